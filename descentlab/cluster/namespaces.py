"""Network namespaces of this machine as a cluster: one for each worker, a bridge, and a rate limit at every end.

::

    worker w: eth0 (tbf: what it sends) ── port w of a bridge in a namespace of its own (tbf: what it receives)

Delay, jitter and loss are netem's; where the kernel has none, a process carries packets between tun devices
(:mod:`descentlab.cluster.tun_link`) in the bridge's place.

Nothing of the host's own network is touched. Names begin with ``dlab``, the id of the process that made them, and when
that process began (so that another one with the same id is told apart). They are removed when the ``with`` ends; by a
guard process when this one is killed; and whatever a crash of both has left, by the next :func:`sweep`.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import StudyError, UserError

FOLDER = Path("/run/netns")
PREFIX = "dlab"
NAME = re.compile(PREFIX + r"(\d+)t(\d+)(?:b|w\d+)")
CLONE_NEWNET = 0x40000000
MOST_WORKERS = 254  # addresses of the network
SIMULATED = "root, ip and tc; link=simulated needs none of them"

# Deletes the named namespaces once its input ends, which it does however its parent ends.
GUARD = """
trap "" INT TERM HUP
cat >/dev/null
for n in "$@"; do
  ip netns pids "$n" 2>/dev/null | xargs -r kill -9 2>/dev/null
  ip netns del "$n" 2>/dev/null
done
"""


@dataclass(frozen=True)
class Shape:
    """What every worker's link is limited to. Rates in Mbit/s, 0 = no limit; latency one way."""

    egress_mbps: float
    ingress_mbps: float
    burst_kb: int = 0
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    loss_pct: float = 0.0

    @property
    def impaired(self) -> bool:
        """Whether more than a rate is asked for."""
        return bool(self.latency_ms or self.loss_pct)

    def burst(self, rate: float) -> str:
        """Small at slow rates, where a large bucket would let small messages through for free in idle gaps."""
        return f"{self.burst_kb or (4 if rate <= 100 else 256)}k"


def check_possible(workers: int = 2) -> None:
    """UserError that names the simulated link where this process cannot make namespaces, or not so many."""
    if workers > MOST_WORKERS:
        raise UserError("workers", workers, f"at most {MOST_WORKERS} on a real link; link=simulated takes more")
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise UserError("link", "real", SIMULATED, hint=f"{missing[0]} is not installed")
    if os.geteuid() != 0 or not _may("net_admin", 12) or not _may("sys_admin", 21):
        raise UserError("link", "real", SIMULATED, hint="this process may not make network namespaces")


def _may(name: str, bit: int) -> bool:
    """Whether this process has a capability, by its number in linux/capability.h."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    effective = next((line for line in lines if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(effective.split()[1], 16) >> bit & 1)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StudyError(
            f"{' '.join(command)}: {done.stderr.strip() or done.returncode}; link=simulated needs no network"
        )


def names(owner: int, workers: int) -> list[str]:
    """The namespaces of a process: the bridge's, then one for each worker."""
    own = f"{PREFIX}{owner}t{_began(owner)}"
    return [f"{own}b", *(f"{own}w{w}" for w in range(workers))]


