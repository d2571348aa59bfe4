"""Norms, counts and largest elements of members against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from descentlab.core import member_stats
from descentlab.core.member_stats import member_max_abs, member_norms
from descentlab.core.tree import Tree

MEMBERS = 5
SHAPES = [(3, 7), (1,), (40,), (2, 3, 3)]


def tree(dtype: torch.dtype, seed: int) -> Tree:
    torch.manual_seed(seed)
    return {str(i): torch.randn(MEMBERS, *shape, dtype=torch.float64).to(dtype) for i, shape in enumerate(SHAPES)}


def flat(held: Tree) -> np.ndarray:
    return np.concatenate([t.flatten(1).numpy() for t in held.values()], axis=1)


@pytest.fixture(params=["compiled", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(member_stats, "compiled_stats", lambda dtype: None)
    elif member_stats.compiled_stats(torch.float32) is None:
        pytest.skip("no C compiler on this machine")
    return str(request.param)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_numpy(dtype: torch.dtype) -> None:
    """Broken on purpose: leaving out the last leaf, or the sum of squares in float32, fails."""
    after, before = tree(dtype, 0), tree(dtype, 1)
    a, b = flat(after), flat(before)
    norm, bad = member_norms(after)
    np.testing.assert_allclose(norm.numpy(), np.linalg.norm(a.astype(np.float64), axis=1), rtol=1e-14)
    assert norm.dtype == torch.float64 and bad.dtype == torch.int64 and not bad.any()
    change = (a - b).astype(np.float64)  # the difference is taken in the weights' own type
    np.testing.assert_allclose(member_norms(after, before)[0].numpy(), np.linalg.norm(change, axis=1), rtol=1e-14)
    assert member_max_abs(after).tolist() == np.abs(a).max(1).astype(np.float64).tolist()


@pytest.mark.usefixtures("route")
def test_the_same_tensors_with_other_numbers_in_another_place_or_with_other_neighbours() -> None:
    """Addresses of tensors that were seen before are remembered. Fails without the look at where they are now."""
    held, other = tree(torch.float32, 0), tree(torch.float32, 1)
    for _ in range(2):
        member_norms(held, other), member_max_abs(held)
    held["0"].mul_(3)
    held["2"].data = torch.full((MEMBERS, 40), 2.0)
    a, b = flat(held), flat(other)
    change = (a - b).astype(np.float64)
    np.testing.assert_allclose(member_norms(held, other)[0].numpy(), np.linalg.norm(change, axis=1), rtol=1e-14)
    assert member_max_abs(held).tolist() == np.abs(a).max(1).astype(np.float64).tolist()
    del held["3"]
    assert member_max_abs(held).tolist() == np.abs(flat(held)).max(1).astype(np.float64).tolist()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_elements_stay_with_their_member(dtype: torch.dtype) -> None:
    clean, spoilt = tree(dtype, 0), tree(dtype, 0)
    spoilt["0"][1, 2, 6] = math.nan
    spoilt["2"][1, 39] = -math.inf
    spoilt["3"][3, 1, 2, 2] = math.inf
    (norm, bad), (norms, _), top = member_norms(spoilt), member_norms(clean), member_max_abs(spoilt)
    assert bad.tolist() == [0, 2, 0, 1, 0]
    assert math.isnan(norm[1]) and math.isinf(norm[3]) and math.isnan(top[1]) and math.isinf(top[3])
    others = [0, 2, 4]
    assert torch.equal(norm[others], norms[others]) and torch.equal(top[others], member_max_abs(clean)[others])
    assert member_norms(clean, spoilt)[1].tolist() == [0] * 5  # counted after the update, not before


@pytest.mark.usefixtures("route")
def test_large_float32_elements_do_not_overflow() -> None:
    norm, bad = member_norms({"w": torch.full((2, 4), 1e30)})
    np.testing.assert_allclose(norm.numpy(), 2e30, rtol=1e-7)
    assert not bad.any()


@pytest.mark.usefixtures("route")
def test_views_that_are_not_contiguous() -> None:
    held: Tensor = torch.randn(4, 3, 5, dtype=torch.float64).transpose(1, 2)
    np.testing.assert_allclose(member_norms({"w": held})[0].numpy(), np.linalg.norm(held.numpy(), axis=(1, 2)))
    assert member_max_abs({"w": held}).tolist() == held.abs().amax((1, 2)).tolist()
