"""The published measures of a recovery run, with the definitions put right; :data:`NOTES` says in what they differ."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from ...analysis.failures import FAILED, PENDING, Score, Scores, excess_accuracies, excess_losses, final_scores
from ...analysis.recovery import analyse_recovery
from ...analysis.results import ResultsLike, cell_settings, class_count, condition_labels, last_attempts
from ...core.errors import UserError

NOTES = (
    "accuracy and loss are those of each step's batch at the weights before its update, not running means.",
    "The step of the fault is in the history; steps count server updates from 0 and are the same in every file.",
    "pre_injection_accuracy is null when the fault strikes at step 0: there is no step before it.",
    "post_injection_accuracy and _loss are those of the faulty forward pass, before its update; the batch after it, "
    "the first at damaged weights, is next_step_accuracy and next_step_loss.",
    "degradation_rate is the least-squares slope over all steps after the fault; null with fewer than two.",
    "A run that diverged or crashed is a failure: final_accuracy is chance, accuracy_change, total_recovery and "
    "degradation_rate are never above 0, it is no positive recovery, and it loses every head-to-head comparison.",
    "divergence_step counts from 0 at the first step after the fault; -1 is the step of the fault itself.",
    "A head-to-head tie counts half for each side.",
    "injection_position holds the coordinates of the first element hit, channels last for activations; "
    "injection_positions those of all of them. Every optimizer met the same elements (hits.jsonl proves it).",
    "injection_value is null where a fault writes several values or makes them from what it finds: rule says how.",
    "nan_weights and inf_weights are 0 where all weights are finite and null otherwise: nonfinite_weights counts both.",
    "seed is the study's seed and replicate the number its streams are keyed by; every optimizer shares both.",
    "accuracy_change counts the progress that training makes anyway. Every optimizer has a fault-free twin: "
    "excess_test_loss (nats) and excess_test_accuracy are over it.",
    "outcome is one of the labels of docs/outcomes.md; polluted_state is where the fault left its mark.",
    "intermediate_summary.json holds the final state only, for the export is written at once; while a run goes on, "
    "status and report have what there is.",
    "A number that is not finite is null, and non_finite in the same object names it.",
)
STAGES = {"forward": "fwrd_inject", "grad_input": "bkwd_inject", "grad_weight": "bkwd_inject"}
EARLY_EPOCH = 1  # epochs 0 and 1 are early


@dataclass(frozen=True)
class Outcome:
    """One optimizer in one experiment: its steps, with accuracy (0..1) and loss (nats) of each step's batch."""

    name: str
    run: str
    hit: int
    steps: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    nonfinite_weights: int | None
    failed: bool
    diverged_step: int | None
    chance: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    def at(self, values: np.ndarray, step: int) -> float | None:
        """The value of ``step``; None where it was not recorded."""
        found = values[self.steps == step]
        return float(found[0]) if len(found) else None

    @property
    def pre(self) -> float | None:
        return self.at(self.accuracy, self.hit - 1)

    @property
    def post(self) -> float | None:
        return self.at(self.accuracy, self.hit)

    @property
    def final(self) -> float:
        """Accuracy of the last batch; chance for a failure."""
        return self.chance if self.failed or not len(self.accuracy) else float(self.accuracy[-1])

    def change_from(self, reference: float | None) -> float | None:
        """Final accuracy minus ``reference``; of a failure at most 0, whatever the reference."""
        if self.failed:
            known = [v for v in (self.pre, self.post) if v is not None and math.isfinite(v)]
            return min(0.0, *(self.chance - v for v in known)) if known else 0.0
        return None if reference is None else self.final - reference

    @property
    def change(self) -> float | None:
        return self.change_from(self.post)

    @property
    def recovery_steps(self) -> int:
        return int(self.steps[-1]) - self.hit if len(self.steps) else 0

    @property
    def slope(self) -> float | None:
        """Accuracy per step after the fault; a failure falls on a straight line to chance."""
        after = self.steps > self.hit
        if self.failed:
            return (self.change or 0.0) / max(self.recovery_steps, 1)
        if after.sum() < 2:
            return None
        return float(np.polyfit(self.steps[after].astype(float), self.accuracy[after], 1)[0])

    def history(self) -> dict[str, list[Any]]:
        return {"steps": self.steps.tolist(), "accuracy": self.accuracy.tolist(), "loss": self.loss.tolist()}

    def injection(self) -> dict[str, Any]:
        """An entry of ``injection_results``."""
        clean = self.nonfinite_weights == 0
        return {
            "post_injection_accuracy": self.post,
            "post_injection_loss": self.at(self.loss, self.hit),
            "nan_weights": 0 if clean else None,
            "inf_weights": 0 if clean else None,
            "nonfinite_weights": self.nonfinite_weights,
        }

    def result(self) -> dict[str, Any]:
        """An entry of ``optimizer_results``."""
        late = None if self.diverged_step is None else self.diverged_step - self.hit - 1
        return {
            "history": self.history(),
            "pre_injection_accuracy": self.pre,
            "post_injection_accuracy": self.post,
            "final_accuracy": self.final,
            "accuracy_change": self.change,
            "total_recovery": self.change_from(self.pre),
            "degradation_rate": self.slope,
            "diverged": self.failed,
            "divergence_step": late,
            "injection_step": self.hit,
            "next_step_accuracy": self.at(self.accuracy, self.hit + 1),
            "next_step_loss": self.at(self.loss, self.hit + 1),
            "run": self.run,
            **self.extra,
        }


