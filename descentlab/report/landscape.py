"""A loss landscape as files: one interactive page without a network, a picture, and the numbers."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from .figures import new_figure, styled

TEMPLATE = Path(__file__).with_name("landscape.html")
MOST_PATHS = 12  # named in the legend of the picture; all are drawn


def write(surface: Any, folder: str | Path, title: str = "Loss landscape") -> Path:
    """Write ``landscape.html``, ``landscape.png`` and ``landscape.npz`` of a
    :class:`descentlab.observe.landscape.Surface`; gives the page's path."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    np.savez(target / "landscape.npz", **arrays(surface))  # type: ignore[arg-type]
    picture(surface, title).savefig(target / "landscape.png", dpi=150)
    page = target / "landscape.html"
    page.write_text(document(surface, title), encoding="utf-8")
    return page


def arrays(surface: Any) -> dict[str, np.ndarray]:
    """Everything drawn, for one .npz: ``x``, ``y``, ``loss``, ``directions``, ``shares``, and of path i ``path_i_xy``,
    ``path_i_loss`` and ``path_i_steps``; ``names`` of the paths, ``inside`` their share in the plane."""
    out = {"x": surface.x, "y": surface.y, "loss": surface.loss, "directions": surface.directions}
    out |= {"shares": np.array(surface.shares), "center_loss": np.float64(surface.center_loss)}
    out |= {"names": np.array([p.name for p in surface.paths]), "inside": np.array([p.inside for p in surface.paths])}
    for i, path in enumerate(surface.paths):
        out |= {f"path_{i}_xy": path.xy, f"path_{i}_loss": path.loss, f"path_{i}_steps": path.steps}
    return out


def axis_names(surface: Any) -> tuple[str, str]:
    """What each axis is and which part of the paths' variance it explains."""
    parts = [
        label if math.isnan(share) else f"{label}: {100 * share:.1f} % of the variance"
        for label, share in zip(surface.labels, surface.shares, strict=True)
    ]
    return parts[0], parts[1]


def levels(surface: Any) -> np.ndarray:
    """Heights of contour lines: dense near the lowest finite loss, where paths end, and evenly spaced above."""
    finite = surface.loss[np.isfinite(surface.loss)]
    low, high = float(finite.min()), float(np.quantile(finite, 0.98))
    if high <= low:
        return np.array([low])
    return low + (high - low) * np.concatenate([np.geomspace(0.004, 0.1, 6), np.linspace(0.2, 1.0, 9)])


def picture(surface: Any, title: str) -> Any:
    """Contour lines with the paths, as a matplotlib figure."""
    with styled():
        figure = new_figure(7.0, 5.4)
        axes = figure.add_subplot()
        shown = np.where(np.isfinite(surface.loss), surface.loss, np.nan)
        at = levels(surface)
        if len(at) > 1:
            filled = axes.contourf(surface.x, surface.y, shown, levels=at, extend="both", cmap="viridis")
            axes.contour(surface.x, surface.y, shown, levels=at, colors="white", linewidths=0.4)
            figure.colorbar(filled, ax=axes, label="loss (nats)", format="%.3g")
        for i, path in enumerate(surface.paths):
            colour = f"C{i % 10}"
            label = path.name if i < MOST_PATHS else None
            axes.plot(*path.xy.T, color=colour, linewidth=1.2, marker=".", markersize=3, label=label)
            axes.plot(*path.xy[-1], color=colour, marker="o", markeredgecolor="white")
        axes.plot(0, 0, marker="+", color="black", markersize=9)
        names = axis_names(surface)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_title(title)
        if surface.paths:
            axes.legend(fontsize=7, loc="best", frameon=True, framealpha=0.8)
    return figure


def document(surface: Any, title: str) -> str:
    """The page: data as JSON beside a drawing script of its own; nothing is fetched."""
    names = axis_names(surface)
    finite = surface.loss[np.isfinite(surface.loss)]
    held = {
        "x": _numbers(surface.x),
        "y": _numbers(surface.y),
        "loss": [_numbers(row) for row in surface.loss],
        "levels": _numbers(levels(surface)),
        "labels": names,
        "paths": [
            {
                "name": p.name,
                "xy": [_numbers(point) for point in p.xy],
                "loss": _numbers(p.loss),
                "steps": p.steps.tolist(),
            }
            for p in surface.paths
        ],
    }
    inside = [p.inside for p in surface.paths]
    note = f"Loss at the centre {surface.center_loss:.6g}, on the plane {finite.min():.6g} to {finite.max():.6g} nats."
    if inside:
        note += (
            f" Paths are projected: {100 * min(inside):.1f} to {100 * max(inside):.1f} % of their squared distance from"
            " the centre lies in the plane; their height in the 3-D view is the loss at their own weights."
        )
    text = TEMPLATE.read_text(encoding="utf-8")
    data = json.dumps(held).replace("<", "\\u003c")
    return text.replace("@TITLE@", html.escape(title)).replace("@NOTE@", html.escape(note)).replace("@DATA@", data)


def _numbers(values: np.ndarray) -> list[float | None]:
    """To seven digits; what is not finite has no place in JSON."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in np.asarray(values, dtype=float).tolist()]
