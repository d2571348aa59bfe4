"""Datasets cut anew: each part made of slices of the published parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.slices import PARTS, Piece, overlap, pieces
from .base import Data, stratified_split


def sliced(data: Data, splits: Mapping[str, str]) -> Data:
    """The data with ``splits[part]`` as its training, validation and test part; itself where nothing changes.

    Raises:
        UserError: for no training or test samples, and for training samples that are evaluated on.
    """
    if all(splits[part] == part for part in PARTS):
        return data
    sizes = dict(zip(PARTS, data.n, strict=True))
    found = {part: pieces(splits[part], sizes) for part in PARTS}
    for part in ("train", "test"):
        if not any(piece.last > piece.first for piece in found[part]):
            raise UserError(f"splits.{part}", splits[part], f"at least one of the samples of '{data.name}' ({sizes})")
    for part in ("validation", "test"):
        if overlap(found["train"], found[part]):
            raise UserError(f"splits.{part}", splits[part], f"samples apart from splits.train = '{splits['train']}'")
    parts: dict[str, Any] = {
        f"{axis}_{part}": _joined(data, axis, found[part]) for part in PARTS for axis in ("x", "y")
    }
    return replace(data, **parts)


def folded(data: Data, folds: int | None, fold: int | None) -> Data:
    """The data with one of ``folds`` equal parts of its training samples as validation part and the others to train on;
    itself without folds. Parts are stratified by class and the same in every process.

    Raises:
        UserError: for more folds than training samples.
    """
    if folds is None or fold is None:
        return data
    n = len(data.x_train)
    if folds > n:
        raise UserError("folds", folds, f"at most the {n} training samples of '{data.name}'")
    labels = data.y_train.numpy() if data.classes and data.y_train.ndim == 1 else np.zeros(n, dtype=np.int64)
    parts = np.array_split(stratified_split(labels, (n, 0, 0))[0], folds)
    held = torch.as_tensor(parts[fold])
    rest = torch.as_tensor(np.sort(np.concatenate([part for k, part in enumerate(parts) if k != fold])))
    x, y = data.x_train, data.y_train
    return replace(data, x_train=x[rest], y_train=y[rest], x_validation=x[held], y_validation=y[held])


def _joined(data: Data, axis: str, chosen: Sequence[Piece]) -> Tensor:
    parts = [getattr(data, f"{axis}_{piece.part}")[piece.first : piece.last] for piece in chosen]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
