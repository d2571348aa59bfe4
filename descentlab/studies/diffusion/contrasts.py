"""Questions answered by contrasts: two clouds that differ in one setting, measured alike, difference by difference.

Pairs are over seeds where both sides have two or more in common: then a seed's whole chain (data order, theta*, cloud)
is the replicate. With one seed the replicate is a group of runs: the statement is about this theta* only, made with
jackknife pseudo-values of 20 groups, and what has one value per theta* is shown without a test.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from ...analysis.contrasts import Contrast, ContrastResult, analyse
from ...analysis.results import ResultsLike, value_text
from ...report import Column, SummaryItem, TableBlock, Verdict
from ...theory import diffusion
from ..common import contrast_item, item
from .clouds import Cloud, Stages, pull_of
from .directions import GROUPS, without_pull
from .score import score
from .spec import READS, DiffusionSpec

FIRST = ("dataset", "splits", "model", "sampler", "dtype", "batch_size", "optimizer", "reference")  # named first
APART = ("study", "seed", "hessians")  # the replicate, and what no cloud depends on
# every setting in which two clouds can differ
AXES = (
    *FIRST,
    *(
        name
        for name, field in DiffusionSpec.model_fields.items()
        if name not in (*FIRST, *APART) and not (field.json_schema_extra or {}).get("extent")  # type: ignore[union-attr]
    ),
)
OF_THETA = frozenset(key.partition(".")[0] for stage in ("sgd", "gd") for key in READS[stage])
GD = "gradient descent"
ONE = "one theta*"
Arrays = Mapping[str, np.ndarray]


@dataclass
class Measured:
    """One cloud: a value per quantity, and where runs are replicates its pseudo-values ``[G]`` over groups of them.
    ``lost``: quantity -> runs it leaves out because they are not finite."""

    cloud: Cloud
    values: dict[str, float] = field(default_factory=dict)
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.cloud.settings["seed"])

    def add(self, name: str, value: float, left_out: Sequence[float] = ()) -> None:
        """``left_out``: the quantity without each group of runs, from which the pseudo-values come."""
        if np.isfinite(value):
            self.values[name] = value
            if len(left_out) > 1:
                self.groups[name] = len(left_out) * value - (len(left_out) - 1) * np.asarray(left_out)


# quantity -> what it is, for the table
QUANTITIES = {
    "spread": "ln of the trace of V",
    "effective directions": "(sum V_i)^2 / sum V_i^2",
    "prediction error": "relative error of Vhat in all live directions",
    "test loss rise": "mean test loss of the runs at their end minus that at theta*, nats",
    "test loss deviation": "standard deviation of the test loss over runs, nats",
    "test loss": "test loss at theta*, nats",
    "generalisation gap": "test minus training loss at theta*, nats",
    "sharpness": "ln of the largest eigenvalue of the loss's own Hessian at theta*",
    "curvature": "ln of the Hessian's trace at theta*",
    "negative share": "share of negative eigenvalues",
    "noise alignment": "cosine between gradient covariance and Hessian",
}


def measure(results: ResultsLike, stages: Stages, cloud: Cloud) -> Measured:
    """All quantities of one cloud that its finished stages give."""
    found = Measured(cloud)
    if cloud.score is not None:
        _spread(found, stages.arrays(cloud.score))
    if cloud.losses is not None:
        held = stages.arrays(cloud.losses)
        loss, start = held["loss"][np.isfinite(held["loss"])], float(held["start_loss"][0])
        found.lost = dict.fromkeys(("test loss rise", "test loss deviation", GD), len(held["loss"]) - len(loss))
        if len(loss) > 2:
            means = _without_groups(held["loss"], np.mean)
            deviations = _without_groups(held["loss"], lambda v: v.std(ddof=1))
            found.add("test loss rise", float(loss.mean()) - start, [m - start for m in means])
            found.add("test loss deviation", float(loss.std(ddof=1)), deviations)
            end = _last(results, cloud.control, "test_loss")
            if end is not None:
                found.add(GD, float(loss.mean()) - end, [m - end for m in means])
        found.add("test loss", start)
    if not cloud.members:
        return found
    before = stages.before(cloud.members[0], "curvature")
    if before:
        _landscape(found, without_pull(stages.arrays(before[0]), pull_of(before[0])))
    gd = next(iter(stages.before(cloud.members[0], "gd")), None)
    held = stages.arrays(gd) if gd is not None else {}
    trained = float(held["train_loss"]) if "train_loss" in held else None
    if "polish_gradients" not in held:
        trained = _last(results, gd, "train_loss")
    if trained is not None and "test loss" in found.values:
        found.add("generalisation gap", found.values["test loss"] - trained)
    return found


def _spread(found: Measured, arrays: Arrays) -> None:
    if "V" not in arrays:
        return
    inside = ((arrays["eigenvectors"].T @ arrays["V"]) * arrays["eigenvectors"].T).sum(1)
    groups = arrays.get("group_variances", np.empty((0, len(inside))))
    found.add("spread", float(np.log(inside.sum())), [float(np.log(g.sum())) for g in groups])

    def effective(v: np.ndarray) -> float:
        return float(v.sum() ** 2 / (v**2).sum())

    found.add("effective directions", effective(inside), [effective(g) for g in groups])
    own = score(arrays)
    if own is not None:
        predicted, live = own.predicted[own.live], own.live
        errors = [diffusion.relative_error(g[live], predicted) for g in groups]
        found.add("prediction error", own.relative_error, errors)


def _landscape(found: Measured, arrays: Arrays) -> None:
    values, h, c = arrays["eigenvalues"], arrays["hessian"], arrays["covariance"]
    edge = 1e-10 * max(1.0, float(np.abs(values).max()))
    if values[-1] > 0 and values.sum() > 0:
        found.add("sharpness", float(np.log(values[-1])))
        found.add("curvature", float(np.log(values.sum())))
    found.add("negative share", float((values < -edge).mean()))
    size = float(np.sqrt((h * h).sum() * (c * c).sum()))
    if size > 0:
        found.add("noise alignment", float((h * c).sum() / size))


def _without_groups(values: np.ndarray, of: Callable[[np.ndarray], float]) -> list[float]:
    """``of`` the finite ones of the values ``[n]`` without each of the groups; empty for too few. A run's number says
    its group, so that two clouds have the same runs in each whatever runs they lost."""
    n, finite = len(values), np.isfinite(values)
    if finite.sum() < 2 * GROUPS:
        return []
    group = np.arange(n) * GROUPS // n
    return [float(of(values[finite & (group != g)])) for g in range(GROUPS)]


def _last(results: ResultsLike, block: Mapping[str, Any] | None, column: str) -> float | None:
    """The last value of a column in a block's rows."""
    if block is None or column not in results.frame.columns:
        return None
    rows = results.frame.filter(pl.col("run").is_in(list(block["runs"])), pl.col(column).is_not_null())
    return None if rows.is_empty() else float(rows.sort("step")[column][-1])


