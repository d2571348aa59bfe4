"""The recovery study through ``descentlab run`` against the same runs trained one at a time with the minimal loop.

    python benchmarks/recovery.py [--quick]

descentlab: the whole command in a process of its own: planning, worker processes, training, every standard observable
at every step, the test set every 10 steps, table and report. Loop: a process of its own too, one thread; for every
case and optimizer the functions of examples/minimal_loop.py train to the step of the planned fault, fork a twin, hit
16 elements of the first layer's output, and train both on, with the test loss every 10 steps; nothing is written.
Cases, fault steps, optimizers and their settings are those of the study. Ratios are time of the other over time of
descentlab:

- ``vs_loop_mlp``, ``vs_loop_cnn``: the default study (4 optimizers, 10 cases) with MLP-386 and with its own network.
- ``vs_loop_mlp_many``: MLP-386 with more cases (``many_cases``); the loop runs 10 of them, and the time beyond its
  start is scaled to the steps of all.
- ``…_training``: without what does not grow with the study: the loop without its start, descentlab without what the
  same command takes for one case of one step.
- ``shared_prefix_vs_scratch``: six types of fault that hit at the same late step, with the fault-free prefix trained
  once for all and their twin, over every run trained from its first step (``share_prefix=false``).
- ``default_prefix_vs_scratch``: the same for the default study, whose only fork is that of a run and its twin. It
  follows from counting steps; nothing is timed.

``--quick``: the network and the shared prefix in smaller studies (2 cases, 2 optimizers), once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ONE_THREAD, alternate, emit, median_ratio, spread

ROOT = Path(__file__).parent.parent
LOOP_CASES = 10
FAULTS = "RD,N16_RD,RBFLIP,WT,INPUT,ZERO"


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": paths}


def ours(settings: Sequence[str], out: Path) -> float:
    """Seconds that ``descentlab run`` takes into a fresh folder."""
    command = [sys.executable, "-m", "descentlab.cli", "run", "recovery", *settings, "--out", str(out), "-y"]
    started = time.perf_counter()
    subprocess.run([*command, "--overwrite"], env=environment(), check=True, capture_output=True)
    return time.perf_counter() - started


def loop(run: Path) -> dict[str, float]:
    """Seconds that the loop takes for the runs of this directory, in all and training only (scaled to all cases)."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--loop", str(run)]
    said = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True).stdout
    took = time.perf_counter() - started
    found = json.loads(said)
    training = found["seconds"] * found["all_steps"] / found["steps"]
    return {"all": took - found["seconds"] + training, "training": training}


def serve_loop(run: Path) -> None:
    """Train the runs of a directory one at a time and print what it took."""
    import torch

    from descentlab.config.tree import StudySpec
    from descentlab.core.streams import Streams
    from descentlab.launch.build import workload
    from descentlab.studies.recovery.spec import RecoverySpec

    torch.set_num_threads(1)
    resolved = [json.loads(line) for line in (run / "resolved.jsonl").read_text().splitlines()]
    cells: dict[int, StudySpec] = {r["cell"]: RecoverySpec.model_validate(r["settings"]) for r in resolved}
    campaign = [json.loads(line) for line in (run / "campaign.jsonl").read_text().splitlines()]
    work = workload(next(iter(cells.values())))
    steps, started = 0, time.perf_counter()
    for case in campaign[:LOOP_CASES]:
        for cell in cells.values():
            steps += train_case(work.module(Streams(0), case["case"]), cell, case, work.data)
    seconds = time.perf_counter() - started
    every = sum(case["step"] + 2 * (1 + cell.recovery_steps) for case in campaign for cell in cells.values())  # type: ignore[attr-defined]
    print(json.dumps({"seconds": seconds, "steps": steps, "all_steps": every}))


