"""Whether a command that a page shows could work, found out without running it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from descentlab.cli.main import app
from descentlab.config import rooms
from descentlab.config.resolve import resolve
from descentlab.launch.profile import read_profile

ROOT = Path(__file__).parent.parent
THIRD_PARTY = ROOT / "examples" / "third_party"


@contextmanager
def beside_the_examples() -> Iterator[None]:
    """``module:Name`` finds the third-party examples; other modules of the same names come back afterwards."""
    names = [path.stem for path in THIRD_PARTY.glob("*.py")]
    held = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(THIRD_PARTY))
    try:
        yield
    finally:
        sys.path.remove(str(THIRD_PARTY))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(held)


def bad_foreign_command(arguments: list[str]) -> str | None:
    """Why ``descentlab compat PROGRAM …`` cannot work."""
    from descentlab.cli import compat_workers
    from descentlab.cli.compat import PROGRAMS, native

    if arguments and arguments[0] in compat_workers.PROGRAMS:
        if "--help" not in arguments:
            resolve("asynchrony", compat_workers.native(arguments[0], arguments[1:]).settings)
        return None
    if arguments[:1] == [] or arguments[0] not in PROGRAMS:
        return f"compat knows {', '.join(PROGRAMS)}"
    if "--help" not in arguments:
        resolve("recovery", native(arguments[1:]).settings)
    return None


def bad_command(command: str) -> str | None:
    """Why a command cannot work, without running it: the subcommand, the settings, the kind or the file is missing."""
    program, *arguments = shlex.split(command) or [""]
    if program in ("python", "pytest"):
        files = [a for a in arguments if a.endswith(".py")]
        absent = [file for file in files if not (ROOT / file).is_file()]
        return f"no file {absent[0]}" if absent else None if files else "no file"
    if program != "descentlab":
        return f"'{program}' is no known program"
    group = typer.main.get_command(app)
    name, *rest = arguments or [""]
    sub = group.commands.get(name)  # type: ignore[attr-defined]
    if sub is None:
        return f"descentlab has no command '{name}'"
    options = {option: parameter for parameter in sub.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if sub.context_settings.get("ignore_unknown_options"):  # compat: another program's command line
        return bad_foreign_command(rest)
    plain: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            plain.append(word)
        elif word not in options:
            return f"descentlab {name} has no option {word}"
        elif rest and not getattr(options[word], "is_flag", False):
            rest.pop(0)
    if not plain:
        return f"descentlab {name} needs an argument"
    if name in ("run", "show"):
        read_profile(s for s in plain[1:] if s.startswith("launcher.") and "=FILE" not in s)
        own = [s for s in plain[1:] if not s.startswith("launcher.")]
        resolve(plain[0], own)  # raises for a study or a setting that does not exist
    elif name == "list":
        rooms.entries(plain[0])
    return None
