"""What a small transformer has learnt, along its training and over a cloud: attention, token and position vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...workloads.models.nanogpt import Attention
from .program_curvature import set_weights

WINDOWS = 64  # of the test text
RUNS = 200  # of a cloud that are looked at, at most
MARKS = 24  # moments of the training, evenly spaced in the logarithm
QUANTITIES = (
    "attention_entropy",  # of a query's weights over the largest it can have: 1 looks everywhere alike
    "attention_previous",  # weight on the token before
    "token_length",  # root mean square length of a token's vector
    "token_rank",  # (sum s^2)^2 / sum s^4 of the centred vectors' singular values: how many directions they use
    "position_length",
    "position_rank",
    "position_neighbours",  # mean cosine between the vectors of successive positions
)


def marks(steps: int) -> list[int]:
    """Numbers of updates after which the weights are kept, rising, 0 and ``steps`` among them."""
    return sorted({0, *np.geomspace(1, max(1, steps), MARKS).round().astype(int).tolist()})


def attention_maps(module: nn.Module, ids: Tensor) -> np.ndarray:
    """Mean attention weights ``[layers, heads, T, T]`` over the windows ``ids`` ``[B, T]``; a row is a query."""
    found: list[Tensor] = []

    def look(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Attention)
        found.append(layer.weights(given[0])[0].mean(0))

    hooks = [m.register_forward_pre_hook(look) for m in module.modules() if isinstance(m, Attention)]
    try:
        with torch.no_grad():
            module(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).double().numpy(force=True)


def quantities(module: Any, maps: np.ndarray) -> np.ndarray:
    """The :data:`QUANTITIES` ``[q]`` of a model whose mean attention is ``maps``."""
    length = maps.shape[-1]
    rows = maps[..., 1:, :]  # the first query sees itself only
    entropy = -(rows * np.log(np.where(rows > 0, rows, 1.0))).sum(-1) / np.log(np.arange(2, length + 1))
    previous = maps[..., np.arange(1, length), np.arange(length - 1)]
    token, position = (e.weight.detach().double().numpy(force=True) for e in (module.token, module.position))
    unit = position / np.linalg.norm(position, axis=1, keepdims=True).clip(min=1e-300)
    neighbours = (unit[1:] * unit[:-1]).sum(1).mean()
    ends = [entropy.mean(), previous.mean(), _length(token), _rank(token), _length(position), _rank(position)]
    return np.array([*ends, neighbours])


def _length(vectors: np.ndarray) -> float:
    return float(np.sqrt((vectors**2).sum(1).mean()))


def _rank(vectors: np.ndarray) -> float:
    scales = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    return float(scales.sum() ** 2 / (scales**2).sum())


def parts(module: nn.Module) -> tuple[list[str], np.ndarray]:
    """Groups of parameters, and of every weight ``[D]`` the index of its group."""
    names, index = [], []
    for name, p in module.named_parameters():
        kind = "attention" if "attention" in name else "norms" if "norm" in name else name.partition(".")[0]
        kind = "hidden layers" if kind == "blocks" else kind
        if kind not in names:
            names.append(kind)
        index += [names.index(kind)] * p.numel()
    return names, np.array(index)


def language(
    module: Any,
    x: Tensor,
    path: Sequence[np.ndarray],
    steps: Sequence[int],
    ends: np.ndarray,
    curvature: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """For ``language.npz``: ``values`` ``[S, q]`` and ``maps`` ``[S, layers, heads, T, T]`` at the weights ``path``
    after ``steps`` updates (theta* last), ``run_values`` ``[M, q]`` at the runs' ``ends`` ``[M, D]``; and of every
    group of parameters (``parts``) its ``size`` and its shares of the traces of V and H, ``spread_share`` and
    ``curvature_share``."""
    ids = x[torch.linspace(0, len(x) - 1, min(WINDOWS, len(x))).long()]

    def at(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        set_weights(module, theta)
        maps = attention_maps(module, ids)
        return quantities(module, maps), maps

    along = [at(theta) for theta in path]
    names, index = parts(module)
    spread, bent = ends.var(axis=0, ddof=1), np.diag(curvature["hessian"])
    return {
        "steps": np.array(steps),
        "quantities": np.array(QUANTITIES),
        "values": np.stack([v for v, _ in along]),
        "maps": np.stack([m for _, m in along]),
        "run_values": np.stack([at(theta)[0] for theta in ends[:RUNS]]),
        "parts": np.array(names),
        "size": np.bincount(index, minlength=len(names)),
        "spread_share": np.bincount(index, spread, len(names)) / spread.sum(),
        "curvature_share": np.bincount(index, bent, len(names)) / bent.sum(),
    }
