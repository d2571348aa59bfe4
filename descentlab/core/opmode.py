"""One interception layer for every operation a perturbation can touch.

``OpMode`` sees each convolution, linear map, batch normalisation and dropout of a module's forward pass, inside
``vmap(functional_call)`` as well as in a plain call. Where nothing is to be edited it calls the stock
operation, so switching it on changes no bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
MATRIX_OPS = ("linear", "conv")  # the operations that run on a matrix unit, where hardware faults are modelled


@dataclass(frozen=True, order=True)
class Site:
    """A place in one step: the ``call``-th operation of ``layer``, in which ``direction``, at which ``operand``.

    ``direction``: ``forward`` (``grad_input`` and ``grad_weight`` are reserved); ``operand``: ``a`` (input), ``b``
    (weight) or ``out`` (result, before the bias is added).
    """

    layer: str
    call: int = 0
    direction: str = "forward"
    operand: str = "out"


Edit = Callable[[Tensor], Tensor]


@dataclass
class OpRecord:
    """What :func:`trace` saw of one operation: shapes as in the traced call, batch axis included."""

    layer: str
    call: int
    kind: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    out: tuple[int, ...]
    p: float = 0.0  # dropout probability


@dataclass
class Ops:
    """What is to happen at which operation of one work step; empty = nothing.

    ``edits``: site -> function of the tensor found there; ``masks``: (layer, call) of a dropout -> 0/1 keep mask.
    """

    edits: Mapping[Site, Edit] = field(default_factory=dict)
    masks: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)


class ReplaceElements(torch.autograd.Function):
    """Forward: the elements at flat ``index`` become ``value``; backward: the identity.

    A wrong value produced by hardware is not a function of the operands, but the backward pass still runs as if the
    operation had been right; a plain scatter would zero the gradient at the hit elements.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, value: Tensor) -> Tensor:
        return x.flatten().index_copy(0, index, value.to(x.dtype)).view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class OpMode(TorchFunctionMode):
    """Applies ``ops`` to the operations of ``module`` while active; with ``record`` it also lists what it saw."""

    def __init__(self, module: nn.Module, ops: Ops | None = None, record: list[OpRecord] | None = None) -> None:
        super().__init__()
        self.module, self.ops, self.record = module, ops or Ops(), record

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
        kwargs = dict(zip(("input", "weight", "bias"), args[:3], strict=False)) | kwargs
        rest = args[3:]
        edits = {op: self.ops.edits.get(Site(layer, call, "forward", op)) for op in ("a", "b", "out")}
        a, b, bias = kwargs.pop("input"), kwargs.pop("weight"), kwargs.pop("bias", None)
        if edits["a"] is not None:
            a = edits["a"](a)
        if edits["b"] is not None:
            b = edits["b"](b)
        if edits["out"] is None:
            out = func(a, b, bias, *rest, **kwargs)
        else:  # the matrix unit's result is wrong; the bias is added afterwards
            out = edits["out"](func(a, b, None, *rest, **kwargs))
            if bias is not None:
                out = out + (bias if kind == "linear" else bias.view(-1, *[1] * (b.dim() - 2)))
        if self.record is not None:
            self.record.append(OpRecord(layer, call, kind, tuple(a.shape), tuple(b.shape), tuple(out.shape)))
        return out

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
    with torch.no_grad(), OpMode(shadow, record=record):
        shadow(x)
    return record
