"""Figures of the diffusion study that compare clouds with their predictions: arrays in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...report.figures import COLOURS, DOUBLE, GREY, looks, new_figure, panel_title, styled
from .score import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arrays = Mapping[str, np.ndarray]
POINTS = 1000  # runs drawn as points


def agreement(scores: Mapping[str, Score]) -> Figure:
    """Measured against predicted variance in every live direction, and their ratio with its chi-square interval."""
    look = looks(list(scores))
    with styled():
        figure = new_figure(DOUBLE, 4.2)
        axes = figure.subplots(2, len(scores), squeeze=False, height_ratios=(2, 1), sharex="col")
        for i, (name, found) in enumerate(scores.items()):
            top, below, mark = axes[0, i], axes[1, i], look[name]
            x, y = found.predicted[found.live], found.measured[found.live]
            ends = np.array([x.min(), x.max()])
            top.plot(ends, ends, color=GREY, linewidth=0.8, linestyle="--", label="measured = predicted")
            top.plot(x, y, mark.marker, color=mark.colour, markersize=2.4, alpha=0.6, markeredgewidth=0)
            top.set_xscale("log")
            top.set_yscale("log")
            top.minorticks_off()
            text = f"{found.live.sum()} directions, {found.n} runs\nlog-correlation {found.log_correlation:.4f}\n"
            text += f"relative error {found.relative_error:.4f}\n(floor {found.floor:.4f})"
            top.text(0.04, 0.96, text, transform=top.transAxes, va="top", fontsize=7)
            panel_title(top, i, name)
            below.axhspan(*found.limits, color=GREY, alpha=0.2, linewidth=0, label="95 % of a perfect prediction")
            below.axhline(1, color=GREY, linewidth=0.8)
            below.plot(x, y / x, mark.marker, color=mark.colour, markersize=2.2, alpha=0.6, markeredgewidth=0)
            below.minorticks_off()
            below.set_xlabel("predicted variance")
        axes[0, 0].set_ylabel("measured variance")
        axes[1, 0].set_ylabel("measured / predicted")
        handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[1, 0].get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def whitened(scores: Mapping[str, Score]) -> Figure:
    """Eigenvalues of Vhat^-1/2 V Vhat^-1/2 against the law of Marchenko and Pastur: all directions at once."""
    with styled():
        figure = new_figure(DOUBLE, 2.5)
        axes = figure.subplots(1, len(scores), squeeze=False)[0]
        for i, (name, found) in enumerate(scores.items()):
            ax, (low, high) = axes[i], found.band
            bins = np.linspace(0, max(high, float(found.spectrum.max())) * 1.05, 45)
            ax.hist(found.spectrum, bins=bins, density=True, color=COLOURS[i], alpha=0.5, label="measured")
            at = np.linspace(low, high, 300)
            q = (len(found.live) - (~found.live).sum()) / (found.n - 1)
            density = np.sqrt(((high - at) * (at - low)).clip(min=0)) / (2 * np.pi * min(q, 1.0) * at.clip(min=1e-9))
            ax.plot(at, density, color="black", linewidth=1.1, label="law of a perfect prediction")
            ax.axvline(low, color=GREY, linewidth=0.7, linestyle=":")
            ax.axvline(high, color=GREY, linewidth=0.7, linestyle=":")
            ax.set_xlabel(r"eigenvalue of $\hat V^{-1/2} V \hat V^{-1/2}$")
            panel_title(ax, i, f"{name}: {100 * found.outside:.1f} % outside")
        axes[0].set_ylabel("density")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def over_time(clouds: Mapping[str, tuple[Arrays, Sequence[Arrays]]], picked: Sequence[int], epoch: int) -> Figure:
    """Variance of chosen modes after every look: measured as points, predicted as lines, one colour per loader.

    ``clouds``: name -> (score.npz, the cloud's blocks).
    """
    look = looks(list(clouds))
    with styled():
        figure = new_figure(DOUBLE, 2.2 * -(-len(picked) // 3))
        axes = figure.subplots(-(-len(picked) // 3), min(3, len(picked)), squeeze=False, sharex=True).ravel()
        for i, mode in enumerate(picked):
            ax, lowest = axes[i], np.inf
            for name, (score, blocks) in clouds.items():
                steps, variance = merged_variance(blocks)
                mark = look[name]
                lowest = min(lowest, float(np.nanmin(np.where(variance[:, mode] > 0, variance[:, mode], np.nan))))
                ax.plot(steps, variance[:, mode], mark.marker, color=mark.colour, markersize=2.6, markeredgewidth=0)
                if "variances" in score:
                    within = slice(None) if "independent_variances" not in score else score["times"] <= epoch
                    predicted, at = score["variances"][within, mode], score["times"][within]
                    ax.plot(at, predicted, color=mark.colour, linestyle=mark.line, linewidth=1, label=name)
                    ax.plot(score["times"], score["variances"][:, mode], "_", color=mark.colour, markersize=5)
            ax.axvline(epoch, color=GREY, linewidth=0.7, linestyle=":")
            ax.set_xscale("log")
            ax.set_yscale("log")
            if np.isfinite(lowest):  # a bridge's prediction at the end of an epoch can be rounding
                ax.set_ylim(bottom=max(lowest / 3, ax.get_ylim()[0]))
            eigenvalue = next(iter(clouds.values()))[0]["eigenvalues"][mode]
            panel_title(ax, i, rf"$\lambda$ = {eigenvalue:.2g}")
        for ax in axes[len(picked) :]:
            ax.set_visible(False)
        for ax in axes[max(0, len(picked) - 3) : len(picked)]:
            ax.set_xlabel("step")
        figure.supylabel("variance along the mode", fontsize=8)
        axes[0].plot([], [], "o", color=GREY, markersize=2.6, label="measured")
        axes[0].plot([], [], "_", color=GREY, markersize=5, label="predicted at these steps")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def merged_variance(blocks: Sequence[Arrays]) -> tuple[np.ndarray, np.ndarray]:
    """Steps ``[L]`` and variances ``[L, D]`` along the eigenvectors of all runs of all blocks (Chan's formula)."""
    n = np.stack([b["n"] for b in blocks]).astype(float)[:, :, None]
    mean, m2 = np.stack([b["mean"] for b in blocks]), np.stack([b["m2"] for b in blocks])
    whole = n.sum(0)
    centre = (n * mean).sum(0) / whole
    squares = m2.sum(0) + (n * (mean - centre) ** 2).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return blocks[0]["steps"], squares / (whole - 1)


def components(theta: np.ndarray, start: np.ndarray, path: np.ndarray | None, predicted: np.ndarray | None) -> Figure:
    """All pairs of the cloud's first four principal components, with theta*, the path of gradient descent, and the
    ellipse that should hold 95 % of the runs if ``predicted`` ``[D, D]`` is right."""
    apart = theta - theta.mean(0)
    _, scales, axes_of = np.linalg.svd(apart, full_matrices=False)
    count = min(4, len(axes_of))
    basis = axes_of[:count].T
    points, line = (theta - start)[:POINTS] @ basis, None if path is None else path @ basis
    share = scales**2 / (scales**2).sum()
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    with styled():
        figure = new_figure(DOUBLE, 2.3 * -(-len(pairs) // 3))
        axes = figure.subplots(-(-len(pairs) // 3), min(3, len(pairs)), squeeze=False).ravel()
        for i, (a, b) in enumerate(pairs):
            ax: Axes = axes[i]
            ax.plot(points[:, a], points[:, b], ".", color=COLOURS[0], markersize=2, alpha=0.5, label="a run's end")
            if predicted is not None:
                edge = _ellipse(basis[:, [a, b]].T @ predicted @ basis[:, [a, b]])
                centre = (theta - start).mean(0) @ basis[:, [a, b]]
                ax.plot(centre[0] + edge[0], centre[1] + edge[1], color="black", linewidth=1, label="95 %, predicted")
            if line is not None:
                ax.plot(line[:, a], line[:, b], color=COLOURS[1], linewidth=1.2)
                ax.plot(
                    *line[-1, [a, b]], "s", color=COLOURS[1], markersize=4, label="gradient descent's end", zorder=4
                )
            ax.plot(0, 0, "*", color="black", markersize=7, label=r"$\theta^*$")
            ax.set_xlabel(f"component {a + 1} ({100 * share[a]:.1f} %)")
            ax.set_ylabel(f"component {b + 1} ({100 * share[b]:.1f} %)")
            panel_title(ax, i, "")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _ellipse(covariance: np.ndarray) -> np.ndarray:
    """The edge ``[2, 200]`` of the region that holds 95 % of a centred Gaussian with this ``[2, 2]`` covariance."""
    values, vectors = np.linalg.eigh(covariance)
    angle = np.linspace(0, 2 * np.pi, 200)
    return vectors @ (np.sqrt(5.991 * values.clip(min=0))[:, None] * np.stack([np.cos(angle), np.sin(angle)]))


def fans(score: Arrays, blocks: Sequence[Arrays], control: Arrays | None, count: int = 6) -> Figure:
    """Coordinates along eigenvectors against time lr x step: quantiles over runs, and gradient descent."""
    directions, steps, lr = blocks[0]["directions"], blocks[0]["steps"], float(score["lr"])
    chosen = np.linspace(0, len(directions) - 1, min(count, len(directions))).round().astype(int)
    values = np.concatenate([b["projections"] for b in blocks], axis=1)
    with styled():
        figure = new_figure(DOUBLE, 2.1 * -(-len(chosen) // 3))
        axes = figure.subplots(-(-len(chosen) // 3), min(3, len(chosen)), squeeze=False, sharex=True).ravel()
        for i, k in enumerate(chosen):
            ax, time = axes[i], lr * steps
            quantiles = np.nanquantile(values[:, :, k], [0.025, 0.25, 0.5, 0.75, 0.975], axis=1)
            ax.fill_between(time, quantiles[0], quantiles[4], color=COLOURS[0], alpha=0.15, linewidth=0, label="95 %")
            ax.fill_between(time, quantiles[1], quantiles[3], color=COLOURS[0], alpha=0.3, linewidth=0, label="50 %")
            ax.plot(time, quantiles[2], color=COLOURS[0], linewidth=1, label="median of the runs")
            if control is not None:
                ax.plot(
                    float(control["lr"]) * control["steps"],
                    control["projections"][:, k],
                    color=COLOURS[1],
                    linestyle="--",
                    linewidth=1.1,
                    label="gradient descent",
                )
            panel_title(ax, i, rf"$\lambda$ = {score['eigenvalues'][directions[k]]:.2g}")
        for ax in axes[len(chosen) :]:
            ax.set_visible(False)
        for ax in axes[max(0, len(chosen) - 3) : len(chosen)]:
            ax.set_xlabel("learning rate x step")
        figure.supylabel("displacement along the mode", fontsize=8)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def test_losses(losses: Mapping[str, Arrays]) -> Figure:
    """Where the runs' test losses lie at the end, the start and the mean of their weights as lines."""
    across = min(2, len(losses))
    down = -(-len(losses) // across)
    with styled():
        figure = new_figure(DOUBLE, 1.9 * down + 0.3)
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for i, (name, found) in enumerate(losses.items()):
            ax, values = axes[i], found["loss"][np.isfinite(found["loss"])]
            ax.hist(values, bins=40, color=COLOURS[0], alpha=0.5, label="runs at the end")
            ax.axvline(
                float(found["start_loss"][0]), color="black", linewidth=1.1, label=r"$\theta^*$, where all start"
            )
            mean = float(found["mean_model_loss"][0])
            ax.axvline(mean, color=COLOURS[1], linewidth=1.3, linestyle="--", label="mean of the runs' weights")
            panel_title(ax, i, f"{name}: {values.mean():.5f} ± {values.std(ddof=1) if len(values) > 1 else 0:.5f}")
            ax.set_ylabel("runs")
            ax.ticklabel_format(axis="x", useOffset=False)
            ax.locator_params(axis="x", nbins=5)
        for ax in axes[-across:]:
            ax.set_xlabel("test loss (nats)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
