"""MNIST: 70,000 handwritten digits of 28 x 28 pixels, 60,000 of them for training."""

from __future__ import annotations

from ..base import Data
from . import idx
from .sources import MNIST
from .split import Sizes


def load(sizes: Sizes) -> Data:
    """See :func:`idx.load`."""
    return idx.load(MNIST, sizes)
