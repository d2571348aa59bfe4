"""The compiled small convolutional network against autograd, member by member."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from descentlab.config.tree import StudySpec
from descentlab.core.native import compiled_code
from descentlab.core.protocols import Batch, Selection
from descentlab.core.state import State
from descentlab.core.streams import Streams
from descentlab.core.tree import stack
from descentlab.engine.batched_cnn import BatchedCnn, cnn_kernel, convolutions
from descentlab.engine.work import MemberWork, VmapWork
from descentlab.launch.build import workload
from descentlab.workloads.models.cnn import SmallCNN
from descentlab.workloads.specs import Digits, SmallCnn

MEMBERS = 3
CASES = [("float64", True, (8, 16, 16)), ("float64", False, (3, 5, 6)), ("float32", True, (4, 7, 2))]


@pytest.fixture(autouse=True)
def compiler() -> None:
    if cnn_kernel(torch.float32) is None:
        pytest.skip("no C compiler on this machine")


def made(dtype: str, batch_norm: bool, channels: tuple[int, ...]) -> tuple[BatchedCnn, MemberWork, State, Selection]:
    """The compiled and the plain form, a state whose every tensor differs from its start, and a batch of 37."""
    model = SmallCnn(channels=list(channels), batch_norm=batch_norm, pool=1)
    work = workload(StudySpec(study="test", dataset=Digits(), model=model, dtype=dtype))
    modules = [work.module(Streams(0), r) for r in range(MEMBERS)]
    params, buffers = (stack([dict(getattr(m, f"named_{k}")()) for m in modules]) for k in ("parameters", "buffers"))
    torch.manual_seed(0)
    for t in [*params.values(), *(b for b in buffers.values() if b.is_floating_point())]:
        t.add_(torch.rand(t.shape, dtype=t.dtype) / 4)
    net = convolutions(modules[0], tuple(work.data.x_train.shape[1:]))
    assert net is not None
    single = MemberWork(work.module(Streams(0), 0), work)
    index = torch.randint(0, len(work.data.x_train), (MEMBERS, 37))
    state = State.start(params, buffers)
    batch = Selection((work.data.x_train, work.data.y_train), index)
    return BatchedCnn(net, VmapWork(work.module(Streams(0), 0), work), single), single, state, batch


@pytest.mark.parametrize(("dtype", "batch_norm", "channels"), CASES)
def test_gradients_buffers_and_scores_are_autograds(dtype: str, batch_norm: bool, channels: tuple[int, ...]) -> None:
    """Tried: biased running variance, padding on one side only, a sum missing in BatchNorm's backward."""
    many, single, state, batch = made(dtype, batch_norm, channels)
    bar = 1e-12 if dtype == "float64" else 2e-5
    for given in (batch, Batch(batch.x, batch.y)):
        ours, theirs = many.work(state, given), single.work(state, given)
        for name, g in theirs.grads.items():
            assert float((ours.grads[name] - g).norm()) <= bar * float(g.norm() + 1e-3), name
        for name, b in theirs.buffers.items():
            torch.testing.assert_close(ours.buffers[name], b, rtol=bar, atol=bar)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=bar, atol=bar)
        assert torch.equal(ours.accuracy, theirs.accuracy)
    x, y = batch.source
    ours, theirs = many.evaluate(state, x[:201], y[:201]), single.evaluate(state, x[:201], y[:201])
    torch.testing.assert_close(ours[0], theirs[0], rtol=bar, atol=bar)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_result_that_nobody_needs_is_written_over(batch_norm: bool) -> None:
    """The same numbers in the same memory; gradients of other members, or that lie apart, are left alone."""
    many, single, state, batch = made("float32", batch_norm, (8, 16, 16))
    spent = many.work(state, batch)
    expected = many.work(state, batch.take([1, 0, 2]))
    places = {n: g.data_ptr() for n, g in {**spent.grads, **spent.buffers}.items()}
    again = many.work(state, batch.take([1, 0, 2]), None, spent)
    assert {n: g.data_ptr() for n, g in {**again.grads, **again.buffers}.items()} == places
    for other in (single.work(state, batch), many.work(state.take([0]), batch.take([0]))):
        before = [g.clone() for g in other.grads.values()]
        found = many.work(state, batch.take([1, 0, 2]), None, other)
        assert all(torch.equal(a, b) for a, b in zip(before, other.grads.values(), strict=True))
        for result in (found, again):
            for name, g in {**expected.grads, **expected.buffers}.items():
                assert torch.equal({**result.grads, **result.buffers}[name], g), name


def test_a_variance_of_one_value_is_refused_as_by_torch() -> None:
    """Not NaN in the running variance."""
    many, *_ = made("float32", True, (8, 16, 16))
    pixels = min(height * width for *_, height, width in many.net.shape)
    assert [many.net.alone(size) for size in (1, 2)] == [pixels == 1, False]
    one = replace(many.net, shape=(*many.net.shape[:-1], (*many.net.shape[-1][:4], 1, 1)))
    assert one.alone(1) and not one.alone(2) and not replace(one, stats=()).alone(1)


def test_members_do_not_touch_each_other() -> None:
    """A NaN stays with its member, and a member alone has the same bits; the state is left as it was."""
    many, _, state, batch = made("float32", True, (8, 16, 16))
    before = {name: b.clone() for name, b in state.buffers.items()}
    whole = many.work(state, batch)
    assert all(torch.equal(before[name], b) for name, b in state.buffers.items())
    alone = many.work(state.take([2]), batch.take([2]))
    state.params["conv2.weight"][1, 0, 0, 0, 0] = math.nan
    spoilt = many.work(state, batch)
    for name, g in whole.grads.items():
        assert torch.equal(g[2], alone.grads[name][0]) and torch.equal(g[[0, 2]], spoilt.grads[name][[0, 2]])
    assert spoilt.loss.isfinite().tolist() == [True, False, True] and spoilt.accuracy[1] == 0
    assert many.evaluate(state, *batch.source)[0].isfinite().tolist() == [True, False, True]


def test_without_compiled_code_and_beyond_the_plain_network() -> None:
    many, single, state, batch = made("float64", True, (8, 16, 16))
    with compiled_code(False):
        ours = many.work(state, batch)
    for name, g in single.work(state, batch).grads.items():
        torch.testing.assert_close(ours.grads[name], g, rtol=1e-10, atol=1e-12)
    with pytest.raises(IndexError, match="sample indices"):
        many.work(state, Selection(batch.source, torch.full((MEMBERS, 2), 10**6)))
    other = SmallCNN(1, (8, 16, 16), 10)
    other.norm2 = nn.BatchNorm2d(16, momentum=None)
    assert convolutions(other, (1, 8, 8)) is None
    hooked = SmallCNN(1, (8, 16, 16), 10)
    hooked.conv1.register_forward_hook(lambda m, a, b: None)
    assert convolutions(hooked, (1, 8, 8)) is None
