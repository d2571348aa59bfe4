"""One spherical Gaussian per class: the Bayes-optimal classifier is the nearest centre."""

from __future__ import annotations

import numpy as np
import torch

from ...core.streams import Streams
from ..base import Data


def centres(classes: int, dimension: int, separation: float, seed: int) -> np.ndarray:
    """Class means ``[classes, dimension]``: independent directions, each ``separation`` from the origin."""
    raw = Streams(seed).normal("centres", classes * dimension, replicate=0).reshape(classes, dimension)
    return separation * raw / np.linalg.norm(raw, axis=1, keepdims=True)


def load(classes: int, dimension: int, separation: float, sizes: tuple[int, int, int], seed: int) -> Data:
    """Inputs ``[n, dimension]`` float64, class centre + N(0, 1); classes are drawn uniformly."""
    streams, n = Streams(seed), sum(sizes)
    y = streams.integers("classes", classes, n, replicate=0)
    noise = streams.normal("noise", n * dimension, replicate=0).reshape(n, dimension)
    x = torch.from_numpy(centres(classes, dimension, separation, seed)[y] + noise)
    t = torch.from_numpy(y)
    a, b = sizes[0], sizes[0] + sizes[1]
    return Data(
        "gaussian_mixture", x[:a], t[:a], x[a:b], t[a:b], x[b:], t[b:],
        classes=classes, source="generated", licence="none needed",
    )  # fmt: skip
