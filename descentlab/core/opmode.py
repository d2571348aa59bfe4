"""One interception layer for every operation a perturbation can touch.

``OpMode`` sees each convolution, linear map, batch normalisation and dropout of a module's forward pass, inside
``vmap(functional_call)`` as well as in a plain call. Where nothing is to be edited it calls the stock
operation, so switching it on changes no bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .matrixop import DIRECTIONS, OPERANDS, Edit, FaultyOp, Stock

_KINDS: dict[Callable[..., Any], str] = {
    F.linear: "linear",
    F.conv1d: "conv",
    F.conv2d: "conv",
    F.conv3d: "conv",
    torch.conv1d: "conv",
    torch.conv2d: "conv",
    torch.conv3d: "conv",
    F.batch_norm: "batch_norm",
    F.dropout: "dropout",
}
_CONV_OPTIONS = ("stride", "padding", "dilation", "groups")
MATRIX_OPS = ("linear", "conv")  # the operations that run on a matrix unit, where hardware faults are modelled


@dataclass(frozen=True, order=True)
class Site:
    """A place in one step: the ``call``-th operation of ``layer``, in which ``direction``, at which ``operand``.

    ============= ================= ================= ====================================
    direction     ``a``             ``b``             ``out``
    ============= ================= ================= ====================================
    ``forward``     input             weight            result, before the bias is added
    ``grad_input``  incoming gradient weight            gradient of the input
    ``grad_weight`` input             incoming gradient gradient of the weight
    ============= ================= ================= ====================================
    """

    layer: str
    call: int = 0
    direction: str = "forward"
    operand: str = "out"


@dataclass
class OpRecord:
    """What :func:`trace` saw of one operation: shapes as in the traced call, batch axis included.

    ``options``: stride, padding, dilation, groups of a convolution as they were given. ``directions``: which of the
    three operations a training step makes; the first layer, for instance, needs no gradient of its input.
    """

    layer: str
    call: int
    kind: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    out: tuple[int, ...]
    p: float = 0.0  # dropout probability
    options: Mapping[str, Any] = field(default_factory=dict)
    directions: tuple[str, ...] = ("forward",)

    def shapes(self, direction: str) -> dict[str, tuple[int, ...]]:
        """Shape of each operand of the operation in ``direction``; see :class:`Site`."""
        found = {
            "forward": (self.a, self.b, self.out),
            "grad_input": (self.out, self.b, self.a),
            "grad_weight": (self.a, self.out, self.b),
        }[direction]
        return dict(zip(OPERANDS, found, strict=True))

    def stock(self) -> Stock:
        """The operation itself: input, weight, bias -> result."""
        if self.kind == "linear":
            return F.linear
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.b) - 3]
        return partial(conv, **self.options)


@dataclass
class Ops:
    """What is to happen at which operation of one work step; empty = nothing.

    ``edits``: site -> function of the tensor found there, called without gradient, that gives what takes its place (a
    tensor, or :class:`~descentlab.core.matrixop.Lanes`); ``masks``: (layer, call) of a dropout -> 0/1 keep mask.
    """

    edits: Mapping[Site, Edit] = field(default_factory=dict)
    masks: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)


class OpMode(TorchFunctionMode):
    """Applies ``ops`` to the operations of ``module`` while active; with ``record`` it also lists what it saw."""

    def __init__(self, module: nn.Module, ops: Ops | None = None, record: list[OpRecord] | None = None) -> None:
        super().__init__()
        self.module, self.ops, self.record = module, ops or Ops(), record
        self._edits: dict[tuple[str, int], dict[tuple[str, str], Edit]] = {}
        for site, edit in self.ops.edits.items():
            if site.direction not in DIRECTIONS or site.operand not in OPERANDS:
                expected = f"a direction of {', '.join(DIRECTIONS)} and an operand of {', '.join(OPERANDS)}"
                raise ValueError(f"site {site.direction}/{site.operand}: expected {expected}")
            self._edits.setdefault((site.layer, site.call), {})[site.direction, site.operand] = edit

    def __enter__(self) -> OpMode:
        self._names: list[str] = []
        self._calls: dict[str, int] = {}
        self._handles = []
        for name, child in self.module.named_modules():
            self._handles.append(child.register_forward_pre_hook(lambda m, a, name=name: self._names.append(name)))
            self._handles.append(child.register_forward_hook(lambda m, a, o: self._pop(), always_call=True))
        return super().__enter__()

    def _pop(self) -> None:
        self._names.pop()

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exc)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func)
        if kind is None:
            return func(*args, **kwargs)
        layer = self._names[-1] if self._names else ""
        call = self._calls.get(f"{layer}/{kind}", 0)
        self._calls[f"{layer}/{kind}"] = call + 1
        if kind == "dropout":
            return self._dropout(layer, call, func, args, kwargs)
        if kind == "batch_norm":
            return func(*args, **kwargs)
        return self._matrix_op(layer, call, kind, func, args, kwargs)

    def _matrix_op(self, layer: str, call: int, kind: str, func: Any, args: tuple, kwargs: dict) -> Tensor:
        given = dict(zip(("input", "weight", "bias", *_CONV_OPTIONS), args, strict=False)) | kwargs
        a, b, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        edits = self._edits.get((layer, call))
        if edits is None:
            out = func(*args, **kwargs)
        else:
            out = self._edited(kind, partial(func, **given), a, b, bias, edits)
        if self.record is not None:
            needed = [("grad_input", a.requires_grad), ("grad_weight", b.requires_grad)]
            directions = ("forward", *(name for name, asked in needed if asked))
            shapes = tuple(a.shape), tuple(b.shape), tuple(out.shape)
            self.record.append(OpRecord(layer, call, kind, *shapes, options=given, directions=directions))
        return out

    def _edited(
        self, kind: str, op: Stock, a: Tensor, b: Tensor, bias: Tensor | None, edits: Mapping[tuple[str, str], Edit]
    ) -> Tensor:
        if bias is None or ("forward", "out") not in edits:
            return FaultyOp.apply(a, b, bias, op, edits)
        out = FaultyOp.apply(a, b, None, op, edits)
        # the matrix unit's result is wrong; the bias is added afterwards
        return out + (bias if kind == "linear" else bias.view(-1, *[1] * (b.dim() - 2)))

    def _dropout(self, layer: str, call: int, func: Any, args: tuple, kwargs: dict) -> Tensor:
        names = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        x, p = names["input"], names.get("p", 0.5)
        if not names.get("training", True) or p == 0.0:
            return func(*args, **kwargs)
        if self.record is not None:
            self.record.append(OpRecord(layer, call, "dropout", tuple(x.shape), (), tuple(x.shape), p))
            return x
        mask = self.ops.masks.get((layer, call))
        if mask is None:  # falling back to torch's generator would break replay silently
            raise RuntimeError(f"dropout at '{layer}' (call {call}) was given no mask")
        return x * mask / (1.0 - p)


def trace(module: nn.Module, x: Tensor) -> list[OpRecord]:
    """The operations one training forward pass of ``module`` on ``x`` makes, in order. Leaves the module unchanged."""
    record: list[OpRecord] = []
    shadow = copy.deepcopy(module).train()
    with torch.enable_grad(), OpMode(shadow, record=record):  # with gradients, to see which ones a step needs
        shadow(x)
    return record
