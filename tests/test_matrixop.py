"""Gradients of the operations a fault can touch: the bits of autograd's, without what autograd imports."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from descentlab.core.matrixop import gradient, replaced

LINEAR = [((64, 36), 8), ((3, 9, 13), 10), ((2, 3, 4, 5), 1), ((1, 8), 33)]
CONVOLUTIONS = [
    (F.conv2d, (64, 1, 8, 8), (8, 1, 3, 3), {"padding": 1}),
    (F.conv2d, (5, 4, 9, 9), (6, 2, 3, 3), {"stride": (2, 1), "padding": (1, 0), "dilation": 2, "groups": 2}),
    (F.conv2d, (2, 3, 8, 8), (4, 3, 3, 3), {"padding": "same"}),  # no closed form here: differentiated
    (F.conv1d, (4, 3, 20), (5, 3, 4), {"stride": 2}),
    (F.conv3d, (2, 2, 5, 5, 5), (3, 2, 2, 2, 2), {}),
]


def autograd(op, operands, of, upstream):
    held = [None if t is None else t.detach() for t in operands]
    held[of].requires_grad_()
    return torch.autograd.grad(op(*held), held[of], upstream)[0]


def assert_same(op, a, b, bias):
    upstream = torch.randn_like(op(a, b, bias))
    for of, operand in enumerate((a, b, bias)):
        if operand is not None:
            expected = autograd(op, (a, b, bias), of, upstream)
            assert torch.equal(gradient(op, (a, b, bias), of, upstream), expected), of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("shape", "out"), LINEAR)
def test_gradients_of_a_linear_map_have_the_bits_of_autograd(shape, out, biased, dtype):
    """Breaks if an operand is transposed, or if the batch axes are added up in another order."""
    torch.manual_seed(0)
    bias = torch.randn(out, dtype=dtype) if biased else None
    assert_same(F.linear, torch.randn(shape, dtype=dtype), torch.randn(out, shape[-1], dtype=dtype), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("conv", "shape", "weight", "options"), CONVOLUTIONS)
def test_gradients_of_a_convolution_have_the_bits_of_autograd(conv, shape, weight, options, biased, dtype):
    """Breaks if an option is dropped, or if the wrong one of the three gradients is returned."""
    torch.manual_seed(0)
    bias = torch.randn(weight[0], dtype=dtype) if biased else None
    assert_same(partial(conv, **options), torch.randn(shape, dtype=dtype), torch.randn(weight, dtype=dtype), bias)


def test_replaced_elements_are_those_of_the_flat_index():
    """Breaks if the index is not unravelled in torch's logical order, whatever the strides."""
    x = torch.arange(24.0).view(4, 6).t().reshape(6, 2, 2).permute(1, 0, 2)
    index = torch.tensor([0, 5, 23])
    expected = x.flatten().clone()
    expected[index] = torch.tensor([-1.0, -2.0, -3.0])
    out = replaced(x, index, torch.tensor([-1.0, -2.0, -3.0]))
    assert torch.equal(out.flatten(), expected) and out.stride() == x.clone().stride()


def test_a_faulted_step_does_not_import_sympy():
    """It takes a second per worker process. Breaks with torch.unravel_index, or autograd with an upstream gradient."""
    program = """
import sys, torch
from descentlab.core.matrixop import replaced
from descentlab.core.opmode import OpMode, Ops, Site
net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
edit = lambda x: replaced(x, torch.tensor([3]), torch.tensor([1e3]))
sites = [Site(layer, 0, direction) for layer in "02" for direction in ("forward", "grad_weight")]
with OpMode(net, Ops({site: edit for site in sites})):
    loss = net(torch.ones(2, 1, 4, 4)).square().mean()
torch.autograd.grad(loss, list(net.parameters()))
print("sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
