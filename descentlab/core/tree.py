"""Arithmetic on trees: nested dicts of tensors, usually with a leading member axis M."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Any]  # str -> Tensor | Tree


def tree_map(f: Callable[..., Tensor], tree: Mapping[str, Any], *rest: Mapping[str, Any]) -> Tree:
    """``f`` on every leaf of ``tree`` (and the leaves at the same places of ``rest``); same structure."""
    return {
        k: tree_map(f, v, *(r[k] for r in rest)) if isinstance(v, Mapping) else f(v, *(r[k] for r in rest))
        for k, v in tree.items()
    }


def leaves(tree: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor of the tree, in insertion order."""
    for value in tree.values():
        if not isinstance(value, Tensor) and isinstance(value, Mapping):  # the first question is the cheap one
            yield from leaves(value)
        else:
            yield value


def clone(tree: Mapping[str, Any]) -> Tree:
    """A copy that shares no memory."""
    return tree_map(lambda t: t.detach().clone(), tree)


def take(tree: Mapping[str, Any], members: Sequence[int]) -> Tree:
    """Copies of the given members, ``[len(members), …]``."""
    index = torch.tensor(members, dtype=torch.int64)
    return tree_map(lambda t: t[index], tree)  # indexing with a tensor copies


def put(tree: Mapping[str, Any], members: Sequence[int], part: Mapping[str, Any]) -> None:
    """Write ``part`` ``[len(members), …]`` into ``tree`` at ``members``, in place."""
    index = list(members)

    def write(t: Tensor, p: Tensor) -> Tensor:
        t[index] = p.to(t.dtype)
        return t

    tree_map(write, tree, part)


def restore(tree: Mapping[str, Any], member: int, earlier: Mapping[str, Any], row: int) -> None:
    """Member ``member`` of ``tree`` becomes ``row`` of an ``earlier`` tree, in place; what did not exist then is 0."""
    for key, now in tree.items():
        then = earlier.get(key)
        if isinstance(now, Mapping):
            restore(now, member, {} if then is None else then, row)
        elif then is None:
            now[member] = 0
        else:
            now[member] = then[row].to(now.dtype)


def stack(trees: Sequence[Mapping[str, Any]]) -> Tree:
    """Single-member trees (no member axis) to one tree ``[M, …]``."""
    return tree_map(lambda *ts: torch.stack([t.detach() for t in ts]), trees[0], *trees[1:])


def cat(trees: Sequence[Mapping[str, Any]]) -> Tree:
    """Trees ``[M_i, …]`` to one tree ``[sum M_i, …]``."""
    return tree_map(lambda *ts: torch.cat(ts), trees[0], *trees[1:])
