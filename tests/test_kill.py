"""Invariant 6: killed at random moments, then the same command: equal tables and equal hits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from descentlab import store

KILLS = 20
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}


def sorted_hits(results: store.Results) -> list[dict]:
    return sorted(results.hits, key=lambda h: (h["run"], h["step"]))


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """Also between a metrics part and its checkpoint: tests/test_store_kills.py stops at every system call.

    Broken on purpose: without dropping the parts no checkpoint covers, rows occur twice.
    """
    command = [sys.executable, str(HERE / "kill_job.py"), str(tmp_path), str(KILLS), "1"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *killed, reference = [json.loads(line) for line in done.stdout.splitlines()]
    expected = store.load(reference["path"])
    assert sum(k["kills"] for k in killed) == KILLS and len(expected.frame) > 500
    for row in killed:
        got = store.load(row["path"])
        assert store.equal_tables(got.frame, expected.frame) == []
        assert sorted_hits(got) == sorted_hits(expected)
        assert {s["status"] for s in got.status} == {"done"}


def test_ctrl_c_checkpoints_and_the_same_command_resumes(tmp_path: Path) -> None:
    """With a pool of two workers; no process is left behind."""
    out = tmp_path / "out"
    settings = ["cases=2", "recovery_steps=2000", "dataset=digits", "model.pool=1", "optimizer=sgd,adam", "processes=2"]
    command = [sys.executable, "-m", "descentlab.cli", "run", "recovery", *settings, "--out", str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(out.glob("blocks/*/owner.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command resumes" in errors
    assert workers_below(process.pid) == []
    assert set(store.status(out).counts()) <= {"interrupted", "queued", "done"}
    assert list(out.glob("blocks/*/checkpoint.pt"))
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert store.status(out).counts() == {"done": 8}


def workers_below(parent: int) -> list[str]:
    """Command lines of live processes started by ``parent``'s session, found by their parent or by being ours."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(fields[1]) == parent and "descentlab.launch.worker" in line:
                found.append(line)
    return found
