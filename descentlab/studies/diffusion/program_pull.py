"""A pull towards one point, added to the loss: what makes a point critical where the loss alone has none nearby.

The loss becomes L(theta) + gamma / 2 |theta - anchor|^2. With k = gamma + the lowest eigenvalue of the Hessian at the
anchor, g the gradient there and T a bound on third derivatives, k^2 > 2 |g| T is enough for a minimum within 2 |g| / k.
The same term localises sampling at a degenerate point (arXiv:2308.12108) and regularises fine-tuning (L2-SP,
arXiv:1802.01483). It is the same for every sample, so it adds to gradient and Hessian and nothing to the noise.
"""

from __future__ import annotations

from collections.abc import Mapping

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
        """The work with the pull in its gradients."""
        return Pulled(work, self) if self.gamma else work


class Pulled:
    """A :class:`~descentlab.core.protocols.Work` with a :class:`Pull` in its gradients. Its losses are without, so they
    compare with those of the stages before and with test losses."""

    def __init__(self, inner: Work, pull: Pull) -> None:
        self.inner, self.pull = inner, pull
        self._anchors: dict[str, Tensor] = {}

    def work(self, view: State, batch: Batch, ops: Ops | None = None) -> Grads:
        """See :class:`~descentlab.core.protocols.Work`."""
        found, anchors = self.inner.work(view, batch, ops), self._anchors or self._cut(view)
        grads = {k: found.grads[k] + self.pull.gamma * (p - anchors[k]) for k, p in view.params.items()}
        return Grads(grads, found.buffers, found.loss, found.accuracy)

    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~descentlab.core.protocols.Work`."""
        return self.inner.evaluate(view, x, y)

    def _cut(self, view: State) -> dict[str, Tensor]:
        """The anchor in the shapes, dtype and place of the weights, which stay the same for a work's life."""
        cuts = np.cumsum([p[0].numel() for p in view.params.values()])[:-1]
        pieces = zip(view.params.items(), np.split(np.asarray(self.pull.anchor), cuts), strict=True)
        self._anchors = {k: torch.from_numpy(a).reshape(p.shape[1:]).to(p) for (k, p), a in pieces}
        return self._anchors
