"""What detection and re-execution cost on ResNet-18 with BatchNorm, beside the published figures.

    python benchmarks/overheads.py [--quick] [--batch-size 128] [--optimizer adam]

Random images of CIFAR-10's shape, Adam, one member, one thread, float32; every number comes from the engine that the
studies run on, with ``arm: reexecute`` in its default settings (bounds on all slots and on BatchNorm's variance).

Ratios are shares of a training step in percent, unless they say otherwise:

- ``detection_arithmetic``: comparisons the check makes (two per watched element) over the floating-point operations of
  forward and backward pass as torch's counter counts them (a multiply-add is two); bound .025, published < .025.
- ``detection_arithmetic_published``: the same for the published check (first moments of convolution kernels, one side).
- ``detection_time``: amplified repetition: the check runs ``K`` extra times after every step, the time of these over
  K and over the time of the step. Published .016 (on another machine, with its one-sided check).
- ``ring_time``: keeping the state before every step (weights, buffers, slots: one copy), by the same method; bound .5.
- ``reexecution_steps``: steps made again per detection, counted (published: 2); ``reexecution_time``: the time of one
  detection with everything that follows from it, in steps (with --quick at batch 16).
- ``reexecution_amortised``: detection each ``RATE``-th step as in the published demonstration would cost
  ``100 * reexecution_time / RATE``; ``…_per_1000``: at one detection per 1,000 steps. The published .12 is the
  undoing alone (its re-executed steps are not counted), so ``undo_time`` is set beside it: rewinding without the steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from common import ONE_THREAD, emit

RATE = 10
QUICK_BATCH = 16  # of the re-execution with --quick
PUBLISHED = {"detection_time": 0.016, "detection_bound": 0.025, "recovery_time": 0.12, "recovery_bound": 0.15}


def noise(n: int = 1024) -> Any:
    """Random images of CIFAR-10's shape."""
    import torch

    from descentlab.workloads.base import Data

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, 32, 32, generator=generator), torch.randint(10, (n,), generator=generator)
    a, b = n - 16, n - 8
    parts = (x[:a], y[:a], x[a:b], y[a:b], x[b:], y[b:])
    return Data("noise", *parts, classes=10, source="generated", licence="none needed")


def engine_of(batch_size: int, optimizer: str, steps: int, hit: int | None) -> Any:
    """One member; with a forward fault of 1e12 at step ``hit``."""
    from descentlab.engine.lockstep import Lockstep
    from descentlab.engine.program import BlockPlan, RunPlan
    from descentlab.launch.build import build_parts
    from descentlab.studies.recovery.spec import RecoverySpec

    fault = {"name": "N16_RD", "value_mode": "fixed", "value": 1e12, "step": hit or 0, "layer": "stem.0"}
    cell = RecoverySpec(
        dataset={"name": "overheads:noise"},
        model="resnet18",
        optimizer={"name": optimizer, "lr": 1e-3},
        arm="reexecute",
        fault=fault,
        batch_size=batch_size,
        observe={"evaluate_every": 0, "every": 10**6},
    )
    parts = build_parts(cell, "member")
    planned = ()
    if hit is not None:
        assert parts.perturbation is not None
        draw = {"replicate": 0, "steps_per_epoch": parts.sampler.steps_per_epoch}
        planned = (parts.perturbation.plan(0, parts.operations, parts.streams, **draw),)
    run = RunPlan("run", 0, steps, 1e-3, planned, hit is not None)
    return Lockstep(BlockPlan("block", 0, "member", (run,)), parts)


