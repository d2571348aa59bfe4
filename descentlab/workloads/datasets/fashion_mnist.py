"""Fashion-MNIST: 70,000 pictures of clothes in MNIST's format, 60,000 of them for training."""

from __future__ import annotations

from ..base import Data
from . import idx
from .sources import FASHION_MNIST
from .split import Sizes


def load(sizes: Sizes) -> Data:
    """See :func:`idx.load`."""
    return idx.load(FASHION_MNIST, sizes)
