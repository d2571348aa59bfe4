"""Trees whose tensors lie side by side in one: row m of it holds all weights of member m.

An update of such a tree is one operation where it would be one per tensor, which is most of its cost for small models.
The tensors of the tree are views, so whoever changes them in place need not know.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from operator import is_

import torch
from torch import Tensor

from .tree import Tree, take

REMEMBERED_ELEMENTS = 2**18  # of larger tensors the base is looked for each time: that is nothing beside using them
# columns, their addresses and their base, the latest first
_remembered: deque[tuple[list[Tensor], list[int], Tensor]] = deque(maxlen=12)


def _remember(tensors: list[Tensor], base: Tensor) -> None:
    if tensors and base.numel() <= REMEMBERED_ELEMENTS:
        _remembered.appendleft((tensors, [t.data_ptr() for t in tensors], base))


def base_of(tree: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor ``[M, P]`` of which the tree's tensors ``[M, …]`` are the columns, in order; None where they are not.

    Decided by addresses, so it holds for trees that were copied, stored or changed in place, too.
    """
    tensors = list(tree.values())
    if not tensors:
        return None
    for place, (known, addresses, base) in enumerate(_remembered):
        if known[0] is tensors[0] and len(known) == len(tensors) and all(map(is_, known, tensors)):
            if [t.data_ptr() for t in tensors] != addresses:  # other storage (t.data = …)
                del _remembered[place]
                break
            if place:
                del _remembered[place]
                _remembered.appendleft((known, addresses, base))
            return base
    found = _base_of(tensors)
    if found is not None:
        _remember(tensors, found)
    return found


def _base_of(tensors: list[Tensor]) -> Tensor | None:
    first = tensors[0]
    members, kind, at = len(first), first.dtype, first.data_ptr()
    width = sum(math.prod(t.shape[1:]) for t in tensors)
    if members == 1 and len({t.untyped_storage().data_ptr() for t in tensors}) > 1:
        return None  # neighbours by chance
    for t in tensors:
        if t.data_ptr() != at or t.dtype != kind or (members > 1 and t.stride(0) != width):
            return None
        row = 1
        for n, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
            if stride != row and n > 1:
                return None
            row *= n
        at += row * t.element_size()
    return first.detach().as_strided((members, width), (width, 1))


def split(base: Tensor, like: Mapping[str, Tensor]) -> Tree:
    """The columns of ``base`` ``[M, P]`` as a tree with the names and shapes of ``like``, but for its members."""
    parts = base.split([math.prod(t.shape[1:]) for t in like.values()], dim=1)
    made = {name: part.view(len(base), *t.shape[1:]) for part, (name, t) in zip(parts, like.items(), strict=True)}
    if base.is_contiguous():
        _remember(list(made.values()), base.detach())
    return made


def gradients_like(params: Mapping[str, Tensor], spent: Mapping[str, Tensor] | None) -> Tree:
    """Room for a gradient, side by side: ``spent``, one that nobody needs any more, where it fits, else new."""
    first = next(iter(params.values()))
    if spent is not None and [(k, t.shape) for k, t in spent.items()] == [(k, t.shape) for k, t in params.items()]:
        base = base_of(spent)
        if base is not None and base.dtype == first.dtype and base.device == first.device:
            return dict(spent)
    return split(first.new_empty(len(first), sum(math.prod(p.shape[1:]) for p in params.values())), params)


def joined(tree: Mapping[str, Tensor]) -> Tensor:
    """All tensors ``[M, …]`` as one ``[M, P]``; a copy only where they do not lie side by side."""
    base = base_of(tree)
    return base if base is not None else torch.cat([t.reshape(len(t), -1) for t in tree.values()], dim=1)


def side_by_side(tree: Tree) -> Tree:
    """The tree, its tensors copied to lie side by side unless they do; left alone where their types differ."""
    if len({(t.dtype, t.device, len(t) > 0) for t in tree.values()}) != 1 or base_of(tree) is not None:
        return tree
    return split(joined(tree), tree)


def take_rows(tree: Tree, members: Sequence[int]) -> Tree:
    """Copies of the given members ``[len(members), …]``, side by side."""
    base = base_of(tree)
    if base is None:
        return side_by_side(take(tree, members))
    return split(base[torch.tensor(members, dtype=torch.int64)], tree)
