"""CIFAR-10: 60,000 colour photographs of 32 x 32 pixels in 10 classes, 50,000 of them for training."""

from __future__ import annotations

from ..base import Data
from . import cifar
from .sources import CIFAR10
from .split import Sizes

LAYOUT = cifar.Layout(
    classes=10,
    label="labels",
    label_bytes=1,
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test=("test_batch",),
)


def load(sizes: Sizes, scale: cifar.Scale) -> Data:
    """See :func:`cifar.load`."""
    return cifar.load(CIFAR10, LAYOUT, sizes, scale)