def _began(process: int) -> int:
    """When a process began, in clock ticks since the machine did; 0 where there is no such process."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def sweep() -> list[str]:
    """Remove namespaces whose process is gone; what was removed."""
    if not FOLDER.is_dir():
        return []
    found = []
    for path in sorted(FOLDER.iterdir()):
        own = NAME.fullmatch(path.name)
        if own and _began(int(own[1])) != int(own[2]):
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)
            found.append(path.name)
    return found


@contextmanager
def network(workers: int, shape: Shape) -> Iterator[list[str]]:
    """Namespaces for ``workers`` workers, joined and limited, as long as the ``with`` lasts: their names, by worker.

    Each has a device ``eth0`` with address 10.77.0.(w + 1).

    Raises:
        UserError: without the privileges or programs. StudyError: where the kernel refuses a command.
    """
    check_possible(workers)
    sweep()
    own = names(os.getpid(), workers)
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, "descentlab-guard", *own],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _build(own, shape)
        yield own[1:]
    finally:
        carrier = _CARRIERS.pop(own[1], None)
        if carrier is not None:
            _end(carrier)
        for name in own:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait(timeout=30)


def _build(own: list[str], shape: Shape) -> None:
    bridge, *ends = own
    for name in own:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
    _run("ip", "-n", bridge, "link", "set", "br0", "up")
    if shape.impaired and not _has_netem(bridge):
        _carry(ends, shape)
        change(ends, shape)
        return
    for w, end in enumerate(ends):
        port = f"port{w}"
        _run("ip", "-n", bridge, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", end)
        _run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", end, "addr", "add", f"10.77.0.{w + 1}/24", "dev", "eth0")
        _run("ip", "-n", end, "link", "set", "eth0", "up")
    change(ends, shape)


def change(ends: list[str], shape: Shape) -> None:
    """Give the links of workers in the namespaces ``ends`` other limits while they are in use."""
    bridge, carrier = ends[0].rpartition("w")[0] + "b", _CARRIERS.get(ends[0])
    for w, end in enumerate(ends):
        limit(end, "eth0", shape.egress_mbps, replace(shape, latency_ms=0, loss_pct=0) if carrier else shape)
        if carrier is None:
            limit(bridge, f"port{w}", shape.ingress_mbps, shape)
    if carrier is not None:
        assert carrier.stdin is not None
        try:
            carrier.stdin.write(f"{shape.ingress_mbps}\n")
            carrier.stdin.flush()
        except OSError as error:
            raise StudyError("the process that carries packets has ended; link=simulated needs none") from error


_CARRIERS: dict[str, subprocess.Popen] = {}  # first namespace -> the process that carries packets, without netem


def _has_netem(namespace: str) -> bool:
    """Whether this kernel can delay and lose packets, tried in a namespace of ours."""
    tried = ["ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


def _carry(ends: list[str], shape: Shape) -> None:
    """Join the namespaces by a process that carries packets between tun devices."""
    settings = {"latency_ms": shape.latency_ms, "jitter_ms": shape.jitter_ms, "loss_pct": shape.loss_pct}
    command = [sys.executable, str(Path(__file__).with_name("tun_link.py"))]
    carrier = subprocess.Popen(
        [*command, json.dumps({**settings, "rate": shape.ingress_mbps}), *ends],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _CARRIERS[ends[0]] = carrier
    assert carrier.stdout is not None and carrier.stderr is not None
    if carrier.stdout.readline() != "up\n":
        why = carrier.stderr.read().strip().splitlines()[-1:]
        raise StudyError(f"a link in user space: {''.join(why)}; link=simulated needs neither netem nor /dev/net/tun")


def _end(carrier: subprocess.Popen) -> None:
    """End the process that carries packets, also one that is dead or no longer listens."""
    for pipe in (carrier.stdin, carrier.stdout, carrier.stderr):
        assert pipe is not None
        with suppress(OSError):  # what could not be written is lost with its reader
            pipe.close()
    try:
        carrier.wait(timeout=5)
    except subprocess.TimeoutExpired:
        carrier.kill()
        carrier.wait()


def limit(namespace: str, device: str, rate_mbps: float, shape: Shape) -> None:
    """Give a device a token bucket of ``rate_mbps``, and netem's delay and loss where asked for."""
    tc = ("ip", "netns", "exec", namespace, "tc", "qdisc")
    subprocess.run([*tc, "del", "dev", device, "root"], capture_output=True, check=False)
    parent = ["root"]
    if rate_mbps:
        bucket = ["rate", f"{rate_mbps:g}mbit", "burst", shape.burst(rate_mbps), "latency", "50ms"]
        _run(*tc, "add", "dev", device, "root", "handle", "1:", "tbf", *bucket)
        parent = ["parent", "1:1"]
    if device == "eth0" and (shape.latency_ms or shape.loss_pct):
        delay = ["delay", f"{shape.latency_ms:g}ms", f"{shape.jitter_ms:g}ms"] if shape.latency_ms else []
        loss = ["loss", f"{shape.loss_pct:g}%"] if shape.loss_pct else []
        _run(*tc, "add", "dev", device, *parent, "netem", *delay, *loss)


def enter(namespace: str) -> None:
    """Move this thread, and those it starts from now on, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(FOLDER / namespace, os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET):
            code = ctypes.get_errno()
            raise StudyError(f"namespace {namespace}: {os.strerror(code)}")
    finally:
        os.close(descriptor)


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent ends; for ``preexec_fn``. Does nothing where there is no prctl."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 15)
