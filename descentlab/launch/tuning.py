"""Learning rates chosen before a comparison: each optimizer's best on a grid, by validation loss, without a fault.

The search is a run of the ``training`` study in a directory of its own beside that of the comparison, so it is
resumed like any other. Its choice is stored as ``tune.json`` in both, and the comparison is a study with these rates:
they are in its ``study.yaml`` and its run ids, and nothing of it depends on the search any more.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config.identity import canonical
from ..config.resolve import Resolved, resolve_settings
from ..core.errors import StudyError, UserError
from ..store import load
from ..store.atomic import write_text

FILE = "tune.json"
WORKLOAD = ("dataset", "model", "schedule", "sampler", "dtype")
SHARED = (*WORKLOAD, "device", "processes", "members_per_block", "checkpoint_s")


def asked(resolved: Resolved) -> bool:
    """Whether rates are to be chosen first."""
    return any(getattr(getattr(cell, "tune", None), "name", "none") != "none" for cell in resolved.cells)


def search_path(out: Path) -> Path:
    """Where the search for the study in ``out`` is run."""
    return out.with_name(f"{out.name}-tune")


def search(resolved: Resolved) -> Resolved:
    """The training study that tries the rates. Raises :class:`UserError` where there is no one search to be made."""
    cells = resolved.cells
    if isinstance(resolved.document.get("grid"), list):
        raise UserError("tune", "grid", "none beside a grid of sub-grids")
    for key in resolved.axes:
        room = key.partition(".")[0]
        if key in ("optimizer.lr", "baseline.lr") or room in ("tune", "seed", "batch_size", *SHARED):
            raise UserError("tune", "grid", f"none beside a grid over {key}")
    cell = cells[0]
    settings = cell.model_dump(mode="json")
    tune = cell.tune  # type: ignore[attr-defined]
    shared = {key: settings[key] for key in SHARED}
    if cell.sampler.name != "full":
        shared["batch_size"] = cell.batch_size
    length = {"steps": tune.steps, "replicates": tune.replicates, "seed": cell.seed + tune.seed_offset}
    look = {"evaluate_on": ["test", "validation"], "observe": {"every": tune.steps, "evaluate_every": 0}}
    grids = [
        {"optimizer": [block], "optimizer.lr": [float(f"{block['lr'] * factor:.4g}") for factor in tune.factors()]}
        for block in blocks(resolved)
    ]
    return resolve_settings({"study": "training", **shared, **length, **look, "grid": grids})


def blocks(resolved: Resolved) -> list[dict[str, Any]]:
    """The distinct optimizers of the comparison, baselines among them, as settings."""
    found = {}
    for cell in resolved.cells:
        settings = cell.model_dump(mode="json")
        for key in ("optimizer", "baseline"):
            block = settings.get(key)
            if block and block["name"] != "none":
                found[canonical(block)] = block
    return list(found.values())


def choose(request: Mapping[str, Any], path: Path, tolerance: float) -> dict[str, Any]:
    """tune.json from a finished search: per optimizer the rate of the smallest mean validation loss (of equal ones the
    smaller rate), a run without a finite loss counting as infinite, and whether all are within ``tolerance`` nats."""
    results = load(path)
    last = results.frame.sort("step").group_by("run").last()
    losses: dict[str, dict[float, list[float]]] = {}
    of = {str(run["id"]): run["settings"]["optimizer"] for run in results.runs}
    for run, loss in last.select("run", "validation_loss").iter_rows():
        block = of[run]
        rates = losses.setdefault(_without_rate(block), {})
        rates.setdefault(float(block["lr"]), []).append(loss if loss is not None and math.isfinite(loss) else math.inf)
    chosen = []
    for block in request["optimizers"]:
        means = {lr: sum(found) / len(found) for lr, found in sorted(losses[_without_rate(block)].items())}
        best = min(means, key=lambda lr: (means[lr], lr))
        if math.isinf(means[best]):
            raise StudyError(f"{path}: no learning rate tried for {block['name']} gives a finite validation loss")
        tried = [[lr, mean if math.isfinite(mean) else None] for lr, mean in means.items()]
        edge = best in (min(means), max(means)) and len(means) > 1
        chosen.append(
            {"optimizer": block, "lr": best, "validation_loss": means[best], "at_the_edge": edge, "tried": tried}
        )
    best_losses = [one["validation_loss"] for one in chosen]
    spread = max(best_losses) - min(best_losses)
    equal = {"spread": spread, "tolerance": tolerance, "equal": spread <= tolerance}
    return {"format": 1, "request": dict(request), "chosen": chosen, **equal}


def _without_rate(block: Mapping[str, Any]) -> str:
    return canonical({key: value for key, value in block.items() if key != "lr"})


def with_choice(resolved: Resolved, choice: Mapping[str, Any]) -> Resolved:
    """The comparison with the chosen rates and nothing left to tune."""
    rates = {canonical(one["optimizer"]): one["lr"] for one in choice["chosen"]}
    document = copy.deepcopy(resolved.document)
    document.pop("tune", None)
    grid = dict(document.pop("grid", None) or {})
    for key in ("optimizer", "baseline"):
        found = {}
        for cell in resolved.cells:
            block = cell.model_dump(mode="json").get(key)
            if block and block["name"] != "none":
                found[canonical(block)] = {**block, "lr": rates[canonical(block)]}
        grid = {name: values for name, values in grid.items() if name.partition(".")[0] != key}
        document.pop(key, None)
        if len(found) == 1:
            document[key] = next(iter(found.values()))
        elif found:
            grid[key] = list(found.values())
    return resolve_settings({**document, **({"grid": grid} if grid else {})})


def lines(choice: Mapping[str, Any]) -> list[str]:
    """What was chosen, for people."""
    said = []
    for one in choice["chosen"]:
        edge = "; the best is at the edge of what was tried" if one["at_the_edge"] else ""
        said.append(f"{one['optimizer']['name']}: lr = {one['lr']:g}, {one['validation_loss']:.4f} nats{edge}")
    word = "within" if choice["equal"] else "not within"
    steps = choice["request"]["steps"]
    said.append(
        f"validation losses after {steps} fault-free updates are {word} {choice['tolerance']:g} nats of each other "
        f"(spread {choice['spread']:.4f})"
    )
    return said


def untuned(resolved: Resolved) -> Resolved:
    """The comparison at the rates of its settings."""
    return resolve_settings({key: value for key, value in resolved.document.items() if key != "tune"}, limit=None)


def tuned(
    resolved: Resolved, out: Path, train: Callable[[Resolved, Path], int], *, anew: bool = False
) -> tuple[int, Resolved, dict[str, Any] | None]:
    """(exit code of the search, the study with its rates, tune.json or None where the search has not ended); a stored
    choice for the same request is obeyed, unless ``anew``.

    ``train`` runs a study in a directory and returns its exit code.
    """
    wanted = search(resolved)
    cell: Any = resolved.cells[0]
    request = {
        "optimizers": blocks(resolved),
        "runs": [run.id for run in wanted.runs],
        "steps": cell.tune.steps,
        "tolerance": cell.tune.tolerance,
    }
    path = search_path(out)
    held = [] if anew else [_stored(out), _stored(path)]
    choice = next((one for one in held if one and one.get("request") == request), None)
    if choice is None:
        print(f"tuning first: {len(wanted.runs)} runs in {path}", file=sys.stderr)
        if code := train(wanted, path):
            return code, resolved, None
        choice = choose(request, path, cell.tune.tolerance)
        write_text(path / FILE, json.dumps(choice, indent=1) + "\n")
    for line in lines(choice):
        print(f"tuned: {line}", file=sys.stderr)
    return 0, with_choice(resolved, choice), choice


def _stored(path: Path) -> dict[str, Any] | None:
    file = path / FILE
    return json.loads(file.read_text()) if file.is_file() else None
