"""What every run records: loss, accuracy, norms, optimizer slots, BatchNorm variances, non-finite counts, test set."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.member_stats import member_max_abs, member_nonfinite, member_norms
from ..core.protocols import Measured
from ..core.tree import leaves


class BatchLoss:
    """Loss (nats) and accuracy of this step's batch, at the weights before the update; the learning rate used."""

    name, needs = "batch_loss", frozenset({"loss"})

    def measure(self, m: Measured) -> dict[str, Tensor]:
        return {"train_loss": m.loss, "train_accuracy": m.accuracy, "lr": m.lr}


class GradientNorm:
    """Euclidean norm of the gradient that was applied, and its non-finite elements."""

    name, needs = "gradient_norm", frozenset({"grad"})
    keeps_nothing = True  # so that the next gradient may be written over this one

    def measure(self, m: Measured) -> dict[str, Tensor]:
        norm, nonfinite = member_norms(m.grads)
        return {"grad_norm": norm, "nonfinite_grads": nonfinite}


class UpdateNorm:
    """Euclidean norm of (weights after - weights before), and non-finite weights after."""

    name, needs = "update_norm", frozenset({"update"})

    def measure(self, m: Measured) -> dict[str, Tensor]:
        assert m.before is not None
        norm, nonfinite = member_norms(m.state.params, {k: m.before[k] for k in m.state.params})
        return {"update_norm": norm, "nonfinite_params": nonfinite}


class LargestSlot:
    """Largest absolute element of any optimizer slot after the update; null for an optimizer without slots."""

    name, needs = "largest_slot", frozenset[str]()

    def measure(self, m: Measured) -> dict[str, Tensor]:
        slots = [t for t in leaves(m.state.slots) if t.dim() > 1]
        return {"slot_max": member_max_abs({str(i): t for i, t in enumerate(slots)})} if slots else {}


class BatchNormVariance:
    """Largest running variance of any BatchNorm layer after the step; null without BatchNorm."""

    name, needs = "batch_norm_variance", frozenset[str]()

    def measure(self, m: Measured) -> dict[str, Tensor]:
        held = {k: b for k, b in m.state.buffers.items() if k.endswith("running_var")}
        return {"bn_var_max": member_max_abs(held)} if held else {}


class TestSet:
    """Loss (nats) and accuracy on the test set at the weights after the update."""

    name, needs = "test_set", frozenset({"eval"})
    weights_only = True  # what the engine need not copy for it: the optimizer's slots
    only_evaluates = True  # nor anything else, where members can be evaluated in their places
    __test__ = False  # not a test case, whatever its name suggests to pytest

    def measure(self, m: Measured) -> dict[str, Tensor]:
        assert m.evaluate is not None
        loss, accuracy = m.evaluate()
        return {"test_loss": loss, "test_accuracy": accuracy}


class WeightNorm:
    """Euclidean norm of all weights after the update."""

    name, needs = "weight_norm", frozenset[str]()

    def measure(self, m: Measured) -> dict[str, Tensor]:
        return {"weight_norm": member_norms(m.state.params)[0]}


class PerClassAccuracy:
    """Accuracy on the test samples of each class, at the weights after the update; NaN for a class without samples."""

    name, needs = "per_class_accuracy", frozenset({"eval"})

    def measure(self, m: Measured) -> dict[str, Tensor]:
        assert m.evaluate is not None and m.test is not None
        x, y = m.test
        if y.dim() != 1 or y.is_floating_point():
            return {}
        shares = []
        for label in range(int(y.max()) + 1):
            here = y == label
            found = m.evaluate(x[here], y[here])[1] if bool(here.any()) else torch.full_like(m.loss, torch.nan)
            shares.append(found.double())
        return {"test_accuracy_class": torch.stack(shares, dim=1)}


STANDARD = (BatchLoss, GradientNorm, UpdateNorm, LargestSlot, BatchNormVariance)


def needs_of(observables: list) -> frozenset[str]:
    """The union of what observables need, so that the engine computes each thing once."""
    return frozenset().union(*(o.needs for o in observables)) if observables else frozenset()


def finite_members(m: Measured) -> Tensor:
    """Which members still have a finite loss and finite weights: bool ``[M]``."""
    return torch.isfinite(m.loss) & (member_nonfinite(m.state.params) == 0)
