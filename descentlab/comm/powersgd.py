"""PowerSGD: low-rank gradient compression with error feedback (Vogels, Karimireddy, Jaggi, arXiv 1905.13727)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import numpy as np
import torch
from torch import Tensor

from ..core.protocols import Exchange, Means, Ranks
from ..core.streams import Streams
from ..core.tree import Tree


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(n, m) of a tensor of ``shape`` (no member or worker axis) seen as a matrix: first axis by the rest."""
    return shape[0], math.prod(shape[1:])


def saves(n: int, m: int, rank: int, min_rate: float = 1.0) -> bool:
    """Whether P ``[n, r]`` and Q ``[m, r]`` together are ``min_rate`` times smaller than the matrix.

    r (n + m) min_rate < n m, torch's rule; from a rate of 1 on it implies r < min(n, m).
    """
    return rank * (n + m) * min_rate < n * m


def numbers_sent(shapes: Mapping[str, tuple[int, ...]], ranks: Ranks, min_rate: float = 2.0) -> tuple[int, int]:
    """Numbers one worker sends in one update: (first message: what travels whole and every P, second: every Q).

    ``shapes``: of all parameters, by name. Times the element size these are the bytes on the wire of one all-reduce's
    input; a ring of W workers carries 2 (W - 1) / W times as many over each worker's link.
    """
    first = second = 0
    for name, shape in shapes.items():
        n, m = as_matrix(shape) if len(shape) > 1 else (1, math.prod(shape))
        rank = rank_of(ranks, name)
        if len(shape) > 1 and saves(n, m, rank, min_rate):
            first, second = first + rank * n, second + rank * m
        else:
            first += n * m
    return first, second


def rank_of(ranks: Ranks, name: str) -> int:
    """The rank of one matrix; 1 where a mapping leaves it out."""
    return ranks.get(name, 1) if isinstance(ranks, Mapping) else ranks


