"""Namespaces with limits at both ends: there while needed, gone after success, failure and kill; and who may not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from descentlab.cluster import namespaces, tun_link
from descentlab.cluster.namespaces import FOLDER, Shape, network
from descentlab.config.resolve import resolve
from descentlab.core.errors import StudyError, UserError
from descentlab.launch.plan import make_plan

ROOT = Path(__file__).parent.parent


def _allowed() -> bool:
    """Whether namespaces can be made here, tried on one."""
    try:
        namespaces.check_possible()
    except UserError:
        return False
    name = f"dlab{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made


needs_root = pytest.mark.skipif(not _allowed(), reason="no privileges to make network namespaces")


def there(owner: int) -> list[str]:
    return [p.name for p in FOLDER.iterdir() if p.name.startswith(f"dlab{owner}")] if FOLDER.is_dir() else []


def limits(namespace: str) -> str:
    show = ["ip", "netns", "exec", namespace, "tc", "qdisc", "show"]
    return subprocess.run(show, capture_output=True, text=True, check=True).stdout


def gone(owner: int, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while there(owner) and time.monotonic() < end:
        time.sleep(0.05)
    return not there(owner)


@needs_root
def test_both_ends_are_limited_and_the_workers_reach_each_other() -> None:
    """What a worker sends at 100 Mbit/s, what it receives at 50; the second call is refused nothing the first had."""
    with network(2, Shape(100.0, 50.0)) as ends:
        bridge = ends[0].replace("w0", "b")
        assert sorted(there(os.getpid())) == sorted([bridge, *ends])
        assert all("tbf" in limits(end) and "rate 100Mbit" in limits(end) for end in ends)
        assert limits(bridge).count("rate 50Mbit") == 2
        reach = ["ip", "netns", "exec", ends[0], sys.executable, "-c", REACH]
        listen = subprocess.Popen(
            ["ip", "netns", "exec", ends[1], sys.executable, "-c", LISTEN], stdout=subprocess.PIPE
        )
        assert listen.stdout is not None and listen.stdout.readline()
        assert subprocess.run(reach, check=False, timeout=20).returncode == 0
        assert listen.wait(timeout=20) == 0
        listen.stdout.close()
    assert not there(os.getpid())


LISTEN = "import socket; s = socket.create_server(('10.77.0.2', 7700)); print('up', flush=True); s.accept()"
REACH = "import socket; socket.create_connection(('10.77.0.2', 7700), timeout=10)"


@needs_root
@pytest.mark.parametrize("netem", [True, False])
def test_packets_are_delayed_and_lost(netem: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection takes a round trip, so twice 15 ms at least; of 300 packets about 90 are lost. By netem, where the
    kernel has it, and in user space. Broken on purpose: a delay on one way only."""
    if not netem:
        monkeypatch.setattr(namespaces, "_has_netem", lambda namespace: False)
    with network(2, Shape(100.0, 50.0, latency_ms=15, loss_pct=30)) as ends:
        job = [sys.executable, str(ROOT / "tests" / "network_job.py")]
        listen = subprocess.Popen(["ip", "netns", "exec", ends[1], *job, "receive"], stdout=subprocess.PIPE, text=True)
        assert listen.stdout is not None and listen.stdout.readline() == "up\n"
        sent = subprocess.run(
            ["ip", "netns", "exec", ends[0], *job, "send"], capture_output=True, text=True, timeout=60, check=True
        )
        arrived = int(listen.communicate(timeout=60)[0])
        assert float(sent.stdout) >= 0.030 and 140 < arrived < 280
        assert all("rate 100Mbit" in limits(end) for end in ends)
        namespaces.change(ends, Shape(10.0, 10.0, latency_ms=15, loss_pct=30))
        assert all("rate 10Mbit" in limits(end) for end in ends)
    assert not there(os.getpid())


@needs_root
def test_a_dead_carrier_is_one_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written to it must not keep the namespaces from being deleted."""
    monkeypatch.setattr(namespaces, "_has_netem", lambda namespace: False)
    with network(2, Shape(0.0, 0.0, latency_ms=1)) as ends:
        carrier = namespaces._CARRIERS[ends[0]]
        carrier.kill()
        carrier.wait()
        with pytest.raises(StudyError, match="the process that carries packets has ended"):
            namespaces.change(ends, Shape(0.0, 10.0, latency_ms=1))
    assert not there(os.getpid())


def test_of_two_rates_close_together_the_second_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both come in one read; broken on purpose, by readline, the second waits in a buffer for the next change."""
    seen: list[float] = []

    class Enough(Exception):
        pass

    class Carrier:
        rate = 0.0

        def __init__(self, devices: list[int]) -> None:
            pass

        def give(self) -> float:
            seen.append(self.rate)
            if len(seen) == 5:
                raise Enough
            return 0.0

    read, write = os.pipe()
    os.write(write, b"5.0\n7.0\n")
    monkeypatch.setattr(tun_link, "Carrier", Carrier)
    with os.fdopen(read) as source, os.fdopen(write, "w"):
        monkeypatch.setattr(sys, "stdin", source)
        with pytest.raises(Enough):
            tun_link.main("{}")
    assert seen == [0.0, 7.0, 7.0, 7.0, 7.0]


@needs_root
@pytest.mark.parametrize("how", ["fail", "SIGTERM", "SIGKILL"])
def test_nothing_is_left(how: str) -> None:
    """After an exception inside, and after a kill nothing in the process can answer to.

    Broken on purpose: without the guard process, the namespaces outlive SIGKILL.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "network_job.py"), *(["fail"] if how == "fail" else [])]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert job.stdout is not None and job.stdout.readline()
    if how != "fail":
        assert there(job.pid)
        job.send_signal(getattr(signal, how))
    assert job.wait(timeout=30) != 0
    job.stdout.close()
    assert gone(job.pid)


@needs_root
def test_what_a_crash_of_everything_left_is_swept() -> None:
    """Also where another process has the id by now: this one is it, and began at another time."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, own = [f"dlab{dead.pid}t1w0", f"dlab{os.getpid()}t1b"], namespaces.names(os.getpid(), 1)[1]
    for name in (*left, own):
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        assert set(left) <= set(namespaces.sweep()) and there(os.getpid()) == [own]
    finally:
        subprocess.run(["ip", "netns", "del", own], check=True)


def test_too_many_workers_for_a_real_link_are_one_error() -> None:
    with pytest.raises(UserError, match=r"workers = 255: expected at most 254 on a real link"):
        make_plan(resolve("compression", ["link=real", "workers=255", "size=quick", "dataset=digits"]), {})


@pytest.mark.parametrize("missing", ["root", "programs"])
def test_without_privileges_the_error_names_the_simulated_link(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "root":
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(namespaces.shutil, "which", lambda program: "/sbin/" + program)
    else:
        monkeypatch.setattr(namespaces.shutil, "which", lambda program: None)
    with pytest.raises(UserError, match=r"link = 'real'.*link=simulated needs none"):
        make_plan(resolve("compression", ["link=real", "size=quick", "dataset=digits"]), {})
