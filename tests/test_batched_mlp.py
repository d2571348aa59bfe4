"""The written-out MLP against plain modules and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from descentlab.core.protocols import Batch, Selection
from descentlab.core.state import State
from descentlab.core.tree import stack
from descentlab.engine import native
from descentlab.engine.batched_mlp import BatchedMlp, plain_layers
from descentlab.workloads.models.mlp import ACTIVATIONS, MLP

MEMBERS, SAMPLES = 5, 12


def modules(hidden: tuple[int, ...], activation: str, dtype: torch.dtype = torch.float64) -> list[MLP]:
    torch.manual_seed(0)
    return [MLP((9, *hidden, 4), activation).to(dtype) for _ in range(MEMBERS)]


def state_of(nets: list[MLP]) -> State:
    return State.start(stack([dict(net.named_parameters()) for net in nets]), {})


def batch(dtype: torch.dtype = torch.float64) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(MEMBERS, SAMPLES, 3, 3, dtype=dtype), torch.randint(0, 4, (MEMBERS, SAMPLES)))


def work_of(net: MLP) -> BatchedMlp:
    layers = plain_layers(net, net.layers)
    assert layers is not None
    return BatchedMlp(layers)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5), (7, 5, 6)], ids=["linear", "one", "two", "three"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_equal_those_of_autograd(activation: str, hidden: tuple[int, ...]) -> None:
    """Broken on purpose: dividing by B - 1, or the derivative of the activation at f(z), fails."""
    nets, data = modules(hidden, activation), batch()
    got = work_of(nets[0]).work(state_of(nets), data)
    assert list(got.grads) == [name for name, _ in nets[0].named_parameters()]
    for m, net in enumerate(nets):
        output = net(data.x[m])
        loss = nn.functional.cross_entropy(output, data.y[m])
        loss.backward()
        assert abs(float(got.loss[m] - loss.detach())) <= 1e-13
        assert float(got.accuracy[m]) == float((output.argmax(1) == data.y[m]).double().mean())
        for name, p in net.named_parameters():
            assert p.grad is not None and got.grads[name].is_contiguous()
            assert float((got.grads[name][m] - p.grad).abs().max()) <= 1e-13


@pytest.fixture
def compiled() -> None:
    if native.kernel(torch.float32) is None:
        pytest.skip("no C compiler on this machine")


def selection(dtype: torch.dtype, samples: int) -> Selection:
    torch.manual_seed(2)
    source = torch.randn(40, 3, 3, dtype=dtype), torch.randint(0, 4, (40,))
    return Selection(source, torch.randint(0, 40, (MEMBERS, samples)))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("samples", [1, 16, 70])
@pytest.mark.parametrize("hidden", [(), (7,), (16, 5, 6)], ids=["linear", "one", "three"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_compiled_gradients_equal_those_of_autograd(activation: str, hidden: tuple[int, ...], samples: int) -> None:
    """Broken on purpose: a sum without the last vector of samples fails with 70 of them."""
    nets, data = modules(hidden, activation), selection(torch.float64, samples)
    got = work_of(nets[0]).work(state_of(nets), data)
    assert "x" not in vars(data)  # never gathered, so the compiled step did run
    for m, net in enumerate(nets):
        output = net(data.x[m])
        loss = nn.functional.cross_entropy(output, data.y[m])
        loss.backward()
        assert abs(float(got.loss[m] - loss.detach())) <= 1e-13
        assert float(got.accuracy[m]) == pytest.approx(float((output.argmax(1) == data.y[m]).double().mean()))
        for name, p in net.named_parameters():
            assert p.grad is not None and float((got.grads[name][m] - p.grad).abs().max()) <= 1e-13


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_members_do_not_touch_each_other(dtype: torch.dtype) -> None:
    nets, data = modules((7,), "silu", dtype), selection(dtype, 20)
    work = work_of(nets[0])
    clean, poisoned = work.work(state_of(nets), data), state_of(nets)
    next(iter(poisoned.params.values()))[2] = math.nan
    got, alone = work.work(poisoned, data), work.work(state_of(nets[4:]), data.take([4]))
    for name, g in clean.grads.items():
        assert torch.equal(got.grads[name][[0, 1, 3, 4]], g[[0, 1, 3, 4]]) and torch.equal(alone.grads[name][0], g[4])
        assert bool(got.grads[name][2].isnan().any())
    assert bool(got.loss[2].isnan()) and float(got.accuracy[2]) == 0.0


@pytest.mark.usefixtures("compiled")
def test_an_index_outside_the_training_set_is_refused() -> None:
    nets, data = modules((7,), "silu"), selection(torch.float64, 4)
    data.index[1, 2] = 40
    with pytest.raises(IndexError, match=r"\[0, 40\)"):
        work_of(nets[0]).work(state_of(nets), data)


def test_without_a_compiler_a_notice_says_so_and_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    native.kernel.cache_clear()
    try:
        nets, data = modules((7,), "silu"), selection(torch.float64, 12)
        with pytest.warns(RuntimeWarning, match="no C compiler"):
            got = work_of(nets[0]).work(state_of(nets), data)
        plain = work_of(nets[0]).work(state_of(nets), Batch(data.x, data.y))
        assert all(torch.equal(got.grads[name], g) for name, g in plain.grads.items())
    finally:
        native.kernel.cache_clear()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("samples", [1, 64, 150])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_compiled_evaluation_equals_that_of_the_module(activation: str, samples: int) -> None:
    """Broken on purpose: counting the samples left from the piece before, with 150 of them, fails."""
    nets = modules((7, 5), activation)
    torch.manual_seed(3)
    x, y = torch.randn(samples, 3, 3, dtype=torch.float64), torch.randint(0, 4, (samples,))
    loss, accuracy = work_of(nets[0]).evaluate(state_of(nets), x, y)
    for m, net in enumerate(nets):
        output = net(x).detach()
        assert abs(float(loss[m] - nn.functional.cross_entropy(output, y))) <= 1e-13
        assert float(accuracy[m]) == pytest.approx(float((output.argmax(1) == y).double().mean()), abs=1e-15)


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_evaluation_equals_that_of_the_module(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchedMlp, "EVALUATE_ELEMENTS", chunk)
    nets = modules((7, 5), "gelu")
    x, y = torch.randn(50, 3, 3, dtype=torch.float64), torch.randint(0, 4, (50,))
    loss, accuracy = work_of(nets[0]).evaluate(state_of(nets), x, y)
    for m, net in enumerate(nets):
        output = net(x).detach()
        assert abs(float(loss[m] - nn.functional.cross_entropy(output, y))) <= 1e-13
        assert float(accuracy[m]) == float((output.argmax(1) == y).double().mean())


def test_the_first_of_tied_outputs_wins_and_a_non_finite_output_is_wrong() -> None:
    net = MLP((4, 4))
    with torch.no_grad():
        net.layers[1].weight.copy_(torch.eye(4))
        net.layers[1].bias.zero_()
    rows = [[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 2, 0], [math.inf, 0, 0, 0], [5.0, -math.inf, 0, 0]]
    x, y = torch.tensor([rows]), torch.tensor([[0, 2, 2, 0, 0]])
    got = work_of(net).work(state_of([net]), Batch(x, y))
    assert float(got.accuracy[0]) == pytest.approx(2 / 5)  # samples 0 and 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_member_leaves_the_others_to_the_bit(dtype: torch.dtype) -> None:
    nets, data = modules((7,), "silu", dtype), batch(dtype)
    work = work_of(nets[0])
    clean = work.work(state_of(nets), data)
    poisoned = state_of(nets)
    next(iter(poisoned.params.values()))[2] = math.nan
    got = work.work(poisoned, data)
    others = [0, 1, 3, 4]
    for name, g in clean.grads.items():
        assert torch.equal(got.grads[name][others], g[others]) and bool(got.grads[name][2].isnan().any())
    assert torch.equal(got.loss[others], clean.loss[others]) and bool(got.loss[2].isnan())
    assert float(got.accuracy[2]) == 0.0


def hooked() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 2))
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP((9, 7, 4), dropout=0.1).layers,
        lambda: nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)),
        lambda: nn.Sequential(nn.Linear(9, 7), nn.GELU(approximate="tanh"), nn.Linear(7, 4)),
        lambda: nn.Sequential(nn.Linear(9, 7, bias=False), nn.ReLU(), nn.Linear(7, 4)),
        lambda: nn.Sequential(nn.Linear(9, 7), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 4)),
        hooked,
    ],
    ids=["dropout", "batchnorm", "tanh-gelu", "no-bias", "ends-with-activation", "no-activation", "hook"],
)
def test_anything_else_is_not_taken(make: Callable[[], nn.Sequential]) -> None:
    net = make()
    assert plain_layers(net, net) is None
