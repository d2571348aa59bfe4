"""Digits are read without importing scikit-learn; its own reader is the oracle."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from commands import ROOT
from sklearn.datasets import load_digits

from descentlab.workloads.datasets.digits import load


def test_digits_are_those_of_scikit_learn() -> None:
    """Every image once, in some part, with its own label."""
    data, bunch = load(), load_digits()
    x = torch.cat([data.x_train, data.x_validation, data.x_test]).flatten(1).numpy() * 16
    y = torch.cat([data.y_train, data.y_validation, data.y_test]).numpy()
    ours, theirs = (np.column_stack([a, b]).tolist() for a, b in ((x, y), (bunch.data, bunch.target)))
    assert sorted(ours) == sorted(theirs)


def test_scikit_learn_is_not_imported() -> None:
    """Its import takes every process longer than a small study."""
    code = (
        "import sys; from descentlab.workloads.datasets.digits import load; load(); sys.exit('sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
