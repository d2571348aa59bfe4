"""How well a predicted covariance matches a measured one, in every direction and between directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special

from ...report import SummaryItem
from ...theory import diffusion

FLAT = 1e-12  # a direction predicted below this share of the largest variance is flat: nothing should move there
FEW_STEPS = 0.01  # lr |lambda| t below which a direction counts as not curved yet


@dataclass(frozen=True)
class Score:
    """One cloud against its prediction; variances ``[D]`` along the Hessian's eigenvectors.

    ``live``: directions that are not flat. ``flat_largest``: the largest measured variance of the flat ones over the
    largest predicted. ``inside``: share of ratios within their chi-square 95 % interval. ``spectrum``: eigenvalues of
    Vhat^-1/2 V Vhat^-1/2 on the live directions, of which ``outside`` lie beyond the Marchenko-Pastur band ``band``.
    """

    n: int
    measured: np.ndarray
    predicted: np.ndarray
    live: np.ndarray
    groups: np.ndarray
    log_correlation: float
    relative_error: float
    floor: float
    inside: float
    limits: tuple[float, float]
    flat_largest: float
    spectrum: np.ndarray
    band: tuple[float, float]
    outside: float

    @property
    def ratio(self) -> np.ndarray:
        """Measured over predicted variance of the live directions."""
        return self.measured[self.live] / self.predicted[self.live]

    @property
    def model_error(self) -> float:
        """What the relative error has beyond that of ``n`` runs of a perfect model, in squares; 0 for nothing."""
        return float(np.sqrt(max(0.0, self.relative_error**2 - self.floor**2)))


def along(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """u^T M u for every column u."""
    return ((vectors.T @ matrix) * vectors.T).sum(1)


def score(arrays: Mapping[str, np.ndarray], which: str = "Vhat", ending: str = "") -> Score | None:
    """The score of a ``score.npz``, of the prediction ``which`` at the snapshot ``ending``; None without a prediction
    or with fewer than three runs."""
    n = int(arrays.get(f"runs{ending}", 0))
    if f"{which}{ending}" not in arrays or n < 3:
        return None
    v, predicted, vectors = arrays[f"V{ending}"], arrays[f"{which}{ending}"], arrays["eigenvectors"]
    a, b = along(v, vectors), along(predicted, vectors)
    live = b > max(FLAT * b.max(), float(arrays.get("rounding", 0.0)))
    ratio = a[live] / b[live]
    limits = 2 * special.gammaincinv((n - 1) / 2, [0.025, 0.975]) / (n - 1)
    values = np.linalg.eigvalsh(predicted)
    places = np.flatnonzero(values > max(FLAT * values.max(), float(arrays.get("rounding", 0.0))))
    spectrum = diffusion.whitened_spectrum(v, predicted, places)
    if len(places) >= n:  # fewer runs than directions: the others are exactly zero
        spectrum = spectrum[-(n - 1) :]
    low, high = _band(len(places), n)
    return Score(
        n,
        a,
        b,
        live,
        arrays.get(f"group_variances{ending}", np.empty((0, len(a)))),
        diffusion.log_correlation(a[live], b[live]),
        diffusion.relative_error(a[live], b[live]),
        diffusion.monte_carlo_floor(n),
        float(((ratio > limits[0]) & (ratio < limits[1])).mean()),
        (float(limits[0]), float(limits[1])),
        float(a[~live].max() / b.max()) if (~live).any() else 0.0,
        spectrum,
        (low, high),
        float(((spectrum < low) | (spectrum > high)).mean()),
    )


def _band(directions: int, n: int) -> tuple[float, float]:
    """Marchenko and Pastur's edges, of the eigenvalues that are not zero where there are fewer runs than directions."""
    root = np.sqrt(directions / (n - 1))
    return float((1.0 - root) ** 2), float((1.0 + root) ** 2)


def jackknifed(value: float, groups: np.ndarray, of: Callable[[np.ndarray], float], n: int, what: str) -> SummaryItem:
    """``value`` with a 95 % interval from leaving out groups of runs, each ``[D]`` of ``groups`` ``[G, D]``."""
    if len(groups) < 2:
        return SummaryItem(value, n, None, None, what)
    each = np.array([of(g) for g in groups])
    spread = np.sqrt((len(each) - 1) / len(each) * ((each - each.mean()) ** 2).sum())
    half = float(special.stdtrit(len(each) - 1, 0.975) * spread)
    return SummaryItem(value, n, value - half, value + half, f"{what}; jackknife over {len(each)} groups of runs, t")


def trace_item(arrays: Mapping[str, np.ndarray]) -> SummaryItem:
    """Trace of V with its interval over groups of runs."""
    groups = arrays.get("group_variances", np.empty((0, 0)))
    return jackknifed(float(np.trace(arrays["V"])), groups, lambda g: float(g.sum()), int(arrays["runs"]), "trace of V")


