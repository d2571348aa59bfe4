"""Updates per second of real parameter servers: python benchmarks/process_engine.py [--quick] [--workers 4]

One server, four workers, batch 32 of the digits, an MLP of about 60,000 and one of about 1,000,000 weights, SGD with
momentum on the server, one thread per process. Contestants, each started anew and in turns, timed after a warm-up:

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
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import ONE_THREAD, alternate, emit, median_ratio, spread

ROOT = Path(__file__).parent.parent
HIDDEN = {"6e4": [256, 160], "1e6": [1024, 912]}
BATCH, LR, MOMENTUM, WARM_UP = 32, 0.01, 0.9, 30


def contestants() -> list[str]:
    """Those that can run here."""
    return ["process", "torch_rpc", *(["ray"] if importlib.util.find_spec("ray") else [])]


def rate(contestant: str, size: str, workers: int, updates: int) -> float:
    """Updates per second, measured in processes of their own."""
    command = [sys.executable, __file__, "--one", contestant, size, str(workers), str(updates)]
    environment = {**os.environ, **ONE_THREAD, "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"{contestant}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def process(size: str, workers: int, updates: int) -> float:
    """This project's engine."""
    from tempfile import TemporaryDirectory

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
    plan = BlockPlan("k", 0, "vmap", (RunPlan("run", 0, updates + WARM_UP, LR),))
    build = partial(build_parts, cell, "vmap")
    with TemporaryDirectory() as folder:
        server = ParameterServer(plan, build(), build=build, journal=Journal(Path(folder) / "timeline.jsonl"))
        for progress in server.run():
            if progress.step == WARM_UP:
                begin = time.perf_counter()
            elif progress.step == WARM_UP + updates:
                return updates / (time.perf_counter() - begin)
    raise AssertionError("the run ended early")


class Net:
    """Model, batches and gradients of a contestant's worker, in plain torch."""

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

    def gradients(self, weights: Sequence[Any]) -> list[Any]:
        """At the given weights, of a random batch."""
        import torch

        with torch.no_grad():
            torch._foreach_copy_(self.params, list(weights))
        rows = torch.randint(len(self.x), (BATCH,), generator=self.generator)
        loss = torch.nn.functional.cross_entropy(self.module(self.x[rows]), self.y[rows])
        return list(torch.autograd.grad(loss, self.params))


class Server:
    """The server half of a contestant: a torch optimizer behind a lock. ``times``: when every update was made."""

    def __init__(self, size: str) -> None:
        import torch

        self.net = Net(size, 0)
        self.optimizer = torch.optim.SGD(self.net.params, lr=LR, momentum=MOMENTUM)
        self.lock = threading.Lock()
        self.times: list[float] = []

    def weights(self) -> list[Any]:
        return [p.detach().clone() for p in self.net.params]

    def push_pull(self, gradients: Sequence[Any]) -> list[Any]:
        """Apply a gradient, give back the weights."""
        with self.lock:
            for p, g in zip(self.net.params, gradients, strict=True):
                p.grad = g
            self.optimizer.step()
            self.times.append(time.perf_counter())
            return self.weights()

    def rate(self) -> float:
        """Updates per second after the warm-up."""
        return (len(self.times) - WARM_UP) / (self.times[-1] - self.times[WARM_UP - 1])


SERVER: list[Server] = []  # of the torch RPC contestant, in its server process


def rpc_weights() -> list[Any]:
    return SERVER[0].weights()


def rpc_push_pull(gradients: Sequence[Any]) -> list[Any]:
    return SERVER[0].push_pull(gradients)


def rpc_process(rank: int, size: str, workers: int, updates: int, port: int, out: Any) -> None:
    """Rank 0 serves, the others push as many gradients each as make up the updates."""
    import torch.distributed.rpc as rpc

    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=workers + 1, rpc_timeout=60, init_method=f"tcp://127.0.0.1:{port}"
    )
    if rank == 0:
        SERVER.append(Server(size))
    rpc.init_rpc(f"rank{rank}", rank=rank, world_size=workers + 1, rpc_backend_options=options)
    if rank:
        net, weights = Net(size, rank), rpc.rpc_sync("rank0", rpc_weights)
        for _ in range((updates + WARM_UP) // workers):
            weights = rpc.rpc_sync("rank0", rpc_push_pull, args=(net.gradients(weights),))
    rpc.shutdown()
    if rank == 0:
        out.put(SERVER[0].rate())


def torch_rpc(size: str, workers: int, updates: int) -> float:
    """Torch RPC, one process per rank."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    out = context.Queue()
    arguments = (size, workers, updates, port, out)
    ranks = [context.Process(target=rpc_process, args=(rank, *arguments)) for rank in range(workers + 1)]
    for rank in ranks:
        rank.start()
    found = out.get(timeout=250)
    for rank in ranks:
        rank.join()
    return float(found)


def ray(size: str, workers: int, updates: int) -> float:
    """Ray's documented asynchronous parameter server."""
    import ray as r

    r.init(num_cpus=workers + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        server = r.remote(num_cpus=1)(Server).remote(size)
        actors = [r.remote(num_cpus=1)(Net).remote(size, seed) for seed in range(workers)]
        weights = server.weights.remote()
        at = {actor.gradients.remote(weights): actor for actor in actors}
        for _ in range(updates + WARM_UP):
            (ready,), _rest = r.wait(list(at))
            actor = at.pop(ready)
            at[actor.gradients.remote(server.push_pull.remote(ready))] = actor
        return float(r.get(server.rate.remote()))
    finally:
        r.shutdown()


def measure(size: str, workers: int, updates: int, repeats: int) -> dict[str, list[float]]:
    """Updates per second of everybody, a list per contestant."""
    return alternate({name: partial(rate, name, size, workers, updates) for name in contestants()}, repeats)


def ratios(found: dict[str, list[float]], size: str) -> dict[str, float | None]:
    """``process_vs_<other>_<size>``; None for who cannot run here."""
    out: dict[str, float | None] = {f"process_vs_{name}_{size}": None for name in ("torch_rpc", "ray")}
    for name in found.keys() - {"process"}:
        out[f"process_vs_{name}_{size}"] = median_ratio(found["process"], found[name])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat: within a minute on an idle machine")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--one", nargs=4, metavar=("CONTESTANT", "SIZE", "WORKERS", "UPDATES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, size, workers, updates = arguments.one
        print(json.dumps(globals()[name](size, int(workers), int(updates))))
        return
    repeats, updates = (1, {"6e4": 300, "1e6": 60}) if arguments.quick else (5, {"6e4": 1000, "1e6": 200})
    made: dict[str, float | None] = {}
    rates: dict[str, dict[str, float]] = {}
    for size in HIDDEN:
        found = measure(size, arguments.workers, updates[size], repeats)
        made |= ratios(found, size)
        rates |= {f"{name}_{size}_per_s": spread(values) for name, values in found.items()}
    for name in ("torch_rpc", "ray"):
        both = [v for size in HIDDEN if (v := made[f"process_vs_{name}_{size}"]) is not None]
        made[f"process_vs_{name}"] = round(statistics.geometric_mean(both), 2) if both else None
    emit("process_engine", made, repeats, rates=rates, workers=arguments.workers, batch_size=BATCH)


if __name__ == "__main__":
    main()
