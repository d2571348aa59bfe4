"""Training many small models: the path ``run`` takes by default against an eager loop and against JAX.

    python benchmarks/ensemble.py [--quick] [--device cpu] [--members 1000]

MLP-386 on mnist5k, batch 64, plain SGD, every member with its own initial weights and batches. descentlab: blocks of
250 members, one process per core with one thread each, the engine and its parts built from a study's settings, drawing
of batches, gathering, gradients, optimizer and clocks included. Loop: ``train`` of examples/minimal_loop.py, one model
after the other; the same included. JAX, when installed: ``jit(vmap(scan))`` over one epoch in one process,
which uses all cores; gathering and updates included, drawing and compilation not.

Ratios are time per member-step of the other over time per member-step of descentlab:

- ``vs_loop``: the loop on one core; descentlab recording once an epoch (``observe.every=60``), no test set.
- ``vs_loop_all_cores``: as many loops as there are cores.
- ``vs_loop_observed``: as ``vs_loop``, with every standard observable of every member at every step.
- ``vs_jax``: all members in one JAX process; null without JAX.
- ``vs_jax_all_cores``: the members split over as many JAX processes as there are cores, each of which uses them all.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import ONE_THREAD, alternate, cores, emit, median_ratio, spread

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

BATCH, LR, EPOCH = 64, 0.1, 60  # 3,840 training images make 60 batches
WARM_UP = 5
LOOP_MODELS = 4


def cell(every: int, device: str) -> Any:
    """The settings of the study; everything not named has its default."""
    from descentlab.config.tree import StudySpec
    from descentlab.observe.specs import Observe
    from descentlab.optim.specs import Sgd
    from descentlab.workloads.specs import Mlp, Mnist5k

    return StudySpec(
        study="benchmark",
        device=device,
        dataset=Mnist5k(),
        model=Mlp(),
        optimizer=Sgd(lr=LR),
        batch_size=BATCH,
        observe=Observe(every=every, evaluate_every=0),
    )


def ensemble(blocks: list[range], every: int, device: str) -> Callable[[int], int]:
    """A function that makes so many updates of every member of these blocks and returns the member-steps made."""
    from descentlab.engine.lockstep import Lockstep
    from descentlab.engine.program import BlockPlan, RunPlan
    from descentlab.launch.build import build_parts, survey

    settings = cell(every, device)
    route = survey(settings).route
    engines = []
    for replicates in blocks:
        runs = tuple(RunPlan(f"r{r}", r, 10**9, LR) for r in replicates)
        engines.append(Lockstep(BlockPlan(f"b{replicates.start}", 0, route, runs), build_parts(settings, route)))
    turns: list[Iterator[Any]] = [engine.run() for engine in engines]

    def advance(updates: int) -> int:
        for engine, turn in zip(engines, turns, strict=True):
            for _ in itertools.islice(turn, updates):
                pass
            engine.recorder.flush()
        return updates * sum(len(replicates) for replicates in blocks)

    return advance


def loop(device: str) -> Callable[[int], int]:
    """The same for plain models one after the other, on inputs that are pooled already."""
    import torch
    from minimal_loop import batch_indices, make_model, train

    from descentlab.launch.build import workload

    data = workload(cell(1, device)).data
    models = [make_model(seed).to(device) for seed in range(LOOP_MODELS)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in models]
    seeds = itertools.count()

    def advance(updates: int) -> int:
        for model, optimizer in zip(models, optimizers, strict=True):
            batches = batch_indices(len(data.x_train), updates, next(seeds))
            train(model, optimizer, data.x_train, data.y_train, batches)
        return updates * LOOP_MODELS

    return advance


def jax_ensemble(replicates: list[int]) -> Callable[[int], int]:
    """The same as one ``jit(vmap(scan))`` over an epoch; batches are drawn outside, from the streams of descentlab,
    and passed in as indices. The drawing is not part of the time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from descentlab.core.streams import Streams
    from descentlab.launch.build import workload

    data = workload(cell(1, "cpu")).data
    x, y = jnp.asarray(data.x_train.numpy()), jnp.asarray(data.y_train.numpy())

    def loss(p: Any, bx: Any, by: Any) -> Any:
        w1, b1, w2, b2 = p
        z = jax.nn.log_softmax(jax.nn.silu(bx @ w1 + b1) @ w2 + b2)
        return -jnp.take_along_axis(z, by[:, None], axis=1).mean()

    def step(p: Any, index: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(p, x[index], y[index])
        return tuple(a - LR * g for a, g in zip(p, grads, strict=True)), value

    shapes, members = [(36, 8), (8,), (8, 10), (10,)], len(replicates)
    params = tuple(0.1 * jax.random.normal(jax.random.key(i), (members, *s)) for i, s in enumerate(shapes))
    compiled = jax.jit(jax.vmap(lambda p, order: jax.lax.scan(step, p, order)))
    order = Streams(0).permutation("order", len(x), replicate=np.array(replicates))[:, : EPOCH * BATCH]
    held = {"params": params, "order": jnp.asarray(order.astype(np.int32).reshape(members, EPOCH, BATCH))}

    def advance(updates: int) -> int:
        epochs = max(1, updates // EPOCH)
        for _ in range(epochs):
            held["params"], losses = compiled(held["params"], held["order"])
            losses.block_until_ready()
        return epochs * EPOCH * members

    return advance


def serve(link: Connection, blocks: list[range], device: str, with_jax: bool, all_members: int) -> None:
    """A worker process: builds its contestants, warms them up, then runs what it is told and says what it did."""
    import torch

    torch.set_num_threads(1)
    contestants = {
        "descentlab": ensemble(blocks, EPOCH, device),
        "descentlab_observed": ensemble(blocks, 1, device),
        "loop": loop(device),
    }
    if with_jax:
        contestants["jax_split"] = jax_ensemble([r for block in blocks for r in block])
        if all_members:
            contestants["jax"] = jax_ensemble(list(range(all_members)))
    for advance in contestants.values():
        advance(WARM_UP)
    link.send("ready")
    while (order := link.recv()) is not None:
        name, updates = order
        started = time.process_time()
        steps = contestants[name](updates)
        link.send((steps, time.process_time() - started))
    link.close()


CPU_MICROSECONDS: dict[str, list[float]] = {}  # per member-step; unlike wall time, hardly changed by other programs


def measure(links: list[Connection], name: str, updates: int) -> float:
    """Microseconds of wall time per member-step when all these workers run ``name`` at once."""
    started = time.perf_counter()
    for link in links:
        link.send((name, updates))
    answers = [link.recv() for link in links]
    elapsed, steps = time.perf_counter() - started, sum(made for made, _ in answers)
    CPU_MICROSECONDS.setdefault(name, []).append(1e6 * sum(cpu for _, cpu in answers) / steps)
    return 1e6 * elapsed / steps


def contest(arguments: argparse.Namespace, with_jax: bool) -> tuple[dict[str, list[float]], int]:
    """(microseconds per member-step of every contestant and repeat, number of processes)."""
    from descentlab.engine.program import MEMBERS_PER_BLOCK

    os.environ.update(ONE_THREAD)
    size = MEMBERS_PER_BLOCK["vmap"]
    blocks = [range(a, min(a + size, arguments.members)) for a in range(0, arguments.members, size)]
    count = min(cores(), len(blocks))
    context = multiprocessing.get_context("spawn")
    links, workers = [], []
    for i in range(count):
        ours, theirs = context.Pipe()
        everyone = arguments.members if i == 0 else 0
        worker = context.Process(target=serve, args=(theirs, blocks[i::count], arguments.device, with_jax, everyone))
        worker.start()
        theirs.close()
        links.append(ours)
        workers.append(worker)
    for link in links:
        assert link.recv() == "ready"
    contestants: dict[str, Callable[[], float]] = {
        "descentlab": lambda: measure(links, "descentlab", EPOCH),
        "loop": lambda: measure(links[:1], "loop", 2 * EPOCH),
        "descentlab_observed": lambda: measure(links, "descentlab_observed", EPOCH),
        "loop_all_cores": lambda: measure(links, "loop", 2 * EPOCH),
    }
    if with_jax:
        contestants["jax"] = lambda: measure(links[:1], "jax", EPOCH)
        contestants["jax_split"] = lambda: measure(links, "jax_split", EPOCH)
    measured = alternate(contestants, 3 if arguments.quick else 9)
    for link, worker in zip(links, workers, strict=True):
        link.send(None)
        worker.join()
    return measured, count


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="3 repeats instead of 9; under a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--members", type=int, default=1000)
    arguments = parser.parse_args()
    with_jax = importlib.util.find_spec("jax") is not None
    measured, processes = contest(arguments, with_jax)
    import torch

    ours = measured["descentlab"]
    ratios = {
        "vs_loop": median_ratio(measured["loop"], ours),
        "vs_loop_all_cores": median_ratio(measured["loop_all_cores"], ours),
        "vs_loop_observed": median_ratio(measured["loop"], measured["descentlab_observed"]),
        "vs_jax": median_ratio(measured["jax"], ours) if with_jax else None,
        "vs_jax_all_cores": median_ratio(measured["jax_split"], ours) if with_jax else None,
    }
    emit(
        "ensemble",
        ratios,
        len(ours),
        microseconds={name: spread(values) for name, values in measured.items()},
        cpu_microseconds={name: spread(values) for name, values in CPU_MICROSECONDS.items()},
        members=arguments.members,
        processes=processes,
        observe={"descentlab": {"every": EPOCH, "evaluate_every": 0}, "descentlab_observed": {"every": 1}},
        device=arguments.device,
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
