"""Peak memory of a cloud: 10,000 members x 1,111 steps of MLP-386 by ``descentlab run``, moments instead of rows.

Prints one JSON line: ``peak_rss_mb`` is the largest sum of resident memory over the process tree, looked at every
50 ms (pages that processes share count once for each), ``seconds`` the wall time of the command. ``--rows`` keeps a
row per run and step instead, every ``--every`` steps. ``--quick`` is 500 members and 200 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import hardware

LIMIT_MB = 2000


def tree(root: int) -> list[int]:
    """The process and its descendants, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(after[1]), []).append(int(entry.parent.name))
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


def resident_mb(pids: list[int]) -> float:
    """Sum of their resident memory in MB."""
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(words: list[str]) -> tuple[float, float, float, int]:
    """(peak of the tree in MB, seconds, size of the directory in MB, exit code) of ``descentlab run training``."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "descentlab.cli", "run", "training", *words, "--out", str(folder / "cloud"), "-y"]
    started, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    while process.poll() is None:
        peak = max(peak, resident_mb(tree(process.pid)))
        time.sleep(0.05)
    seconds = time.monotonic() - started
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
    shutil.rmtree(folder)
    return peak, seconds, size, process.returncode


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--members", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rows", action="store_true", help="keep a row per run and step")
    parser.add_argument("--every", type=int, default=1, help="steps between rows or moments")
    given = parser.parse_args()
    members, steps = given.members or (500 if given.quick else 10_000), given.steps or (200 if given.quick else 1111)
    words = ["model=mlp", "dataset=mnist5k", "optimizer=sgd", "optimizer.lr=0.05", "sampler=replacement", "processes=2"]
    words += [f"replicates={members}", f"steps={steps}", f"observe.every={given.every}", "observe.evaluate_every=0"]
    if not given.rows:
        looks = given.every * max(1, 100 // given.every)
        words += ["observe.reduce=moments", "observe.weights=variance", f"observe.weights_every={looks}"]
    peak, seconds, size, code = measure(words)
    line = {
        "benchmark": "cloud_memory",
        "ratios": {"peak_rss_of_2_gb": round(peak / LIMIT_MB, 3)},
        "n": members,
        "steps": steps,
        "every": given.every,
        "kept": "rows" if given.rows else "moments",
        "peak_rss_mb": round(peak),
        "seconds": round(seconds, 1),
        "us_per_member_step": round(1e6 * seconds / (members * steps), 2),
        "directory_mb": round(size, 1),
        "exit_code": code,
        "command": " ".join(["descentlab run training", *words]),
        "hardware": hardware(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
