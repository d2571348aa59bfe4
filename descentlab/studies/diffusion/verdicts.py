"""Sentences and tables of the diffusion report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...analysis.results import ResultsLike
from ...report import Column, SummaryItem, TableBlock, Verdict
from ...theory import diffusion
from ..common import plain_item
from .clouds import Cloud, Stages, pull_of
from .score import Bridge, Score, along, score


@dataclass(frozen=True)
class Point:
    """theta*: gradient norm, extreme eigenvalues, how many of them are negative or zero, and how descent ended.

    ``rounding``: the gradient that rounding the weights to the study's dtype gives by itself; ``pull``: the strength of
    the pull that is part of the loss here; ``moved``: how far the polish has gone; ``points``: of how many
    theta* of the study this is the first.
    """

    gradient: float
    low: float
    high: float
    negative: int
    flat: int
    lr: float
    tolerance: float
    orbit: bool
    orbit_ratio: float
    polish: tuple[float, ...]
    rates: tuple[float, ...]
    rounding: float = 0.0
    pull: float = 0.0
    moved: float = 0.0
    points: int = 1

    @property
    def critical(self) -> bool:
        """Whether this may be called a critical point."""
        return self.gradient <= self.limit and (not self.orbit or len(self.polish) > 0)

    @property
    def limit(self) -> float:
        """The largest gradient that still counts as none: what was asked for, and twice what rounding gives where a
        polish in float64 has come as far as asked."""
        polished = bool(self.polish) and self.polish[-1] <= self.tolerance
        return max(self.tolerance, 2 * self.rounding) if polished else self.tolerance

    def items(self) -> dict[str, SummaryItem]:
        """For summary.json."""
        values = {
            "gradient_norm": (self.gradient, "norm of the gradient of all training data at theta*"),
            "lambda_min": (self.low, "smallest eigenvalue of the Hessian of all training data, pull included"),
            "lambda_max": (self.high, "largest eigenvalue of the Hessian of all training data, pull included"),
            "gradient_rounding": (self.rounding, "gradient that rounding the weights to dtype gives by itself"),
            "pull": (self.pull, "strength of the pull towards where descent ended, in gradient and Hessian"),
            "polish_moved": (self.moved, "distance of theta* from where descent ended"),
            "sharpness": (
                self.lr * self.high / 2,
                "learning rate of the descent x largest eigenvalue (pull included) / 2; stable below 1",
            ),
            "period_two": (float(self.orbit), "1 where descent ended in an orbit of period two"),
            "critical": (
                float(self.critical),
                f"1 where the gradient is below {self.limit:.3g} and there is no orbit",
            ),
        }
        if self.polish:
            values["polish_gradient"] = (self.polish[-1], "gradient norm at the end of the polish, in float64")
        return {f"diffusion/theta/{k}": plain_item(v, 1, text) for k, (v, text) in values.items()}

    def text(self) -> str:
        """A paragraph."""
        rates = ", ".join(f"{lr * self.high / 2:.3g} at {lr:g}" for lr in self.rates)
        end = (
            "Descent ended in an orbit of period two, so its sharpness has reached the edge of stability."
            if self.orbit
            else f"Descent did not end in an orbit of period two (ratio of its last two steps "
            f"{self.orbit_ratio:.3g}; 0 would be one)."
        )
        pull = (
            f" Gradient, Hessian and clouds are those of loss + {self.pull:g} / 2 |theta - where descent ended|^2: "
            "without it the eigenvalues are smaller by as much, and there is a gradient."
            if self.pull
            else ""
        )
        return (
            f"|gradient| = {self.gradient:.3g}; eigenvalues of the Hessian from {self.low:.3g} to {self.high:.4g}, "
            f"{self.negative} negative and {self.flat} zero; lr lambda_max / 2 = {self.lr * self.high / 2:.3g} for the "
            f"descent, for the clouds {rates} (stable below 1). {end}{pull}"
        )


def point_of(stages: Stages, results: ResultsLike) -> Point | None:
    """What is known of theta*; None before its curvature is."""
    blocks = stages.named("curvature")
    if not blocks:
        return None
    found, settings = stages.arrays(blocks[0]), blocks[0]["settings"]
    theta, values = stages.arrays(stages.before(blocks[0], "gd")[0]), stages.arrays(blocks[0])["eigenvalues"]
    edge = 1e-10 * max(1.0, float(np.abs(values).max()))
    own = settings["reference"]["gd"]
    rates = sorted({float(run["settings"]["optimizer"]["lr"]) for run in results.runs})
    return Point(
        float(np.linalg.norm(found["gradient"])),
        float(values[0]),
        float(values[-1]),
        int((values < -edge).sum()),
        int((np.abs(values) <= edge).sum()),
        float(own["lr"]),
        float(own["tolerance"]),
        bool(theta["period_two"]),
        float(theta["orbit_ratio"]),
        tuple(np.atleast_1d(theta.get("polish_gradients", np.array([]))).tolist()),
        tuple(rates),
        _rounding(found["hessian"], theta["theta"], str(settings["dtype"])),
        pull_of(blocks[0]),
        float(np.linalg.norm(theta["theta"] - theta.get("gd_theta", theta["theta"]))),
        len(blocks),
    )


def _rounding(hessian: np.ndarray, theta: np.ndarray, dtype: str) -> float:
    """Norm of H d for weights that are d off: each by an error spread evenly over one unit in its last place."""
    unit = np.spacing(np.abs(theta).astype(dtype)).astype(np.float64)
    return float(np.linalg.norm(hessian * unit) / np.sqrt(12))


def point_verdict(point: Point) -> Verdict:
    """Whether theta* is a critical point, in one line."""
    star = "theta*" if point.points == 1 else f"theta* (the first of {point.points})"
    of = f" of the loss with a pull of {point.pull:g} towards where descent ended" if point.pull else ""
    if point.critical:
        kind = "a minimum" if not point.flat else f"no direction falls, {point.flat} are flat to second order"
        kind = f"a saddle with {point.negative} falling directions" if point.negative else kind
        return Verdict(f"{star} is a critical point{of}, {kind}: |gradient| = {point.gradient:.2g}", point.text())
    why = "descent goes round it in an orbit of period two" if point.orbit else f"|gradient| = {point.gradient:.2g}"
    return Verdict(f"{star} is not a critical point{of}: {why}", point.text())


def cloud_verdict(cloud: Cloud, found: Score, summary: Mapping[str, SummaryItem]) -> Verdict:
    """How one cloud agrees with theory, in one line."""
    floor = summary[f"diffusion/{cloud.name}/monte_carlo_floor"]
    error = summary[f"diffusion/{cloud.name}/relative_error_all"]
    count = int(found.live.sum())
    text = (
        f"{cloud.name}: spread of {found.n} runs predicted in {count} of {len(found.live)} directions (the others "
        f"flat) with a relative error of {found.relative_error:.4f}; a perfect prediction would show {found.floor:.4f}"
    )
    low, high = (floor.low or 0.0), (floor.high or 0.0)
    span = "" if error.low is None or error.high is None else f" [{error.low:.4f}, {error.high:.4f}]"
    parts = [
        f"log-correlation {found.log_correlation:.5f}",
        f"relative error {found.relative_error:.4f}{span}, of clouds drawn from the prediction {low:.4f} to {high:.4f}",
        f"{100 * found.inside:.1f} % of ratios inside their chi-square 95 % interval",
        f"{100 * found.outside:.2f} % of the whitened eigenvalues outside the Marchenko-Pastur band",
        f"flat directions measure at most {found.flat_largest:.1g} of the largest",
    ]
    return Verdict(text, "; ".join(parts))


def bridge_verdict(found: Bridge) -> Verdict:
    """The bridge in one line."""
    ratio = found.ratio
    span = "" if ratio.low is None or ratio.high is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]"
    text = (
        f"Without replacement the spread in mid-epoch is {ratio.value:.3f}{span} of that with replacement; the "
        f"bridge's law says {found.expected:.3f}"
    )
    return Verdict(text, f"after {found.step} of {found.epoch} batches; n = {ratio.n}; {ratio.method}")


def published(arrays: Mapping[str, np.ndarray], covariance: np.ndarray, batch_size: int) -> np.ndarray:
    """Variances ``[D]`` by the formula of the published check: lr C_ii / B / (2 |lambda_i| + 1e-6)."""
    noise = along(covariance, arrays["eigenvectors"]) / batch_size
    return float(arrays["lr"]) * noise / (2 * np.abs(arrays["eigenvalues"]) + 1e-6)


def simpler(
    cloud: Cloud, arrays: Mapping[str, np.ndarray], curvature: Mapping[str, np.ndarray], steps: int
) -> dict[str, np.ndarray]:
    """Variances ``[D]`` by what others use: the process in continuous time, and the published stationary formula. For
    plain SGD with replacement; empty for other clouds."""
    o, batch = cloud.settings["optimizer"], int(cloud.settings["batch_size"])
    if cloud.sampler != "replacement" or o["name"] != "sgd" or o.get("momentum") or o.get("weight_decay"):
        return {}
    noise = curvature["covariance"] / batch
    continuous = diffusion.continuous_covariance(curvature["hessian"], noise, float(arrays["lr"]), steps)
    return {
        "continuous time (Ornstein-Uhlenbeck)": along(continuous, arrays["eigenvectors"]),
        "published: stationary": published(arrays, curvature["covariance"], batch),
    }


def _plain_row(found: Score, predicted: np.ndarray) -> list[Any]:
    """The numbers of a prediction that has variances only."""
    a, b = found.measured[found.live], predicted[found.live]
    error = diffusion.relative_error(a, b)
    low, high = found.limits
    inside = 100 * float(((a / b > low) & (a / b < high)).mean())
    beyond = float(np.sqrt(max(0.0, error**2 - found.floor**2)))
    return [diffusion.log_correlation(a, b), error, found.floor, inside, None, beyond]


def prediction_table(
    clouds: Sequence[Cloud],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    scores: Mapping[str, Score],
    curvatures: Mapping[str, Mapping[str, np.ndarray]],
) -> TableBlock:
    """One line per cloud and prediction."""
    columns = [
        Column("cloud"),
        Column("prediction"),
        Column("n", "d", "runs with finite weights"),
        Column("live directions", "d"),
        Column("log-correlation", ".5f", "over all live directions"),
        Column("relative error", ".4f", "sqrt(mean((V / Vhat - 1)^2))"),
        Column("floor", ".4f", "sqrt(2 / (n - 1))"),
        Column("inside 95 % (%)", ".1f", "ratios within their chi-square interval"),
        Column("outside band (%)", ".2f", "whitened eigenvalues outside the Marchenko-Pastur band"),
        Column("model error", ".4f", "relative error beyond the floor, in squares; 0 where below it"),
    ]
    rows: list[list[Any]] = []
    for cloud in clouds:
        if cloud.name not in scores:
            continue
        held = arrays[cloud.name]
        kinds = {str(held["theory"]): scores[cloud.name]}
        if "linear_Vhat" in held:
            linear = score(held, "linear_Vhat")
            kinds |= {"linear": linear} if linear is not None else {}
        for kind, found in kinds.items():
            share = [100 * found.inside, 100 * found.outside, found.model_error]
            numbers = [found.log_correlation, found.relative_error, found.floor, *share]
            rows.append([cloud.name, kind, found.n, int(found.live.sum()), *numbers])
        steps, own = max(int(t) for t in held["snapshot_steps"]), scores[cloud.name]
        for kind, predicted in simpler(cloud, held, curvatures[cloud.name], steps).items():
            rows.append([cloud.name, kind, own.n, int(own.live.sum()), *_plain_row(own, predicted)])
    return TableBlock(columns, rows, "Every prediction against every cloud; nothing is fitted.")