@dataclass(frozen=True)
class Planned:
    """``name`` of the comparison, its two sides by seed, and the quantity."""

    name: str
    quantity: str
    first: Mapping[int, Measured]
    second: Mapping[int, Measured]

    @property
    def lost(self) -> int:
        """Runs that the quantity leaves out on both sides, in the seeds compared."""
        if self.quantity == GD:
            return sum(one.lost.get(GD, 0) for one in self.second.values())
        seeds = set(self.first) & set(self.second)
        return sum(side[s].lost.get(self.quantity, 0) for side in (self.first, self.second) for s in seeds)

    def differences(self) -> tuple[np.ndarray, str]:
        """Second minus first, one per replicate, and what a replicate is."""
        if self.quantity == GD:  # a quantity that is a difference already
            own = [one for _, one in sorted(self.second.items()) if GD in one.values]
            if len(own) > 1:
                return np.array([one.values[GD] for one in own]), "seed"
            return (own[0].groups[GD], "group of runs") if GD in own[0].groups else (np.array([own[0].values[GD]]), ONE)
        seeds = sorted(set(self.first) & set(self.second))
        pairs = [(self.first[s], self.second[s]) for s in seeds]
        pairs = [(a, b) for a, b in pairs if self.quantity in a.values and self.quantity in b.values]
        apart = np.array([b.values[self.quantity] - a.values[self.quantity] for a, b in pairs])
        if len(apart) > 1 or not len(apart):
            return apart, "seed"
        a, b = pairs[0]
        if self.quantity in a.groups and self.quantity in b.groups:
            return b.groups[self.quantity] - a.groups[self.quantity], "group of runs"
        return apart, ONE


