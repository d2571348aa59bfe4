"""The interception layer: no edit = stock operation, same bits; an edit does what hardware would, and only that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from descentlab.core.matrixop import replaced
from descentlab.core.opmode import OpMode, Ops, Site, trace
from descentlab.perturb.positions import to_logical, walk
from descentlab.workloads.models.cnn import SmallCNN


class Mixed(nn.Module):
    """Every operation the layer sees, one convolution called twice, one linear map without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.conv(self.conv(x))).relu())
        return F.linear(x.mean((2, 3)), self.weight)


def test_trace_names_calls_and_shapes() -> None:
    net = Mixed()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    records = trace(net, torch.randn(4, 3, 5, 5))
    assert [(r.layer, r.call, r.kind) for r in records] == [
        ("conv", 0, "conv"),
        ("conv", 1, "conv"),
        ("drop", 0, "dropout"),
        ("", 0, "linear"),
    ]
    assert records[0].out == (4, 3, 5, 5) and records[3].b == (2, 3) and records[2].p == 0.5
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("vmapped", [False, True])
def test_without_edits_every_bit_is_the_same(vmapped: bool) -> None:
    net = SmallCNN(1, (4, 4, 4), 10)
    params = {k: p.detach().expand(2, *p.shape).clone() for k, p in net.named_parameters()}
    x = torch.randn(2, 5, 1, 9, 9)

    stacked = {k: b.expand(2, *b.shape).clone() for k, b in net.named_buffers()}

    def loss(p: dict, buffers: dict, x: Tensor) -> Tensor:
        fresh = {k: b.clone() for k, b in buffers.items()}
        return functional_call(net, (p, fresh), (x,)).square().sum()

    def run() -> dict:
        if vmapped:
            return vmap(grad(loss))(params, stacked, x)
        return grad(loss)(*({k: t[0] for k, t in d.items()} for d in (params, stacked)), x[0])

    plain = run()
    with OpMode(net):
        watched = run()
    assert all(torch.equal(plain[k], watched[k]) for k in plain)


def test_a_replaced_element_changes_the_output_there_and_lets_the_gradient_through() -> None:
    """Broken on purpose: a scatter that autograd sees zeroes the gradient at the hit element."""
    net = nn.Linear(3, 4)
    x = torch.randn(2, 3)
    index, value = torch.tensor([5]), torch.tensor([7.0])
    site = Site("", 0, "forward", "out")
    with OpMode(net, Ops({site: lambda t: replaced(t, index, value)})):
        out = net(x)
    expected = (x @ net.weight.T).detach()
    expected[1, 1] = 7.0
    torch.testing.assert_close(out.detach(), expected + net.bias.detach())  # the bias is added to the wrong value
    upstream = torch.randn(2, 4)
    (got,) = torch.autograd.grad(out, [net.weight], upstream)
    torch.testing.assert_close(got, upstream.T @ x)  # as if the operation had been right


def test_operand_faults_touch_one_call_and_leave_the_stored_weight() -> None:
    net = Mixed().eval()
    weight = net.conv.weight.detach().clone()
    x = torch.randn(1, 3, 4, 4)
    with OpMode(net, Ops({Site("conv", 1, "forward", "b"): lambda w: w * 0})):
        out = net(x)
    by_hand = net.conv.bias.view(1, -1, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(out, F.linear(net.norm(by_hand).relu().mean((2, 3)), net.weight))
    assert torch.equal(net.conv.weight, weight)


def test_dropout_takes_its_mask_and_refuses_to_draw_one() -> None:
    net = nn.Sequential(nn.Dropout(0.25)).train()
    x, mask = torch.ones(2, 4), torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 1]])
    with OpMode(net, Ops(masks={("0", 0): mask})):
        assert torch.equal(net(x), mask / 0.75)
    with pytest.raises(RuntimeError, match="given no mask"), OpMode(net):
        net(x)


def test_runs_of_elements_lie_along_channels() -> None:
    """Golden: 4 channels on a 2x3 map; element 5 in N H W C order is sample 0, row 0, column 1, channel 1."""
    axes = walk("conv", "g", 4)
    logical = to_logical(np.arange(4, 8), (2, 4, 2, 3), axes)
    assert logical.tolist() == [1, 7, 13, 19]  # channel c of (row 0, column 1): c * 6 + 1
    assert to_logical(np.array([24]), (2, 4, 2, 3), axes).tolist() == [24]
    assert to_logical(np.arange(3), (5, 10), walk("linear", "g", 2)).tolist() == [0, 1, 2]
    assert to_logical(np.arange(3), (5, 2, 10), walk("linear", "x", 3)).tolist() == [0, 1, 2]
    assert to_logical(np.arange(3), (5, 10), walk("linear", "w", 2)).tolist() == [
        0,
        10,
        20,
    ]  # input 0 to outputs 0 to 2
