"""Training many small models: the path ``run`` takes by default against a loop over plain models and against JAX.

    python benchmarks/ensemble.py [--quick] [--device cpu] [--members 1000]

MLP-386 on mnist5k, batch 64, plain SGD, every member with its own initial weights and batches. descentlab: blocks of
500 members, one process per core with one thread each; drawing of batches, gathering, gradients, optimizer, clocks,
every standard observable at every step, the test set every 10 steps, and the writing of all rows included. What the
others measure on the way: contestants.py. JAX, when installed: ``jit(vmap(scan))`` in one process, which uses all
cores; gathering, updates and measurements included, drawing, compilation and writing not.

Ratios are time per member-step of the other over time per member-step of descentlab:

- ``vs_loop``: the loop on one core. ``vs_loop_all_cores``: as many loops as there are cores.
- ``vs_jax``: all members in one JAX process; ``vs_jax_all_cores``: the members split over as many JAX processes as
  there are cores, each of which uses them all; null without JAX.
- ``vs_loop_unobserved``, ``vs_jax_unobserved``: descentlab with a row per epoch and no test set, the others with the
  loss alone.
- ``vs_loop_cnn``, ``vs_loop_lenet5``: as ``vs_loop`` for the recovery study's BatchNorm network and LeNet5, in blocks
  of 5 (LeNet5 not with ``--quick``); ``…_two_threads``: against the loop with two threads.

Others: ``store_share``, the share of the processor time of a default step that goes into making and writing rows, a
part every 60,000 rows (``run`` writes one every 65,536); ``slope``, of the logarithm of processor time against the
logarithm of members, the median over turns, one process, 500 to 2,000 members in blocks of 500, whole epochs, so that
every turn draws a permutation per member and epoch; every size is measured for about equally long; ``memory_steps`` and
``memory_members``, peak memory with four times the steps and four times the members over that without. ``--quick``
leaves out what the bounds do not need (null).
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from common import ONE_THREAD, alternate, cores, emit, median_ratio, slopes, spread
from contestants import EPOCH, STORE_S, Advance, blocks, cell, ensemble, jax_ensemble, loop

WARM_UP = 10
SIZES = (500, 1000, 1500, 2000)  # members for the slope; 250, half a block, is printed beside them
CNN_UPDATES, CNN_MEMBERS = 10, 10
PART = 2 * EPOCH  # updates after which a block of 500 has 60,000 rows to write
FULL_ONLY = {
    *("loop_all_cores", "descentlab_unobserved", "loop_unobserved", "jax_split", "jax_unobserved"),
    *("cnn_loop_two_threads", "lenet5", "lenet5_loop", "lenet5_loop_two_threads", f"members_{SIZES[0] // 2}"),
}


def contestants(worker: int, count: int, arguments: argparse.Namespace, with_jax: bool) -> dict[str, Advance]:
    """Everything worker number ``worker`` of ``count`` can be asked to run."""
    from descentlab.engine.program import MEMBERS_PER_BLOCK, ONE_BY_ONE

    size, members = ONE_BY_ONE, arguments.members
    own = blocks(members, worker, count, size)
    plain = cell(observed=False, device=arguments.device)
    default = cell(device=arguments.device)
    found: dict[str, Advance] = {
        "descentlab": ensemble(own, default),
        "loop": loop(default),
    }
    if not arguments.quick:
        found["descentlab_unobserved"] = ensemble(own, plain)
        found["loop_unobserved"] = loop(plain, evaluate=False)
    for model in ("cnn",) if arguments.quick else ("cnn", "lenet5"):
        settings, five = cell(model, device=arguments.device), MEMBERS_PER_BLOCK["member"]
        found[model] = ensemble(blocks(CNN_MEMBERS, worker, count, five), settings)
        found[f"{model}_loop"] = found[f"{model}_loop_two_threads"] = loop(settings, models=1)
    if worker == 0:
        if not arguments.quick:
            found[f"members_{size // 2}"] = ensemble([range(size // 2)], default)
        whole = ensemble(blocks(max(SIZES), 0, 1, size), default)
        found |= {f"members_{several}": partial(equally_long, whole, several, size) for several in SIZES}
    if with_jax and worker == 0:
        found["jax"] = jax_ensemble(list(range(members)), observed=True)
        if not arguments.quick:
            found["jax_unobserved"] = jax_ensemble(list(range(members)), observed=False)
    if with_jax and not arguments.quick:
        found["jax_split"] = jax_ensemble([r for block in own for r in block], observed=True)
    return found


def equally_long(advance: Callable[..., int], members: int, size: int, updates: int) -> int:
    """The first ``members`` so often that all :data:`SIZES` take about as long, and are disturbed as much."""
    turns = round(max(SIZES) / members) if updates == EPOCH else 1
    return sum(advance(updates, first=members // size) for _ in range(turns))


def serve(link: Connection, worker: int, count: int, arguments: argparse.Namespace, with_jax: bool) -> None:
    """A worker process: builds its contestants, warms them up, then runs what it is told and says what it did."""
    import torch

    torch.set_num_threads(1)
    known = contestants(worker, count, arguments, with_jax)
    for advance in known.values():
        advance(WARM_UP)
    link.send("ready")
    while (order := link.recv()) is not None:
        name, updates = order
        torch.set_num_threads(2 if name.endswith("two_threads") else 1)
        started, STORE_S[0] = time.process_time(), 0.0
        steps = known[name](updates)
        link.send((steps, time.process_time() - started, STORE_S[0]))
    link.close()


CPU_MICROSECONDS: dict[str, list[float]] = {}  # per member-step; unlike wall time, hardly changed by other programs
STORE_SHARE: dict[str, list[float]] = {}


def measure(links: list[Connection], name: str, updates: int) -> float:
    """Microseconds of wall time per member-step when all these workers run ``name`` at once."""
    started = time.perf_counter()
    for link in links:
        link.send((name, updates))
    answers = [link.recv() for link in links]
    elapsed, steps = time.perf_counter() - started, sum(made for made, *_ in answers)
    used = sum(cpu for _, cpu, _ in answers)
    CPU_MICROSECONDS.setdefault(name, []).append(1e6 * used / steps)
    STORE_SHARE.setdefault(name, []).append(sum(store for *_, store in answers) / used)
    return 1e6 * elapsed / steps


def turns(links: list[Connection], with_jax: bool, quick: bool) -> dict[str, Callable[[], float]]:
    """What is measured in every repeat, rivals side by side."""
    one, everyone = partial(measure, links[:1]), partial(measure, links)
    found = {
        "descentlab": partial(everyone, "descentlab", PART),
        "loop": partial(one, "loop", EPOCH),
        "loop_all_cores": partial(everyone, "loop", EPOCH),
        "descentlab_unobserved": partial(everyone, "descentlab_unobserved", EPOCH),
        "loop_unobserved": partial(one, "loop_unobserved", EPOCH),
    }
    if with_jax:
        found["jax"] = partial(one, "jax", EPOCH)
        found["jax_split"] = partial(everyone, "jax_split", EPOCH)
        found["jax_unobserved"] = partial(one, "jax_unobserved", EPOCH)
    for model in ("cnn", "lenet5"):
        found[model] = partial(everyone, model, CNN_UPDATES)
        found[f"{model}_loop"] = partial(one, f"{model}_loop", CNN_UPDATES)
        found[f"{model}_loop_two_threads"] = partial(one, f"{model}_loop_two_threads", CNN_UPDATES)
    for several in (SIZES[0] // 2, *SIZES):
        found[f"members_{several}"] = partial(one, f"members_{several}", EPOCH)
    return {name: turn for name, turn in found.items() if not (quick and name in FULL_ONLY)}


def contest(arguments: argparse.Namespace, with_jax: bool) -> tuple[dict[str, list[float]], int]:
    """(microseconds per member-step of every contestant and repeat, number of processes)."""
    os.environ.update(ONE_THREAD)
    count = min(cores(), max(1, arguments.members // 500))
    context = multiprocessing.get_context("spawn")
    links, workers = [], []
    for i in range(count):
        ours, theirs = context.Pipe()
        worker = context.Process(target=serve, args=(theirs, i, count, arguments, with_jax))
        worker.start()
        theirs.close()
        links.append(ours)
        workers.append(worker)
    for link in links:
        assert link.recv() == "ready"
    measured = alternate(turns(links, with_jax, arguments.quick), 3 if arguments.quick else 9)
    for link, worker in zip(links, workers, strict=True):
        link.send(None)
        worker.join()
    return measured, count


def peak_memory(link: Connection, members: int, updates: int, device: str) -> None:
    """Train in blocks, one after the other, and send the largest memory this process ever had, in bytes."""
    import torch

    torch.set_num_threads(1)
    for block in blocks(members, 0, 1, 500):
        advance = ensemble([block], cell(device=device))
        for _ in range(updates // EPOCH):
            advance(EPOCH)
    link.send(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory(device: str, steps: int) -> dict[str, float]:
    """Peak memory in MB of fresh processes, side by side."""
    context = multiprocessing.get_context("spawn")
    jobs = {f"500 members, {steps} steps": (500, steps), "4 x steps": (500, 4 * steps), "4 x members": (2000, steps)}
    links, found = {}, {}
    for name, (members, updates) in jobs.items():
        links[name], theirs = context.Pipe()
        context.Process(target=peak_memory, args=(theirs, members, updates, device)).start()
        theirs.close()
    for name, link in links.items():
        found[name] = round(link.recv() / 2**20, 1)
    return found


def slope(measured: dict[str, list[float]]) -> float:
    """Median over turns of the slope of log time against log members."""
    return round(statistics.median(slopes({n: [n * t for t in measured[f"members_{n}"]] for n in SIZES})), 3)


def ratios_of(measured: dict[str, list[float]], with_jax: bool) -> dict[str, float | None]:
    """Name -> ratio, see above."""

    def ratio(slow: str, fast: str) -> float | None:
        return median_ratio(measured[slow], measured[fast]) if slow in measured else None

    found: dict[str, float | None] = {
        "vs_loop": ratio("loop", "descentlab"),
        "vs_loop_all_cores": ratio("loop_all_cores", "descentlab"),
        "vs_jax": ratio("jax", "descentlab"),
        "vs_jax_all_cores": ratio("jax_split", "descentlab"),
        "vs_loop_unobserved": ratio("loop_unobserved", "descentlab_unobserved"),
        "vs_jax_unobserved": ratio("jax_unobserved", "descentlab_unobserved"),
    }
    for model in ("cnn", "lenet5"):
        found[f"vs_loop_{model}"] = ratio(f"{model}_loop", model)
        found[f"vs_loop_{model}_two_threads"] = ratio(f"{model}_loop_two_threads", model)
    return found


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="3 repeats instead of 9; under a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--members", type=int, default=1000)
    arguments = parser.parse_args()
    with_jax = importlib.util.find_spec("jax") is not None
    measured, processes = contest(arguments, with_jax)
    ratios = ratios_of(measured, with_jax)
    ratios["store_share"] = round(sorted(STORE_SHARE["descentlab"])[len(STORE_SHARE["descentlab"]) // 2], 4)
    ratios["slope"] = slope(CPU_MICROSECONDS)
    steps = EPOCH if arguments.quick else 5 * EPOCH
    held = memory(arguments.device, steps)
    base = held[f"500 members, {steps} steps"]
    ratios |= {
        "memory_steps": round(held["4 x steps"] / base, 3),
        "memory_members": round(held["4 x members"] / base, 3),
    }
    details: dict[str, Any] = {
        "microseconds": {name: spread(values) for name, values in measured.items()},
        "cpu_microseconds": {name: spread(values) for name, values in CPU_MICROSECONDS.items()},
        "memory_mb": held,
        "members": arguments.members,
        "processes": processes,
        "default_path": "observe.every=1, observe.evaluate_every=10 on 1,000 test images, rows written to parquet",
        "loop_measures": "loss at every step, test loss every 10 steps",
        "device": arguments.device,
    }
    emit("ensemble", ratios, len(measured["descentlab"]), **details)


if __name__ == "__main__":
    main()
