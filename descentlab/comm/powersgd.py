"""PowerSGD: low-rank gradient compression with error feedback (Vogels, Karimireddy, Jaggi, arXiv 1905.13727)."""

from __future__ import annotations

import math
from typing import final

import numpy as np
import torch
from torch import Tensor

from ..core.protocols import Exchange, Mean
from ..core.streams import Streams
from ..core.tree import Tree


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(n, m) of a tensor of ``shape`` (no member or worker axis) seen as a matrix: first axis by the rest."""
    return shape[0], math.prod(shape[1:])


def saves(n: int, m: int, rank: int) -> bool:
    """Whether P ``[n, r]`` and Q ``[m, r]`` together are smaller than the matrix: r (n + m) < n m, so r < min(n, m)."""
    return rank * (n + m) < n * m


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
        P   = orthonormal(mean_w(A_w Q))       one collective of n r numbers
        Q   = mean_w(A_w^T P)                  one collective of m r numbers; kept for the next step (warm start)
        g   = P Q^T                            the averaged gradient, the same on all workers
        e_w = A_w - P Q^T                      against the aggregate, as in the authors' code

    Tensors with one axis, and matrices for which rank * (n + m) >= n * m, travel whole; in the second case whatever
    an earlier, smaller rank left owing goes with them and ``e_w`` becomes zero.

    Worker memory: ``residual``: name -> ``[M, W, …]`` for every tensor with two or more axes (at any rank, so that
    the rank may change). Shared memory: ``q``: name -> ``[M, m, r]``; ``replicate`` int64 ``[M]``. Column j of the
    first Q is standard normal, drawn from the stream ``powersgd/<name>`` at step j, whatever the rank.
    """

    def __init__(self, rank: int) -> None:
        if rank < 1:
            raise ValueError(f"rank = {rank}: expected at least 1")
        self.rank = rank

    def start(self, params: Tree, workers: int, streams: Streams, replicates: np.ndarray) -> tuple[Tree, Tree]:
        """See :class:`~descentlab.core.protocols.Compressor`: no residual, a random Q."""
        residual, q = {}, {}
        for name, p in params.items():
            if p.dim() > 2:
                _, m = as_matrix(p.shape[1:])
                residual[name] = p.new_zeros(p.shape[0], workers, *p.shape[1:])
                q[name] = _columns(name, m, range(self.rank), streams, replicates).to(p)
        shared = {"q": q, "replicate": torch.from_numpy(np.array(replicates, dtype=np.int64))}
        return {"residual": residual}, shared

    def exchange(self, grads: Tree, memory: Tree, shared: Tree) -> Exchange:
        """See :class:`~descentlab.core.protocols.Compressor`; collectives in the order of ``grads``."""
        mean, residual, q = {}, dict(memory["residual"]), dict(shared["q"])
        for name, g in grads.items():
            if name not in residual:
                mean[name] = yield Mean(g)
                continue
            owed_MK = g + residual[name]
            n, m = as_matrix(g.shape[2:])
            if not saves(n, m, q[name].shape[-1]):
                mean[name] = yield Mean(owed_MK)
                residual[name] = torch.zeros_like(owed_MK)
                continue
            a_MKNm = owed_MK.reshape(*g.shape[:2], n, m)
            p_MNR = orthonormal((yield Mean(a_MKNm @ q[name].unsqueeze(1))))
            q[name] = yield Mean(a_MKNm.mT @ p_MNR.unsqueeze(1))
            mean[name] = (p_MNR @ q[name].mT).reshape(g.shape[0], *g.shape[2:])
            residual[name] = owed_MK - mean[name].unsqueeze(1)
        return mean, {"residual": residual}, {**shared, "q": q}

    def resize(self, shared: Tree, rank: int, streams: Streams) -> Tree:
        """The shared memory at another rank: the first columns of Q stay, missing ones are drawn as at the start.

        The residual is not part of the shared memory, so it stays as it is to the bit.
        """
        q = {}
        for name, old in shared["q"].items():
            r, replicates = old.shape[-1], shared["replicate"].cpu().numpy()
            q[name] = old[..., :rank].clone()
            if rank > r:
                more = _columns(name, old.shape[1], range(r, rank), streams, replicates)
                q[name] = torch.cat([q[name], more.to(old)], dim=-1)
        self.rank = rank
        return {**shared, "q": q}


def _columns(name: str, m: int, columns: range, streams: Streams, replicates: np.ndarray) -> Tensor:
    """Standard normal columns, float64 ``[M, m, len(columns)]``; each is its own draw."""
    drawn = [streams.normal(f"powersgd/{name}", m, replicate=replicates, step=j) for j in columns]
    return torch.from_numpy(np.stack(drawn, axis=-1))