@dataclass(frozen=True)
class Experiment:
    """One planned fault and what every optimizer made of it; ``crashed`` lists runs that broke off with an error."""

    number: int
    config: dict[str, Any]
    outcomes: dict[str, Outcome]
    crashed: list[dict[str, Any]]
    runs: tuple[str, ...]

    @property
    def epoch(self) -> int:
        return int(self.config["target_epoch"])


@dataclass(frozen=True)
class Campaign:
    """Everything an export writes. ``unfinished`` counts experiments with runs still to be done."""

    optimizers: list[str]
    experiments: list[Experiment]
    unfinished: int
    configs: list[dict[str, Any]]

    def outcomes(self, name: str) -> list[Outcome]:
        """Of one optimizer, in the order of the experiments."""
        return [e.outcomes[name] for e in self.experiments if name in e.outcomes]


def gather(results: ResultsLike) -> Campaign:
    """Read experiments and outcomes from a recovery run. Raises :class:`UserError` for a run of another study."""
    if not results.campaign or not any(run.get("role") == "fault" for run in results.runs):
        raise UserError("export", str(results.path), "a directory of the recovery study, with a campaign of faults")
    cells = cell_settings(results.frame)
    labels = {cell: file_name(label) for cell, label in condition_labels(cells).items()}
    pairs = _pairs(results, labels)
    scores = final_scores(results, [[run, twin] for run, twin in pairs.values()], class_count(results.spec))
    excess, named = _excess(pairs, scores), outcome_labels(results)
    frame = last_attempts(results.frame)
    rows = {str(key[0]): part for key, part in frame.partition_by("run", as_dict=True).items()}
    status = {str(line["run"]): line for line in results.status}
    settings = {int(run["cell"]): run.get("settings") or {} for run in results.runs}
    configs, experiments, unfinished = [], [], 0
    for number, case in enumerate(results.campaign):
        chosen = {
            labels[cell]: runs
            for (cell, replicate), runs in pairs.items()
            if replicate == int(case["replicate"]) and cell in case.get("cells", labels)
        }
        config = _config(number, case, results, settings, labels, rows, chosen)
        configs.append(config)
        if not chosen or any(scores[run].state == PENDING for pair in chosen.values() for run in pair):
            unfinished += 1
            continue
        outcomes = {
            name: _outcome(
                name,
                int(case["step"]),
                rows.get(run),
                scores[run],
                scores.chance,
                _beside(scores[twin], excess[run]) | named.get(run, {}),
            )
            for name, (run, twin) in chosen.items()
        }
        crashed = [
            {"optimizer": name, "role": role, "run": run, "message": status[run].get("message", "")}
            | ({"block": status[run]["block"]} if status[run].get("block") else {})
            for name, pair in chosen.items()
            for role, run in zip(("fault", "twin"), pair, strict=True)
            if status.get(run, {}).get("status") == "failed"
        ]
        experiments.append(Experiment(number, config, outcomes, crashed, tuple(run for run, _ in chosen.values())))
    return Campaign(list(labels.values()), experiments, unfinished, configs)


def outcome_labels(results: ResultsLike) -> dict[str, dict[str, Any]]:
    """Faulted run -> its label as in the report (docs/outcomes.md) and what the label was read from."""
    measures = analyse_recovery(results, class_count(results.spec)).measures
    names = {"outcome": "outcome", "outcome_note": "outcome_note", "polluted": "polluted_state"}
    return {row["run"]: {new: row[old] for old, new in names.items()} for row in measures.iter_rows(named=True)}


def file_name(label: str) -> str:
    """A condition's name as a part of a file name."""
    return re.sub(r"[^\w.=+-]+", "_", label).strip("_")


def _pairs(results: ResultsLike, labels: Mapping[int, str]) -> dict[tuple[int, int], tuple[str, str]]:
    """(cell, replicate) -> (faulted run, twin)."""
    known = {(int(r["cell"]), int(r["replicate"]), r["role"]): str(r["id"]) for r in results.runs}
    return {
        (cell, replicate): (run, known[cell, replicate, "twin"])
        for (cell, replicate, role), run in sorted(known.items())
        if role == "fault" and cell in labels and (cell, replicate, "twin") in known
    }


