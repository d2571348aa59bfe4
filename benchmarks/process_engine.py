"""Updates per second of real parameter servers: python benchmarks/process_engine.py [--quick] [--workers 4]

One server, four workers (two with --quick), batch 32 of the digits, an MLP of about 60,000 and one of about 1,000,000
weights, SGD with momentum on the server, one thread per process. Contestants are started once and take turns; each turn
is timed after a warm-up. While others are measured they are stopped (TensorPipe polls without a pause), but for Ray,
whose daemons watch each other and need little:

- ``process``: the engine as ``descentlab run … engine=process`` uses it (a row every 10 updates, updates logged);
- ``torch_rpc``: push and pull in one ``rpc_sync`` call to a server that holds a torch optimizer (TensorPipe);
- ``ray``: the asynchronous parameter server of Ray's documentation, with actors; left out where ray is not installed.

``process_vs_torch_rpc_6e4`` and so on are medians of the ratio within a repeat; ``…_per_s`` are medians of updates per
second.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from common import ONE_THREAD, alternate, emit, median_ratio, spread

ROOT = Path(__file__).parent.parent
HIDDEN = {"6e4": [256, 160], "1e6": [1024, 912]}
BATCH, LR, MOMENTUM, WARM_UP = 32, 0.01, 0.9, 30
SHORTER = {"ray": 3}  # the slowest is timed over a third of the updates
PATIENCE_S = 120.0  # for one answer of a contestant; it is ended then
Rate = Callable[[str, int], float]  # (size, updates) -> updates per second after the warm-up


def contestants() -> list[str]:
    """Those that can run here."""
    return ["process", "torch_rpc", *(["ray"] if importlib.util.find_spec("ray") else [])]


class Contestant:
    """A contestant in processes of its own, which measures when it is asked to."""

    def __init__(self, name: str, workers: int) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)
        environment = {**os.environ, **ONE_THREAD, "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
        command = [sys.executable, __file__, "--one", name, "--workers", str(workers)]
        self._process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            process_group=0,  # not a session: Linux shares processors between sessions
        )

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._errors.close()

    def answer(self, ask: str = "") -> float:
        """Send a line, wait for the number that comes back; SystemExit where none does."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if ask:
            self._process.stdin.write(f"{ask}\n")
            self._process.stdin.flush()
        timer = threading.Timer(PATIENCE_S, partial(os.killpg, self._process.pid, signal.SIGKILL))
        timer.start()
        for line in self._process.stdout:
            if line.startswith("rate "):
                timer.cancel()
                return float(line.split()[1])
        self._errors.seek(0)
        raise SystemExit(f"{self.name}: {self._errors.read()[-2000:]}")

    def pause(self) -> None:
        """Take no processor time until the next question."""
        if self.name != "ray":
            os.killpg(self._process.pid, signal.SIGSTOP)

    def rate(self, size: str, updates: int) -> float:
        """Updates per second."""
        os.killpg(self._process.pid, signal.SIGCONT)
        found = self.answer(f"{size} {updates}")
        self.pause()
        return found


def answer_all(name: str, workers: int) -> None:
    """What a contestant's own process does: a line in, a rate out, until the input ends."""
    with globals()[name](workers) as rate:
        print("rate 0", flush=True)  # it is up
        for line in sys.stdin:
            size, updates = line.split()
            print(f"rate {rate(size, int(updates))}", flush=True)


