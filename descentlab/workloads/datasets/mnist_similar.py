"""Images with the first two moments of MNIST's classes and nothing else of MNIST: similar data to train on.

Of every class of the 3,840 training images of ``mnist5k`` the mean m and the principal components u_i with variances
s_i are taken (pixels in [0, 1], covariance divided by the class's number). A sample is m + sum_i sqrt(s_i) z_i u_i with
independent standard normal z over the ``rank`` largest components, cut to [0, 1]. Before the cut, mean and covariance
of a class are those of the real images but for the components left out; the cut raises dark pixels' mean and shrinks
their variance. Third and higher moments, strokes among them, are not reproduced: these are blurred clouds, no digits
that anybody wrote. The published program of that name read a file whose origin it does not say; this is not that file.

Validation and test samples are the real ones of ``mnist5k``, none of which the fit has seen.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from ...core.streams import Streams
from ..base import Data
from . import mnist5k

CLASSES = 10


@functools.lru_cache(maxsize=2)
def fitted(rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Means ``[10, 784]`` and scaled components ``[10, rank, 784]`` (rows of length sqrt(s_i)) of the classes."""
    real = mnist5k.load()
    x, y = real.x_train.flatten(1).double().numpy(), real.y_train.numpy()
    means, parts = [], []
    for c in range(CLASSES):
        own = x[y == c]
        means.append(own.mean(0))
        _, scale, rows = np.linalg.svd(own - means[-1], full_matrices=False)
        rows *= np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(1)])[:, None]  # the same on every machine
        parts.append((scale[:rank, None] / np.sqrt(len(own))) * rows[:rank])
    return np.stack(means), np.stack(parts)


def unclipped(n: int, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(samples ``[n, 784]`` before the cut, classes ``[n]``: 0 to 9 in turn)."""
    means, parts = fitted(rank)
    y = np.arange(n) % CLASSES
    z = Streams(seed).normal("images", n * rank, replicate=0).reshape(n, rank)
    out = np.empty((n, means.shape[1]))
    for c in range(CLASSES):
        out[y == c] = means[c] + z[y == c] @ parts[c]
    return out, y


def load(n: int, rank: int, seed: int) -> Data:
    """``n`` training images ``[n, 1, 28, 28]`` in [0, 1], classes in turn; validation 160 and test 1,000 real ones."""
    real = mnist5k.load()
    x, y = unclipped(n, rank, seed)
    images = torch.from_numpy(np.clip(x, 0.0, 1.0)).float().view(-1, 1, 28, 28)
    return Data(
        "mnist_similar",
        images, torch.from_numpy(y), real.x_validation, real.y_validation, real.x_test, real.y_test,
        classes=CLASSES,
        source=f"Gaussian samples fitted to each class of mnist5k ({rank} components); real images for testing",
        licence=real.licence,
    )  # fmt: skip