def _excess(pairs: Mapping[Any, tuple[str, str]], scores: Scores) -> dict[str, tuple[float, float]]:
    """Faulted run -> excess test loss and accuracy over its twin, failures charged as in every other table."""
    done = [(run, twin) for run, twin in pairs.values() if PENDING not in (scores[run].state, scores[twin].state)]
    sides = [scores[run] for run, _ in done], [scores[twin] for _, twin in done]
    both = zip(excess_losses(*sides), excess_accuracies(*sides), strict=True)
    return {run: values for (run, _), values in zip(done, both, strict=True)}


def _beside(twin: Score, excess: tuple[float, float]) -> dict[str, Any]:
    return {
        "twin_test_loss": twin.test_loss,
        "twin_test_accuracy": twin.test_accuracy,
        "excess_test_loss": excess[0],
        "excess_test_accuracy": excess[1],
        "twin_failed": twin.failed,
    }


def _outcome(
    name: str, hit: int, part: pl.DataFrame | None, score: Score, chance: float, beside: Mapping[str, Any]
) -> Outcome:
    columns: dict[str, np.ndarray] = {}
    for column in ("step", "train_accuracy", "train_loss", "nonfinite_params"):
        has = part is not None and column in part.columns
        values = part[column].cast(pl.Float64).fill_null(math.nan).to_numpy() if part is not None and has else ()
        columns[column] = np.array(values, dtype=float)
    steps = columns["step"].astype(np.int64)
    at_hit = columns["nonfinite_params"][steps == hit]
    extra = {
        "final_test_loss": score.test_loss,
        "final_test_accuracy": score.test_accuracy,
        **beside,
        "failure": score.reason if score.state == FAILED else None,
    }
    weights = int(at_hit[0]) if len(at_hit) and math.isfinite(at_hit[0]) else None
    loss, accuracy = columns["train_loss"], columns["train_accuracy"]
    step = score.failed_step if score.failed else None
    return Outcome(name, score.run, hit, steps, accuracy, loss, weights, score.failed, step, chance, extra)


def _config(
    number: int,
    case: Mapping[str, Any],
    results: ResultsLike,
    settings: Mapping[int, Mapping[str, Any]],
    labels: Mapping[int, str],
    rows: Mapping[str, pl.DataFrame],
    chosen: Mapping[str, tuple[str, str]],
) -> dict[str, Any]:
    """An entry of all_injection_configs.json: the published keys, then ours."""
    own = {labels[cell]: settings.get(cell, {}) for cell in labels if labels[cell] in chosen}
    first = next(iter(own.values()), {})
    rates = {name: (one.get("optimizer") or {}).get("lr") for name, one in own.items()}
    rule, site = case.get("rule", {}), str(case.get("site", "forward/out"))
    direction, _, operand = site.partition("/")
    kernel = operand == ("out" if direction == "grad_weight" else "b")
    positions = coordinates(case.get("index") or [], case.get("shape") or [], kernel=kernel)
    epoch, step = int(case["epoch"]), int(case["step"])
    start = _epoch_start(rows, chosen, epoch)
    return {
        "experiment_id": number,
        "seed": first.get("seed", results.spec.get("seed")),
        "model": (first.get("model") or {}).get("name"),
        "stage": STAGES.get(direction, direction),
        "fmodel": case.get("fault") or (first.get("fault") or {}).get("name"),
        "target_epoch": epoch,
        "target_step": None if start is None else step - start,
        "target_layer": case["layer"],
        "injection_position": positions[0] if positions else [],
        "injection_value": rule.get("value"),
        "learning_rate": next(iter(rates.values())) if len(set(rates.values())) == 1 else None,
        "learning_rates": rates,
        "replicate": int(case["replicate"]),
        "injection_step": step,
        "injection_positions": positions,
        "site": site,
        "rule": dict(rule),
        "index": list(case.get("index") or []),
        "shape": list(case.get("shape") or []),
    }


def _epoch_start(rows: Mapping[str, pl.DataFrame], chosen: Mapping[str, tuple[str, str]], epoch: int) -> int | None:
    for pair in chosen.values():
        for run in pair:
            if run in rows and "epoch" in rows[run].columns:
                steps = rows[run].filter(pl.col("epoch") == epoch)["step"]
                if len(steps):
                    return int(steps.min())  # type: ignore[arg-type]
    return None


def coordinates(index: Sequence[int], shape: Sequence[int], *, kernel: bool) -> list[list[int]]:
    """Flat indices (torch's order) as coordinates in the published order: NHWC activations, HWIO kernels."""
    if not len(index) or not len(shape):  # an event without elements of its own
        return []
    unravelled = np.array(np.unravel_index(np.asarray(index), tuple(shape))).T
    if len(shape) > 2:
        order = [*range(2, len(shape)), 1, 0] if kernel else [0, *range(2, len(shape)), 1]
        unravelled = unravelled[:, order]
    elif kernel and len(shape) == 2:
        unravelled = unravelled[:, ::-1]
    return unravelled.tolist()
