"""1,797 real handwritten 8x8 digits inside scikit-learn."""

from __future__ import annotations

import numpy as np
import torch

from ..base import Data, stratified_split

SIZES = (1280, 157, 360)


def load() -> Data:
    """Images ``[n, 1, 8, 8]`` in [0, 1]; train 1,280 (20 batches of 64), validation 157, test 360, stratified."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images.astype(np.float32)).unsqueeze(1) / 16.0
    y = bunch.target.astype(np.int64)
    train, validation, test = stratified_split(y, SIZES)
    t = torch.from_numpy(y)
    return Data(
        "digits",
        x[train], t[train], x[validation], t[validation], x[test], t[test],
        classes=10,
        source="UCI Optical Recognition of Handwritten Digits (test part), shipped with scikit-learn",
        licence="CC BY 4.0",
    )  # fmt: skip
