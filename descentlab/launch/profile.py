"""What a Slurm job asks for: the keys of ``launcher.…`` and of a profile file."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from ..config.yaml12 import load, load_file
from ..core.errors import UserError, nearest

PREFIX = "launcher."


class Profile(BaseModel):
    """What the jobs of one submission ask for. Nothing of it changes a result or a run id."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None  # for instance gpu:1
    cpus: PositiveInt = 1  # cores of a job; it trains as many blocks side by side
    memory_gb: PositiveFloat | None = None  # of a job; None: what the cluster gives
    time_min: PositiveInt = 60  # limit of a job; reaching it costs nothing but a place in the queue
    parallel: PositiveInt = 256  # jobs of the array that run at once
    jobs: PositiveInt = 1000  # jobs of an array at most (Slurm's MaxArraySize); more blocks share a job
    signal_s: PositiveInt = 90  # warning before the limit, long enough for an update and a checkpoint
    requeues: int = Field(20, ge=0)  # how often a job may reach its limit
    attempts: PositiveInt = 4  # of a submission that Slurm is too busy for
    retry_s: PositiveFloat = 5.0  # before the second one; doubled each time
    python: str | None = None  # command that starts Python in the job; None: the one that submits
    setup: list[str] = []  # shell lines before Python starts, such as module load or conda activate
    options: dict[str, str | int | float | bool] = {}  # any other option of sbatch, without its dashes
    script: str | None = None  # a file whose #SBATCH lines and commands come first


def read_profile(settings: Iterable[str]) -> Profile:
    """The profile that ``launcher.key=value`` settings give; ``launcher.profile=FILE`` is read first.

    Raises :class:`UserError` for an unknown key, a value of the wrong kind or a file that is not there.
    """
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.removeprefix(PREFIX).partition("=")
        if not equals:
            raise UserError(PREFIX + key, "", "key=value")
        given[key] = load(text, PREFIX + key)
    file = given.pop("profile", None)
    return _checked({**(_from_file(Path(str(file))) if file is not None else {}), **given})


def check_slurm(profile: Profile) -> None:
    """Raise :class:`UserError` where jobs cannot be submitted at all: no Slurm, no submitit, no script."""
    absent = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if absent:
        raise UserError(
            "--launcher", "slurm", "a machine that has Slurm's commands", hint=f"no {absent[0]} on the PATH"
        )
    if find_spec("submitit") is None:
        raise UserError("--launcher", "slurm", "submitit", hint="pip install 'descentlab[slurm]'")
    read_script(profile)


def read_script(profile: Profile) -> tuple[dict[str, str | bool], list[str]]:
    """(options of the ``#SBATCH`` lines, the other lines) of the user's own script; both empty without one."""
    if profile.script is None:
        return {}, []
    path = Path(profile.script)
    if not path.is_file():
        raise UserError(PREFIX + "script", profile.script, "an existing file")
    options: dict[str, str | bool] = {}
    commands: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("#SBATCH"):
            for word in shlex.split(line.removeprefix("#SBATCH"), comments=True):
                key, equals, value = word.removeprefix("--").partition("=")
                if not word.startswith("--"):
                    raise UserError(PREFIX + "script", line, "options written as --name or --name=value")
                options[key] = value if equals else True
        elif not line.startswith("#!") and (commands or line.strip()):
            commands.append(line)
    return options, commands


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(PREFIX + "profile", str(path), "an existing YAML file")
    value = load_file(path)
    if not isinstance(value, dict):
        raise UserError(PREFIX + "profile", str(path), "a YAML file of keys and values")
    return value


def _checked(given: dict[str, Any]) -> Profile:
    if isinstance(given.get("setup"), str):
        given = {**given, "setup": [given["setup"]]}
    for key in given:
        if key not in Profile.model_fields:
            known = ", ".join(("profile", *Profile.model_fields))
            hint = nearest(str(key), Profile.model_fields)
            raise UserError(PREFIX + str(key), given[key], f"one of the keys {known}", hint=hint)
    try:
        return Profile.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"][:2] if first["loc"][0] == "options" else first["loc"][:1]))
        raise UserError(PREFIX + key, first["input"], first["msg"].removeprefix("Input should be ")) from None
