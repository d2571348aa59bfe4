"""``dl.inject`` in a plain PyTorch loop, and the examples of the flat namespace as they stand."""

from __future__ import annotations

import itertools
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import descentlab as dl
from descentlab.core.errors import UserError

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "own_loop"


class Net(nn.Module):
    """A convolution, dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.conv1(x).relu().mean((2, 3))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.linspace(-1, 1, 2 * 36).view(2, 1, 6, 6)


def test_the_hit_is_before_the_bias_and_its_gradient_is_the_clean_operation_s(net: Net) -> None:
    """Oracle: the layer written out; breaks when the bias is overwritten or the backward pass sees the replacement."""
    net.eval()
    with dl.inject(net, layer="head", index=[1, 5], value=7.0) as hits:
        out = net(X)
    features = net.conv1(X).relu().mean((2, 3))
    clean = F.linear(features, net.head.weight).detach()
    wrong = clean.clone()
    wrong.view(-1)[[1, 5]] = 7.0
    assert torch.equal(out, wrong + net.head.bias)
    (hit,) = hits
    assert (hit.layer, hit.index, hit.shape, hit.new) == ("head", (1, 5), (2, 3), (7.0, 7.0))
    assert hit.old == pytest.approx((float(clean[0, 1]), float(clean[1, 2])))
    (gradient,) = torch.autograd.grad(out.square().sum(), [net.head.weight])
    torch.testing.assert_close(gradient, (2 * out.detach()).T @ features.detach())


def test_elements_run_along_channels_and_depend_on_the_seed_alone(net: Net) -> None:
    def hit(seed: int) -> tuple[int, ...]:
        with dl.inject(net, layer="conv1", elements=4, value=1e12, seed=seed) as hits:
            net(X)
        return hits[0].index

    first = hit(0)
    assert hit(0) == first and len({hit(seed) for seed in range(5)}) > 1
    pixels = 4 * 4  # output 4 x 4: one step along the channels is 16 elements in torch's order
    assert [b - a for a, b in itertools.pairwise(first)] == [pixels] * 3
    assert first[0] % (4 * pixels) < pixels  # starts at channel 0


def test_only_one_execution_is_hit_and_nothing_stays_behind(net: Net) -> None:
    net.eval()
    clean = net(X)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with dl.inject(net, layer="head", index=[0], value=9.0, call=1) as hits:
        first, second, third = net(X), net(X), net(X)
    assert torch.equal(first, clean) and torch.equal(third, clean) and not torch.equal(second, clean)
    assert len(hits) == 1 and torch.equal(net(X), clean)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_dropout_draws_as_it_would_without_the_block(net: Net) -> None:
    net.train()
    torch.manual_seed(3)
    net.drop(torch.ones(2, 4))  # the layer that is hit is not before the dropout
    expected = torch.rand(3)
    torch.manual_seed(3)
    with dl.inject(net, layer="head", index=[0], value=1.0):
        net(X)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"layer": "conv2", "index": [0]}, "layer = 'conv2': expected a layer of the model .conv1, drop, head."),
        ({"layer": "head", "index": [6]}, "index = 6: expected 0 to 5"),
        ({"layer": "head", "index": [-1]}, "index = -1: expected 0 to 5"),
        ({"layer": "head", "elements": 7}, "elements = 7: expected at most 6"),
        ({"layer": "head", "elements": 0}, "elements = 0: expected at least 1"),
        ({"layer": "head"}, "either index or elements"),
        ({"layer": "head", "index": []}, "at least one element"),
        ({"layer": "drop", "index": [0]}, "these did: conv1, head"),
        ({"layer": "head", "index": [0], "call": 2}, "call 2"),
    ],
)
def test_mistakes_are_named(net: Net, settings: dict, text: str) -> None:
    with pytest.raises(UserError, match=text), dl.inject(net, value=1.0, **settings):
        net(X)
    assert not net._forward_hooks and not net.head._forward_hooks


def test_an_error_in_the_block_is_not_replaced(net: Net) -> None:
    with pytest.raises(ZeroDivisionError), dl.inject(net, layer="head", index=[0], value=1.0):
        1 / 0  # noqa: B018


@pytest.mark.parametrize(("name", "text"), [("inject.py", "-> 1e12"), ("hessian.py", "lr <"), ("top_k.py", "residual")])
def test_an_example_runs(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name))
    assert text in capsys.readouterr().out


def test_the_load_example_reads_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("size=quick", "cases=1", "recovery_steps=1", "optimizer=sgd,adam", "fault.step=2", "model=mlp")
    dl.run("recovery", *settings, out=tmp_path / "run", launcher="local")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["load.py", str(tmp_path / "run")])
    runpy.run_path(str(EXAMPLES / "load.py"))
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["adam", "sgd"]


def test_examples_are_ten_lines() -> None:
    for path in EXAMPLES.glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) <= 11, path.name  # ten lines of code below one of text


def test_the_spectrum_example(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / "spectrum.py"))
    first, second = capsys.readouterr().out.splitlines()
    words = first.replace(";", "").split()
    stated, error, other, spread = (float(words[i]) for i in (1, 3, 6, 8))
    assert abs(stated - other) < 5 * spread and 0 < error < 0.3 * stated
    assert float(second.split()[5]) > 0
