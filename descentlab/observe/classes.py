"""What a classifier makes of each class of the test set."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.protocols import Measured
from .training import PerClassAccuracy


class ClassReport:
    """Of each class, at the weights after the update: recall (the accuracy on its samples), precision (the share of
    right ones among the samples called so, 0 where none is) and how many samples it has. One evaluation per class."""

    name, needs = "class_report", frozenset({"eval"})

    def measure(self, m: Measured) -> dict[str, Tensor]:
        recall = PerClassAccuracy().measure(m)
        if not recall:
            return {}
        assert m.evaluate is not None and m.test is not None
        x, y = m.test
        (shares,) = recall.values()
        counts = torch.bincount(y, minlength=shares.shape[1]).to(shares)
        named = [m.evaluate(x, torch.full_like(y, label))[1] for label in range(shares.shape[1])]
        called = torch.stack(named, dim=1).double() * len(y)  # samples for which the class has the largest output
        right = shares.nan_to_num(0.0) * counts
        precision = torch.where(called > 0, right / called.clamp_min(1.0), torch.zeros_like(called))
        return {**recall, "test_precision_class": precision, "test_support_class": counts.expand_as(shares).clone()}