def planned(measured: Sequence[Measured]) -> Iterator[Planned]:
    """Every pair of variants that differ in as few settings as the grid allows, the first level against the others;
    and every variant's runs against gradient descent."""
    variants: dict[str, dict[int, Measured]] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    for one in measured:
        key = str([one.cloud.settings.get(axis) for axis in AXES])
        variants.setdefault(key, {})[one.seed] = one
        settings[key] = one.cloud.settings
    every = list(settings.values())
    chosen = list(_pairs(settings))
    names = _distinct([partial(_name, settings[a], settings[b], every) for a, b in chosen])
    for (a, b), name in zip(chosen, names, strict=True):
        for quantity in QUANTITIES:
            if quantity in _LANDSCAPE and not _apart(settings[a], settings[b]) & OF_THETA:
                continue  # one and the same theta*
            if quantity != "prediction error" and _apart(settings[a], settings[b]) == {"theory"}:
                continue  # one and the same cloud
            if any(quantity in one.values for one in variants[b].values()):
                yield Planned(name, quantity, variants[a], variants[b])
    against = [key for key, own in variants.items() if any(GD in one.values for one in own.values())]
    against = list({str([settings[k].get(axis) for axis in AXES if axis != "theory"]): k for k in against}.values())
    for key, where in zip(against, _distinct([partial(_where, settings[k], every) for k in against]), strict=True):
        yield Planned(f"SGD - gradient descent{where}", GD, {}, variants[key])


