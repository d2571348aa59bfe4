"""Workers on a virtual clock, and as processes: python benchmarks/asynchrony.py [--quick]

- ``virtual_vs_plain_steps``: time of sequential steps of the lockstep engine over the time of the same number of
  updates of five asynchronous workers on the virtual clock, for one LeNet5, the published network, batch 32. Both draw,
  compute, update and record a row every fifth step, as the study does; the latter also keep old versions and measure
  staleness. ``virtual_vs_plain_steps_members``: the same for 100 members of MLP-386, where a step is so short that
  keeping versions and measuring staleness shows.
- ``members_vs_one_by_one``: 100 asynchronous MLP members one after the other over all of them in one ensemble.
- ``process_vs_torch_rpc``, ``process_vs_ray``: updates per second, see process_engine.py; null with ``--no-process``
  or where the other is not installed.

Contestants take turns in one process with one thread; ratios are medians over repeats.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ONE_THREAD, alternate, emit, median_ratio, spread

os.environ.update(ONE_THREAD)
ROOT = Path(__file__).parent.parent
WORKERS, MEMBERS = 5, 100
Contestant = Callable[[], float]


def engine(model: str, kind: str, replicates: range, steps: int) -> Any:
    """An engine of the asynchrony study that stands before its first update."""
    import torch

    from descentlab.cluster.pace import Pace
    from descentlab.cluster.schemes import Waiting
    from descentlab.engine.lockstep import Lockstep
    from descentlab.engine.program import BlockPlan, RunPlan
    from descentlab.engine.virtual import Virtual
    from descentlab.launch.build import build_parts
    from descentlab.studies.asynchrony.spec import AsynchronySpec

    torch.set_num_threads(1)
    workers = 1 if kind == "plain" else WORKERS
    observe = {"every": 5, "evaluate_every": 0}
    cell = AsynchronySpec(model=model, workers=workers, evaluate_on=["test"], observe=observe)
    route = "vmap" if model == "mlp" else "member"
    parts = build_parts(cell, route)
    lr = float(cell.optimizer.lr) / 10  # type: ignore[attr-defined]
    plan = BlockPlan("k", 0, route, tuple(RunPlan(f"r{r}", r, steps, lr) for r in replicates))
    if kind == "plain":
        return Lockstep(plan, parts)
    return Virtual(plan, parts, timeline=Waiting(Pace(cell.delay.build(), 0.005)))


def stepping(model: str, kind: str, replicates: range, steps: int, repeats: int) -> Contestant:
    """Seconds of the next ``steps`` updates, after a warm-up of 20."""
    turns = engine(model, kind, replicates, 20 + steps * (repeats + 1)).run()
    for _ in range(20):
        next(turns)

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            next(turns)
        return time.perf_counter() - begin

    return run


def one_by_one(steps: int, repeats: int, sample: int) -> Contestant:
    """Seconds of ``steps`` updates of 100 members by themselves, measured on a sample of them."""
    each = [stepping("mlp", "virtual", range(r, r + 1), steps, repeats) for r in range(sample)]
    return lambda: sum(run() for run in each) * MEMBERS / sample


def virtual(quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """The two ratios of the virtual clock, and what they come from."""
    repeats = 7 if quick else 15
    steps = {"mlp": 100 if quick else 200, "lenet5": 40 if quick else 100}
    many = range(MEMBERS)
    contestants: dict[str, Contestant] = {
        "mlp_plain": stepping("mlp", "plain", many, steps["mlp"], repeats),
        "mlp_virtual": stepping("mlp", "virtual", many, steps["mlp"], repeats),
        "lenet5_plain": stepping("lenet5", "plain", range(1), steps["lenet5"], repeats),
        "lenet5_virtual": stepping("lenet5", "virtual", range(1), steps["lenet5"], repeats),
        "one_by_one": one_by_one(steps["mlp"], repeats, 3),
    }
    seconds = alternate(contestants, repeats)
    found = {
        "virtual_vs_plain_steps": median_ratio(seconds["lenet5_plain"], seconds["lenet5_virtual"]),
        "virtual_vs_plain_steps_members": median_ratio(seconds["mlp_plain"], seconds["mlp_virtual"]),
        "members_vs_one_by_one": median_ratio(seconds["one_by_one"], seconds["mlp_virtual"]),
    }
    per_update = {
        name: spread([1e6 * s / steps[name.split("_")[0]] for s in values])
        for name, values in seconds.items()
        if name != "one_by_one"
    }
    return found, {"us_per_update": per_update, "steps": steps}


def processes(quick: bool) -> dict[str, float]:
    """The ratios of process_engine.py, in a process of its own; empty where it cannot run."""
    file = Path(__file__).with_name("process_engine.py")
    if not file.exists():
        return {}
    command = [sys.executable, str(file), *(["--quick"] if quick else [])]
    paths = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {}
    return dict(json.loads(done.stdout.splitlines()[-1])["ratios"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="within a minute")
    options.add_argument("--no-process", action="store_true", help="the virtual clock alone")
    given = options.parse_args()
    ratios, details = virtual(given.quick)
    real = {} if given.no_process else processes(given.quick)
    details["ray_installed"] = importlib.util.find_spec("ray") is not None
    emit("asynchrony", {**ratios, **real}, 7 if given.quick else 15, **details)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
