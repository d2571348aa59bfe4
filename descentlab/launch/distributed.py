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

from ..cluster.namespaces import Shape, end_with_parent, network
from ..core.errors import StudyError
from ..store import RunDirectory
from ..store.claim import Claim
from .plan import Block

STOP, STEP, MESSAGE = "stop", "step.txt", "message.txt"  # files in the block's folder by which the processes talk
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
    for name in (STOP, STEP, MESSAGE):
        (folder / name).unlink(missing_ok=True)
    with _alone(stop) as mine, _place(cell) as namespaces:
        if not mine:
            return "interrupted"
        with subprocess.Popen(
            command(directory.path, block.key, cell.workers, cell.restarts),
            env=environment(namespaces),
            preexec_fn=end_with_parent,  # so that nothing is left when this process is killed
        ) as process:
            try:
                interrupted = _watch(process, folder, claim, tick, stop)
            finally:
                _end(process)
    if (folder / "done.json").is_file():
        return "done"
    if interrupted:
        return "interrupted"
    said = (folder / MESSAGE).read_text().strip() if (folder / MESSAGE).is_file() else "see the log"
    raise StudyError(f"processes of block {block.key} ended with code {process.returncode}: {said}")


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
    link = cell.link
    if link.name != "real":
        return nullcontext([])
    ingress = link.bandwidth_mbps if link.ingress_mbps is None else link.ingress_mbps
    extra = (link.burst_kb, link.latency_ms, link.jitter_ms, link.loss_pct)
    return network(cell.workers, Shape(link.bandwidth_mbps, ingress, *extra))


def _watch(
    process: subprocess.Popen, folder: Path, claim: Claim, tick: Callable[[int], None], stop: Callable[[], bool]
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
