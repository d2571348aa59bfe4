"""A pull towards one point, added to the loss: what makes a point critical where the loss alone has none nearby.

The loss becomes L(theta) + gamma / 2 |theta - anchor|^2. Where gamma exceeds the size of the lowest eigenvalue of the
Hessian at the anchor, the sum is convex around it and has a minimum there, next to the anchor. The same term localises
sampling at a degenerate point (arXiv:2308.12108, eq. 12) and regularises fine-tuning (L2-SP, arXiv:1802.01483, eq. 3).
It is the same for every sample, so it adds to gradient and Hessian and nothing to the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.opmode import Ops
from ...core.protocols import Batch, Grads, Work
from ...core.state import State
from .spec import DiffusionSpec


class Pull:
    """``gamma`` / 2 |theta - ``anchor``|^2; ``anchor`` ``[D]``, all parameters in their order."""

    def __init__(self, gamma: float = 0.0, anchor: np.ndarray | float = 0.0) -> None:
        self.gamma, self.anchor = gamma, anchor

    @classmethod
    def of(cls, cell: DiffusionSpec, at: Mapping[str, np.ndarray]) -> Pull:
        """As the settings ask, towards where descent to theta* ended (``theta.npz`` of stage gd)."""
        gamma = cell.reference.gd.localise
        return cls(gamma, at["gd_theta"]) if gamma else cls()

    def value(self, theta: np.ndarray) -> float:
        """At ``theta`` ``[D]``."""
        return float(self.gamma / 2 * ((theta - self.anchor) ** 2).sum())

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """At every row of ``theta`` ``[..., D]``."""
        return self.gamma * (theta - self.anchor)

    def added(self, hessian: np.ndarray) -> np.ndarray:
        """``hessian`` ``[D, D]`` with the pull's own."""
        return hessian + self.gamma * np.eye(len(hessian)) if self.gamma else hessian

    def on(self, work: Work) -> Work:
        """The work with the pull in its gradients and losses."""
        return Pulled(work, self) if self.gamma else work


class Pulled:
    """A :class:`~descentlab.core.protocols.Work` with a :class:`Pull` in it; test losses are without."""

    def __init__(self, inner: Any, pull: Pull) -> None:
        self.inner, self.pull = inner, pull

    def work(self, view: State, batch: Batch, ops: Ops | None = None) -> Grads:
        """See :class:`~descentlab.core.protocols.Work`."""
        found = self.inner.work(view, batch, ops)
        squares, grads = torch.zeros_like(found.loss), {}
        for (name, p), anchor in zip(view.params.items(), self._anchors(view), strict=True):
            away = p - anchor
            grads[name] = found.grads[name] + self.pull.gamma * away
            squares = squares + away.square().flatten(1).sum(1)
        return Grads(grads, found.buffers, found.loss + self.pull.gamma / 2 * squares, found.accuracy)

    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~descentlab.core.protocols.Work`."""
        return self.inner.evaluate(view, x, y)

    def _anchors(self, view: State) -> list[Tensor]:
        params = view.params.values()
        cuts = np.cumsum([p[0].numel() for p in params])[:-1]
        pieces = np.split(np.asarray(self.pull.anchor), cuts)
        return [torch.from_numpy(a).reshape(p.shape[1:]).to(p) for a, p in zip(pieces, params, strict=True)]
