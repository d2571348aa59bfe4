"""Sparse text files of LIBSVM (``label index:value …``), read by scikit-learn, as dense rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...core.errors import StudyError, UserError
from ..base import Data, stratified_split
from .split import held_out

LARGEST = 2**31  # numbers of a dense table: 8 GB


def load(
    name: str,
    files: Sequence[Path],
    *,
    normalise: bool,
    regression: bool,
    features: int | None,
    validation: int,
    test_share: float,
    source: str = "",
    licence: str = "not stated",
) -> Data:
    """The dataset of one file, or of a training and a test file.

    Inputs ``[n, features]`` float32, with ``normalise`` of Euclidean length 1 (rows of zeros stay); classes 0, 1, …
    are the labels in ascending order, or with ``regression`` targets are ``[n, 1]`` as they are. Of a single file a
    fixed stratified permutation holds out ``test_share`` for testing; ``validation`` samples are held out of what is
    left, the last ones of a training file.

    Raises:
        UserError: for a file that is not in this format, and for more held out than there is.
        StudyError: for a file that cannot be read.
    """
    tables, labels = _read(files, features)
    if normalise:
        tables = [_unit_rows(x) for x in tables]
    targets, classes = _targets(name, labels, regression)
    if len(files) == 2:
        x, y = _published(name, tables, targets, validation)
    else:
        x, y = _permuted(tables[0], targets[0], labels[0], validation, test_share, regression)
    where = source or ", ".join(str(path) for path in files)
    return Data(name, x[0], y[0], x[1], y[1], x[2], y[2], classes=classes, source=where, licence=licence)


def _read(files: Sequence[Path], features: int | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    from sklearn.datasets import load_svmlight_files

    try:
        found = load_svmlight_files([str(path) for path in files], n_features=features, dtype=np.float32)
    except FileNotFoundError as error:
        raise UserError("dataset.path", str(error.filename), "a file that exists") from None
    except OSError as error:
        raise StudyError(f"{files[0]}: cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError) as error:
        expected = f"lines 'label index:value …' with at most dataset.features columns ({error})"
        raise UserError("dataset.path", str(files[0]), expected) from None
    if any(matrix.shape[0] * matrix.shape[1] > LARGEST for matrix in found[0::2]):
        raise UserError("dataset.path", str(files[0]), f"at most {LARGEST} numbers as a dense table")
    tables = [np.ascontiguousarray(matrix.toarray()) for matrix in found[0::2]]
    if not all(len(table) for table in tables):
        raise UserError("dataset.path", str(files[0]), "at least one sample")
    return tables, [np.asarray(y) for y in found[1::2]]


def _unit_rows(x: np.ndarray) -> np.ndarray:
    from sklearn.preprocessing import normalize

    return normalize(x, copy=False)


def _targets(name: str, labels: Sequence[np.ndarray], regression: bool) -> tuple[list[torch.Tensor], int]:
    if regression:
        return [torch.from_numpy(y.astype(np.float32))[:, None] for y in labels], 0
    known = np.unique(np.concatenate(labels))
    if len(known) < 2 or not np.isfinite(known).all() or (known != np.round(known)).any():
        expected = f"whole numbers as labels, at least two of them, not {known[:5].tolist()}; or task = regression"
        raise UserError("dataset.task", "classification", expected)
    return [torch.from_numpy(np.searchsorted(known, y)) for y in labels], len(known)


Parts = tuple[list[torch.Tensor], list[torch.Tensor]]


def _published(name: str, tables: Sequence[np.ndarray], targets: Sequence[torch.Tensor], validation: int) -> Parts:
    left = held_out(name, len(tables[0]), validation)
    x, x_test = (torch.from_numpy(table) for table in tables)
    y, y_test = targets
    return [x[:left], x[left:], x_test], [y[:left], y[left:], y_test]


def _permuted(
    table: np.ndarray, target: torch.Tensor, labels: np.ndarray, validation: int, share: float, regression: bool
) -> Parts:
    n = len(table)
    test = round(n * share)
    left = held_out("libsvm", n - test, validation)
    strata = np.zeros(n, dtype=np.int64) if regression else np.unique(labels, return_inverse=True)[1]
    parts = stratified_split(strata, (left, validation, test))
    return [torch.from_numpy(table[rows]) for rows in parts], [target[torch.from_numpy(rows)] for rows in parts]
