"""Curvature matrices as operators: what multiplies a vector, without the matrix.

All in float64 on a copy of the model; the model itself is not touched. Parameters are those that require a gradient, in
the order of ``named_parameters()``, each flattened. The model runs in the mode it is in (training or evaluation).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ..core.errors import UserError, nearest

Loss = Callable[[Any, Any], Tensor]
Data = tuple[Any, Any] | Sequence[tuple[Any, Any]]
Matrix = Literal["hessian", "ggn"]


class Operator(ABC):
    """A symmetric matrix of ``n`` rows that can be multiplied with vectors on ``device``."""

    n: int
    device: torch.device

    @abstractmethod
    def rows(self, vectors: Tensor) -> Tensor:
        """The matrix times each of ``vectors`` ``[r, n]``: ``[r, n]``."""

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times ``vector`` ``[n]``."""
        return self.rows(vector.unsqueeze(0))[0]


def operator(
    model: nn.Module, loss: Loss, data: Data, matrix: Matrix = "hessian", parameters: Sequence[str] | None = None
) -> Operator:
    """The Hessian of ``loss(model(x), y)``, or its generalised Gauss-Newton matrix J^T (d2 loss / d output^2) J.

    ``data``: ``(x, y)``, or a list of such batches: then the mean over all samples, and the loss has to be a mean over
    the samples of a batch. An ``x`` that is a mapping is passed as ``model(**x)``. ``parameters``: names of
    ``model.named_parameters()``, or prefixes that end at a dot, to which the matrix is restricted (a block of a layer).
    """
    if matrix not in ("hessian", "ggn"):
        raise UserError("matrix", matrix, "hessian or ggn")
    made = Hessian if matrix == "hessian" else GaussNewton
    twin, names = copy.deepcopy(model).double(), chosen(model, parameters)
    params = [p for name, p in twin.named_parameters() if name in names]
    batches = batches_of(data)
    if len(batches) == 1:
        return made(twin, params, loss, batches[0])
    return Batches(lambda batch: made(twin, params, loss, batch), batches)


def batches_of(data: Data) -> list[tuple[Any, Any]]:
    """The batches of ``data``: one, or those of a list."""
    batches = list(data) if isinstance(data, list) else [data]
    if not batches:
        raise UserError("data", "[]", "at least one batch (x, y)")
    return batches  # type: ignore[return-value]


def shares(batches: Sequence[tuple[Any, Any]]) -> list[float]:
    """Each batch's part of all samples."""
    counts = [len(next(iter(x.values())) if isinstance(x, Mapping) else x) for x, _ in batches]
    return [count / sum(counts) for count in counts]


