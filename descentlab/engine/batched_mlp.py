"""Plain fully connected classifiers, all members at once, forward and backward written out.

With M members, B samples and layers l = 1 … L, samples stand last (``[M, D, B]``), where elementwise work is two to
three times faster on a CPU than with samples first. X^T is a view of the gathered batch, no copy::

    Z_1 = W_1 X^T + b_1        Z_l = W_l A_(l-1) + b_l        A_l = f(Z_l), l < L

The loss of a member is the mean over its samples of log sum_c exp z_c - z_y, with z the column of Z_L, shifted by its
largest element before exp. Backward, with Y the one-hot targets::

    G_L = (softmax(Z_L) - Y) / B        G_l = f'(Z_l) * (W_(l+1)^T G_(l+1))
    dW_l = G_l A_(l-1)^T (A_0 = X^T)    db_l = G_l summed over the samples

Every product is per member, so a NaN stays with its member. On a CPU, networks with SiLU or ReLU take the same step in
compiled code (:mod:`.native`) where the machine has a C compiler; its float32 results differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.flat import gradients_like
from ..core.native import TYPES, enabled
from ..core.opmode import Ops
from ..core.protocols import Batch, Grads, Selection
from ..core.state import State
from ..core.tree import Tree
from .native import Kernel, kernel

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """``f(z)``, and ``backward(gradient at f(z), z, f(z))``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.SiLU: Activation(torch.nn.functional.silu, lambda g, z, a: aten.silu_backward(g, z)),
    nn.ReLU: Activation(torch.relu, lambda g, z, a: aten.threshold_backward(g, a, 0)),
    nn.Tanh: Activation(torch.tanh, lambda g, z, a: aten.tanh_backward(g, a)),
    nn.GELU: Activation(torch.nn.functional.gelu, lambda g, z, a: aten.gelu_backward(g, z)),
}


@dataclass(frozen=True)
class Layer:
    """Names of a linear layer's parameters in the module, and the class of the activation that follows (None: last)."""

    weight: str
    bias: str
    activation: type[nn.Module] | None


def plain_layers(module: nn.Module, chain: nn.Sequential) -> list[Layer] | None:
    """The layers of ``chain``, the whole forward pass of ``module``; None unless it is a plain MLP.

    Plain: an optional ``Flatten``, then linear layers with biases, exactly one activation of :data:`ACTIVATIONS`
    between two of them, nothing after the last, no hooks, no other parameters or buffers.
    """
    names = {id(p): name for name, p in module.named_parameters(remove_duplicate=False)}
    steps = list(chain)
    if steps and type(steps[0]) is nn.Flatten and (steps[0].start_dim, steps[0].end_dim) == (1, -1):
        steps = steps[1:]
    linear, between = steps[0::2], steps[1::2]
    if len(linear) != len(between) + 1 or any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return None
    if any(type(f) not in ACTIVATIONS or getattr(f, "approximate", "none") != "none" for f in between):
        return None
    layers = []
    for step, f in zip(linear, [*between, None], strict=True):
        if type(step) is not nn.Linear or step.bias is None:
            return None
        layers.append(Layer(names[id(step.weight)], names[id(step.bias)], type(f) if f is not None else None))
    used = {name for layer in layers for name in (layer.weight, layer.bias)}
    whole = used == {name for name, _ in module.named_parameters()} and len(used) == 2 * len(layers)
    return layers if whole and not list(module.buffers()) else None


COMPILED_WEIGHTS = 2**17  # of one member; beyond, its weights leave the cache and torch's blocked products are faster


