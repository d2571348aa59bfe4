"""Curvature along training, in a loop of one's own: every so many steps, kept as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import UserError
from .curvature import hessian, top_k
from .operators import Data, Loss
from .spectrum import spectral_density, trace

What = Literal["dense", "top_k", "density", "trace"]
KINDS = ("dense", "top_k", "density", "trace")


class CurvatureLog:
    """Call it before every step; each ``every``-th call measures. ``what``:

    - ``dense``: ``hessian`` ``[T, n, n]`` and ``eigenvalues`` ``[T, n]``, ascending;
    - ``top_k``: ``eigenvalues`` ``[T, k]``, largest first, and ``vectors`` ``[T, n, k]``;
    - ``density``: ``nodes`` and ``node_weights`` ``[T, P, m]`` of Lanczos quadrature;
    - ``trace``: ``trace`` and ``trace_error`` ``[T]``.

    Beside them ``step`` ``[T]`` and ``weights`` ``[T, n]`` as float64. ``options`` go to the function of that name
    (``k=5``, ``matrix="ggn"``, ``parameters=["2"]`` …). For a model too large for ``dense`` the first call raises
    :class:`UserError` with the bytes.
    """

    def __init__(
        self, loss: Loss, data: Data | None = None, *, every: int = 10, what: What = "top_k", **options: Any
    ) -> None:
        if what not in KINDS:
            raise UserError("what", what, f"one of {', '.join(KINDS)}")
        if every < 1:
            raise UserError("every", every, "at least 1")
        self.loss, self.data, self.every, self.what, self.options = loss, data, every, what, options
        self._held: dict[str, list[np.ndarray]] = {}

    def __call__(self, model: nn.Module, step: int, data: Data | None = None) -> bool:
        """Measure at ``step`` if it is due, on ``data`` (None: the data given at the start); whether it was."""
        if step % self.every:
            return False
        at = self.data if data is None else data
        if at is None:
            raise UserError("data", None, "a batch (x, y), here or at the start")
        found = self._measured(model, at)
        flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).double()
        for name, value in {"step": torch.tensor(step), "weights": flat, **found}.items():
            self._held.setdefault(name, []).append(value.cpu().numpy())
        return True

    def _measured(self, model: nn.Module, data: Data) -> dict[str, Tensor]:
        if self.what == "dense":
            matrix = hessian(model, self.loss, data, **self.options)
            return {"hessian": matrix, "eigenvalues": torch.linalg.eigvalsh(matrix)}
        if self.what == "top_k":
            top = top_k(model, self.loss, data, **self.options)
            return {"eigenvalues": top.values, "vectors": top.vectors}
        if self.what == "density":
            found = spectral_density(model, self.loss, data, **self.options)
            return {"nodes": found.nodes, "node_weights": found.weights}
        value = trace(model, self.loss, data, **self.options)
        return dict(zip(("trace", "trace_error"), torch.tensor(value[:2], dtype=torch.float64), strict=True))

    def arrays(self) -> dict[str, np.ndarray]:
        """What was measured so far, time first."""
        return {name: np.stack(values) for name, values in self._held.items()}

    def save(self, path: str | Path) -> None:
        """Write :meth:`arrays` as one .npz."""
        np.savez(path, **self.arrays())  # type: ignore[arg-type]


class FlatDirections(NamedTuple):
    """``number`` of directions in which no output changes on the data: an orthonormal ``basis`` ``[n, number]`` in the
    order of the parameters; ``constant``: how many inputs of the first linear map never vary."""

    number: int
    constant: int
    basis: Tensor


def flat_directions(model: nn.Module, x: Tensor, tolerance: float = 1e-12) -> FlatDirections:
    """Exactly flat directions of a network that begins with a linear map, from linear dependence of its inputs.

    If sum_j c_j x_j + c_0 = 0 for every sample, adding c to the weights of one output (c_0 to its bias) does nothing:
    as many directions for each output as the inputs, with a constant one for the bias, lack in rank. An input that is
    always 0 gives one for each output, one that is always the same gives one where there is a bias. ``tolerance``: what
    counts as 0, relative to the largest singular value. Raises :class:`UserError` for models that begin otherwise.
    """
    first = next((m for m in model.modules() if not list(m.children()) and not isinstance(m, nn.Flatten)), None)
    if not isinstance(first, nn.Linear):
        raise UserError("model", type(model).__name__, "a network that begins with nn.Linear")
    inputs = x.double().flatten(1)
    constant = int((inputs == inputs[0]).all(0).sum())
    if first.bias is not None:
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    scale, rows = torch.linalg.svd(inputs, full_matrices=True)[1:]
    rank = int((scale > tolerance * scale.max()).sum())
    lost = rows[rank:]  # [missing, inputs]
    names = {id(p): name for name, p in model.named_parameters()}
    at, n = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            at[name] = n
            n += p.numel()
    basis = torch.zeros(n, len(lost) * first.out_features, dtype=torch.float64)
    weight, bias = at[names[id(first.weight)]], None if first.bias is None else at[names[id(first.bias)]]
    for i in range(first.out_features):
        columns = slice(i * len(lost), (i + 1) * len(lost))
        place = weight + i * first.in_features
        basis[place : place + first.in_features, columns] = lost[:, : first.in_features].T
        if bias is not None:
            basis[bias + i, columns] = lost[:, -1]
    return FlatDirections(basis.shape[1], constant, basis)
