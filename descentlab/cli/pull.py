"""Copies the light files of a run directory from another host: rows, settings, status and report, no checkpoints."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from ..core.errors import StudyError, UserError
from ..store.directory import CLAIMS, LAYOUT, MARKER, RunDirectory

# First match counts. Checkpoints, replay artifacts and copied code are what makes a directory heavy; without them
# everything can be read and reported, and runs that are not done would begin anew.
RULES = (
    "--exclude=.*.tmp",
    "--include=/blocks/*/artifacts/moments-*",
    "--exclude=/blocks/*/artifacts/*",
    "--exclude=/blocks/*/checkpoint.pt",
    "--exclude=/slurm/*.pkl",
    "--exclude=/code",
    *(f"--include=/{name}" for name in (MARKER, *LAYOUT)),
    "--exclude=/*",
)


def command(source: str, target: Path) -> list[str]:
    """The rsync command line for ``source`` (``HOST:DIR`` or a directory)."""
    return ["rsync", "--archive", "--prune-empty-dirs", *RULES, f"{source.rstrip('/')}/", f"{target}/"]


def pull(source: str, out: Path | None, dry_run: bool) -> str:
    """Copy, or with ``dry_run`` say how; the lines to print.

    Raises :class:`UserError` where the target holds something else, :class:`StudyError` where rsync fails.
    """
    name = source.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    if not name or name in (".", ".."):
        raise UserError("pull", source, "HOST:DIR, or a directory that run has made")
    target = out or Path("out") / name
    if Path(source).exists() and Path(source).resolve() == target.resolve():
        raise UserError("--out", str(target), "another directory than the one to copy")
    line = command(source, target)
    if dry_run:
        return shlex.join(line)
    if shutil.which("rsync") is None:
        raise UserError("pull", source, "a machine that has rsync", hint=f"elsewhere: {shlex.join(line)}")
    if target.is_dir() and any(target.iterdir()):
        RunDirectory.open(target)  # not over somebody's other files
    target.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise StudyError(f"rsync could not copy {source}: {said}")
    if not (target / MARKER).is_file():
        raise UserError("pull", source, f"a directory made by descentlab (it has no {MARKER})")
    files = [p for p in target.rglob("*") if p.is_file() and p.relative_to(target).parts[0] != CLAIMS]
    return f"{target}: {len(files)} files, {sum(p.stat().st_size for p in files) / 2**20:.1f} MB"
