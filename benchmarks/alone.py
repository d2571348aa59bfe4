"""What the studies are compared with: runs trained one at a time by the functions of examples/minimal_loop.py.

``Baseline`` asks for it; ``python benchmarks/alone.py`` answers, in a process of its own with one thread. For a planned
fault it trains to the step of the fault, forks a twin, hits 16 elements of the first layer's output, and trains both
on, with the loss of every step and the test loss every 10; nothing is written. Cases, fault steps, optimizers and
their settings are those of a run directory; for MLP-386 the pooled images come from one file, the fastest start there
is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ONE_THREAD

ROOT = Path(__file__).parent.parent
KINDS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}
Job = dict[str, Any]  # model, optimizer, its settings, case, step of the fault, updates after it


def environment() -> dict[str, str]:
    """One thread per process, and the package and the examples on the path."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": paths}


def command(settings: Sequence[str], out: Path) -> dict[str, float]:
    """Seconds of ``descentlab run recovery`` into a fresh folder: ``command``, all of it; ``training``, from the plan
    on the disk to the table on the disk, which is every update, measurement and row but no start and no report."""
    told = [sys.executable, "-m", "descentlab.cli", "run", "recovery", *settings, "--out", str(out), "-y"]
    started = time.perf_counter()
    done = subprocess.run([*told, "--overwrite"], env=environment(), capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(told)}: {done.stderr}")
    return {"command": took, "training": _training(out)}


def train(settings: Sequence[str], out: Path) -> float:
    """As ``training`` of :func:`command`, of a study whose report is not written."""
    told = [sys.executable, __file__, "train", str(out), *settings]
    done = subprocess.run(told, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(told)}: {done.stderr}")
    return _training(out)


def train_together(studies: Mapping[str, Sequence[str]], folder: Path) -> dict[str, float]:
    """As :func:`train`, of several studies one after the other in one process: name -> seconds."""
    told = [sys.executable, __file__, "together", str(folder), json.dumps(dict(studies))]
    done = subprocess.run(told, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(told)}: {done.stderr}")
    return {name: _training(folder / name) for name in studies}


def _training(out: Path) -> float:
    started, ended = ((out / name).stat().st_mtime for name in ("plan.json", "table.parquet"))
    return ended - started


def study(settings: Sequence[str], out: Path, launcher: str = "pool") -> None:
    """The recovery study without its report."""
    from descentlab.config.resolve import resolve
    from descentlab.launch import api
    from descentlab.store import RunDirectory, refresh

    resolved = resolve("recovery", settings, limit=None)
    if api.run(resolved, out, yes=True, launcher=launcher, overwrite=True, with_report=False):
        raise RuntimeError("a block failed")
    refresh(RunDirectory.open(out))


def jobs(run: Path) -> list[Job]:
    """One job per planned fault and cell of a run directory."""
    resolved = [json.loads(line) for line in (run / "resolved.jsonl").read_text().splitlines()]
    cells = {row["cell"]: row["settings"] for row in resolved}
    found = []
    for case in (json.loads(line) for line in (run / "campaign.jsonl").read_text().splitlines()):
        for cell in (cells[number] for number in case["cells"]):
            settings = {k: v for k, v in cell["optimizer"].items() if v is not None}
            name = KINDS[settings.pop("name")]
            job = {"model": cell["model"]["name"], "optimizer": name, "settings": settings, "case": case["case"]}
            found.append({**job, "step": case["step"], "after": 1 + cell["recovery_steps"]})
    return found


def updates(job: Job) -> int:
    """Updates that one job makes: to the fault, then run and twin."""
    return job["step"] + 2 * job["after"]


def member_steps(run: Path) -> int:
    """Updates that descentlab makes for a run directory, shared prefixes counted once."""
    return sum(block["member_steps"] for block in json.loads((run / "plan.json").read_text())["blocks"])


def from_scratch(run: Path) -> int:
    """Updates if every run is trained from its first step, and one twin for all faults of a case and optimizer."""
    blocks = json.loads((run / "plan.json").read_text())["blocks"]
    plans = [(b["key"], p) for b in blocks for p in b["plans"]]
    twins = {(key, p["replicate"], p["lr"], p["variant"]): p["stop"] for key, p in plans if not p["perturbed"]}
    return sum(p["stop"] for _, p in plans if p["perturbed"]) + sum(twins.values())


