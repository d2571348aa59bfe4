"""PowerSGD as a DDP communication hook, with ranks that can be changed while training (arXiv 1905.13727)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..core.protocols import Ranks
from ..core.streams import Streams
from .hook import Bucket, BucketHook, Marks
from .powersgd import as_matrix, columns, orthonormal, rank_of, saves


@dataclass
class _Group:
    """Matrices of one shape and rank: residuals ``e`` ``[G, n, m]``; ``p`` ``[G, r, n]`` and ``q`` ``[G, r, m]`` are
    views of the messages, transposed because products with a matrix stored by rows are several times faster so."""

    names: list[str]
    e: Tensor
    p: Tensor
    q: Tensor

    def __post_init__(self) -> None:
        self.each = list(self.e.unbind(0))  # views

    def left(self) -> None:
        """P = E Q."""
        if self.q.shape[1] == 1:  # one layout is as good as the other, and products with vectors have a routine
            torch.bmm(self.e, self.q.mT, out=self.p.view(*self.p.shape[::2], 1))
        else:
            torch.bmm(self.q, self.e.mT, out=self.p)

    def right(self) -> None:
        """Orthonormal P, and Q = E^T P."""
        self.p.copy_(orthonormal(self.p.mT).mT)
        torch.bmm(self.p, self.e, out=self.q)


@dataclass
class _Layout:
    """What a bucket sends: ``first`` holds the tensors that travel whole and every P, ``second`` every Q."""

    whole: list[str]
    groups: list[_Group]
    first: Tensor
    second: Tensor


@final
class PowerSGDHook(BucketHook):
    """Low-rank gradients with error feedback and warm start, for DDP on gloo or nccl.

    ::

        hook = PowerSGDHook(rank=4).attach(ddp_model)

    ``rank``: one for every matrix (a tensor with two or more axes, seen as first axis by the rest), or name -> rank.
    A matrix ``[n, m]`` travels whole unless rank (n + m) min_compression_rate < n m, torch's rule; so do all tensors
    in the first ``start_iteration`` backward passes. Two collectives per bucket: what travels whole with every P, then
    every Q. Matrices of one shape are worked on together.

    :meth:`set_rank` changes ranks between backward passes: what is owed stays to the bit, the first columns of each Q
    stay, further ones are drawn (the same on all processes, from ``seed``) and orthogonalised against them. Call it
    on every process with the same ranks. ``seed`` and ``replicate`` are what first columns depend on.
    """

    def __init__(
        self,
        rank: Ranks = 1,
        *,
        min_compression_rate: float = 2.0,
        start_iteration: int = 0,
        error_feedback: bool = True,
        warm_start: bool = True,
        seed: int = 0,
        replicate: int = 0,
        overlap: bool | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(overlap=overlap, process_group=process_group)
        if min_compression_rate < 1:
            raise ValueError(f"min_compression_rate = {min_compression_rate}: expected at least 1")
        self.ranks, self.min_rate, self.start_iteration = rank, min_compression_rate, start_iteration
        self.error_feedback, self.warm_start = error_feedback, warm_start
        self._streams, self._replicate = Streams(seed), np.array([replicate])
        self._shapes: dict[str, torch.Size] = {}
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self._q: dict[str, Tensor] = {}
        self._residual: dict[str, Tensor] = {}
        self._check(rank, {})

    def set_rank(self, rank: Ranks) -> None:
        """Change the rank of all matrices, or of each by name, from the next backward pass on."""
        self._check(rank, self._shapes)
        self._unbind()
        self.ranks = rank
        self._q = {name: self._resized(name, q) for name, q in self._q.items()}

    def residual(self, name: str) -> Tensor:
        """What is owed to the parameter ``name``; zero before anything is. Not a copy."""
        if name not in self._residual:
            n, m = as_matrix(self._shapes[name])
            self._residual[name] = torch.zeros(n, m, dtype=self._dtypes[name], device=self._devices[name])
        return self._residual[name]

    def q(self, name: str) -> Tensor:
        """The right factor of the parameter ``name``, ``[m, rank]``. Not a copy."""
        if name not in self._q:
            _, m = as_matrix(self._shapes[name])
            made = columns(name, m, range(self._rank(name)), self._streams, self._replicate)[0]
            self._q[name] = made.to(device=self._devices[name], dtype=self._dtypes[name])
        return self._q[name]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every parameter that is a matrix: name -> (n, m)."""
        return {name: as_matrix(shape) for name, shape in self._shapes.items() if len(shape) > 1}

    def _rank(self, name: str) -> int:
        """The columns a matrix's Q has: its rank, as far as there are directions."""
        return min(rank_of(self.ranks, name), *as_matrix(self._shapes[name]))

    def _check(self, ranks: Ranks, shapes: Mapping[str, torch.Size]) -> None:
        """ValueError for a rank below 1, above a matrix's, or of something that is no matrix."""
        asked = ranks if isinstance(ranks, Mapping) else {}
        for rank in asked.values() if isinstance(ranks, Mapping) else [ranks]:
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"rank = {rank!r}: expected an integer of at least 1")
        if not shapes:
            return
        own = {name: min(as_matrix(shape)) for name, shape in shapes.items() if len(shape) > 1}
        for name, rank in asked.items():
            if name not in own:
                raise ValueError(f"rank of {name!r}: expected the name of a matrix ({', '.join(own)})")
            if rank > own[name]:
                raise ValueError(f"rank = {rank} of {name}: expected at most {own[name]}, the rank of the matrix")
        largest = max(own.values(), default=1)
        if isinstance(ranks, int) and ranks > largest:
            raise ValueError(f"rank = {ranks}: expected at most {largest}, the rank of the largest matrix")

    def _start(self, params: dict[str, Tensor]) -> None:
        self._shapes = {name: p.shape for name, p in params.items()}
        self._dtypes = {name: p.dtype for name, p in params.items()}
        self._devices = {name: p.device for name, p in params.items()}
        self._check(self.ranks, self._shapes)

    def exchange(self, bucket: Bucket, marks: Marks) -> None:
        """See :class:`BucketHook`: Algorithm 1 for all matrices of the bucket at once."""
        if self.iteration < self.start_iteration:
            for buffer in bucket.buffers:
                self.reduce(buffer)
            marks.mark("collective_s")
            return
        layout = self._layout(bucket)
        whole = [bucket.grads[name].view(-1) for name in layout.whole]
        parts = layout.first[: sum(g.numel() for g in whole)].split([g.numel() for g in whole])
        self._compress(bucket, layout, list(parts), whole)
        marks.mark("compress_s")
        self.reduce(layout.first)
        marks.mark("collective_s")
        if whole:
            torch._foreach_copy_(whole, list(parts))
        if layout.groups:
            for group in layout.groups:
                group.right()
            marks.mark("compress_s")
            self.reduce(layout.second)
            marks.mark("collective_s")
            self._decompress(bucket, layout)
        marks.mark("decompress_s")

    def _compress(self, bucket: Bucket, layout: _Layout, parts: list[Tensor], whole: list[Tensor]) -> None:
        """Add the gradients to what is owed, and fill the first message."""
        for name, part, g in zip(layout.whole, parts, whole, strict=True):
            owed = self._residual.pop(name, None)  # at another rank, at which it was compressed
            if owed is not None and self.error_feedback:
                g.add_(owed.view(-1))
            part.copy_(g)
        for group in layout.groups:
            grads = [bucket.grads[name].view(group.e.shape[1:]) for name in group.names]
            if self.error_feedback:
                torch._foreach_add_(group.each, grads)
            else:
                torch._foreach_copy_(group.each, grads)
            if not self.warm_start and self.iteration > 0:
                self._redraw(group)
            group.left()

    def _redraw(self, group: _Group) -> None:
        rank, m = group.q.shape[1:]
        for i, name in enumerate(group.names):
            drawn = columns(f"{name}/{self.iteration}", m, range(rank), self._streams, self._replicate)
            group.q[i].copy_(drawn[0].mT)

    def _decompress(self, bucket: Bucket, layout: _Layout) -> None:
        """Write P Q^T over the gradients; what it leaves out is owed."""
        for group in layout.groups:
            for name, p, q in zip(group.names, group.p, group.q, strict=True):
                torch.mm(p.mT, q, out=bucket.grads[name].view(group.e.shape[1:]))
            group.e.baddbmm_(group.p.mT, group.q, alpha=-1)

    def _layout(self, bucket: Bucket) -> _Layout:
        key = tuple(bucket.grads)
        if key not in self._layouts:
            if any(set(key) & set(other) for other in self._layouts):  # DDP has made other buckets
                self._unbind()
            self._layouts[key] = self._lay_out(bucket)
        return self._layouts[key]

    def _lay_out(self, bucket: Bucket) -> _Layout:
        low: dict[tuple[int, int, int], list[str]] = {}
        whole = []
        for name in bucket.grads:
            shape, rank = self._shapes[name], rank_of(self.ranks, name)
            n, m = as_matrix(shape) if len(shape) > 1 else (1, 1)
            if len(shape) > 1 and saves(n, m, rank, self.min_rate):
                low.setdefault((n, m, rank), []).append(name)
            else:
                whole.append(name)
        sizes = sum(bucket.grads[name].numel() for name in whole)
        like = bucket.buffers[0]
        first = like.new_empty(sizes + sum(len(names) * n * r for (n, _, r), names in low.items()))
        second = like.new_empty(sum(len(names) * m * r for (_, m, r), names in low.items()))
        groups, at, to = [], sizes, 0
        for (n, m, r), names in low.items():
            g = len(names)
            p, q = first[at : at + g * n * r].view(g, r, n), second[to : to + g * m * r].view(g, r, m)
            at, to = at + g * n * r, to + g * m * r
            e = torch.stack([self.residual(name) for name in names])
            for i, name in enumerate(names):
                q[i].copy_(self.q(name).mT)
                self._q[name], self._residual[name] = q[i].mT, e[i]
            groups.append(_Group(names, e, p, q))
        return _Layout(whole, groups, first, second)

    def _unbind(self) -> None:
        """Forget the messages' layout; Q and what is owed become tensors of their own."""
        self._layouts = {}
        self._q = {name: q.clone() for name, q in self._q.items()}
        self._residual = {name: e.clone() for name, e in self._residual.items()}

    def _resized(self, name: str, q: Tensor) -> Tensor:
        """The leading columns; or all of them and drawn ones, made orthonormal after them in the old ones' space."""
        rank, held = self._rank(name), q.shape[1]
        if rank <= held:
            return q[:, :rank].clone()
        drawn = columns(name, q.shape[0], range(held, rank), self._streams, self._replicate)[0].to(q)
        basis = orthonormal(q)
        drawn = drawn - basis @ (basis.mT @ drawn)
        return torch.cat([q, orthonormal(drawn)], dim=1)

    def _state(self) -> dict[str, Any]:
        return {
            "rank": dict(self.ranks) if isinstance(self.ranks, Mapping) else self.ranks,
            "q": {name: q.clone() for name, q in self._q.items()},
            "residual": {name: e.clone() for name, e in self._residual.items()},
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        unknown = [name for name in (*state["q"], *state["residual"]) if name not in self.matrices()]
        if unknown:
            raise ValueError(f"state of {unknown[0]!r}: the model has no such matrix")
        for name, e in state["residual"].items():
            if tuple(e.shape) != self.matrices()[name]:
                raise ValueError(f"residual of {name}: {tuple(e.shape)}, expected {self.matrices()[name]}")
        self._unbind()
        self.ranks = state["rank"]
        self._q = {name: q.clone() for name, q in state["q"].items()}
        self._residual = {name: e.clone() for name, e in state["residual"].items()}
