"""Network namespaces of this machine as a cluster: one for each worker, a bridge, and a rate limit at every end.

::

    worker w: eth0 (tbf: what it sends) ── port w of a bridge in a namespace of its own (tbf: what it receives)

Nothing of the host's own network is touched. Names begin with ``dlab`` and the id of the process that made them. They
are removed when the ``with`` ends; by a guard process when this one is killed; and whatever a crash of both has left,
by the next :func:`sweep`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import StudyError, UserError

FOLDER = Path("/run/netns")
PREFIX = "dlab"
CLONE_NEWNET = 0x40000000
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
    """What every worker's link is limited to. Rates in Mbit/s, 0 = no limit; ``delay`` are netem's words, if any."""

    egress_mbps: float
    ingress_mbps: float
    burst_kb: int = 0
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    loss_pct: float = 0.0

    def burst(self, rate: float) -> str:
        """Small at slow rates, where a large bucket would let small messages through for free in idle gaps."""
        return f"{self.burst_kb or (4 if rate <= 100 else 256)}k"


def check_possible() -> None:
    """UserError that names the simulated link where this process cannot make namespaces."""
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
    return [f"{PREFIX}{owner}b", *(f"{PREFIX}{owner}w{w}" for w in range(workers))]


def sweep() -> list[str]:
    """Remove namespaces whose process is gone; what was removed."""
    if not FOLDER.is_dir():
        return []
    found = []
    for path in sorted(FOLDER.iterdir()):
        digits = path.name.removeprefix(PREFIX)
        owner = "".join(c for i, c in enumerate(digits) if digits[: i + 1].isdigit())
        if path.name.startswith(PREFIX) and owner and not Path(f"/proc/{owner}").exists():
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
    check_possible()
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
    for w, end in enumerate(ends):
        port = f"port{w}"
        _run("ip", "-n", bridge, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", end)
        _run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", end, "addr", "add", f"10.77.0.{w + 1}/24", "dev", "eth0")
        _run("ip", "-n", end, "link", "set", "eth0", "up")
        limit(end, "eth0", shape.egress_mbps, shape)
        limit(bridge, port, shape.ingress_mbps, shape)


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
