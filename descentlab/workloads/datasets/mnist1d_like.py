"""Short signals in ten classes, made as MNIST-1D is (Greydanus and Kobak, ICML 2024), from templates of our own.

A class is a fixed curve of 12 points. A sample is that curve, padded, stretched, scaled, sheared, shifted around a
circle, with correlated noise, sampled at 40 points. A linear classifier does badly, a small convolution well.
"""

from __future__ import annotations

import numpy as np
import torch

from ...core.streams import Streams
from ..base import Data

CLASSES, TEMPLATE, PADDED, LENGTH = 10, 12, 72, 40
SCALE, SHEAR, SHIFT, SMOOTH = 0.4, 0.75, 48, 2.0


def templates(seed: int) -> np.ndarray:
    """Curves ``[10, 12]``: smoothed random walks of mean 0 and largest absolute value 1."""
    steps = Streams(seed).normal("templates", CLASSES * TEMPLATE, replicate=0).reshape(CLASSES, TEMPLATE)
    curves = np.cumsum(steps, axis=1)
    curves -= curves.mean(1, keepdims=True)
    return curves / np.abs(curves).max(1, keepdims=True)


def smooth(signals: np.ndarray, width: float) -> np.ndarray:
    """Circular convolution of every row with a Gaussian of ``width`` points."""
    n = signals.shape[1]
    distance = np.minimum(np.arange(n), n - np.arange(n))
    kernel = np.exp(-0.5 * (distance / width) ** 2)
    return np.fft.irfft(np.fft.rfft(signals, axis=1) * np.fft.rfft(kernel / kernel.sum()), n=n, axis=1)


def load(noise: float, sizes: tuple[int, int, int], seed: int) -> Data:
    """Inputs ``[n, 40]`` float64 with the classes in turn; ``noise``: standard deviation before smoothing."""
    streams, n = Streams(seed), sum(sizes)
    y = np.arange(n) % CLASSES
    scale, shear, where = (streams.uniform("shape", n, replicate=0, step=i)[:, None] for i in range(3))
    grid = np.linspace(0.0, 1.0, PADDED)[None, :]
    stretched = grid * PADDED / (TEMPLATE * (2.0 + 2.0 * where))  # the template fills a third to a half, zeros after it
    at = stretched * (TEMPLATE - 1)
    low = np.clip(np.floor(at).astype(int), 0, TEMPLATE - 2)
    curve = np.take_along_axis(templates(seed)[y], low, 1) * (low + 1 - at)
    curve += np.take_along_axis(templates(seed)[y], low + 1, 1) * (at - low)
    signal = np.where(at <= TEMPLATE - 1, curve, 0.0) * (1.0 + SCALE * (2.0 * scale - 1.0))
    signal += SHEAR * (2.0 * shear - 1.0) * (grid - 0.5)
    shift = streams.integers("shift", SHIFT, n, replicate=0)[:, None]
    signal = np.take_along_axis(signal, (np.arange(PADDED)[None, :] - shift) % PADDED, 1)
    rough = streams.normal("noise", n * PADDED, replicate=0).reshape(n, PADDED)
    signal = smooth(signal + noise * rough, SMOOTH)
    x = torch.from_numpy(signal[:, np.linspace(0, PADDED - 1, LENGTH).round().astype(int)])
    t = torch.from_numpy(y)
    a, b = sizes[0], sizes[0] + sizes[1]
    return Data(
        "mnist1d_like", x[:a], t[:a], x[a:b], t[a:b], x[b:], t[b:],
        classes=CLASSES, source="generated", licence="none needed",
    )  # fmt: skip