@contextmanager
def process(workers: int) -> Iterator[Rate]:
    """This project's engine, one server and its workers for each size."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {size: served(size, workers, Path(folder) / size) for size in HIDDEN}
        for run in runs.values():
            next(run)

        def rate(size: str, updates: int) -> float:
            for _ in range(WARM_UP):
                next(runs[size])
            begin = time.perf_counter()
            for _ in range(updates):
                next(runs[size])
            return updates / (time.perf_counter() - begin)

        try:
            yield rate
        finally:
            for run in runs.values():
                run.close()


def served(size: str, workers: int, log: Path) -> Any:
    """A run of a size that does not end by itself."""
    from descentlab.engine.journal import Journal
    from descentlab.engine.process import ParameterServer
    from descentlab.engine.program import BlockPlan, RunPlan
    from descentlab.launch.build import build_parts
    from descentlab.observe.specs import Observe
    from descentlab.optim.specs import Sgd
    from descentlab.studies.crossed.spec import CrossedSpec
    from descentlab.workloads.specs import Digits, Mlp

    cell = CrossedSpec(
        dataset=Digits(),
        model=Mlp(pool=0, hidden=HIDDEN[size]),
        optimizer=Sgd(lr=LR, momentum=MOMENTUM),
        batch_size=BATCH,
        workers=workers,
        observe=Observe(every=10, evaluate_every=0),
    )
    plan = BlockPlan("k", 0, "vmap", (RunPlan("run", 0, 10**6, LR),))
    build = partial(build_parts, cell, "vmap")
    return ParameterServer(plan, build(), build=build, journal=Journal(log)).run()


class Net:
    """Model and batches in plain torch."""

    def __init__(self, size: str, seed: int) -> None:
        import torch
        from sklearn.datasets import load_digits

        torch.set_num_threads(1)
        torch.manual_seed(0)
        widths = [64, *HIDDEN[size], 10]
        layers: list[Any] = []
        for a, b in itertools.pairwise(widths):
            layers += [torch.nn.Linear(a, b), torch.nn.SiLU()]
        self.module = torch.nn.Sequential(*layers[:-1])
        self.params = list(self.module.parameters())
        x, y = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
        self.generator = torch.Generator().manual_seed(seed)


class Worker:
    """Gradients of a contestant's worker."""

    def __init__(self, seed: int) -> None:
        self.nets = {size: Net(size, seed) for size in HIDDEN}

    def gradients(self, size: str, weights: Sequence[Any]) -> list[Any]:
        """At the given weights, of a random batch."""
        import torch

        net = self.nets[size]
        with torch.no_grad():
            torch._foreach_copy_(net.params, list(weights))
        rows = torch.randint(len(net.x), (BATCH,), generator=net.generator)
        loss = torch.nn.functional.cross_entropy(net.module(net.x[rows]), net.y[rows])
        return list(torch.autograd.grad(loss, net.params))


class Server:
    """The server half of a contestant: torch optimizers behind a lock. ``times``: when every update was made."""

    def __init__(self) -> None:
        import torch

        self.params = {size: Net(size, 0).params for size in HIDDEN}
        self.optimizers = {size: torch.optim.SGD(p, lr=LR, momentum=MOMENTUM) for size, p in self.params.items()}
        self.lock = threading.Lock()
        self.times: list[float] = []

    def weights(self, size: str) -> list[Any]:
        return [p.detach().clone() for p in self.params[size]]

    def push_pull(self, size: str, gradients: Sequence[Any]) -> list[Any]:
        """Apply a gradient, give back the weights."""
        with self.lock:
            for p, g in zip(self.params[size], gradients, strict=True):
                p.grad = g
            self.optimizers[size].step()
            self.times.append(time.perf_counter())
            return self.weights(size)

    def rate(self) -> float:
        """Updates per second after the warm-up since this was last asked."""
        times, self.times = self.times, []
        return (len(times) - WARM_UP) / (times[-1] - times[WARM_UP - 1])


SERVER: list[Server] = []  # of the torch RPC contestant, in its server process


def rpc_weights(size: str) -> list[Any]:
    return SERVER[0].weights(size)


def rpc_push_pull(size: str, gradients: Sequence[Any]) -> list[Any]:
    return SERVER[0].push_pull(size, gradients)


def rpc_process(rank: int, workers: int, port: int, asks: Any, out: Any) -> None:
    """Rank 0 serves and says the rate when asked; the others push as many gradients as they are asked for."""
    import torch.distributed.rpc as rpc

    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=workers + 1, rpc_timeout=60, init_method=f"tcp://127.0.0.1:{port}"
    )
    if rank == 0:
        SERVER.append(Server())
    worker = Worker(rank)
    rpc.init_rpc(f"rank{rank}", rank=rank, world_size=workers + 1, rpc_backend_options=options)
    out.put(0.0)
    for size, pushes in iter(asks.get, None):
        if rank:
            weights = rpc.rpc_sync("rank0", rpc_weights, args=(size,))
            for _ in range(pushes):
                weights = rpc.rpc_sync("rank0", rpc_push_pull, args=(size, worker.gradients(size, weights)))
        out.put(0.0 if rank else SERVER[0].rate())
    rpc.shutdown()


