"""``python benchmarks/startup.py [--quick]``: ``descentlab --help`` against importing typer and pydantic, in seconds.

``startup``: median over repeats of (``descentlab --help``) / (``python -c "import typer, pydantic"``), both in fresh
processes, in turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from common import alternate, emit, median_ratio, spread

COMMANDS = {
    "help": [sys.executable, "-m", "descentlab.cli", "--help"],
    "imports": [sys.executable, "-c", "import typer, pydantic"],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="11 repeats instead of 41")
    repeats = 11 if parser.parse_args().quick else 41
    measured = alternate({name: lambda c=command: seconds(c) for name, command in COMMANDS.items()}, repeats)
    milliseconds = {name: spread([1e3 * s for s in values]) for name, values in measured.items()}
    emit(
        "startup", {"startup": median_ratio(measured["help"], measured["imports"])}, repeats, milliseconds=milliseconds
    )


if __name__ == "__main__":
    main()