def train_case(model: Any, cell: Any, case: dict[str, Any], data: Any) -> int:
    """One case with one optimizer, and its twin; the number of updates made."""
    import torch
    from minimal_loop import batch_indices, fork, hit, test_loss, train
    from torch import nn

    at, after = case["step"], cell.recovery_steps
    settings = {k: v for k, v in cell.optimizer.model_dump().items() if k != "name" and v is not None}
    kind = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}[cell.optimizer.name]
    optimizer = getattr(torch.optim, kind)(model.parameters(), **settings)
    batches = batch_indices(len(data.x_train), at + 1 + after, seed=case["case"])

    def go(net: Any, rule: Any, first: int, last: int) -> None:
        for a in range(first, last, 10):
            net.train()
            train(net, rule, data.x_train, data.y_train, batches[a : min(a + 10, last)])
            test_loss(net.eval(), data.x_test, data.y_test)

    go(model, optimizer, 0, at)
    twin, twin_rule = fork(model, optimizer)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    if isinstance(layer, nn.Linear):
        with hit(layer, 0, 16, 1e5):
            go(model, optimizer, at, at + 1)
    else:
        handle = layer.register_forward_hook(spoil)
        go(model, optimizer, at, at + 1)
        handle.remove()
    go(model, optimizer, at + 1, at + 1 + after)
    go(twin, twin_rule, at, at + 1 + after)
    return at + 2 * (1 + after)


def spoil(module: Any, args: Any, out: Any) -> Any:
    """As ``hit`` of the minimal loop, for a convolution: 16 wrong values forward, the identity backward."""
    wrong = out.detach().clone()
    wrong.view(-1)[:16] = 1e5
    return out + (wrong - out).detach()


def step_ratio(run: Path) -> float:
    """Member-steps of every run from scratch over those made with shared prefixes."""
    plan = json.loads((run / "plan.json").read_text())["blocks"]
    return round(sum(p["stop"] for b in plan for p in b["plans"]) / sum(b["member_steps"] for b in plan), 2)


def studies(quick: bool) -> dict[str, list[str]]:
    """Name -> settings of every command that is timed."""
    small = ["cases=2", "optimizer=adam,sgd"] if quick else []
    late = ["cases=2", "optimizer=adam", f"fault={FAULTS}", f"fault.step={200 if quick else 600}"]
    late.append(f"recovery_steps={20 if quick else 60}")
    return {
        "mlp": ["model=mlp"],
        "mlp_many": ["model=mlp", f"cases={200 if quick else 1000}"],
        "cnn": small,
        "start": ["model=mlp", "cases=1", "recovery_steps=1", "fault.step=0"],
        "shared": late,
        "scratch": [*late, "share_prefix=false"],
    }


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="smaller studies, once; about a minute")
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        return serve_loop(arguments.loop)
    settings = studies(arguments.quick)
    training: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in settings}

        def looped(name: str) -> float:
            took = loop(runs[name])
            training.setdefault(name, []).append(took["training"])
            return took["all"]

        turns: dict[str, Any] = {}
        for name in ("mlp", "mlp_many", "cnn"):
            ours(settings[name], runs[name]) if not arguments.quick else None  # warm: files in the cache, C built
            turns[name] = lambda name=name: ours(settings[name], runs[name])
            turns[f"{name}_loop"] = lambda name=name: looped(name)
        for name in ("start", "shared", "scratch"):
            turns[name] = lambda name=name: ours(settings[name], runs[name])
        measured = alternate(turns, 1 if arguments.quick else 3)
        ratios: dict[str, float | None] = {}
        for name in ("mlp", "mlp_many", "cnn"):
            ratios[f"vs_loop_{name}"] = median_ratio(measured[f"{name}_loop"], measured[name])
            rest = [max(a - b, 1e-9) for a, b in zip(measured[name], measured["start"], strict=True)]
            ratios[f"vs_loop_{name}_training"] = median_ratio(training[name], rest)
        ratios["shared_prefix_vs_scratch"] = median_ratio(measured["scratch"], measured["shared"])
        ratios["default_prefix_vs_scratch"] = step_ratio(runs["mlp"])
        steps = step_ratio(runs["shared"])
    emit(
        "recovery",
        ratios,
        len(measured["mlp"]),
        seconds={name: spread(values) for name, values in measured.items()},
        settings={name: " ".join(values) for name, values in settings.items()},
        shared_prefix_steps=steps,
        loop_cases=LOOP_CASES,
        measured="whole commands, process start and report included; …_training without them",
    )


if __name__ == "__main__":
    main()
