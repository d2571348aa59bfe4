"""Ending a run on real processes from outside: everything it started ends with it, and its log is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from descentlab.engine.journal import Journal

WAIT_S = 120.0  # only a hang would need it
NUMBERS = [signal.SIGTERM, signal.SIGKILL, *([signal.SIGINT] if "DESCENTLAB_CHAOS" in os.environ else [])]
RUN = "from descentlab.cli.main import main; main()"
SETTINGS = ["preset=bare", "engine=process", "dataset=digits", "model=linear", "workers=2", "replicates=1"]
SETTINGS += ["timeline=asynchronous", "steps=100000", "delay=constant", "delay.mean_s=0", "cost.compute_s=0"]
SETTINGS += ["observe.every=1000", "observe.evaluate_every=0"]


def marked(mark: str) -> list[int]:
    """Processes with this word in their environment, which all descendants inherit; zombies do not count."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # gone, or somebody else's
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.name)
def test_everything_ends_with_the_command(number: signal.Signals, tmp_path: Path) -> None:
    """In the middle of training: command, launcher's worker, fork server, both worker processes; none is left.

    Broken by a launcher that leaves its worker, or a fork server that outlives the server's process.
    """
    mark = uuid.uuid4().hex
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DESCENTLAB_MARK": mark}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", RUN, "run", "asynchrony", *SETTINGS, "--out", str(tmp_path / "out"), "-y"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=said, stderr=said)
    until = time.monotonic() + WAIT_S
    while not any(log.read_bytes().count(b"\n") > 20 for log in tmp_path.glob("out/blocks/*/timeline.jsonl")):
        assert time.monotonic() < until and process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    assert len(marked(mark)) >= 5
    process.send_signal(number)
    code = process.wait(WAIT_S)
    assert code == (-number if number == signal.SIGKILL else 130), (tmp_path / "said").read_text()
    until = time.monotonic() + WAIT_S
    while left := marked(mark):
        assert time.monotonic() < until, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.05)
    (log,) = tmp_path.glob("out/blocks/*/timeline.jsonl")
    entries = Journal(log).entries
    assert [entry.update for entry in entries] == list(range(len(entries))) and len(entries) > 20
