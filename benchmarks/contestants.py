"""The programs that the benchmarks compare: blocks of descentlab, plain loops, and JAX.

Each function builds one and returns ``advance(updates)``, which makes so many updates of every model and returns the
member-steps made. What is measured on the way: descentlab's default is every standard observable (loss, accuracy,
gradient and update norms, non-finite counts) at every step and the test set every 10 steps, and rows written as
``run`` writes them. The loops measure the loss at every step and the test loss every 10, nothing else. JAX measures
loss, both norms and both non-finite counts at every step and the test loss every 10, and keeps them in memory.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

BATCH, LR, EPOCH = 64, 0.1, 60  # 3,840 training images make 60 batches
EVALUATE = 10
LOOP_MODELS = 4
Advance = Callable[[int], int]
STORE_S = [0.0]  # processor seconds this process has spent on making and writing rows


def cell(model: str = "mlp", *, observed: bool = True, device: str = "cpu") -> Any:
    """The settings of the study; everything not named has its default. Not ``observed``: a row every epoch, no test
    set."""
    from descentlab.config.tree import StudySpec
    from descentlab.observe.specs import Observe
    from descentlab.optim.specs import Sgd
    from descentlab.workloads import specs

    models = {"mlp": specs.Mlp, "cnn": specs.SmallCnn, "lenet5": specs.Lenet5}
    return StudySpec(
        study="benchmark",
        device=device,
        dataset=specs.Mnist5k(),
        model=models[model](),
        optimizer=Sgd(lr=LR),
        batch_size=BATCH,
        observe=Observe() if observed else Observe(every=EPOCH, evaluate_every=0),
    )


def blocks(members: int, first: int, count: int, size: int) -> list[range]:
    """Replicates of the blocks that process ``first`` of ``count`` runs."""
    return [range(a, min(a + size, members)) for a in range(0, members, size)][first::count]


def ensemble(packed: list[range], settings: Any) -> Callable[..., int]:
    """descentlab: the engine and its parts as ``run`` builds them, rows written as ``run`` writes them.

    ``advance(updates, first)`` moves the first blocks only.
    """
    from descentlab.engine.lockstep import Lockstep
    from descentlab.engine.program import BlockPlan, RunPlan
    from descentlab.launch.build import build_parts, survey
    from descentlab.launch.usage import Usage
    from descentlab.store import BlockWriter, RunDirectory

    usage = Usage()
    folder = tempfile.TemporaryDirectory()
    directory = RunDirectory.create(Path(folder.name) / "run", "benchmark", "study: benchmark\n")
    route = survey(settings).route
    turns: list[tuple[Any, Iterator[Any], Any]] = []
    for replicates in packed:
        runs = tuple(RunPlan(f"{r:012x}", r, 10**9, LR) for r in replicates)
        engine = Lockstep(BlockPlan(f"b{replicates.start}", 0, route, runs), build_parts(settings, route))
        writer = BlockWriter(directory, engine.plan.key)
        writer.resume()
        turns.append((engine, engine.run(), writer))

    def advance(updates: int, first: int | None = None) -> int:
        for engine, turn, writer in turns[:first]:
            for _ in itertools.islice(turn, updates):
                pass
            started = time.process_time()
            columns, _ = engine.recorder.flush()
            if columns:
                writer.rows(usage.beside(columns, engine.recorder.now()))
            writer.spill()
            STORE_S[0] += time.process_time() - started
        return updates * sum(len(replicates) for replicates in packed[:first])

    advance.folder = folder  # type: ignore[attr-defined]  # lives as long as the function
    return advance


def loop(settings: Any, *, evaluate: bool = True, models: int = LOOP_MODELS) -> Advance:
    """Plain models one after the other with ``train`` of examples/minimal_loop.py."""
    import torch
    from minimal_loop import batch_indices, make_model, test_loss, train

    from descentlab.core.streams import Streams
    from descentlab.launch.build import workload

    work = workload(settings)
    data, device = work.data, work.device
    plain = settings.model.name == "mlp"
    nets = [make_model(r).to(device) if plain else work.module(Streams(0), r) for r in range(models)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=LR) for net in nets]
    seeds = itertools.count()

    def advance(updates: int) -> int:
        for net, optimizer in zip(nets, optimizers, strict=True):
            batches = batch_indices(len(data.x_train), updates, next(seeds))
            for a in range(0, updates, EVALUATE if evaluate else updates):
                net.train()
                piece = batches[a : a + EVALUATE] if evaluate else batches
                train(net, optimizer, data.x_train, data.y_train, piece)
                if evaluate:
                    test_loss(net.eval(), data.x_test, data.y_test)
        return updates * models

    return advance


def jax_ensemble(replicates: list[int], *, observed: bool) -> Advance:
    """One ``jit(vmap(scan))`` over an epoch; batches are drawn outside, from the streams of descentlab, and passed in
    as indices. The drawing is not part of the time. Not ``observed``: the loss alone."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from descentlab.core.streams import Streams
    from descentlab.launch.build import workload

    data = workload(cell()).data
    x, y, x_test, y_test = (jnp.asarray(t.numpy()) for t in (data.x_train, data.y_train, data.x_test, data.y_test))

    def loss(p: Any, bx: Any, by: Any) -> Any:
        w1, b1, w2, b2 = p
        z = jax.nn.log_softmax(jax.nn.silu(bx @ w1 + b1) @ w2 + b2)
        return -jnp.take_along_axis(z, by[:, None], axis=1).mean()

    def norm(tree: Any) -> Any:
        return jnp.sqrt(sum(jnp.vdot(t, t) for t in tree))

    def bad(tree: Any) -> Any:
        return sum((~jnp.isfinite(t)).sum() for t in tree)

    def step(p: Any, index: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(p, x[index], y[index])
        after = tuple(a - LR * g for a, g in zip(p, grads, strict=True))
        if not observed:
            return after, value
        change = tuple(a - b for a, b in zip(after, p, strict=True))
        return after, (value, norm(grads), bad(grads), norm(change), bad(after))

    def ten(p: Any, order: Any) -> Any:
        after, seen = jax.lax.scan(step, p, order)
        return after, (seen, loss(after, x_test, y_test) if observed else None)

    shapes, members = [(36, 8), (8,), (8, 10), (10,)], len(replicates)
    params = tuple(0.1 * jax.random.normal(jax.random.key(i), (members, *s)) for i, s in enumerate(shapes))
    compiled = jax.jit(jax.vmap(lambda p, order: jax.lax.scan(ten, p, order)))
    order = Streams(0).permutation("order", len(x), replicate=np.array(replicates))[:, : EPOCH * BATCH]
    tens = (members, EPOCH // EVALUATE, EVALUATE, BATCH)
    held = {"params": params, "order": jnp.asarray(order.astype(np.int32).reshape(tens))}

    def advance(updates: int) -> int:
        epochs = max(1, updates // EPOCH)
        for _ in range(epochs):
            held["params"], seen = compiled(held["params"], held["order"])
            jax.block_until_ready(seen)
        return epochs * EPOCH * members

    return advance
