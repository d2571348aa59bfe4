"""A workload is a dataset, a model, a loss and its metrics; nothing in it knows how it is trained."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.protocols import isolated_init
from ..core.streams import Streams


@dataclass(frozen=True)
class Data:
    """Arrays of one dataset, already split; the three parts never overlap.

    ``x_*``: ``[n, …]`` in the study's dtype, or int64 token ids ``[n, T]``. ``y_*``: class indices ``[n]``, or
    ``[n, T]`` for a class per token (``classes`` > 0), or real targets ``[n, …]`` (``classes`` = 0).
    ``vocabulary``: the symbol of every token id, empty where inputs are no text.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    source: str
    licence: str
    vocabulary: str = ""

    @property
    def n(self) -> tuple[int, int, int]:
        """Numbers of training, validation and test samples."""
        return len(self.x_train), len(self.x_validation), len(self.x_test)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x_train.shape[1:])

    def checked(self) -> Data:
        """Itself.

        Raises:
            ValueError: for parts of different length or shape, no training samples, or class indices out of range.
        """
        for part in ("train", "validation", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if len(x) != len(y):
                raise ValueError(f"x_{part} has {len(x)} samples, y_{part} {len(y)}")
            if tuple(x.shape[1:]) != self.shape or y.shape[1:] != self.y_train.shape[1:]:
                raise ValueError(f"samples of the {part} part have another shape than those of the training part")
            if self.classes and y.numel() and (int(y.min()) < 0 or int(y.max()) >= self.classes):
                raise ValueError(f"y_{part} holds classes outside 0 to {self.classes - 1}")
        if not self.n[0]:
            raise ValueError("no training samples")
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> Data:
        """Floating-point parts in ``dtype``, everything on ``device``."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype) if t.is_floating_point() else t.to(device)

        parts: dict[str, Any] = {k: move(getattr(self, k)) for k in _PARTS}
        return replace(self, **parts)

    def map_inputs(self, f: Callable[[Tensor], Tensor]) -> Data:
        """The same data with ``f`` applied to every input."""
        parts: dict[str, Any] = {k: f(getattr(self, k)) for k in _PARTS if k.startswith("x_")}
        return replace(self, **parts)

    def sha256(self) -> str:
        """Fingerprint of every array, in a fixed order."""
        digest = hashlib.sha256()
        for part in _PARTS:
            digest.update(np.ascontiguousarray(getattr(self, part).cpu().numpy()).tobytes())
        return digest.hexdigest()


_PARTS = ("x_train", "y_train", "x_validation", "y_validation", "x_test", "y_test")


def stratified_split(y: np.ndarray, sizes: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A fixed permutation of ``range(len(y))`` cut into three parts, each with every class in proportion.

    Items are ordered by (rank within their own shuffled class + class offset), so any prefix is stratified to within
    one item per class. The permutation is a constant of the library: it depends on no seed of a study.
    """
    order = Streams(0).permutation("split", len(y), replicate=0)
    classes, counts = np.unique(y, return_counts=True)
    position = np.empty(len(y))
    for c, n in zip(classes, counts, strict=True):
        members = order[y[order] == c]
        position[members] = (np.arange(n) + 0.5) / n
    ranked = order[np.argsort(position[order], kind="stable")]
    a, b, c = sizes
    return ranked[:a], ranked[a : a + b], ranked[a + b : a + b + c]


def _flat(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``[…, classes]`` and ``[…]`` as ``[N, classes]`` and ``[N]``."""
    return (output, y) if output.dim() == 2 else (output.flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class ModelFactory:
    """Builds modules for a dataset. ``stem`` is a parameter-free, deterministic, per-sample first layer: it is applied
    to the data once instead of in every step."""

    build: Callable[[Data], nn.Module]
    stem: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Workload:
    """What is trained: data (stem applied), a module maker, loss and metrics."""

    data: Data
    make: Callable[[], nn.Module]
    dtype: torch.dtype
    device: torch.device
    square: bool = False  # the squared distance for classes too

    @classmethod
    def of(
        cls, data: Data, factory: ModelFactory, *, dtype: torch.dtype, device: torch.device, square: bool = False
    ) -> Workload:
        data = data.to(device, dtype)
        stemmed = data.map_inputs(factory.stem) if factory.stem else data
        return cls(stemmed, lambda: factory.build(data), dtype, device, square)

    @property
    def has_cross_entropy(self) -> bool:
        """Whether the loss is the cross-entropy."""
        return self.data.classes > 0 and not self.square

    def module(self, streams: Streams, replicate: int) -> nn.Module:
        """A fresh module; the same (seed, replicate) gives the same weights whatever else runs."""
        seed = streams.torch_seed("init", replicate=replicate)
        return isolated_init(self.make, seed, self.dtype).to(self.device)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy in nats, or half the mean squared distance for targets that are no classes and, with
        ``square``, to the class as a unit vector.

        ``output`` ``[B, classes]`` with ``y`` ``[B]``, or ``[B, T, classes]`` with ``y`` ``[B, T]``: then the mean is
        over all tokens.
        """
        if self.has_cross_entropy:
            return F.cross_entropy(*_flat(output, y))
        if self.data.classes:
            y = (torch.arange(output.shape[-1], device=y.device) == y.unsqueeze(-1)).to(output.dtype)
        return 0.5 * (output - y).square().flatten(1).sum(1).mean()

    def vectorised_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """:meth:`loss` as it is computed inside ``vmap``: the same up to rounding.

        mean_b (log sum_c exp z_bc - z_by), z = output - max_c output. ``vmap`` takes torch's own cross-entropy apart
        into steps that need more time than the whole rest of a small network; this form halves the time of a step.
        """
        if not self.has_cross_entropy:
            return self.loss(output, y)
        z = output - output.detach().amax(-1, keepdim=True)
        return (z.exp().sum(-1).log() - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)).mean()

    def accuracy(self, output: Tensor, y: Tensor) -> Tensor:
        """Share of right classes; NaN where there are no classes. NaN outputs count as wrong."""
        if not self.data.classes:
            return output.new_full((), math.nan)
        by_class = output.movedim(-1, 0)  # an argmax over the last axis is slow when that axis is short
        right = (by_class.argmax(0) == y) & ((by_class * 0).sum(0) == 0)  # 0 * x = 0 only for finite x
        return right.to(output.dtype).mean()
