"""Where results come from: versions, code, hardware, command. Never environment variables: they hold secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .directory import RunDirectory

PACKAGES = ("descentlab", "torch", "numpy", "scipy", "polars", "pydantic", "scikit-learn", "mlxtend", "matplotlib")
DIFF_LIMIT_BYTES = 65536
NAME = "provenance.json"


def gather(command: Sequence[str] | None = None, device: str = "", data_order: str = "") -> dict[str, Any]:
    """Versions, git state of the current directory, hardware, threads, ``device``, ``command`` (default: this one).

    ``data_order``: a hash of the order in which the first samples are read.
    """
    return {
        "command": list(sys.argv if command is None else command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "data_order": data_order,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": _threads(),
        "git": _git(Path.cwd()),
    }


def record(
    directory: RunDirectory,
    command: Sequence[str] | None = None,
    device: str = "",
    data_order: str = "",
    found: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write provenance.json; when the directory is taken up again, add a session and warn about changed versions.

    ``found``: what :func:`gather` gave already.
    """
    now = {**(found or gather(command)), "device": device, "data_order": data_order, "threads": _threads()}
    first = directory.read_json(NAME)
    if not first:
        directory.replace_json(NAME, now)
        return now
    changed = [
        f"{name} {first['packages'].get(name)} -> {version}"
        for name, version in now["packages"].items()
        if first["packages"].get(name) != version
    ]
    if changed:
        directory.event("warning", f"taken up with other versions: {', '.join(changed)}")
    merged = {**first, "resumed": [*first.get("resumed", []), now]}
    directory.replace_json(NAME, merged)
    return merged


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _threads() -> int | None:
    torch = sys.modules.get("torch")  # asked only when it is loaded already
    return torch.get_num_threads() if torch is not None else None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the repository around ``folder``; None outside one or without git."""
    commit = _run_git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = _run_git(folder, "diff", "HEAD") or ""
    limited = diff.encode()[:DIFF_LIMIT_BYTES].decode(errors="ignore")
    return {"commit": commit.strip(), "dirty": bool(diff), "diff": limited, "diff_complete": limited == diff}


def _run_git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
