"""What the Slurm launcher asks for: profiles and their mistakes, the sbatch text, retries. Needs no Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from descentlab.core.errors import StudyError, UserError
from descentlab.launch.profile import Profile, check_slurm, read_profile
from descentlab.launch.snapshot import snapshot

GOLDEN = Path(__file__).parent / "golden" / "sbatch.txt"


def test_a_profile_file_and_keys_after_it(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("partition: long\nsetup: module load cuda\noptions: {exclude: node7}\nmemory_gb: 4\n")
    read = read_profile([f"launcher.profile={file}", "launcher.partition=short", "launcher.time_min=5"])
    assert (read.partition, read.time_min, read.memory_gb) == ("short", 5, 4)
    assert (read.setup, read.options) == (["module load cuda"], {"exclude": "node7"})


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("launcher.partitoin=x", "launcher.partitoin = 'x': expected one of the keys profile, partition"),
        ("launcher.time_min=long", "launcher.time_min = 'long': expected a valid integer"),
        ("launcher.cpus=0", "launcher.cpus = 0: expected greater than 0"),
        ("launcher.profile=nowhere.yaml", "launcher.profile = 'nowhere.yaml': expected an existing YAML file"),
        ("launcher.partition", "launcher.partition = '': expected key=value"),
    ],
)
def test_a_mistake_in_a_profile_is_one_line(setting: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read_profile([setting])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"expected a machine that has Slurm's commands\. no sbatch on the PATH"):
        check_slurm(Profile())


def with_srun(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """submitit makes an executor only where there is an srun."""
    pytest.importorskip("submitit")
    folder.mkdir(exist_ok=True)
    (folder / "srun").write_text("#!/bin/sh\n")
    (folder / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_the_sbatch_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against tests/golden/sbatch.txt, read line by line when it was made. Order of the lines before Python starts: the
    user's script, ``setup``, our own environment."""
    with_srun(monkeypatch, tmp_path / "bin")
    from descentlab.launch.slurm import make_executor

    script = tmp_path / "header.sh"
    script.write_text("#!/bin/bash\n#SBATCH --mail-type=END --exclusive\n\nsource /etc/profile\n")
    profile = Profile(
        partition="gpu",
        account="optim",
        gres="gpu:1",
        cpus=2,
        memory_gb=4.5,
        time_min=30,
        parallel=8,
        signal_s=120,
        python="python3",
        setup=["module load cuda", "conda activate lab"],
        options={"constraint": "a100|h100", "exclusive": False},
        script=str(script),
    )
    executor = make_executor(tmp_path, "recovery", profile, tmp_path / "code" / "0123456789ab")
    executor.parameters["map_count"] = 12  # what submitit sets for an array of 12
    text = executor._make_submission_file_text(executor._submitit_command_str, "uid")
    assert text.replace(str(tmp_path), "DIR") == GOLDEN.read_text()


@pytest.mark.parametrize(("message", "tries"), [("Socket timed out on send/recv", 3), ("invalid partition", 1)])
def test_only_a_busy_slurm_is_asked_again(
    message: str, tries: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three attempts with pauses of 1 and 2 s where waiting may help, one where it cannot; then one line."""
    with_srun(monkeypatch, tmp_path / "bin")
    from submitit.core.utils import FailedJobError

    from descentlab.launch import slurm

    pauses: list[float] = []
    asked: list[int] = []
    monkeypatch.setattr(slurm.time, "sleep", pauses.append)

    def send() -> None:
        asked.append(1)
        raise FailedJobError(f"sbatch: error: {message}\n")

    with pytest.raises(StudyError, match=f"Slurm refused the jobs.*: sbatch: error: {message}; nothing was submitted"):
        slurm._patiently(send, Profile(attempts=3, retry_s=1.0))
    assert len(asked) == tries and pauses == [1.0, 2.0][: tries - 1]


def test_a_snapshot_holds_the_package_and_the_users_modules_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchanged code is copied once, changed code beside it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "users_own_rule.py").write_text("import users_own_helper\n")
    (tmp_path / "users_own_helper.py").write_text("FACTOR = 1\n")
    made = snapshot(tmp_path, [{"optimizer": {"name": "users_own_rule:Rule"}}])
    assert (made / "descentlab" / "launch" / "slurm.py").is_file()
    assert (made / "users_own_rule.py").is_file() and (made / "users_own_helper.py").is_file()
    assert not (made / "torch").exists() and not list(made.rglob("__pycache__"))
    assert snapshot(tmp_path, []) == made
    (tmp_path / "users_own_helper.py").write_text("FACTOR = 2\n")
    other = snapshot(tmp_path, [])
    assert other != made and (made / "users_own_helper.py").read_text() == "FACTOR = 1\n"
