"""1,797 real handwritten 8x8 digits inside scikit-learn."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ...core.errors import UserError
from ..base import Data, stratified_split

SIZES = (1280, 157, 360)


def load() -> Data:
    """Images ``[n, 1, 8, 8]`` in [0, 1]; train 1,280 (20 batches of 64), validation 157, test 360, stratified."""
    rows = _rows()
    x = torch.from_numpy(rows[:, :64].reshape(-1, 8, 8)).unsqueeze(1) / 16.0
    y = rows[:, 64].astype(np.int64)
    train, validation, test = stratified_split(y, SIZES)
    t = torch.from_numpy(y)
    return Data(
        "digits",
        x[train], t[train], x[validation], t[validation], x[test], t[test],
        classes=10,
        source="UCI Optical Recognition of Handwritten Digits (test part), shipped with scikit-learn",
        licence="CC BY 4.0",
    )  # fmt: skip


def _rows() -> np.ndarray:
    """``[n, 64 + 1]``, as float32: pixels from 0 to 16, and the digit.

    The file is read without importing scikit-learn, which takes every process longer than a small study.
    """
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise UserError("dataset", "digits", "scikit-learn, which has the file")
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():  # another layout than that of the versions known so far
        from sklearn.datasets import load_digits

        images, target = load_digits(return_X_y=True)
        return np.column_stack([images, target]).astype(np.float32)
    with gzip.open(path, "rt") as file:
        return np.array([line.split(",") for line in file], dtype=np.float32)