def floor_item(found: Score, vectors: np.ndarray, predicted: np.ndarray, draws: int = 100) -> SummaryItem:
    """sqrt(2 / (n - 1)), and the range in which a perfect prediction's relative error falls in 95 % of clouds: Wishart
    matrices drawn from the prediction (Bartlett), whose directions are correlated as the cloud's are."""
    inside = vectors.T @ predicted @ vectors
    chosen = inside[np.ix_(found.live, found.live)]
    scale = 1 / np.sqrt(np.diag(chosen))
    values, basis = np.linalg.eigh(chosen * np.outer(scale, scale))
    root = (basis * np.sqrt(values.clip(min=0.0))).astype(np.float32)
    d, degrees = len(root), found.n - 1
    generator = np.random.Generator(np.random.Philox(1))
    errors = []
    for _ in range(draws):
        if degrees >= d:
            factor = np.tril(generator.standard_normal((d, d), dtype=np.float32), -1)
            factor[np.diag_indices(d)] = np.sqrt(generator.chisquare(degrees - np.arange(d)))
        else:
            factor = generator.standard_normal((d, degrees), dtype=np.float32)
        ratio = ((root @ factor) ** 2).sum(1) / degrees
        errors.append(np.sqrt(np.mean((ratio - 1) ** 2)))
    low, high = np.quantile(errors, [0.025, 0.975])
    method = f"sqrt(2 / (n - 1)); range of the relative error over {draws} clouds drawn from the prediction"
    return SummaryItem(found.floor, found.n, float(low), float(high), method)


def items(found: Score, vectors: np.ndarray, predicted: np.ndarray) -> dict[str, SummaryItem]:
    """The score as summary items by their last name."""
    live, n, b = found.live, found.n, found.predicted
    count = int(live.sum())
    over = f"over {count} of {len(live)} Hessian eigendirections, the others flat"
    plain = {
        "inside_chi_square": (found.inside, f"share of ratios in their chi-square 95 % interval, {over}"),
        "outside_marchenko_pastur": (found.outside, "share of eigenvalues of Vhat^-1/2 V Vhat^-1/2 outside the band"),
        "flat_directions": (float((~live).sum()), f"predicted below {FLAT:g} of the largest variance or rounding"),
        "flat_largest": (
            found.flat_largest,
            "largest measured variance of a flat direction over the largest predicted",
        ),
        "model_error": (found.model_error, "sqrt(relative error^2 - floor^2), 0 where below the floor"),
    }
    out = {name: SummaryItem(value, n, None, None, method) for name, (value, method) in plain.items()}
    groups = found.groups
    out["log_correlation_all"] = jackknifed(
        found.log_correlation,
        groups,
        lambda g: diffusion.log_correlation(g[live], b[live]),
        n,
        f"Pearson correlation of the logarithms of measured and predicted variance {over}",
    )
    out["relative_error_all"] = jackknifed(
        found.relative_error,
        groups,
        lambda g: diffusion.relative_error(g[live], b[live]),
        n,
        f"sqrt(mean((V_i / Vhat_i - 1)^2)) {over}",
    )
    out["monte_carlo_floor"] = floor_item(found, vectors, predicted)
    return out


@dataclass(frozen=True)
class Bridge:
    """The variance without replacement after ``step`` of ``epoch`` batches over that with replacement, averaged over
    the ``directions`` that are not curved yet; ``expected`` by the bridge's law."""

    ratio: SummaryItem
    step: int
    epoch: int
    directions: int
    expected: float


def bridge(arrays: Mapping[str, np.ndarray]) -> Bridge | None:
    """The bridge in the middle of the first epoch, from a ``score.npz`` of a cloud without replacement; None where half
    an epoch was not looked at or there are too few runs."""
    epoch = int(arrays["steps_per_epoch"])
    step = max(1, epoch // 2)
    ending = f"_{step}"
    if f"V{ending}" not in arrays or "independent_variances" not in arrays or int(arrays[f"runs{ending}"]) < 3:
        return None
    vectors, values, lr = arrays["eigenvectors"], arrays["eigenvalues"], float(arrays["lr"])
    apart = arrays["independent_variances"][list(arrays["times"]).index(step)]
    law = along(arrays[f"Vhat{ending}"], vectors)
    live = (apart > FLAT * apart.max()) & (lr * np.abs(values) * step < FEW_STEPS)
    measured = along(arrays[f"V{ending}"], vectors)

    def ratio(variances: np.ndarray) -> float:
        return float((variances[live] / apart[live]).mean())

    text = f"mean over {int(live.sum())} directions of V / Vhat with replacement, after {step} of {epoch} batches"
    n = int(arrays[f"runs{ending}"])
    found = jackknifed(ratio(measured), arrays[f"group_variances{ending}"], ratio, n, text)
    return Bridge(found, step, epoch, int(live.sum()), ratio(law))
