"""CIFAR-100: 60,000 colour photographs of 32 x 32 pixels in 100 (fine) classes, 50,000 of them for training."""

from __future__ import annotations

from ..base import Data
from . import cifar
from .sources import CIFAR100
from .split import Sizes

LAYOUT = cifar.Layout(classes=100, label="fine_labels", label_bytes=2, train=("train",), test=("test",))


def load(sizes: Sizes, scale: cifar.Scale) -> Data:
    """See :func:`cifar.load`."""
    return cifar.load(CIFAR100, LAYOUT, sizes, scale)