def evenly(items: Sequence[Job], most: int) -> list[Job]:
    """At most so many of the items, spread over all."""
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(min(most, len(items)))]


@dataclass
class Baseline:
    """The same runs, one at a time. ``training``: seconds of the updates; ``command``: start and imports too, once;
    ``processes``: the seconds if every run (a twin too) is a process of its own, trained from its first step."""

    training: float
    command: float
    processes: float
    updates: int
    measured: int  # updates that were made; the rest is scaled
    second_per_update: float

    @classmethod
    def of(cls, run: Path, sample: int, folder: Path) -> Baseline:
        """Measured on ``sample`` jobs spread over all and scaled by the number of updates."""
        everything = jobs(run)
        chosen = evenly(everything, sample)
        if chosen[0]["model"] == "mlp":
            save_data(folder / "data.npz")
        (folder / "jobs.json").write_text(json.dumps(chosen))
        started = time.perf_counter()
        told = [sys.executable, __file__, "loop", str(folder)]
        said = subprocess.run(told, env=environment(), check=True, capture_output=True, text=True).stdout
        took = time.perf_counter() - started
        seconds = json.loads(said)["seconds"]
        made, every = sum(map(updates, chosen)), sum(map(updates, everything))
        start, each = took - seconds, seconds / made
        alone = sum(2 * (start + each * (job["step"] + job["after"])) for job in everything)
        return cls(each * every, start + each * every, alone, every, made, each)


def save_data(path: Path) -> None:
    """mnist5k as MLP-386 sees it."""
    if path.exists():
        return
    import numpy as np
    from contestants import cell

    from descentlab.launch.build import workload

    data = workload(cell()).data
    arrays = (data.x_train, data.y_train, data.x_test, data.y_test)
    np.savez(path, *(a.numpy() for a in arrays))


def serve(folder: Path) -> None:
    """Make the jobs of a folder and print what it took without the start."""
    import numpy as np
    import torch
    from minimal_loop import make_model

    torch.set_num_threads(1)
    todo = json.loads((folder / "jobs.json").read_text())
    if todo[0]["model"] == "mlp":
        held = np.load(folder / "data.npz")
        data, build = tuple(torch.from_numpy(held[name]) for name in held.files), make_model
    else:
        from contestants import cell

        from descentlab.core.streams import Streams
        from descentlab.launch.build import workload

        work = workload(cell("cnn"))
        data = (work.data.x_train, work.data.y_train, work.data.x_test, work.data.y_test)
        build = lambda case: work.module(Streams(0), case)  # noqa: E731
    model = build(0)
    torch.optim.SGD(model.parameters(), lr=0.1)  # imports torch._dynamo: part of the start
    started = time.perf_counter()
    for job in todo:
        train_case(build(job["case"]), job, data)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def train_case(model: Any, job: Job, data: Sequence[Any]) -> None:
    """One case with one optimizer, and its twin."""
    import torch
    from minimal_loop import batch_indices, fork, hit, test_loss, train
    from torch import nn

    x, y, x_test, y_test = data
    at, last = job["step"], job["step"] + job["after"]
    optimizer = getattr(torch.optim, job["optimizer"])(model.parameters(), **job["settings"])
    batches = batch_indices(len(x), last, seed=job["case"])

    def go(net: Any, rule: Any, first: int, end: int) -> None:
        for a in range(first, end, 10):
            net.train()
            train(net, rule, x, y, batches[a : min(a + 10, end)])
            test_loss(net.eval(), x_test, y_test)

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
    go(model, optimizer, at + 1, last)
    go(twin, twin_rule, at, last)


def spoil(module: Any, args: Any, out: Any) -> Any:
    """As ``hit`` of the minimal loop, for a convolution: 16 wrong values forward, the identity backward."""
    wrong = out.detach().clone()
    wrong.view(-1)[:16] = 1e5
    return out + (wrong - out).detach()


def main() -> None:
    """What the functions above ask of a process of its own."""
    what, where, *settings = sys.argv[1:]
    if what == "loop":
        serve(Path(where))
    elif what == "train":
        study(settings, Path(where))
    else:
        for name, own in json.loads(settings[0]).items():
            study(own, Path(where) / name, launcher="local")


if __name__ == "__main__":
    main()
