"""Our PowerSGD hook against torch's (one bucket, loopback), and against a plain all-reduce over limited links.

    python benchmarks/compression.py [--quick] [--only hooks|links|order]

Two processes on gloo train an MLP of 1.02 million parameters; a measurement is the mean time of an iteration, forward
to optimizer step, of one contestant. The two of a pair take turns of a few iterations, in the order a b b a, so that
what else the machine does meets both; a repeat is several such turns. ``vs_torch_hook_rank_r`` is torch's time over
ours, both hooks with their own defaults but for the one bucket that torch's needs: the median over repeats, with the
lower end of its one-sided 95 % bootstrap interval under ``lower``. ``vs_all_reduce_…`` is the plain all-reduce's time
over that of our rank 2.

``--only order`` (not part of the whole) trains with every compressor over 1 Gbit, 100 and 20 Mbit/s and holds the
median time of an iteration against the time model: what was no sending, 8 bytes / rate, and the measured latency of
every message; ``in_order`` counts pairs of methods that the model puts in the right order. Limited links are network
namespaces and need root; without it they are left out, and ``skipped`` says so.
"""

from __future__ import annotations

import argparse
import gc
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
METHODS = ("none", "fp16", "rank_1", "rank_2", "rank_4", "rank_8", "topk", "sign")


def lower_bound(slow: Sequence[float], fast: Sequence[float], resamples: int = 4000) -> float:
    """Fifth percentile of the median of resampled ratios."""
    ratios = np.array(slow) / np.array(fast)
    drawn = np.random.default_rng(0).choice(ratios, size=(resamples, len(ratios)))
    return round(float(np.quantile(np.median(drawn, axis=1), 0.05)), 3)


def measured(
    pairs: Sequence[tuple[str, str]], repeats: int, turns: int, iterations: int, namespaces: Sequence[str]
) -> dict[str, list[float]]:
    """Run the two processes; seconds of an iteration, a list per contestant. A repeat is ``turns`` turns a b b a of
    ``iterations`` each."""
    plan = {"pairs": list(pairs), "repeats": repeats, "turns": turns, "iterations": iterations}
    return run_processes(plan, namespaces)


def run_processes(plan: dict[str, Any], namespaces: Sequence[str]) -> Any:
    """What the first of two processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        task = {**plan, "store": f"{folder}/store"}
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
    gc.disable()
    if "methods" in task:
        found = {name: method_times(name, task["iterations"]) for name in task["methods"]}
        if task["rank"] == 0:
            print(json.dumps(found), flush=True)
        dist.barrier()
        dist.destroy_process_group()
        return
    found: dict[str, list[float]] = {}
    for pair in task["pairs"]:
        contestants = {name: contestant(name, task["iterations"]) for name in pair}
        found |= {name: [] for name in pair}
        for _ in range(task["repeats"]):
            turn = alternate(contestants, 2 * task["turns"])  # every other time in reverse order
            for name in pair:
                found[name].append(float(np.mean(turn[name])))
        del contestants
        gc.collect()
    dist.barrier()
    if task["rank"] == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def method_times(name: str, iterations: int) -> dict[str, float]:
    """Median seconds of an iteration with one compressor, and what the time model makes of it."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from descentlab.comm.half import HalfPrecision
    from descentlab.comm.hook import BucketHook, CompressorHook
    from descentlab.comm.plain_hooks import AllReduceHook
    from descentlab.comm.powersgd_hook import PowerSGDHook
    from descentlab.comm.sign import SignSgd
    from descentlab.comm.topk import TopK
    from descentlab.engine.environment import measure_environment

    model = network_of_layers(25)
    makers: dict[str, Callable[[], BucketHook]] = {
        "none": lambda: AllReduceHook(overlap=False),
        "fp16": lambda: CompressorHook(HalfPrecision("fp16")),
        "topk": lambda: CompressorHook(TopK(0.01)),
        "sign": lambda: CompressorHook(SignSgd()),
    }
    make = makers.get(name) or (lambda: PowerSGDHook(rank=int(name.removeprefix("rank_"))))
    hook = make().attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(32, WIDTHS[0]), torch.randint(WIDTHS[-1], (32,))
    whole, busy = [], []
    for i in range(2 + iterations):
        dist.barrier()
        sent, messages, started = hook.bytes_sent, hook.messages, time.perf_counter()
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i >= 2:
            whole.append(time.perf_counter() - started)
            busy.append(whole[-1] - hook.timings()["collective_s"])
    link = measure_environment(1, 9)
    found = {"s": float(np.median(whole)), "busy_s": float(np.median(busy)), "latency_s": link.latency_s}
    return {
        **found,
        "bytes": hook.bytes_sent - sent,
        "messages": hook.messages - messages,
        "gathers": hook.gathered > 0,
    }


