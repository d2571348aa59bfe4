"""Final scores of runs in which a failure counts: never dropped, scored at chance or worse, ranked last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from .results import ResultsLike, last_attempts

DONE, FAILED, PENDING = "done", "failed", "pending"


@dataclass(frozen=True)
class Score:
    """A run at the end of its comparison: test loss (nats) and accuracy (0..1) at ``step``, failures already scored.

    ``state`` is done, failed or pending (not finished yet, so in no statistic). ``failed_step`` is the first
    non-finite step of a failed run where known.
    """

    run: str
    state: str
    reason: str = ""
    failed_step: int | None = None
    step: int | None = None
    test_loss: float = math.nan
    test_accuracy: float = math.nan

    @property
    def failed(self) -> bool:
        return self.state == FAILED


@dataclass(frozen=True)
class Scores:
    """Scores by run id, with what a failure was charged: ``failure_loss`` in nats, ``chance`` accuracy 0..1."""

    by_run: Mapping[str, Score]
    failure_loss: float
    chance: float

    def __getitem__(self, run: str) -> Score:
        return self.by_run[run]

    def failures(self) -> list[Score]:
        return [score for score in self.by_run.values() if score.failed]

    def pending(self) -> list[Score]:
        return [score for score in self.by_run.values() if score.state == PENDING]


def _bad(value: Any) -> bool:
    return value is not None and not math.isfinite(value)


def _state(run: str, rows: pl.DataFrame | None, status: Mapping[str, Any]) -> Score:
    """What became of one run, from its status line and its last row (either may tell)."""
    word = status.get("status", "planned")
    if word in ("diverged", "failed"):
        step = status.get("diverged_step", status.get("steps"))
        reason = status.get("message") or ("first non-finite loss or weights" if word == "diverged" else "crashed")
        return Score(run, FAILED, f"{word}: {reason}", None if step is None else int(step))
    if word != "done":
        return Score(run, PENDING, word)
    if rows is None or rows.is_empty():
        return Score(run, FAILED, "done without a single recorded step")
    last = rows.row(-1, named=True)
    if last.get("nonfinite_params"):
        return Score(run, FAILED, "non-finite weights at the end", int(last["step"]))
    if _bad(last["train_loss"]):
        return Score(run, FAILED, "non-finite training loss at the end", int(last["step"]))
    return Score(run, DONE)


def _group_scores(states: Iterable[Score], tests: Mapping[str, dict[int, tuple[float, float]]]) -> list[Score]:
    """Read every run of one group at the group's last common evaluated step; non-finite there is a failure."""
    group = list(states)
    alive = [score for score in group if score.state == DONE]
    common = set.intersection(*(set(tests.get(score.run, {})) for score in alive)) if alive else set()
    step = max(common, default=None)
    out = []
    for score in group:
        if score.state != DONE:
            out.append(score if score.state == PENDING else replace(score, step=step))
        elif step is None:
            out.append(replace(score, state=FAILED, reason="no evaluated step in common with its twin"))
        else:
            loss, accuracy = tests[score.run][step]
            read = replace(score, step=step, test_loss=loss, test_accuracy=accuracy)
            if not math.isfinite(loss):
                read = replace(read, state=FAILED, reason="non-finite test loss", failed_step=step)
            out.append(read)
    return out


def final_scores(results: ResultsLike, groups: Sequence[Sequence[str]], classes: int) -> Scores:
    """Score every run of ``groups`` (run ids that are compared at one step, a twin among them).

    A failure is charged max(ln C, the worst finite final test loss among all runs scored here) and accuracy 1/C.
    """
    frame = last_attempts(results.frame)
    rows = {str(key[0]): part for key, part in frame.partition_by("run", as_dict=True).items()}
    status = {str(line["run"]): line for line in results.status}
    tests = {
        run: {
            int(step): (float(loss), float(accuracy))
            for step, loss, accuracy in part.select("step", "test_loss", "test_accuracy").drop_nulls().iter_rows()
        }
        for run, part in rows.items()
    }
    scores = [
        score
        for group in groups
        for score in _group_scores((_state(run, rows.get(run), status.get(run, {})) for run in group), tests)
    ]
    finite = [score.test_loss for score in scores if score.state == DONE]
    charge = max([math.log(classes), *finite])
    chance = 1.0 / classes
    filled = (replace(s, test_loss=charge, test_accuracy=chance) if s.failed else s for s in scores)
    return Scores({score.run: score for score in filled}, charge, chance)


def excess_losses(fault: Sequence[Score], twin: Sequence[Score]) -> list[float]:
    """Test loss over the twin, pair by pair, in nats; failures at least as bad as the worst pair that finished.

    Without that floor a failed run beside a poor twin could outrank a run that finished. A pair whose *twin* failed
    is charged the worst excess of all: its difference would otherwise credit the fault with the twin's failure.
    """
    return _excess([a.test_loss - b.test_loss for a, b in zip(fault, twin, strict=True)], fault, twin)


def excess_accuracies(fault: Sequence[Score], twin: Sequence[Score]) -> list[float]:
    """Test accuracy over the twin, pair by pair (0..1); a failed run at chance, a failed twin charged the worst."""
    losses = _excess([b.test_accuracy - a.test_accuracy for a, b in zip(fault, twin, strict=True)], fault, twin, False)
    return [0.0 - loss for loss in losses]


def _excess(raw: list[float], fault: Sequence[Score], twin: Sequence[Score], floor: bool = True) -> list[float]:
    pairs = list(zip(raw, fault, twin, strict=True))
    finished = max((value for value, a, b in pairs if not (a.failed or b.failed)), default=-math.inf)
    charged = [max(value, finished) if a.failed and floor else value for value, a, _ in pairs]
    known = [value for value, b in zip(charged, twin, strict=True) if not b.failed]
    worst = max(known, default=max((abs(value) for value in raw), default=0.0))
    return [worst if b.failed else value for value, b in zip(charged, twin, strict=True)]
