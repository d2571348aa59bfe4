"""Does an engine train what its plan says, and take a run up where it was left?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..core.state import State
from ..core.tree import leaves
from ..engine.driver import Engine
from ..engine.lockstep import Lockstep
from ..engine.parts import Parts
from ..engine.program import BlockPlan
from ..engine.recorder import Recorder

Maker = Callable[[BlockPlan, Parts, State | None, int, Recorder], Engine]


def check_engine(make: Maker, plan: BlockPlan, parts: Callable[[], Parts], *, synchronous: bool = False) -> None:
    """``make(plan, parts, state, step, recorder)`` builds the engine; ``parts()`` builds fresh parts for each.

    Every run gets one row per update until it stops, with the clock to match; training twice gives the same bits; so
    does every state taken apart in the middle and taken up by a new engine. ``synchronous=True``: nothing is stale
    here, so the weights have to be those of ``lockstep`` to the bit.
    """
    whole, rows = _train(make, plan, parts(), None, 0, plan.stop)
    _check_rows(plan, rows)
    again, same = _train(make, plan, parts(), None, 0, plan.stop)
    assert _equal(whole, again) and _alike(rows, same), "training twice gives two results; is a global generator used?"
    for cut in sorted({1, plan.stop // 2, plan.stop - 1} - {0}):
        half, first = _train(make, plan, parts(), None, 0, cut)
        state, second = _train(make, plan, parts(), half.clone(), cut, plan.stop)
        good = _equal(whole, state) and _alike(rows, first + second)
        assert good, f"a run taken up after update {cut} differs from the undisturbed one; something is not in State"
    if synchronous:
        reference, _ = _train(Lockstep, plan, parts(), None, 0, plan.stop)  # type: ignore[arg-type]
        pairs = zip(leaves(reference.params), leaves(whole.params), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "without staleness the weights differ from lockstep's"


def _train(
    make: Maker, plan: BlockPlan, parts: Parts, state: State | None, step: int, until: int
) -> tuple[State, list[dict[str, Any]]]:
    recorder = Recorder()
    engine = make(plan, parts, state, step, recorder)
    for progress in engine.run():
        if progress.step == until:
            break
    columns, _ = recorder.flush()
    columns.pop("wall_s", None)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return engine.state, rows


def _check_rows(plan: BlockPlan, rows: list[dict[str, Any]]) -> None:
    for run in plan.runs:
        steps = [row["step"] for row in rows if row["run"] == run.id]
        assert steps == list(range(run.stop)), f"run {run.id}: rows for updates {steps}, expected 0 to {run.stop - 1}"
        samples = [row["samples"] for row in rows if row["run"] == run.id]
        rising = all(a < b for a, b in zip(samples, samples[1:], strict=False))  # noqa: RUF007
        assert rising, f"run {run.id}: the number of samples does not grow with every update"


def _equal(a: State, b: State) -> bool:
    pairs = zip(leaves(a.state_dict()), leaves(b.state_dict()), strict=True)
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)


def _alike(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    """The same rows; NaN equals NaN, and a column that a part of the rows does not have is a missing value."""

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        return {k: "NaN" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items() if v is not None}

    return [plain(row) for row in a] == [plain(row) for row in b]
