"""How much memory one sample needs in a model, found by running the model on two samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .opmode import OpMode

SAMPLES = 2  # BatchNorm refuses to train on one


@dataclass(frozen=True)
class Footprint:
    """Elements per sample: ``largest`` of a single result in the forward pass, ``kept`` of all results that autograd
    keeps for the backward pass (weights not counted)."""

    largest: int
    kept: int


class _Largest(TorchFunctionMode):
    """Notes the number of elements of the largest result of any function."""

    largest = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in _tensors(out))])
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def footprint(module: nn.Module, x: Tensor) -> Footprint:
    """The :class:`Footprint` of ``module`` on samples like those of ``x`` ``[B, …]``; the module stays unchanged.

    Views count as the memory they share, once. Dropout counts as absent.
    """
    shadow = copy.deepcopy(module).train()
    sample = x[:SAMPLES].clone()  # its own storage, not that of the whole dataset
    known = {t.untyped_storage().data_ptr() for t in (*shadow.parameters(), *shadow.buffers())}
    kept: dict[int, Tensor] = {}  # held, so that no storage is freed and its address used again

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    sizes = _Largest()
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with torch.enable_grad(), saved, sizes, OpMode(shadow, record=[]):  # the innermost sees a call first
        shadow(sample)
    elements = sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values())
    return Footprint(-(-sizes.largest // len(sample)), -(-elements // len(sample)))
