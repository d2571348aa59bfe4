"""Where the mean of the runs goes, beside gradient descent: with the same learning rate, or with that times B / N."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import special

from ...report import Column, SummaryItem, TableBlock
from ...theory.diffusion import mean_displacement
from ...theory.intervals import holm
from ..common import plain_item

Arrays = Mapping[str, np.ndarray]
LEVEL = 0.05
WIDE = 10.0


def items(score: Arrays, path: Arrays, curvature: Arrays) -> dict[str, SummaryItem]:
    """Summary items by their last name.

    ``control_ratio``: how many times gradient descent's displacement d the mean of the runs has gone along it,
    m d / d d, with the normal interval of a mean of n runs of covariance V; ``control_ratio_predicted``: the same of
    two gradient descents on the quadratic, with the cloud's learning rate and with the control's (1 where they are one;
    N / B for a control that is B / N times slower as long as curvature is not felt). Neither where descent hardly moves
    and the interval is :data:`WIDE` times what it is compared with. ``control_differs``: live directions in which mean
    and gradient descent differ, z-tests corrected by Holm at 5 %.
    """
    vectors, n = score["eigenvectors"], int(score["runs"])
    lr, slow, steps = float(score["lr"]), float(path["lr"]), int(path["steps"][-1])
    mean, gone = vectors.T @ score["mean"], path["mean"][-1]
    variance = ((vectors.T @ score["V"]) * vectors.T).sum(1)
    size = float(gone @ gone)
    out = {
        "control_lr": plain_item(slow, 1, "learning rate of gradient descent"),
        "control_displacement": plain_item(size**0.5, 1, "distance of gradient descent from theta* at its end"),
    }
    own, other = (mean_displacement(curvature["hessian"], curvature["gradient"], rate, steps) for rate in (lr, slow))
    expected = float(own @ other) / float(other @ other) if float(other @ other) > 0 else 0.0
    along = vectors @ gone
    half = 1.96 * float(np.sqrt(along @ score["V"] @ along / n)) / size if size > 0 else np.inf
    if half < WIDE * max(1.0, abs(expected)):
        ratio = float(mean @ gone) / size
        text = "displacement of the runs' mean along that of gradient descent, over the latter; normal interval"
        out["control_ratio"] = SummaryItem(ratio, n, ratio - half, ratio + half, text)
        text = "the same of linear theory: two gradient descents on the quadratic at theta*"
        out |= {"control_ratio_predicted": plain_item(expected, 1, text)} if expected else {}
    live = variance > max(1e-12 * variance.max(), float(score.get("rounding", 0.0)))
    p = holm(2 * special.ndtr(-np.abs(mean - gone)[live] / np.sqrt(variance[live] / n)))
    text = f"of {int(live.sum())} directions those whose mean differs from gradient descent's, Holm at {LEVEL:g}"
    out["control_differs"] = plain_item(float((p < LEVEL).sum()), n, text)
    return out


def table(clouds: Mapping[str, Mapping[str, SummaryItem]]) -> TableBlock:
    """One row per cloud."""
    rows: list[list[Any]] = []
    for name, own in clouds.items():
        ratio, expected = own.get("control_ratio"), own.get("control_ratio_predicted")
        verdict = "descent hardly moves" if ratio is None else ""
        if ratio is not None and expected is not None and ratio.low is not None and ratio.high is not None:
            low, high, value = ratio.low, ratio.high, expected.value or 0.0
            verdict = "within noise of it" if low <= value <= high else "further" if low > value else "less far"
        differs = own["control_differs"]
        rows.append(
            [name, own["control_lr"], own["control_displacement"], differs.n, ratio, expected, verdict, differs]
        )
    columns = [
        Column("cloud"),
        Column("control's learning rate", ".4g"),
        Column("its displacement", ".3g"),
        Column("n", "d", "runs"),
        Column("mean of the runs / control", ".4g", "along the control's displacement, with its 95 % interval"),
        Column("linear theory", ".4g", "two gradient descents on the quadratic at theta*"),
        Column("verdict"),
        Column("directions that differ", ".0f", "z-tests of the mean, Holm at 5 %"),
    ]
    text = "The mean of the runs beside gradient descent of as many steps (control.scaling=B/N: with lr B / N)."
    return TableBlock(columns, rows, text)
