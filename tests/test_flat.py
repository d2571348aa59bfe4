"""Weights that lie side by side: the same values, in one tensor."""

from __future__ import annotations

import io

import torch

from descentlab.core.flat import base_of, joined, side_by_side, split
from descentlab.core.state import State
from descentlab.core.tree import Tree

SHAPES = {"a": (2, 3), "b": (4,), "c": (1, 2, 2), "d": ()}


def tree(members: int = 3) -> Tree:
    torch.manual_seed(0)
    return {name: torch.randn(members, *shape) for name, shape in SHAPES.items()}


def test_a_base_is_found_where_there_is_one_and_holds_every_tensor_in_order() -> None:
    """Fails when a gap, another order or another layout of a member's part passes for side by side."""
    loose, laid = tree(), side_by_side(tree())
    base = base_of(laid)
    assert base_of(loose) is None and base is not None and base.shape == (3, 6 + 4 + 4 + 1)
    assert all(torch.equal(laid[name], loose[name]) for name in SHAPES)
    assert torch.equal(base, torch.cat([t.reshape(3, -1) for t in loose.values()], dim=1))
    assert side_by_side(laid) is laid
    laid["b"].mul_(2)
    assert torch.equal(base[:, 6:10], 2 * loose["b"]) and joined(laid).data_ptr() == base.data_ptr()
    assert base_of({name: laid[name] for name in ("b", "a", "c", "d")}) is None
    assert base_of({name: laid[name] for name in ("a", "b")}) is None
    assert base_of({**laid, "a": laid["a"].mT}) is None and base_of({}) is None
    assert base_of({**laid, "c": laid["c"].clone()}) is None


def test_one_member_and_other_types() -> None:
    assert base_of(side_by_side(tree(1))) is not None
    mixed = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3, dtype=torch.float64)}
    assert side_by_side(mixed) is mixed


def test_states_keep_the_layout_through_copies_and_files() -> None:
    state = State.start(tree(), {})
    state.slots["momentum"] = split(torch.ones(3, 15), state.params)
    taken = state.take([2, 0, 2])
    assert base_of(taken.params) is not None and base_of(taken.slots["momentum"]) is not None
    assert torch.equal(taken.params["a"], state.params["a"][[2, 0, 2]])
    taken.params["a"].zero_()
    assert state.params["a"].abs().sum() > 0
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    again = State.from_state_dict(torch.load(buffer, weights_only=True))
    assert base_of(again.params) is not None and torch.equal(again.params["c"], state.params["c"])


def test_a_tensor_that_got_other_storage_has_no_base_any_more() -> None:
    """The base was found before, and would be remembered for these very tensors."""
    laid = side_by_side(tree())
    assert base_of(laid) is not None
    laid["b"].data = laid["b"].clone()
    assert base_of(laid) is None