def timed(call: Callable[[], Any], times: int = 1) -> float:
    """Seconds of processor time per call (other programs on the machine do not count)."""
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def step_operations(engine: Any) -> int:
    """Floating-point operations of one forward and backward pass of the batch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module = engine.parts.single.module
    x, batch = engine.parts.train[0][:2], engine.parts.sampler.batch_size  # it grows in proportion to the batch
    for name, p in engine.state.params.items():
        owner, _, key = name.rpartition(".")
        module.get_submodule(owner)._parameters[key] = torch.nn.Parameter(p[0].clone())
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    return int(counter.get_total_flops()) * batch // len(x)


def steps_of(engine: Any, count: int, repeats: int) -> tuple[list[float], list[float], list[float]]:
    """Processor seconds of ``count`` updates without check and copy, of a check and of a copy, measured after each."""
    from descentlab.engine.guard import Guard

    plain, checks, rings = [], [], []
    for i in range(count):
        whole = timed(engine.update)
        arm, state = engine.parts.arm, engine.state
        checks.append(timed(lambda arm=arm, state=state: arm.check(state), repeats))
        rings.append(timed(lambda: Guard.keep(engine.guard, engine), repeats))
        plain.append(whole - (checks[-1] + rings[-1] if i else 0.0))  # before the first update there are no slots
    return plain, checks, rings


def rewound(engine: Any, step: float, check: float, ring: float) -> tuple[int, float]:
    """The next update meets its fault: steps made again, and the time of that in steps."""
    whole = timed(engine.update)
    columns, _ = engine.recorder.flush()
    taken_back = [n for n in columns["rewound"].to_list() if n]
    if taken_back != [2]:
        raise SystemExit(f"the fault was not noticed: {taken_back}")
    return taken_back[0], (whole - step - check - ring) / step


def measure(arguments: argparse.Namespace) -> None:
    """Run, time, print."""
    from descentlab.core.tree import leaves
    from descentlab.engine.guard import copy_into
    from descentlab.perturb.arms import watched

    count, repeats = (5, 2) if arguments.quick else (9, 10)
    engine = engine_of(arguments.batch_size, arguments.optimizer, count + 1, None if arguments.quick else count)
    plain, checks, rings = steps_of(engine, count, repeats)
    undo = timed(lambda: copy_into(engine.guard.ring[0].state, engine.state), repeats)
    costs = tuple(statistics.median(values) for values in (plain, checks, rings))
    other = engine
    if arguments.quick:  # three steps less at the full batch: what re-execution costs in steps hardly depends on it
        other = engine_of(QUICK_BATCH, arguments.optimizer, 4, 3)
        costs = tuple(statistics.median(values[1:]) for values in steps_of(other, 3, 1))
    again_steps, again = rewound(other, *costs)
    step, state = statistics.median(plain), engine.state
    flops = step_operations(engine)
    elements = sum(t.numel() for tensors in watched(state, "all").values() for t in tensors)
    published = sum(t.numel() for tensors in watched(state, "published").values() for t in tensors)
    share = {name: 100 * statistics.median(v) / step for name, v in (("check", checks), ("ring", rings))}
    ratios = {
        "detection_arithmetic": 100 * 2 * elements / flops,
        "detection_arithmetic_published": 100 * published / flops,
        "detection_time": share["check"],
        "ring_time": share["ring"],
        "undo_time": 100 * undo / step,
        "reexecution_steps": float(again_steps),
        "reexecution_time": again,
        "reexecution_amortised": 100 * again / RATE,
        "reexecution_amortised_per_1000": 100 * again / 1000,
    }
    emit(
        "overheads",
        {name: float(f"{value:.3g}") for name, value in ratios.items()},
        len(plain),
        batch_size=arguments.batch_size,
        optimizer=arguments.optimizer,
        step_s=round(step, 3),
        check_ms=round(1000 * statistics.median(checks), 1),
        ring_ms=round(1000 * statistics.median(rings), 1),
        state_mb=round(sum(t.numel() * t.element_size() for t in leaves(state.state_dict())) / 1e6),
        step_gflop=round(flops / 1e9, 1),
        repeats=repeats,
        rate=RATE,
        published_percent=PUBLISHED,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five steps; ends within a minute")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--optimizer", default="adam", choices=("adam", "adamw", "sgd", "rmsprop"))
    arguments = parser.parse_args()
    os.environ.update(ONE_THREAD)
    import torch

    torch.set_num_threads(1)
    measure(arguments)


if __name__ == "__main__":
    main()
