"""Runs one study again and again in forked children, killing each at a random moment (a helper of test_kill.py).

``python kill_job.py OUT KILLS SEED``: prints one JSON line per finished directory; the last one was left undisturbed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from descentlab.config.resolve import resolve
from descentlab.launch import api, block, build, plan  # noqa: F401  (imported before forking)

SETTINGS = [
    "size=quick",
    "cases=3",
    "recovery_steps=30",
    "dataset=digits",
    "model.pool=1",
    "batch_size=32",
    "checkpoint_s=0.05",
    "optimizer=sgd,adam",
]


def child(out: Path) -> int:
    """Run the study in a fork of this process; returns its process id."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(api.run(resolve("recovery", SETTINGS), out, launcher="local", with_report=False))
    return pid


def main() -> None:
    out, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    random.seed(seed)
    started = time.monotonic()
    _, status = os.waitpid(child(out / "undisturbed"), 0)
    whole = time.monotonic() - started
    killed, directory = 0, 0
    while killed < kills:
        path, here, status = out / f"killed-{directory}", 0, -1
        while status != 0:
            pid = child(path)
            if killed < kills:
                time.sleep(random.uniform(0.02, 0.5) * whole)
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                killed, here = killed + 1, here + 1
        print(json.dumps({"path": str(path), "kills": here}), flush=True)
        directory += 1
    print(json.dumps({"path": str(out / "undisturbed"), "kills": 0, "seconds": whole}), flush=True)


if __name__ == "__main__":
    main()