def _pairs(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Keys of the variants to be compared."""
    taken: set[tuple[frozenset[str], str]] = set()
    for a, b in itertools.combinations(settings, 2):
        apart = _apart(settings[a], settings[b])
        closer = any(k != b and _apart(settings[k], settings[b]) < apart for k in settings)
        if not closer and (apart, b) not in taken:
            taken.add((apart, b))
            yield a, b


def _distinct(named: Sequence[Callable[..., str]]) -> list[str]:
    """Short names, and whole ones where several would have the same."""
    short = Counter(name() for name in named)
    return [name(whole=True) if short[name()] > 1 else name() for name in named]


_LANDSCAPE = ("test loss", "generalisation gap", "sharpness", "curvature", "negative share", "noise alignment")


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(axis for axis in AXES if a.get(axis) != b.get(axis))


def _name(a: Mapping[str, Any], b: Mapping[str, Any], all_of: Sequence[Mapping[str, Any]], whole: bool = False) -> str:
    """``sampler shuffle - replacement (optimizer lr=0.05)``: what differs, second minus first, and where the grid has
    more; what follows from another dataset or model only where ``whole``."""
    apart = _apart(a, b)
    shown = sorted(apart, key=AXES.index)
    if {"dataset", "model"} & apart and not whole:
        shown = [axis for axis in shown if axis in ("dataset", "model")]
    parts = [f"{axis} {_short(b.get(axis), a.get(axis))} - {_short(a.get(axis), b.get(axis))}" for axis in shown]
    return ", ".join(parts) + _where(a, all_of, apart, whole)


def _where(
    own: Mapping[str, Any],
    all_of: Sequence[Mapping[str, Any]],
    apart: frozenset[str] = frozenset(),
    whole: bool = False,
) -> str:
    found = []
    for axis in AXES if whole else [axis for axis in AXES if axis not in ("splits", "reference")]:
        others = [one.get(axis) for one in all_of if one.get(axis) != own.get(axis)]
        if axis not in apart and others:
            found.append(f"{axis} {_short(own.get(axis), *others)}")
    return f" ({', '.join(found)})" if found else ""


def _short(value: Any, *others: Any) -> str:
    """A setting by its name, or by what tells it from the ``others``; ``gd.lr=0.1`` for a key of a block in it."""
    if not isinstance(value, Mapping):
        return str(value)
    alike = [one for one in others if isinstance(one, Mapping) and one.get("name") == value.get("name")]
    parts = [str(value.get("name", value))] if len(alike) < len(others) else []
    own, against = _flat(value), [_flat(one) for one in alike]
    differing = {k: v for k, v in own.items() if any(one.get(k) != v for one in against)}
    return " ".join(parts + [f"{k}={value_text(v) if isinstance(v, float) else v}" for k, v in differing.items()])


def _flat(block: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a block and of the blocks in it, dotted."""
    out: dict[str, Any] = {}
    for key, value in block.items():
        inner = _flat(value) if isinstance(value, Mapping) else None
        out |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return out


@dataclass(frozen=True)
class Answer:
    """A planned contrast with its result; ``result`` is None where one theta* leaves nothing to test."""

    plan: Planned
    unit: str
    value: float
    result: ContrastResult | None


def answers(measured: Sequence[Measured]) -> list[Answer]:
    """All planned contrasts; those with replicates are one family (Holm)."""
    found = [(plan, *plan.differences()) for plan in planned(measured)]
    found = [entry for entry in found if len(entry[1])]
    tested = [(plan, d, unit) for plan, d, unit in found if len(d) > 1]
    results = iter(analyse([Contrast(f"{p.name}: {p.quantity}", d, "") for p, d, _ in tested]))
    return [Answer(plan, unit, float(d.mean()), next(results) if len(d) > 1 else None) for plan, d, unit in found]


def table(found: Sequence[Answer]) -> TableBlock | None:
    """One line per contrast; None without any."""
    if not found:
        return None
    columns = [
        Column("contrast"),
        Column("quantity"),
        Column("verdict"),
        Column("replicate", "", "seed: a whole chain from initial weights on; group of runs: for this theta* only"),
        Column("n", "d"),
        Column("left out", "d", "runs on both sides whose test loss is not finite"),
        Column("difference", "+.4g", "second minus first, mean with its 95 % interval, not corrected"),
        Column("Holm p", ".3g", "corrected for all contrasts with replicates"),
        Column("detectable", ".3g", "difference found with 80 % power at the corrected level"),
        Column("d_z", "+.2f", "effect size: mean difference / its standard deviation over replicates"),
    ]
    rows: list[list[Any]] = []
    for one in found:
        what = "test loss" if one.plan.quantity == GD else one.plan.quantity
        if one.result is None:
            rows.append(
                [one.plan.name, what, "not tested: one theta*", one.unit, 1, one.plan.lost, one.value, *[None] * 3]
            )
            continue
        r = one.result
        tail = [r.p_holm, r.detectable, r.estimate.dz]
        rows.append([one.plan.name, what, r.verdict, one.unit, r.estimate.n, one.plan.lost, item(r.estimate), *tail])
    text = "; ".join(f"{name}: {what}" for name, what in QUANTITIES.items())
    return TableBlock(columns, rows, f"Every pair the grid allows. {text}. Differences of ln are logarithms of ratios.")


def items(found: Sequence[Answer]) -> dict[str, SummaryItem]:
    """For summary.json: ``diffusion/contrast/NAME/QUANTITY``."""
    out = {}
    for one in found:
        what = "test loss" if one.plan.quantity == GD else one.plan.quantity
        key = f"diffusion/contrast/{one.plan.name}/{what}"
        left_out = f"; {one.plan.lost} runs that are not finite left out" if one.plan.lost else ""
        if one.result is None:
            out[key] = SummaryItem(one.value, 1, None, None, f"difference, one theta*: not tested{left_out}")
        else:
            made = contrast_item(one.result)
            out[key] = SummaryItem(
                made.value, made.n, made.low, made.high, f"replicate: {one.unit}; {made.method}{left_out}"
            )
    return out


def verdicts(found: Sequence[Answer]) -> list[Verdict]:
    """One line per comparison: which quantities differ, and which do not beyond noise."""
    lines: list[Verdict] = []
    against = [one for one in found if one.plan.quantity == GD and one.result is not None]
    if against:
        counts = Counter(one.result.verdict for one in against if one.result is not None)
        text = ", ".join(f"{verdict} in {count}" for verdict, count in counts.items())
        lines.append(
            Verdict(f"SGD - gradient descent, test loss: {text} of {len(against)} clouds", "the table has the numbers")
        )
    for name in dict.fromkeys(one.plan.name for one in found if one.plan.quantity != GD):
        own = [one for one in found if one.plan.name == name and one.result is not None]
        if not own:
            continue
        said: dict[str, list[str]] = {}
        for one in own:
            what = "test loss" if one.plan.quantity == GD else one.plan.quantity
            said.setdefault(one.result.verdict if one.result else "", []).append(what)
        text = f"{name}: " + "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in said.items())
        unit, n = own[0].unit, own[0].result.estimate.n if own[0].result else 0
        lost = max(one.plan.lost for one in own)
        left_out = f"; of the test loss {lost} runs that are not finite left out" if lost else ""
        lines.append(Verdict(text, f"replicate: {unit}, n = {n}; Holm over all contrasts of this report{left_out}"))
    return lines