def chosen(model: nn.Module, wanted: Sequence[str] | None) -> set[str]:
    """Names of the parameters that require a gradient, or of those that ``wanted`` names."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not names:
        raise UserError("model", type(model).__name__, "a model with parameters that require a gradient")
    if wanted is None:
        return set(names)
    kept: set[str] = set()
    for word in wanted:
        found = {name for name in names if name == word or name.startswith(f"{word}.")}
        if not found:
            expected = f"parameters or layers of the model ({', '.join(names)})"
            raise UserError("parameters", word, expected, hint=nearest(word, names))
        kept |= found
    return kept


def size(model: nn.Module, parameters: Sequence[str] | None = None) -> int:
    """How many rows the matrix has."""
    names = chosen(model, parameters)
    return sum(p.numel() for name, p in model.named_parameters() if name in names)


def at(model: nn.Module, weights: Tensor) -> nn.Module:
    """A float64 copy of the model whose parameters that require a gradient are ``weights`` ``[n]``, in their order."""
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, value in stacked(twin, weights.unsqueeze(0)).items():
            twin.get_parameter(name).copy_(value[0])
    return twin


def stacked(model: nn.Module, weights: Tensor | None) -> dict[str, Tensor]:
    """Every parameter ``[M, *shape]`` in float64: the model's own (M = 1), or those that require a gradient cut from
    ``weights`` ``[n]`` or ``[M, n]``."""
    own = {name: p.detach().double().unsqueeze(0) for name, p in model.named_parameters()}
    if weights is None:
        return own
    free = [name for name, p in model.named_parameters() if p.requires_grad]
    sizes = [own[name].numel() for name in free]
    if weights.dim() not in (1, 2) or weights.shape[-1] != sum(sizes):
        expected = f"({sum(sizes)},) or (members, {sum(sizes)}): the parameters that require a gradient"
        raise UserError("weights", tuple(weights.shape), expected)
    rows = weights.detach().double().view(-1, sum(sizes))
    for name, part in zip(free, rows.split(sizes, dim=1), strict=True):
        own[name] = part.reshape(len(rows), *own[name].shape[1:])
    return {name: p.expand(len(rows), *p.shape[1:]) for name, p in own.items()}


def _double(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _double(v) for k, v in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def evaluate(model: nn.Module, x: Any) -> Any:
    """``model(x)`` in float64; ``model(**x)`` for a mapping."""
    x = _double(x)
    return model(**x) if isinstance(x, Mapping) else model(x)


def _number(value: Tensor) -> Tensor:
    if value.dim():
        raise UserError("loss", tuple(value.shape), "a function that returns one number (a mean over the samples)")
    return value


class _Differentiable(Operator):
    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.n, self.device = sum(p.numel() for p in self.params), self.params[0].device

    def _flat(self, parts: Sequence[Tensor | None], rows: int) -> Tensor:
        """Gradients ``[r, *shape]`` side by side ``[r, n]``; zero where the loss does not see a parameter."""
        pairs = zip(parts, self.params, strict=True)
        flat = [p.new_zeros(rows, p.numel()) if g is None else g.reshape(rows, -1) for g, p in pairs]
        return torch.cat(flat, dim=1).detach()


@final
class Hessian(_Differentiable):
    """Reverse over reverse: the gradient as one vector, differentiated once more."""

    def __init__(self, model: nn.Module, params: Sequence[Tensor], loss: Loss, data: tuple[Any, Any]) -> None:
        super().__init__(params)
        value = _number(loss(evaluate(model, data[0]), _double(data[1])))
        parts = torch.autograd.grad(value, self.params, create_graph=True, materialize_grads=True)
        self._gradient = torch.cat([g.reshape(-1) for g in parts])

    def rows(self, vectors: Tensor) -> Tensor:
        """See :class:`Operator`; one vectorised reverse pass."""
        if not self._gradient.requires_grad:  # a loss that is linear in the parameters
            return torch.zeros_like(vectors)
        parts = torch.autograd.grad(
            self._gradient, self.params, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return self._flat(parts, len(vectors))

    def product(self, vector: Tensor) -> Tensor:
        """See :class:`Operator`; one plain reverse pass, also through operations that cannot be vectorised."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(vector)
        parts = torch.autograd.grad(self._gradient, self.params, vector, retain_graph=True, allow_unused=True)
        return self._flat(parts, 1)[0]


@final
class GaussNewton(_Differentiable):
    """J^T (d2 loss / d output^2) J; J v by differentiating J^T u, which is linear in u, with respect to u."""

    def __init__(self, model: nn.Module, params: Sequence[Tensor], loss: Loss, data: tuple[Any, Any]) -> None:
        super().__init__(params)
        self._output = evaluate(model, data[0])
        self._u = torch.zeros_like(self._output, requires_grad=True)
        parts = torch.autograd.grad(
            self._output, self.params, self._u, create_graph=True, retain_graph=True, materialize_grads=True
        )
        self._back = torch.cat([g.reshape(-1) for g in parts])
        self._leaf = self._output.detach().requires_grad_()
        value = _number(loss(self._leaf, _double(data[1])))
        (self._slope,) = torch.autograd.grad(value, self._leaf, create_graph=True)

    def rows(self, vectors: Tensor) -> Tensor:
        """See :class:`Operator`."""
        if not self._slope.requires_grad or not self._back.requires_grad:  # linear in the output
            return torch.zeros_like(vectors)
        (forward,) = torch.autograd.grad(self._back, self._u, vectors, retain_graph=True, is_grads_batched=True)
        (curved,) = torch.autograd.grad(self._slope, self._leaf, forward, retain_graph=True, is_grads_batched=True)
        parts = torch.autograd.grad(
            self._output, self.params, curved, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return self._flat(parts, len(vectors))


@final
class Batches(Operator):
    """The mean over batches, weighted by their sizes; one batch's graph is held at a time."""

    def __init__(self, make: Callable[[tuple[Any, Any]], _Differentiable], batches: Sequence[tuple[Any, Any]]) -> None:
        self.make, self.batches, self.shares = make, batches, shares(batches)
        first = make(batches[0])
        self.n, self.device = first.n, first.device

    def rows(self, vectors: Tensor) -> Tensor:
        """See :class:`Operator`."""
        total = torch.zeros_like(vectors)
        for share, batch in zip(self.shares, self.batches, strict=True):
            total += share * self.make(batch).rows(vectors)
        return total

    def product(self, vector: Tensor) -> Tensor:
        """See :class:`Operator`."""
        total = torch.zeros_like(vector)
        for share, batch in zip(self.shares, self.batches, strict=True):
            total += share * self.make(batch).product(vector)
        return total
