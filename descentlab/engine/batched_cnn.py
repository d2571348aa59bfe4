"""Small convolutional networks, all members in one call of compiled code (``plain_cnn.c``).

With X_0 the images, per member and for convolutions l = 1 … L with BatchNorm (n = samples x pixels)::

    Z_l = W_l * X_(l-1)     Y_l = g_l (Z_l - mean_l) / sqrt(var_l + eps) + s_l     X_l = max(Y_l, 0)
    H = mean of X_L over the pixels          outputs = V H + c

and backward, with D_l the gradient at Y_l (0 where X_l is), N_l = (Z_l - mean_l) / sqrt(var_l + eps)::

    ds_l = sum D_l     dg_l = sum D_l N_l     dZ_l = g_l / sqrt(var_l + eps) (D_l - ds_l / n - N_l dg_l / n)

Running variances take the unbiased variance, as torch's. Without BatchNorm Y_l = Z_l + b_l. Members are computed one
after the other, so their numbers do not depend on each other.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.flat import gradients_like
from ..core.native import TYPES, Held, enabled, library
from ..core.opmode import Ops
from ..core.protocols import Batch, Grads, Selection, Work
from ..core.state import State
from ..core.tree import Tree, clone
from .native import places

SOURCE = Path(__file__).with_name("plain_cnn.c")
EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class Convolutions:
    """What the compiled code needs of a network. ``shape``: in, height, width, out, height, width of every layer;
    ``stats``: names of the running mean and variance of every layer, ``counts`` of the number of batches seen."""

    shape: tuple[tuple[int, int, int, int, int, int], ...]
    kernel: int
    stride: int
    pad: int
    classes: int
    eps: float
    momentum: float
    params: tuple[str, ...]
    stats: tuple[str, ...]
    counts: tuple[str, ...]

    @property
    def normed(self) -> bool:
        return bool(self.stats)

    def alone(self, batch: int) -> bool:
        """Whether a BatchNorm layer has one value per channel, which has no unbiased variance."""
        return self.normed and batch * min(height * width for *_, height, width in self.shape) == 1


def convolutions(module: nn.Module, image: tuple[int, ...]) -> Convolutions | None:
    """The layers of a :class:`~descentlab.workloads.models.cnn.SmallCNN` for images ``[C, H, W]``; None where they are
    not the plain ones the compiled code has."""
    children = dict(module.named_children())
    depth = (len(children) - 1) // 2
    convs: list[Any] = [children.get(f"conv{i}") for i in range(1, depth + 1)]
    norms: list[Any] = [children.get(f"norm{i}") for i in range(1, depth + 1)]
    head = children.get("head")
    if len(image) != 3 or depth < 1 or type(head) is not nn.Linear or head.bias is None:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules()):
        return None
    if any(type(c) is not nn.Conv2d for c in convs) or len({type(n) for n in norms}) != 1:
        return None
    normed = type(norms[0]) is nn.BatchNorm2d
    if not normed and type(norms[0]) is not nn.Identity:
        return None
    first = convs[0]
    if len({_kind(c) for c in convs}) != 1 or None in _kind(first) or any((c.bias is None) != normed for c in convs):
        return None
    if normed and (len({(n.eps, n.momentum) for n in norms}) != 1 or not _standard(norms[0])):
        return None
    kernel, stride, pad = first.kernel_size[0], first.stride[0], first.padding[0]
    _, height, width = image
    shape = []
    for c in convs:
        out = [(size + 2 * pad - kernel) // stride + 1 for size in (height, width)]
        shape.append((c.in_channels, height, width, c.out_channels, *out))
        height, width = out
    each = ("conv{}.weight", "norm{}.weight", "norm{}.bias") if normed else ("conv{}.weight", "conv{}.bias")
    stats = ("norm{}.running_mean", "norm{}.running_var") if normed else ()
    numbers = range(1, depth + 1)
    params = (*(name.format(i) for i in numbers for name in each), "head.weight", "head.bias")
    if set(params) != {name for name, _ in module.named_parameters()}:
        return None
    eps, momentum = (norms[0].eps, norms[0].momentum) if normed else (0.0, 0.0)
    return Convolutions(
        tuple(shape),
        kernel,
        stride,
        pad,
        head.out_features,
        eps,
        momentum,
        params,
        tuple(name.format(i) for i in numbers for name in stats),
        tuple(f"norm{i}.num_batches_tracked" for i in numbers) if normed else (),
    )


def _kind(c: nn.Conv2d) -> tuple[Any, ...]:
    """Kernel, stride, padding; None among them for a convolution of another kind."""
    plain = c.groups == 1 and c.dilation == (1, 1) and c.padding_mode == "zeros" and not isinstance(c.padding, str)
    square = plain and all(len(set(pair)) == 1 for pair in (c.kernel_size, c.stride, c.padding))
    return c.kernel_size, c.stride, c.padding, square or None


def _standard(norm: nn.BatchNorm2d) -> bool:
    return bool(norm.affine and norm.track_running_stats and norm.momentum is not None)


@functools.cache
def cnn_kernel(dtype: torch.dtype) -> CnnKernel | None:
    """The compiled functions for ``dtype``; None (with a notice) where they cannot be built or loaded."""
    loaded = library(SOURCE, dtype)
    return CnnKernel(loaded) if loaded is not None else None


@functools.cache
def _arguments(net: Convolutions) -> tuple[Any, ...]:
    """What every compiled function is told of the network."""
    numbers = [n for layer in net.shape for n in layer]
    shape = (ctypes.c_int32 * len(numbers))(*numbers)
    return len(net.shape), shape, net.kernel, net.stride, net.pad, net.classes, int(net.normed)


class CnnKernel:
    """The functions of one compiled library."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._step, self._evaluate, self._vectors = loaded.cnn_step, loaded.cnn_evaluate, loaded.cnn_scratch_vectors
        self._step.restype = self._evaluate.restype = None
        self._vectors.restype = ctypes.c_int64
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._held = Held()

    def step(
        self, net: Convolutions, params: Tree, stats: Tree, x: Tensor, y: Tensor, index: Tensor, grads: Tree
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy ``[M]``; writes ``grads`` and brings ``stats`` (name -> ``[M, C]``, contiguous) up to date.

        Training set ``x`` ``[n, …]``, ``y`` ``[n]`` int64; ``index`` ``[M, B]`` int64.
        """
        low, high = index.aminmax()
        if int(low) < 0 or int(high) >= len(x):
            raise IndexError(f"sample indices must be in [0, {len(x)})")
        members, batch = index.shape
        x, y, index = x.contiguous(), y.contiguous(), index.contiguous()
        made, rows = [grads[n] for n in net.params], self._held.rows
        held, written, kept = rows([params[n] for n in net.params]), rows(made), rows([*stats.values()])
        if any(a is not b for a, b in zip(written.tensors, made, strict=True)):
            raise ValueError("gradients of a member that are not contiguous")
        loss, accuracy = x.new_empty(members), x.new_empty(members)
        self._step(
            members,
            batch,
            *_arguments(net),
            ctypes.c_double(net.eps),
            ctypes.c_double(net.momentum),
            *(_at(t) for t in (x, y, index)),
            held.addresses,
            held.strides,
            written.addresses,
            written.strides,
            kept.addresses,
            kept.strides,
            _at(loss),
            _at(accuracy),
            ctypes.c_void_p(self._room(net, batch)),
        )
        return loss, accuracy

    def evaluate(
        self, net: Convolutions, params: Tree, stats: Tree, x: Tensor, y: Tensor, only: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy ``[M]`` on all of ``x`` ``[n, …]``, ``y`` ``[n]``, with the running statistics.
        ``only``: of these members alone, ``[len(only)]``."""
        x, y = x.contiguous(), y.contiguous()
        held, kept = self._held.rows([params[n] for n in net.params]), self._held.rows([*stats.values()])
        there = len(held.tensors[0])
        members = there if only is None else len(only)
        loss, accuracy = (torch.empty(members, dtype=torch.float64) for _ in range(2))
        self._evaluate(
            members,
            places(only, there),
            ctypes.c_int64(len(x)),
            EVALUATED_AT_ONCE,
            *_arguments(net),
            ctypes.c_double(net.eps),
            *(_at(t) for t in (x, y)),
            held.addresses,
            held.strides,
            kept.addresses,
            kept.strides,
            _at(loss),
            _at(accuracy),
            ctypes.c_void_p(self._room(net, EVALUATED_AT_ONCE)),
        )
        return loss.to(x.dtype), accuracy.to(x.dtype)

    def _room(self, net: Convolutions, batch: int) -> int:
        """Address of enough scratch, a multiple of 64."""
        layers, shape = _arguments(net)[:2]
        size = 64 * self._vectors(batch, layers, shape, net.classes) + 64
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return -(-self._scratch.data_ptr() // 64) * 64


def _at(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _copied(buffers: Tree, to: Tree) -> Tree:
    """A copy, in ``to`` where that fits."""
    if not to or [(k, b.shape) for k, b in buffers.items()] != [(k, b.shape) for k, b in to.items()]:
        return clone(buffers)
    torch._foreach_copy_(list(to.values()), list(buffers.values()))
    return to


class BatchedCnn:
    """The worker half of a step (the ``Work`` protocol) for a small convolutional network with a cross-entropy loss.

    Where the compiled code cannot be had (no compiler, another device or type), ``worker`` and ``evaluator`` do what
    they are named after.
    """

    reuses = True

    def __init__(self, net: Convolutions, worker: Work, evaluator: Work) -> None:
        self.net, self.worker, self.evaluator = net, worker, evaluator

    def _native(self, x: Tensor) -> CnnKernel | None:
        same = x.device.type == "cpu" and x.dtype in TYPES and x[0].numel() == math.prod(self.net.shape[0][:3])
        if not enabled() or not same:
            return None
        return cnn_kernel(x.dtype)

    def apart(self, view: State, batch: Batch) -> bool:
        """Whether :meth:`work` takes one member after the other into tensors of its own making."""
        if not isinstance(batch, Selection) or self.net.alone(batch.index.shape[1]):
            return False
        return self._native(batch.source[0]) is not None

    @torch.no_grad()
    def work(self, view: State, batch: Batch, ops: Ops | None = None, spent: Grads | None = None) -> Grads:
        """See :class:`~descentlab.core.protocols.Work`."""
        if ops is not None and (ops.edits or ops.masks):
            raise ValueError("edits run on the single-member path, and this network has no dropout")
        native = self._native(batch.source[0] if isinstance(batch, Selection) else batch.x)
        size = (batch.index if isinstance(batch, Selection) else batch.y).shape[1]
        if native is None or self.net.alone(size):  # torch says what is wrong with a variance of one value
            with torch.enable_grad():
                return self.worker.work(view, batch, ops)
        if isinstance(batch, Selection):
            (x, y), index = batch.source, batch.index
        else:  # samples that are in no set: laid end to end they are one
            x, y = batch.x.flatten(0, 1), batch.y.flatten()
            index = torch.arange(len(y)).view(batch.y.shape)
        params = view.params
        grads = gradients_like(params, spent.grads if spent is not None else None)
        buffers = _copied(view.buffers, spent.buffers if spent is not None else {})
        stats = {name: buffers[name] for name in self.net.stats}
        loss, accuracy = native.step(self.net, params, stats, x.flatten(1), y, index, grads)
        if self.net.counts:
            torch._foreach_add_([buffers[name] for name in self.net.counts], 1)
        return Grads(grads, buffers, loss, accuracy)

    @torch.no_grad()
    def evaluate(self, view: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~descentlab.core.protocols.Work`."""
        return self.evaluate_some(view, None, x, y)

    @torch.no_grad()
    def evaluate_some(self, view: State, members: Sequence[int] | None, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`evaluate` of some members alone, ``[len(members)]``."""
        native = self._native(x)
        if native is None:
            return self.evaluator.evaluate(view if members is None else view.take(members), x, y)
        stats = {name: view.buffers[name] for name in self.net.stats}
        return native.evaluate(self.net, view.params, stats, x.flatten(1), y, members)
