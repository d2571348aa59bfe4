"""Chaos on real processes: whatever happens to workers, messages or the server, nothing acknowledged is lost.

Every round ends with the same question, asked from outside: is every gradient that a worker was told is applied in the
log, and do the weights follow from the log alone, by the virtual engine? ``DESCENTLAB_CHAOS=20`` runs 20 rounds.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from process_job import STEPS, cell_of, make_server
from saboteur import noted
from small import builder, plan_of, quadratic
from test_process import replayed, wait_until_gone

from descentlab.core.errors import StudyError, UserError
from descentlab.engine.crew import Limits
from descentlab.engine.journal import Journal
from descentlab.engine.local import LocalProcesses
from descentlab.engine.process import ParameterServer
from descentlab.optim.specs import Sgd

MISCHIEF = ("kill", "stop", "nan", "flip", "garbage", "stale", "server", "port", "late")
ROUNDS = int(os.environ.get("DESCENTLAB_CHAOS", "0"))
WAIT_S = 120.0  # for a server in a process of its own to come so far; only a hang would need it


def judge(server: ParameterServer, folder: Path, workers: int, steps: int) -> None:
    """All updates made once, acknowledged ones among them, weights as the log says, one thread each, nobody left."""
    entries = Journal(folder / "log").entries
    assert [entry.update for entry in entries] == list(range(steps)) and len(server.log) == steps
    applied = [number for entry in entries for number in entry.numbers]
    assert len(set(applied)) == len(applied)
    assert set(noted(folder, "acknowledged")) <= set(applied) and noted(folder, "acknowledged")
    for worker in range(workers):
        own = [b for e in entries for w, b in zip(e.workers, e.batches, strict=True) if w == worker]
        assert own == list(range(len(own)))
    assert set(noted(folder, "threads")) == {1}
    replayed(server.plan, cell_of(workers), server)
    wait_until_gone(noted(folder, "pids"))


def run_round(kind: str, folder: Path, seed: int) -> list[tuple[str, str]]:
    """One round of one kind with 2 to 5 workers; what the server noted."""
    draw = random.Random(seed)
    workers, moment = draw.randint(2, 5), draw.randint(3, STEPS // 2)
    if kind == "server":
        kill_the_server(folder, workers, moment)
    if kind == "port":
        take_the_port(folder, workers)
    told: list[tuple[str, str]] = []
    mischief = () if kind in ("server", "port") else ((kind, moment),)
    memory = draw.choice(["socket", "shared"])
    server = make_server(folder, workers, mischief, note=lambda *what: told.append(what), memory=memory)
    for _ in server.run():
        pass
    judge(server, folder, workers, STEPS)
    return told


def kill_the_server(folder: Path, workers: int, moment: int) -> None:
    """Start a server in a process of its own and SIGKILL it after so many updates; its workers go with it."""
    command = [sys.executable, str(Path(__file__).with_name("process_job.py")), str(folder), str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(command, env=environment)
    until, log = time.monotonic() + WAIT_S, folder / "log"
    while not log.is_file() or log.read_bytes().count(b"\n") < moment:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(noted(folder, "pids"))
    assert log.read_bytes().count(b"\n") >= moment


def take_the_port(folder: Path, workers: int) -> None:
    """One clear line, nothing started, nothing logged; the port free again, the same run goes."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = make_server(folder, workers, (), port=taken.getsockname()[1])
        with pytest.raises(UserError, match=r"^engine.port = \d+: expected a port of 127.0.0.1 that is free"):
            next(server.run())
    assert not noted(folder, "pids") and not Journal(folder / "log").entries


EXPECTED = {
    "kill": ("worker_replaced", "killed by signal 9"),
    "stop": ("worker_replaced", "no answer within"),
    "nan": ("worker_slip", "NaN or infinity"),
    "flip": ("worker_slip", "corrupted answer"),
    "garbage": ("worker_slip", "corrupted answer"),
    "stale": ("worker_slip", "which it does not have"),
    "server": ("replayed", "made again from the log"),
}


@pytest.mark.parametrize("kind", [k for k in MISCHIEF if k != "server"])
def test_a_round(kind: str, tmp_path: Path) -> None:
    """Every kind once, with other numbers of workers.

    Without a deadline ``stop`` would hang; a replacement that begins its batches anew, a checksum that is not looked
    at, or a NaN that is applied unseen would fail in its kind.
    """
    told = run_round(kind, tmp_path, MISCHIEF.index(kind))
    if kind in EXPECTED:
        assert any(what == EXPECTED[kind][0] and EXPECTED[kind][1] in text for what, text in told), told


def test_a_killed_server(tmp_path: Path) -> None:
    """SIGKILL in the middle of training: its workers end, the same job goes on from the log, nothing is lost.

    A log that is written after the acknowledgement, or a state that is newer than it, would fail.
    """
    told = run_round("server", tmp_path, 6)
    assert told[0][0] == "replayed"


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_many_rounds(seed: int, tmp_path: Path) -> None:
    """On request: as many rounds as asked for, kinds in turn."""
    run_round(MISCHIEF[seed % len(MISCHIEF)], tmp_path, 1000 + seed)


def test_a_worker_that_is_broken_for_good_ends_the_run(tmp_path: Path) -> None:
    """It answers NaN to every task, and so does each replacement: one line, nobody left.

    A non-finite gradient that is applied unseen would make a run of NaN.
    """
    server = make_server(tmp_path, 2, (("always_nan", 0),), restarts=1)
    with pytest.raises(StudyError, match=r"worker \d is lost \(returned a gradient with NaN or infinity .* 3 times"):
        for _ in server.run():
            pass
    assert not server.log
    wait_until_gone(noted(tmp_path, "pids"))


def test_real_divergence_is_applied_as_everywhere() -> None:
    """A rate at which training diverges: the server's own computation says NaN too, so the run goes on and is recorded
    as diverged, as on the virtual clock. Broken by refusing every NaN."""
    cell = quadratic(workers=2, optimizer=Sgd(lr=1e36))
    plan, build = plan_of(cell, 16, replicates=[0]), builder(cell)
    server = ParameterServer(plan, build(), build=build, limits=Limits(60.0, 60.0, 0))
    for _ in server.run():
        pass
    server.recorder.flush()
    assert len(server.log) == 16 and server.recorder.diverged


def test_strangers_get_nothing(tmp_path: Path) -> None:
    """Whoever connects without the key, silent or talking, is dropped; the run does not notice."""

    def pester(address: Any) -> list[socket.socket]:
        found = [socket.create_connection(address) for _ in range(3)]
        found[0].sendall(b"\x00\x00\x00\x30" + bytes(48))
        found[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
        return found

    server = make_server(tmp_path, 2, ())
    strangers: list[socket.socket] = []
    for progress in server.run():
        if progress.step == 3:
            strangers = pester(server.hub._listener.getsockname())  # type: ignore[attr-defined]
    judge(server, tmp_path, 2, STEPS)
    for stranger in strangers:
        stranger.close()


def test_an_abandoned_run_leaves_no_process(tmp_path: Path) -> None:
    server = make_server(tmp_path, 2, ())
    run = server.run()
    next(run)
    run.close()
    wait_until_gone(noted(tmp_path, "pids"))
    assert isinstance(server.hub, LocalProcesses) and not server.hub.pids
