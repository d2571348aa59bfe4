"""Figures of theta* and of curvature along runs: arrays in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ...report.figures import COLOURS, DOUBLE, GREY, SINGLE, looks, new_figure, panel_title, plain_log_ticks, styled
from ...theory.intervals import eigenvalues_of_mean, over_replicates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arrays = Mapping[str, np.ndarray]
SMALL = 1e-5  # eigenvalues below it are not drawn in the tube


def stitched(sgd: pl.DataFrame, gd: pl.DataFrame, clouds: Mapping[str, pl.DataFrame]) -> Figure:
    """The loss through all stages: SGD, gradient descent, and the clouds (mean over runs with its interval)."""
    look = looks(list(clouds))
    with styled():
        figure = new_figure(DOUBLE, 2.4)
        axes = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 1.3))
        for ax, rows, name in zip(axes[:2], (sgd, gd), ("SGD", "gradient descent"), strict=True):
            if rows.height:
                trained = rows.filter(pl.col("train_loss").is_not_null())
                step, loss = _binned(trained["step"].to_numpy(), trained["train_loss"].to_numpy())
                ax.plot(step, loss, color=COLOURS[0], linewidth=1.1, label="training loss")
                tested = rows.filter(pl.col("test_loss").is_not_null()) if "test_loss" in rows.columns else rows.head(0)
                ax.plot(tested["step"], tested["test_loss"], color=COLOURS[1], linestyle="--", label="test loss")
            panel_title(ax, 0 if name == "SGD" else 1, name)
            ax.set_xlabel("step")
        axes[0].set_yscale("log")
        plain_log_ticks(axes[0])
        axes[0].set_ylabel("loss (nats)")
        axes[0].legend()
        for name, rows in clouds.items():
            step, mean = rows["step"].to_numpy(), rows["mean"].to_numpy()
            error = 1.96 * np.sqrt(rows["variance"].to_numpy() / rows["n"].to_numpy())
            mark = look[name]
            axes[2].plot(step, mean, color=mark.colour, linestyle=mark.line, linewidth=1, label=name)
            axes[2].fill_between(step, mean - error, mean + error, color=mark.colour, alpha=0.2, linewidth=0)
        panel_title(axes[2], 2, "clouds: mean batch loss")
        axes[2].set_xlabel("step")
        if clouds:
            figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _binned(step: np.ndarray, values: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Means over bins of equal width where there are more than ``most`` points."""
    if len(step) <= most:
        return step, values
    cuts = np.linspace(0, len(step), most + 1).astype(int)[1:-1]
    return (
        np.array([part.mean() for part in np.split(step, cuts)]),
        np.array([part.mean() for part in np.split(values, cuts)]),
    )


def gradient_norms(gd: pl.DataFrame, polish: Sequence[float], tolerance: float = 0.0) -> Figure:
    """The gradient's norm during descent, both axes logarithmic, and beside it at the recorded points of the polish, if
    there are some, with the norm it is to come below (``tolerance``)."""
    with styled():
        figure = new_figure(DOUBLE if len(polish) else SINGLE, 2.5)
        left, *rest = figure.subplots(1, 2 if len(polish) else 1, sharey=True, squeeze=False)[0]
        left.plot(gd["step"].to_numpy() + 1, gd["grad_norm"].to_numpy(), color=COLOURS[0])
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlabel("step of gradient descent")
        left.set_ylabel("norm of the full gradient")
        for ax in rest:
            ax.plot(polish, color=COLOURS[1], marker=".", markersize=3, linewidth=1)
            ax.set_xlabel("recorded point of the polish")
            if tolerance:
                ax.axhline(tolerance, color=GREY, linestyle=":", linewidth=0.9, label="tolerance")
                ax.legend()
    return figure


def tubes(along: Mapping[str, Arrays]) -> Figure:
    """Sorted eigenvalues of the Hessians along runs: mean and two standard deviations over runs and steps; and the
    largest one over time, mean over runs with Student's interval where there are several."""
    look = looks(list(along))
    with styled():
        figure = new_figure(DOUBLE, 2.6)
        left, right = figure.subplots(1, 2)
        for name, found in along.items():
            values, mark = found["eigenvalues"][:, :, ::-1], look[name]
            mean, spread = np.nanmean(values, (0, 1)), np.nanstd(values, (0, 1))
            kept = np.abs(mean) > SMALL
            place = np.arange(1, len(mean) + 1)
            left.plot(place[kept], mean[kept], color=mark.colour, linestyle=mark.line, linewidth=1, label=name)
            low, high = mean - 2 * spread, mean + 2 * spread
            left.fill_between(place, low, high, where=kept, color=mark.colour, alpha=0.15, linewidth=0)
            _largest(right, found["steps"], values[:, :, 0], mark)
        left.set_yscale("symlog", linthresh=1e-3)
        left.axhline(0, color=GREY, linewidth=0.6)
        left.set_xlabel("place")
        left.set_ylabel("eigenvalue of a batch's Hessian")
        right.set_xlabel("step")
        right.set_ylabel("largest eigenvalue")
        panel_title(left, 0, "mean and two deviations")
        panel_title(right, 1, "sharpest direction of each batch")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _largest(ax: Any, steps: np.ndarray, values: np.ndarray, mark: Any) -> None:
    """``values`` ``[R, K]`` over ``steps``, as far as any run is finite."""
    reached = np.isfinite(values).any(axis=0)
    steps, values = steps[reached], values[:, reached]
    ax.plot(steps, np.nanmean(values, 0), color=mark.colour, linestyle=mark.line, linewidth=1)
    if len(values) > 1:
        found = over_replicates(values)
        ax.fill_between(steps, found.low, found.high, color=mark.colour, alpha=0.12, linewidth=0)


