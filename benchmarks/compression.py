"""Our PowerSGD hook against torch's (one bucket, loopback), and against a plain all-reduce over limited links.

    python benchmarks/compression.py [--quick]

Two processes on gloo train an MLP of 1.02 million parameters; a measurement is the mean time of an iteration, forward
to optimizer step, of one contestant; they take turns, every other time in reverse order. ``vs_torch_hook_rank_r`` is
torch's time over ours: the median over repeats, with the lower end of its one-sided 95 % bootstrap interval under
``lower``. ``vs_all_reduce_…`` is the plain all-reduce's time over that of our rank 2. Limited links are network
namespaces and need root; without it they are left out, and ``skipped`` says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from common import ONE_THREAD, alternate, emit, median_ratio

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RANKS = (1, 2, 4, 8)
LINKS = {"no_limit": 0.0, "1gbit": 1000.0, "100mbit": 100.0, "20mbit": 20.0}
WIDTHS = (784, 784, 512, 10)  # 1,022,426 parameters


def lower_bound(slow: Sequence[float], fast: Sequence[float], resamples: int = 4000) -> float:
    """Fifth percentile of the median of resampled ratios."""
    ratios = np.array(slow) / np.array(fast)
    drawn = np.random.default_rng(0).choice(ratios, size=(resamples, len(ratios)))
    return round(float(np.quantile(np.median(drawn, axis=1), 0.05)), 3)


def pair(names: Sequence[str], repeats: int, iterations: int, namespaces: Sequence[str]) -> dict[str, list[float]]:
    """Run the two processes; seconds of an iteration, a list per contestant."""
    with tempfile.TemporaryDirectory() as folder:
        task = {"names": list(names), "repeats": repeats, "iterations": iterations, "store": f"{folder}/store"}
        device = "eth0" if namespaces else "lo"
        environment = {**os.environ, **ONE_THREAD, "GLOO_SOCKET_IFNAME": device}
        command = [sys.executable, __file__, "--process"]
        jobs = []
        for rank in range(2):
            own = {**task, "rank": rank, "namespace": namespaces[rank] if namespaces else ""}
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            jobs.append(subprocess.Popen([*command, json.dumps(own)], env=environment, stdout=out, text=True))
        try:
            said, _ = jobs[0].communicate(timeout=600)
            if any(job.wait(timeout=60) for job in jobs):
                raise SystemExit("a process failed; see above")
        finally:
            for job in jobs:
                job.kill()
        return json.loads(said.splitlines()[-1])


def process(task: dict[str, Any]) -> None:
    """One of the two processes; the first prints what it measured."""
    if task["namespace"]:
        from descentlab.cluster.namespaces import enter

        enter(task["namespace"])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(task["store"], 2), rank=task["rank"], world_size=2)
    contestants = {name: contestant(name, task["iterations"]) for name in task["names"]}
    found = alternate(contestants, task["repeats"])
    dist.barrier()
    if task["rank"] == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def contestant(name: str, iterations: int) -> Callable[[], float]:
    """A model of its own with its hook; a call trains for ``iterations`` and gives the mean time of one."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from descentlab.comm.plain_hooks import TorchPowerSGDHook
    from descentlab.comm.powersgd_hook import PowerSGDHook

    torch.manual_seed(0)
    layers = [layer for n, m in itertools.pairwise(WIDTHS) for layer in (nn.Linear(n, m), nn.ReLU())][:-1]
    kind, _, rank = name.partition("_")
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=1000 if kind == "torch" else 25)
    if kind in ("ours", "atonce"):
        PowerSGDHook(rank=int(rank), start_iteration=2 if kind == "ours" else 0).attach(model)
    elif kind == "torch":
        TorchPowerSGDHook(int(rank)).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(32, WIDTHS[0]), torch.randint(WIDTHS[-1], (32,))

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    train(2 if kind in ("plain", "atonce") else 4)  # DDP makes its buckets anew; two travel whole beside torch's hook

    def measure() -> float:
        dist.barrier()
        started = time.perf_counter()
        train(iterations)
        return (time.perf_counter() - started) / iterations

    return measure


def limited(rate_mbps: float) -> Any:
    """Namespaces with this limit; none for the loopback."""
    from descentlab.cluster.namespaces import Shape, network

    return network(2, Shape(rate_mbps, rate_mbps)) if rate_mbps else nullcontext([])


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repeats, within a minute")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process:
        process(json.loads(asked.process))
        return
    from descentlab.core.errors import UserError

    repeats = 3 if asked.quick else 7
    hooks = pair([f"{who}_{r}" for r in RANKS for who in ("ours", "torch")], repeats, 10 if asked.quick else 30, [])
    ratios: dict[str, float | None] = {}
    lower, times, skipped = {}, {"loopback": {name: round(float(np.median(t)), 5) for name, t in hooks.items()}}, []
    for r in RANKS:
        ratios[f"vs_torch_hook_rank_{r}"] = median_ratio(hooks[f"torch_{r}"], hooks[f"ours_{r}"])
        lower[f"vs_torch_hook_rank_{r}"] = lower_bound(hooks[f"torch_{r}"], hooks[f"ours_{r}"])
    for name, rate in LINKS.items():
        slow = 0 < rate <= 100
        try:
            with limited(rate) as namespaces:
                own = pair(["plain", "atonce_2"], 2 if asked.quick else 5, 1 if slow else 10, namespaces)
        except UserError as error:
            skipped.append(f"{name}: {error}")
            continue
        ratios[f"vs_all_reduce_{name}"] = median_ratio(own["plain"], own["atonce_2"])
        times[name] = {who: round(float(np.median(t)), 5) for who, t in own.items()}
    emit("compression", ratios, repeats, lower=lower, seconds=times, **({"skipped": skipped} if skipped else {}))


if __name__ == "__main__":
    main()