class BatchedMlp:
    """The worker half of a step (the ``Work`` protocol) for a plain MLP with a cross-entropy loss, on any device."""

    reuses = True
    EVALUATE_ELEMENTS = 2**22  # members x samples x widest layer evaluated at once, as a bound on memory

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        used = {layer.activation for layer in layers[:-1]}
        self._covered = used in ({nn.SiLU}, {nn.ReLU}, set())

    def _forward(self, params: Tree, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of every layer and its outputs before the activation, samples last; ``x`` is ``[M, D, B]``."""
        inputs, outputs = [x], []
        for layer in self.layers:
            z = torch.baddbmm(params[layer.bias].unsqueeze(2), params[layer.weight], inputs[-1])
            outputs.append(z)
            if layer.activation is not None:
                inputs.append(ACTIVATIONS[layer.activation].forward(z))
        return inputs, outputs

    @torch.no_grad()
    def work(self, view: State, batch: Batch, ops: Ops | None = None, spent: Grads | None = None) -> Grads:
        """See :class:`~descentlab.core.protocols.Work`; nothing can be edited or masked here."""
        if ops is not None and (ops.edits or ops.masks):
            raise ValueError("edits run on the single-member path, and a plain MLP has no dropout")
        native = self._native(batch.source[0], view.params) if isinstance(batch, Selection) else None
        if native is not None and isinstance(batch, Selection):
            return self._compiled(native, view.params, batch, spent)
        params, x, y = view.params, batch.x.flatten(2), batch.y.unsqueeze(1)
        inputs, outputs = self._forward(params, x.mT)
        loss, accuracy, g = _cross_entropy(outputs[-1], y)
        grads: Tree = {}
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            grads[layer.weight] = torch.bmm(g, inputs[i].mT)
            grads[layer.bias] = g.sum(2)
            before = self.layers[i - 1].activation if i else None
            if before is not None:
                back = torch.bmm(params[layer.weight].mT, g)
                g = ACTIVATIONS[before].backward(back, outputs[i - 1], inputs[i])
        return Grads({name: grads[name] for name in params}, {}, loss, accuracy)

    def _native(self, x: Tensor, params: Tree) -> Kernel | None:
        """The compiled step, where it covers these layers and this kind of tensor, and is the faster one."""
        if not enabled() or not self._covered or x.device.type != "cpu" or x.dtype not in TYPES:
            return None
        if sum(math.prod(p.shape[1:]) for p in params.values()) > COMPILED_WEIGHTS:
            return None
        return kernel(x.dtype)

    def apart(self, view: State, batch: Batch) -> bool:
        """Whether :meth:`work` takes one member after the other into tensors of its own making."""
        return isinstance(batch, Selection) and self._native(batch.source[0], view.params) is not None

    def _compiled(self, native: Kernel, params: Tree, batch: Selection, spent: Grads | None) -> Grads:
        x, y = batch.source
        grads = gradients_like(params, spent.grads if spent is not None else None)
        names = [*(layer.weight for layer in self.layers), *(layer.bias for layer in self.layers)]
        made = [grads[name] for name in names]
        loss, accuracy = native.step(*self._network(params), x.flatten(1), y, batch.index, made)
        return Grads(grads, {}, loss, accuracy)

    def _network(self, params: Tree) -> tuple[bool, list[Tensor], list[Tensor]]:
        """Whether the activation is SiLU, weights and biases in order: what the compiled functions take."""
        weights, biases = zip(*((params[layer.weight], params[layer.bias]) for layer in self.layers), strict=True)
        return self.layers[0].activation is nn.SiLU, list(weights), list(biases)

    @torch.no_grad()
    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~descentlab.core.protocols.Work`."""
        return self.evaluate_some(view, None, x, y)

    @torch.no_grad()
    def evaluate_some(self, view: State, members: Sequence[int] | None, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`evaluate` of some members alone, ``[len(members)]``."""
        if (native := self._native(x, view.params)) is not None:
            return native.evaluate(*self._network(view.params), x.flatten(1), y, members)
        view = view if members is None else view.take(members)
        widest = max(view.params[layer.bias].shape[1] for layer in self.layers)
        chunk = max(1, self.EVALUATE_ELEMENTS // (len(x) * widest))
        inputs, parts = x.flatten(1).t(), []
        for a in range(0, view.members, chunk):
            params = {k: p[a : a + chunk] for k, p in view.params.items()}
            count = min(chunk, view.members - a)
            _, outputs = self._forward(params, inputs.expand(count, *inputs.shape))
            parts.append(_cross_entropy(outputs[-1], y.expand(count, 1, -1))[:2])
        losses, accuracies = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(accuracies)


def _cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss (nats) and accuracy of every member ``[M]`` and the gradient at ``z`` ``[M, C, B]``; ``y`` is
    ``[M, 1, B]``."""
    shifted = z - z.amax(1, keepdim=True)
    own = shifted.gather(1, y)
    e = shifted.exp()
    total = e.sum(1, keepdim=True)
    loss = (total.log() - own).mean((1, 2))
    accuracy = _right(z, shifted, own, y).mean((1, 2), dtype=z.dtype)
    g = e.mul_(total.mul_(y.shape[-1]).reciprocal_())
    g.scatter_add_(1, y, g.new_full((1,), -1.0 / y.shape[-1]).expand(y.shape))
    return loss, accuracy, g


def _right(z: Tensor, shifted: Tensor, own: Tensor, y: Tensor) -> Tensor:
    """Which samples are classified rightly, bool ``[M, 1, B]``: the first largest output wins, a non-finite output
    makes the sample wrong. An argmax over a short axis would cost more than the rest of the step, so it is taken only
    where two classes share the largest output."""
    top = shifted == 0
    right = (own == 0) & torch.isfinite(shifted.amin(1, keepdim=True))
    tied = right & (top.sum(1, keepdim=True) > 1)
    if tied.any():
        m, _, b = tied.nonzero(as_tuple=True)
        right[m, 0, b] = z[m, :, b].argmax(1) == y[m, 0, b]
    return right
