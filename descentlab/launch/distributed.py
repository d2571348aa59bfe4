"""Runs a block as processes under torchrun, on this machine's loopback or in network namespaces of its own."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ..cluster.namespaces import Shape, change, end_with_parent, network
from ..core.errors import StudyError
from ..core.signals import warnings_held_back
from ..store import RunDirectory
from ..store.claim import Claim
from ..store.parts import read_cover
from .plan import Block

STOP, STEP = "stop", "step.txt"  # files in the block's folder by which the processes talk
MESSAGE, MEETING = "message-{}.txt", "meeting-"  # what process {} ended with; where they found each other
POLL_S = 0.1
GRACE_S = 60.0  # for processes that were asked to stop


def run_distributed(
    directory: RunDirectory,
    block: Block,
    cell: Any,
    claim: Claim,
    tick: Callable[[int], None],
    stop: Callable[[], bool],
) -> str:
    """``done`` or ``interrupted``. One block at a time on a machine: two would share its cores and spoil the times.

    Raises:
        StudyError: with the first process's message, when torchrun has given up.
    """
    folder = directory.block_folder(block.key)
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    with _alone(stop) as mine, _place(cell) as namespaces:
        if not mine:
            return "interrupted"
        rates, held = _Rates(getattr(cell, "link", None), namespaces), read_cover(folder)
        rates.reach(held.step if held else 0)  # before the processes measure the link they go on over
        with warnings_held_back():
            started = subprocess.Popen(
                command(directory.path, block.key, cell.workers, cell.restarts),
                env=environment(namespaces),
                preexec_fn=end_with_parent,  # so that nothing is left when this process is killed
            )
        with started as process:
            try:
                interrupted = _watch(process, folder, claim, tick, stop, rates)
            finally:
                _end(process)
                said = what_failed(folder)
                _clear(folder)
    if (folder / "done.json").is_file():
        return "done"
    if interrupted:
        return "interrupted"
    raise StudyError(f"processes of block {block.key} ended with code {process.returncode}: {said or 'see the log'}")


def what_failed(folder: Path) -> str:
    """The message of the process that failed first; the others usually just lost it. Empty without one."""
    found = sorted(folder.glob(MESSAGE.format("*")), key=lambda path: path.stat().st_mtime_ns)
    return found[0].read_text().strip() if found else ""


def _clear(folder: Path) -> None:
    """Remove what processes leave for each other, also those that were killed."""
    for pattern in (STOP, STEP, MESSAGE.format("*"), MEETING + "*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


class _Rates:
    """The changes of a real link's bandwidth: made when the processes have come to their update."""

    def __init__(self, link: Any, namespaces: list[str]) -> None:
        self._link, self._namespaces = link, namespaces
        self._due = sorted(getattr(link, "changes", {}).items()) if namespaces else []

    def reach(self, step: int) -> None:
        """The processes have made ``step`` updates."""
        while self._due and self._due[0][0] <= step:
            _, rate = self._due.pop(0)
            change(self._namespaces, _shape(self._link, rate))


def command(path: Path, key: str, workers: int, restarts: int) -> list[str]:
    """The torchrun command of a block."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    limits = [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    return [*run, *limits, "-m", "descentlab.launch.rank", str(path), key]


def environment(namespaces: list[str]) -> dict[str, str]:
    """Of torchrun and its processes: one thread each, their namespaces and the network device in them."""
    package = str(Path(__file__).parent.parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    device = "eth0" if namespaces else os.environ.get("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "")
    named = {"GLOO_SOCKET_IFNAME": device} if device else {}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "DESCENTLAB_NETNS": ",".join(namespaces)}
    return {**os.environ, **own, **named}


@contextmanager
def _alone(stop: Callable[[], bool]) -> Iterator[bool]:
    """Wait for the machine's lock; False when asked to stop before it is free."""
    path = Path(tempfile.gettempdir()) / f"descentlab-{os.getuid()}-processes.lock"
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if stop():
                    yield False
                    return
                time.sleep(POLL_S)
                continue
            break
        yield True


def _place(cell: Any) -> Any:
    link = getattr(cell, "link", None)
    if link is None or link.name != "real":
        return nullcontext([])
    return network(cell.workers, _shape(link, link.bandwidth_mbps))


def _shape(link: Any, rate_mbps: float) -> Shape:
    ingress = rate_mbps if link.ingress_mbps is None else link.ingress_mbps
    return Shape(rate_mbps, ingress, link.burst_kb, link.latency_ms, link.jitter_ms, link.loss_pct)


def _watch(
    process: subprocess.Popen,
    folder: Path,
    claim: Claim,
    tick: Callable[[int], None],
    stop: Callable[[], bool],
    rates: _Rates,
) -> bool:
    """Pass on progress until the processes end; whether they were asked to stop."""
    seen, asked, since = 0, False, 0.0
    while process.poll() is None:
        time.sleep(POLL_S)
        claim.check()
        with suppress(OSError, ValueError):
            now = int((folder / STEP).read_text())
            tick(max(0, now - seen))
            seen = max(seen, now)
        rates.reach(seen)
        if stop() and not asked:
            (folder / STOP).touch()
            asked, since = True, time.monotonic()
        if asked and time.monotonic() - since > GRACE_S:
            process.terminate()
    return asked


def _end(process: subprocess.Popen) -> None:
    """End torchrun, which ends its processes; twenty seconds are more than it takes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