def alignment(values: np.ndarray, noise: np.ndarray, cosine: float, scale: float) -> Figure:
    """Noise of single-sample gradients along every eigenvector against its eigenvalue."""
    with styled():
        figure = new_figure(SINGLE, 2.6)
        ax = figure.subplots()
        size = np.abs(values)
        live = (size > 1e-9) & (noise > 1e-14)
        for sign, colour, name in ((values > 0, COLOURS[0], "positive"), (values < 0, COLOURS[1], "negative")):
            part = live & sign
            ax.plot(size[part], noise[part], ".", color=colour, markersize=3, alpha=0.7, label=f"{name} curvature")
        ends = np.array([size[live].min(), size.max()])
        ax.plot(ends, ends * scale, color=GREY, linestyle="--", linewidth=0.9, label=f"{scale:.2f} x curvature")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("size of the eigenvalue of H")
        ax.set_ylabel("variance of single gradients")
        ax.set_title(f"cosine of noise and Hessian {cosine:.3f}")
        ax.legend(fontsize=6)
    return figure


def across_rates(
    rates: np.ndarray, traces: np.ndarray, predicted: np.ndarray, along: Mapping[str, Arrays], shares: Mapping[str, Any]
) -> Figure:
    """What changes with the learning rate: the cloud's size, the averaged Hessian of the batches along runs, and
    its trace beside that at theta*.

    ``traces`` ``[L, 3]``: value, low, high. ``shares``: name -> trace of the averaged Hessian over that of all data at
    theta*, an interval over runs.
    """
    look = looks(list(along))
    with styled():
        figure = new_figure(DOUBLE, 2.5)
        first, second, third = figure.subplots(1, 3)
        order = np.argsort(rates)
        first.plot(rates[order], predicted[order], "-", color=GREY, label="predicted")
        apart = np.abs(traces[:, [1, 2]] - traces[:, :1]).T
        first.errorbar(rates, traces[:, 0], apart, fmt="o", color=COLOURS[0], markersize=3, capsize=2, label="measured")
        first.set_xscale("log")
        first.set_yscale("log")
        first.set_xlabel("learning rate")
        first.set_ylabel("trace of the cloud's covariance")
        first.set_xticks(rates, [f"{rate:g}" for rate in rates])
        first.minorticks_off()
        plain_log_ticks(first)
        first.legend()
        for i, (name, found) in enumerate(along.items()):
            mean, mark = averaged_eigenvalues(found)[:, 0][::-1], look[name]
            second.plot(np.arange(1, 1 + len(mean)), mean, color=mark.colour, linestyle=mark.line, label=name)
            value, low, high = shares[name]
            third.errorbar(i, value, [[value - low], [high - value]], fmt=mark.marker, color=mark.colour, capsize=2)
        second.set_yscale("symlog", linthresh=1e-3)
        second.set_xlabel("place")
        second.set_ylabel("averaged eigenvalue")
        third.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        third.set_xlim(-0.5, len(along) - 0.5)
        third.set_xticks([])
        third.set_xlabel("cloud")
        third.set_ylabel(r"trace, averaged / at $\theta^*$")
        names = ("size of the cloud", "averaged batch Hessian", "its trace")
        for i, (ax, name) in enumerate(zip((first, second, third), names, strict=True)):
            panel_title(ax, i, name)
        figure.legend(*second.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def whole_runs(found: Arrays) -> np.ndarray:
    """The averaged Hessians ``[R, D, D]`` of the runs that did not diverge."""
    return found["mean_hessian"][np.isfinite(found["mean_hessian"]).all((1, 2))]


def averaged_eigenvalues(found: Arrays) -> np.ndarray:
    """Eigenvalues (rising) of the Hessian averaged over runs and steps, ``[D, 3]``: with jackknife intervals over runs
    where there are three, else without ends (NaN); all NaN where no run went on to its end."""
    matrices = whole_runs(found)
    if not len(matrices):
        return np.full((found["mean_hessian"].shape[1], 3), np.nan)
    if len(matrices) > 2:
        return np.stack(eigenvalues_of_mean(matrices), axis=1)
    values = np.linalg.eigvalsh(matrices.mean(0))
    return np.stack([values, np.full_like(values, np.nan), np.full_like(values, np.nan)], axis=1)