def orthonormal(p_MNR: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``p_MNR``, R <= N, by Householder QR.

    Deterministic, and a basis in every case: where columns vanish or are dependent, reflections that are never made
    leave unit vectors. So a zero gradient gives no NaN, and a Q that has become zero finds its way back. A member that
    holds a NaN comes out as NaN, alone.
    """
    return torch.linalg.qr(p_MNR).Q


@final
class PowerSGD:
    """The :class:`~descentlab.core.protocols.Compressor` of Algorithms 1 and 2, for every tensor with two or more axes.

    ::

        A_w = g_w + e_w                        input of worker w: gradient plus what it still owes
        P   = orthonormal(mean_w(A_w Q))       n r numbers
        Q   = mean_w(A_w^T P)                  m r numbers; kept for the next step (warm start)
        g   = P Q^T                            the averaged gradient, the same on all workers
        e_w = A_w - P Q^T                      against the aggregate, as in the authors' code

    All P, and what travels whole, are one message, all Q another one. Tensors with one axis, and matrices for which
    rank * (n + m) * min_compression_rate >= n * m, travel whole; in the second case whatever an earlier, smaller rank
    left owing goes with them and ``e_w`` becomes zero. The first ``start_iteration`` updates travel whole altogether.

    Worker memory: ``residual``: name -> ``[M, W, …]`` for every tensor with two or more axes (at any rank, so that
    the rank may change); zero without ``error_feedback``. Shared memory: ``q``: name -> ``[M, m, r]``; ``replicate``
    int64 ``[M]``; ``updates`` int64 ``[M]`` where they are counted. Column j of the first Q is standard normal, drawn
    from the stream ``powersgd/<name>`` at step j, whatever the rank; without ``warm_start`` the Q of update t > 0 is
    drawn afresh from ``powersgd/<name>/<t>``.
    """

    def __init__(
        self,
        rank: int,
        *,
        min_compression_rate: float = 1.0,
        start_iteration: int = 0,
        error_feedback: bool = True,
        warm_start: bool = True,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank = {rank}: expected at least 1")
        self.rank, self.min_rate, self.start_iteration = rank, min_compression_rate, start_iteration
        self.error_feedback, self.warm_start = error_feedback, warm_start

    @property
    def counts(self) -> bool:
        """Whether the number of updates matters."""
        return self.start_iteration > 0 or not self.warm_start

    def start(self, params: Tree, workers: int, streams: Streams, replicates: np.ndarray) -> tuple[Tree, Tree]:
        """See :class:`~descentlab.core.protocols.Compressor`: no residual, a random Q."""
        self._streams = streams
        residual, q = {}, {}
        for name, p in params.items():
            if p.dim() > 2:
                _, m = as_matrix(p.shape[1:])
                residual[name] = p.new_zeros(p.shape[0], workers, *p.shape[1:])
                q[name] = columns(name, m, range(self.rank), streams, replicates).to(p)
        shared: Tree = {"q": q, "replicate": torch.from_numpy(np.array(replicates, dtype=np.int64))}
        if self.counts:
            shared["updates"] = torch.zeros(len(replicates), dtype=torch.int64)
        return {"residual": residual}, shared

    def exchange(self, grads: Tree, memory: Tree, shared: Tree) -> Exchange:
        """See :class:`~descentlab.core.protocols.Compressor`; tensors in the order of ``grads``."""
        residual, (q, shared) = dict(memory["residual"]), self._begin(shared)
        inputs = {name: g + residual[name] if name in residual else g for name, g in grads.items()}
        low = [name for name in grads if name in residual and self._compresses(grads[name], q[name], shared)]
        matrices = {name: inputs[name].flatten(3).reshape(*inputs[name].shape[:3], -1) for name in low}
        whole = [name for name in grads if name not in matrices]
        asked = [matrices[name] @ q[name].unsqueeze(1) for name in low]
        answers = yield Means((*(inputs[name] for name in whole), *asked))
        mean = dict(zip(whole, answers, strict=False))
        for name in whole:
            if name in residual:
                residual[name] = torch.zeros_like(inputs[name])
        p = {name: orthonormal(answer) for name, answer in zip(low, answers[len(whole) :], strict=True)}
        if low:
            q |= zip(low, (yield Means(tuple(matrices[n].mT @ p[n].unsqueeze(1) for n in low))), strict=True)
        for name in low:
            g = grads[name]
            mean[name] = (p[name] @ q[name].mT).reshape(g.shape[0], *g.shape[2:])
            residual[name] = inputs[name] - mean[name].unsqueeze(1)
            if not self.error_feedback:
                residual[name] = torch.zeros_like(residual[name])
        return {name: mean[name] for name in grads}, {"residual": residual}, {**shared, "q": q}

    def _begin(self, shared: Tree) -> tuple[Tree, Tree]:
        """Q for this update, and the shared memory with the update counted."""
        q = dict(shared["q"])
        if not self.counts:
            return q, shared
        t = int(shared["updates"][0])
        if not self.warm_start and t > 0:
            who = shared["replicate"].cpu().numpy()
            q = {
                name: columns(f"{name}/{t}", old.shape[1], range(old.shape[2]), self._streams, who).to(old)
                for name, old in q.items()
            }
        return q, {**shared, "updates": shared["updates"] + 1}

    def _compresses(self, g: Tensor, q: Tensor, shared: Tree) -> bool:
        n, m = as_matrix(g.shape[2:])
        if self.counts and int(shared["updates"][0]) <= self.start_iteration:
            return False
        return saves(n, m, q.shape[-1], self.min_rate)

    def resize(self, shared: Tree, rank: Ranks, streams: Streams) -> Tree:
        """The shared memory at another rank, one for all matrices or one for each: the first columns of Q stay,
        missing ones are drawn as at the start.

        The residual is not part of the shared memory, so it stays as it is to the bit.
        """
        self._streams = streams
        q = {}
        for name, old in shared["q"].items():
            r, replicates = old.shape[-1], shared["replicate"].cpu().numpy()
            new = rank_of(rank, name)
            q[name] = old[..., :new].clone()
            if new > r:
                more = columns(name, old.shape[1], range(r, new), streams, replicates)
                q[name] = torch.cat([q[name], more.to(old)], dim=-1)
        return {**shared, "q": q}

    def requests(self, shapes: Mapping[str, tuple[int, ...]], ranks: Ranks, element_size: int) -> list[Means]:
        """The messages of one update at other ranks, as tensors without values."""
        dtype = torch.float64 if element_size == 8 else torch.float32
        sizes = numbers_sent(shapes, ranks, self.min_rate)
        return [Means((torch.empty(1, 1, size, dtype=dtype, device="meta"),)) for size in sizes if size]


def columns(name: str, m: int, wanted: range, streams: Streams, replicates: np.ndarray) -> Tensor:
    """Standard normal columns, float64 ``[M, m, len(wanted)]``; each is its own draw."""
    drawn = [streams.normal(f"powersgd/{name}", m, replicate=replicates, step=j) for j in wanted]
    return torch.from_numpy(np.stack(drawn, axis=-1))
