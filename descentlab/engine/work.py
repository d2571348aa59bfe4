"""The worker half of a step, by two routes with the same meaning.

``MemberWork`` runs one plain module after the other (faster for convolutions on a CPU, and the only route a member
takes on the step that hits it); ``VmapWork`` runs all members in one vectorised call. Their rounding differs, so which
one a block takes is decided once (:mod:`descentlab.engine.plan`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..core.opmode import OpMode, Ops
from ..core.protocols import Batch, Grads
from ..core.state import State
from ..core.tree import Tree, stack


class Objective(Protocol):
    """What the engine needs of a workload."""

    def loss(self, output: Tensor, y: Tensor) -> Tensor: ...

    def vectorised_loss(self, output: Tensor, y: Tensor) -> Tensor: ...

    def accuracy(self, output: Tensor, y: Tensor) -> Tensor: ...


def _tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, bool]]:
    """(full name, owner, attribute, is parameter) of every parameter and buffer."""
    for prefix, owner in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for key, p in owner._parameters.items():
            if p is not None:
                yield dot + key, owner, key, True
        for key, b in owner._buffers.items():
            if b is not None:
                yield dot + key, owner, key, False


EVALUATE_ELEMENTS = 2**24  # members x samples x largest result of one sample evaluated at once, as a bound on memory


def pieces(samples: int, per_sample: int) -> tuple[int, int]:
    """(members, samples) to evaluate at once, so that no result holds more than :data:`EVALUATE_ELEMENTS` elements.

    ``per_sample``: elements of the largest result one sample of one member has. Samples are cut only where not even
    one member fits whole.
    """
    fit = max(1, EVALUATE_ELEMENTS // max(1, per_sample))
    return max(1, fit // max(1, samples)), min(samples, fit)


def joined(parts: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Means over all samples from the means over pieces of ``counts`` samples; one piece stays as it is."""
    if len(parts) == 1:
        return parts[0]
    shares = [n / sum(counts) for n in counts]
    losses, accuracies = zip(*parts, strict=True)
    return _weighted(losses, shares), _weighted(accuracies, shares)


def _weighted(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([v * share for v, share in zip(values, shares, strict=True)]).sum(0)


class MemberWork:
    """Members one after the other through one plain ``nn.Module`` whose tensors are swapped for views of the stack.

    ``per_sample``: elements of the largest result of one sample (:mod:`descentlab.core.footprint`).
    """

    def __init__(self, module: nn.Module, objective: Objective, per_sample: int = 1) -> None:
        self.module, self.objective, self.per_sample = module, objective, per_sample
        self._slots = list(_tensors(module))

    def _load(self, view: State, m: int, *, grad: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        params, buffers = {}, {}
        for name, owner, key, is_parameter in self._slots:
            if is_parameter:
                params[name] = view.params[name][m].detach().requires_grad_(grad)
                owner._parameters[key] = params[name]
            else:
                buffers[name] = view.buffers[name][m].clone()
                owner._buffers[key] = buffers[name]
        return params, buffers

    def work(self, view: State, batch: Batch, ops: Ops | None = None) -> Grads:
        """See :class:`~descentlab.core.protocols.Work`; edits apply to every member, masks have a member axis."""
        self.module.train()
        grads, buffers, losses, accuracies = [], [], [], []
        for m in range(view.members):
            params, member_buffers = self._load(view, m, grad=True)
            if ops is None:
                output = self.module(batch.x[m])
            else:
                masks = {k: mask[m] for k, mask in ops.masks.items()}
                with OpMode(self.module, Ops(ops.edits, masks)):
                    output = self.module(batch.x[m])
            loss = self.objective.loss(output, batch.y[m])
            grads.append(dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)))
            buffers.append(member_buffers)
            losses.append(loss.detach())
            accuracies.append(self.objective.accuracy(output.detach(), batch.y[m]))
        return Grads(stack(grads), stack(buffers), torch.stack(losses), torch.stack(accuracies))

    @torch.no_grad()
    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~descentlab.core.protocols.Work`."""
        self.module.eval()
        losses, accuracies = [], []
        _, step = pieces(len(x), max(self.per_sample, x[0].numel()))
        cuts = list(zip(x.split(step), y.split(step), strict=True))
        for m in range(view.members):
            self._load(view, m, grad=False)
            parts = []
            for a, b in cuts:
                output = self.module(a)
                parts.append((self.objective.loss(output, b), self.objective.accuracy(output, b)))
            loss, accuracy = joined(parts, [len(a) for a, _ in cuts])
            losses.append(loss)
            accuracies.append(accuracy)
        return torch.stack(losses), torch.stack(accuracies)


class VmapWork:
    """All members in one vectorised forward pass, ``vmap(functional_call)``, and one backward pass through their sum.

    The gradient of the sum of the members' losses is every member's own gradient: no loss sees another member's
    weights. (``torch.func.grad`` gives the same and loads ``torch._dynamo``, two seconds per process.)
    ``per_sample``: as for :class:`MemberWork`.
    """

    def __init__(self, module: nn.Module, objective: Objective, per_sample: int = 1) -> None:
        self.module, self.objective, self.per_sample = module, objective, per_sample

        def loss(params: Tree, buffers: Tree, x: Tensor, y: Tensor, masks: Any) -> tuple[Tensor, Tree, Tensor]:
            fresh = {k: b.clone() for k, b in buffers.items()}  # BatchNorm updates its buffers in place
            if masks:
                with OpMode(module, Ops(masks=masks)):
                    output = functional_call(module, (params, fresh), (x,))
            else:
                output = functional_call(module, (params, fresh), (x,))
            return objective.vectorised_loss(output, y), fresh, objective.accuracy(output.detach(), y)

        self._loss = vmap(loss, in_dims=(0, 0, 0, 0, 0))
        self._eval = vmap(self._forward, in_dims=(0, 0, None, None))

    def _forward(self, params: Tree, buffers: Tree, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        output = functional_call(self.module, (params, buffers), (x,))
        return self.objective.vectorised_loss(output, y), self.objective.accuracy(output, y)

    def work(self, view: State, batch: Batch, ops: Ops | None = None) -> Grads:
        """See :class:`~descentlab.core.protocols.Work`; only dropout masks (with a member axis) are supported here."""
        if ops is not None and ops.edits:
            raise ValueError("edits run on the single-member path")
        self.module.train()
        masks = dict(ops.masks) if ops is not None else {}
        params = {k: p.detach().requires_grad_() for k, p in view.params.items()}
        loss, buffers, accuracy = self._loss(params, view.buffers, batch.x, batch.y, masks)
        grads = torch.autograd.grad(loss.sum(), list(params.values()))
        return Grads(dict(zip(params, grads, strict=True)), buffers, loss.detach(), accuracy)

    @torch.no_grad()
    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~descentlab.core.protocols.Work`."""
        self.module.eval()
        chunk, step = pieces(len(x), max(self.per_sample, x[0].numel()))
        cuts, parts = list(zip(x.split(step), y.split(step), strict=True)), []
        for a in range(0, view.members, chunk):
            rows = slice(a, a + chunk)
            params = {k: p[rows] for k, p in view.params.items()}
            buffers = {k: b[rows] for k, b in view.buffers.items()}
            found = [self._eval(params, buffers, *cut) for cut in cuts]
            parts.append(joined(found, [len(cut[0]) for cut in cuts]))
        losses, accuracies = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(accuracies)