@contextmanager
def torch_rpc(workers: int) -> Iterator[Rate]:
    """Torch RPC, one process per rank."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.rpc", "sklearn.datasets"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = range(workers + 1)
    asks, outs = [context.SimpleQueue() for _ in ranks], [context.SimpleQueue() for _ in ranks]
    processes = [
        context.Process(target=rpc_process, args=(rank, workers, port, asks[rank], outs[rank])) for rank in ranks
    ]
    for one in processes:
        one.start()
    for out in outs:
        out.get()

    def rate(size: str, updates: int) -> float:
        for ask in asks[1:]:
            ask.put((size, (updates + WARM_UP) // workers))
        for out in outs[1:]:
            out.get()
        asks[0].put((size, 0))
        return float(outs[0].get())

    yield rate
    for ask in asks:
        ask.put(None)
    for one in processes:
        one.join()


@contextmanager
def ray(workers: int) -> Iterator[Rate]:
    """Ray's documented asynchronous parameter server."""
    import ray as r

    r.init(num_cpus=workers + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    server = r.remote(num_cpus=1)(Server).remote()
    actors = [r.remote(num_cpus=1)(Worker).remote(seed) for seed in range(workers)]

    def rate(size: str, updates: int) -> float:
        weights = server.weights.remote(size)
        at = {actor.gradients.remote(size, weights): actor for actor in actors}
        for _ in range(updates + WARM_UP):
            (ready,), _rest = r.wait(list(at))
            actor = at.pop(ready)
            at[actor.gradients.remote(size, server.push_pull.remote(size, ready))] = actor
        found = float(r.get(server.rate.remote()))
        r.wait(list(at), num_returns=len(at))
        return found

    try:
        rate("6e4", 1)
        yield rate
    finally:
        r.shutdown()


def measure(workers: int, updates: dict[str, int], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Updates per second of everybody by size, a list per contestant."""
    with ExitStack() as stack:
        started = [stack.enter_context(Contestant(name, workers)) for name in contestants()]
        for one in started:
            one.answer()
        for one in started:
            one.pause()
        found = {}
        for size in HIDDEN:
            turns = {one.name: partial(one.rate, size, updates[size] // SHORTER.get(one.name, 1)) for one in started}
            found[size] = alternate(turns, repeats)
        return found


def ratios(found: dict[str, list[float]], size: str) -> dict[str, float | None]:
    """``process_vs_<other>_<size>``; None for who cannot run here."""
    out: dict[str, float | None] = {f"process_vs_{name}_{size}": None for name in ("torch_rpc", "ray")}
    for name in found.keys() - {"process"}:
        out[f"process_vs_{name}_{size}"] = median_ratio(found["process"], found[name])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two workers, two short repeats: within a minute")
    parser.add_argument("--workers", type=int, default=0, help="4, with --quick 2")
    parser.add_argument("--one", choices=("process", "torch_rpc", "ray"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    workers = arguments.workers or (2 if arguments.quick else 4)
    if arguments.one:
        answer_all(arguments.one, workers)
        return
    repeats, updates = (2, {"6e4": 300, "1e6": 60}) if arguments.quick else (7, {"6e4": 400, "1e6": 60})
    made: dict[str, float | None] = {}
    rates: dict[str, dict[str, float]] = {}
    for size, found in measure(workers, updates, repeats).items():
        made |= ratios(found, size)
        rates |= {f"{name}_{size}_per_s": spread(values) for name, values in found.items()}
    for name in ("torch_rpc", "ray"):
        both = [v for size in HIDDEN if (v := made[f"process_vs_{name}_{size}"]) is not None]
        made[f"process_vs_{name}"] = round(statistics.geometric_mean(both), 2) if both else None
    emit("process_engine", made, repeats, rates=rates, workers=workers, batch_size=BATCH)


if __name__ == "__main__":
    main()