def network_of_layers(bucket_mb: float) -> Any:
    """The MLP, wrapped."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    layers = [layer for n, m in itertools.pairwise(WIDTHS) for layer in (nn.Linear(n, m), nn.ReLU())][:-1]
    return DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=bucket_mb)


def contestant(name: str, iterations: int) -> Callable[[], float]:
    """A model of its own with its hook; a call trains for ``iterations`` and gives the mean time of one."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from descentlab.comm.plain_hooks import TorchPowerSGDHook
    from descentlab.comm.powersgd_hook import PowerSGDHook

    kind, _, rank = name.partition("_")
    model = network_of_layers(1000 if kind == "torch" else 25)
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

    train(2 if kind in ("plain", "atonce") else 6)  # DDP makes its buckets anew; two travel whole beside torch's hook

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


def against_torch(quick: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(ratios, their lower bounds, seconds of an iteration) of both hooks on the loopback."""
    pairs = [(f"ours_{r}", f"torch_{r}") for r in RANKS]
    found = measured(pairs, 3 if quick else 7, 1 if quick else 2, 8 if quick else 10, [])
    ratios, lower = {}, {}
    for r in RANKS:
        ratios[f"vs_torch_hook_rank_{r}"] = median_ratio(found[f"torch_{r}"], found[f"ours_{r}"])
        lower[f"vs_torch_hook_rank_{r}"] = lower_bound(found[f"torch_{r}"], found[f"ours_{r}"])
    return ratios, lower, {"loopback": {name: round(float(np.median(t)), 5) for name, t in found.items()}}


def against_all_reduce(quick: bool) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(ratios, seconds of an iteration, what could not be measured) over links of four speeds."""
    from descentlab.core.errors import UserError

    ratios, times, skipped = {}, {}, []
    for name, rate in LINKS.items():
        slow = 0 < rate <= 100
        try:
            with limited(rate) as namespaces:
                own = measured([("plain", "atonce_2")], 1 if quick else 5, 1, 1 if slow else 5, namespaces)
        except UserError as error:
            skipped.append(f"{name}: {error}")
            continue
        ratios[f"vs_all_reduce_{name}"] = median_ratio(own["plain"], own["atonce_2"])
        times[name] = {who: round(float(np.median(t)), 5) for who, t in own.items()}
    return ratios, times, skipped


def order(quick: bool) -> dict[str, Any]:
    """Rate -> method -> [measured ms, predicted ms], and how many pairs of methods are in the predicted order."""
    from descentlab.core.ring import all_gather_s, all_reduce_s

    out: dict[str, Any] = {}
    for name, rate in LINKS.items():
        if not rate:
            continue
        with limited(rate) as namespaces:
            iterations = (20 if rate > 100 else 6 if rate > 20 else 3) // (2 if quick else 1)
            found = run_processes({"methods": METHODS, "iterations": iterations}, namespaces)
        times = {}
        for method, one in found.items():
            cost = all_gather_s if one["gathers"] else all_reduce_s
            wire = cost(one["bytes"], 2, rate, 0.0) + one["messages"] * cost(0.0, 2, 0.0, one["latency_s"])
            times[method] = [round(1e3 * one["s"], 2), round(1e3 * (one["busy_s"] + wire), 2)]
        pairs = list(itertools.combinations(times.values(), 2))
        right = sum((a[0] - b[0]) * (a[1] - b[1]) >= 0 for a, b in pairs)
        out[name] = {"ms": times, "in_order": f"{right} of {len(pairs)}", "iterations": iterations}
    return out


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repeats, within a minute")
    parser.add_argument("--only", choices=["hooks", "links", "order"], help="one part")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process:
        process(json.loads(asked.process))
        return
    if asked.only == "order":
        emit("compression", {}, 1, order=order(asked.quick))
        return
    ratios: dict[str, float | None] = {}
    times: dict[str, Any] = {}
    details: dict[str, Any] = {}
    if asked.only != "links":
        found, details["lower"], own = against_torch(asked.quick)
        ratios |= found
        times |= own
    if asked.only != "hooks":
        found, own, skipped = against_all_reduce(asked.quick)
        ratios |= found
        times |= own
        details |= {"skipped": skipped} if skipped else {}
    emit("compression", ratios, 3 if asked.quick else 7, **details, seconds=times)


if __name__ == "__main__":
    main()
