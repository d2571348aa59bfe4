"""Nine sites of a convolution and a linear map against a faulted graph in numpy, by loops over the kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.core.matrixop import DIRECTIONS, OPERANDS, Lanes, replaced
from descentlab.core.opmode import OpMode, Ops, Site, trace
from descentlab.core.protocols import Batch
from descentlab.core.state import State
from descentlab.engine.work import MemberWork

Tamper = Callable[[str, np.ndarray], np.ndarray]  # ("forward/a", tensor) -> the tensor the operation sees or gives
SITES = [f"{direction}/{operand}" for direction, operand in itertools.product(DIRECTIONS, OPERANDS)]


def clean(site: str, t: np.ndarray) -> np.ndarray:
    return t


class Conv:
    """Result, input gradient and weight gradient of a convolution in any number of dimensions, float64."""

    def __init__(self, stride: Any, padding: Any, dilation: Any, groups: int = 1) -> None:
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def _taps(self, out: tuple[int, ...], kernel: tuple[int, ...]) -> Iterator[tuple[tuple, tuple]]:
        """(place in the kernel, the strided window of the padded input it is multiplied with)."""
        for tap in itertools.product(*map(range, kernel)):
            start = [t * d for t, d in zip(tap, self.dilation, strict=True)]
            stop = [s + (n - 1) * step + 1 for s, n, step in zip(start, out, self.stride, strict=True)]
            yield tap, tuple(slice(*w) for w in zip(start, stop, self.stride, strict=True))

    def _size(self, x: np.ndarray, w: np.ndarray) -> tuple[int, ...]:
        dims = zip(x.shape[2:], w.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in dims)

    def _pad(self, x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, 0), *((p, p) for p in self.padding)])

    def _group(self, x: np.ndarray, w: np.ndarray, g: int) -> tuple[slice, slice]:
        inputs, outputs = w.shape[1], w.shape[0] // self.groups
        return slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)

    def forward(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        out = np.zeros((x.shape[0], w.shape[0], *self._size(x, w)))
        padded = self._pad(x)
        for g in range(self.groups):
            i, o = self._group(x, w, g)
            for tap, window in self._taps(out.shape[2:], w.shape[2:]):
                seen = padded[(slice(None), i, *window)]
                out[:, o] += np.einsum("ni...,oi->no...", seen, w[(o, slice(None), *tap)])
        return out

    def grad_input(self, dy: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        padded = np.zeros_like(self._pad(x))
        for g in range(self.groups):
            i, o = self._group(x, w, g)
            for tap, window in self._taps(dy.shape[2:], w.shape[2:]):
                at = (slice(None), i, *window)
                padded[at] += np.einsum("no...,oi->ni...", dy[:, o], w[(o, slice(None), *tap)])
        inner = tuple(slice(p, p + n) for p, n in zip(self.padding, x.shape[2:], strict=True))
        return padded[(slice(None), slice(None), *inner)]

    def grad_weight(self, x: np.ndarray, dy: np.ndarray, w: np.ndarray) -> np.ndarray:
        out, padded = np.zeros_like(w), self._pad(x)
        for g in range(self.groups):
            i, o = self._group(x, w, g)
            for tap, window in self._taps(dy.shape[2:], w.shape[2:]):
                seen, coming = padded[(slice(None), i, *window)], dy[:, o]
                flat = (t.reshape(*t.shape[:2], -1) for t in (coming, seen))
                out[(o, slice(None), *tap)] = np.einsum("nop,nip->oi", *flat)
        return out


class Dense(Conv):
    """The same of a linear map."""

    def __init__(self) -> None:
        super().__init__((), (), ())

    def forward(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return x @ w.T

    def grad_input(self, dy: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        return dy @ w

    def grad_weight(self, x: np.ndarray, dy: np.ndarray, w: np.ndarray) -> np.ndarray:
        return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def ahead(op: Conv, x: np.ndarray, w: np.ndarray, tamper: Tamper) -> np.ndarray:
    return tamper("forward/out", op.forward(tamper("forward/a", x), tamper("forward/b", w)))


def back(op: Conv, x: np.ndarray, w: np.ndarray, dy: np.ndarray, tamper: Tamper) -> tuple[np.ndarray, np.ndarray]:
    """(input gradient, weight gradient): both from the *clean* saved input and weight."""
    dx = op.grad_input(tamper("grad_input/a", dy), tamper("grad_input/b", w), x)
    dw = op.grad_weight(tamper("grad_weight/a", x), tamper("grad_weight/b", dy), w)
    return tamper("grad_input/out", dx), tamper("grad_weight/out", dw)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], Conv]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), (2, 4, 7), Conv((2,), (2,), (1,), 2)),
    "conv2d": (
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (2, 3, 6, 5),
        Conv((2, 1), (1, 0), (1, 2)),
    ),
    "depthwise": (
        nn.Conv2d(3, 3, 3, padding="same", groups=3, bias=False),
        (2, 3, 4, 4),
        Conv((1, 1), (1, 1), (1, 1), 3),
    ),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1), (1, 2, 3, 2, 3), Conv((1,) * 3, (1,) * 3, (1,) * 3)),
    "linear": (nn.Linear(5, 4), (3, 5), Dense()),
    "sequence": (nn.Linear(5, 4, bias=False), (2, 3, 5), Dense()),
}


def wrong(value: float, element: int) -> tuple[Callable[[Tensor], Tensor], Callable[[np.ndarray], np.ndarray]]:
    """One element becomes ``value``: as an edit and in numpy."""

    def by_hand(t: np.ndarray) -> np.ndarray:
        t = t.copy()
        t.flat[element] = value
        return t

    return lambda t: replaced(t, torch.tensor([element]), torch.tensor([value])), by_hand


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_fault_touches_one_operation_as_in_the_graph_built_by_hand(layer: str, site: str) -> None:
    """Broken on purpose, one at a time: the faulty operand saved for the backward pass, the edit of grad_input used for
    grad_weight too, the bias added before the fault: each fails at its sites."""
    module, shape, op = LAYERS[layer]
    module = module.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    edit, by_hand = wrong(9.5, 4)
    calls = 0

    def counted(t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return edit(t)

    stored = module.weight.detach().clone()
    direction, operand = site.split("/")
    with OpMode(module, Ops({Site("", 0, direction, operand): counted})):
        out = module(x)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    parameters = list(module.parameters())
    dx, dw, *db = torch.autograd.grad(out, [x, *parameters], upstream)
    assert calls == 1 and torch.equal(module.weight, stored)

    def tamper(at: str, t: np.ndarray) -> np.ndarray:
        return by_hand(t) if at == site else t

    arrays = [t.detach().numpy() for t in (x, parameters[0], upstream)]
    result = ahead(op, *arrays[:2], tamper)
    if db:
        bias = parameters[1].detach().numpy()
        result = result + (bias if layer == "linear" else bias.reshape(-1, *[1] * (len(shape) - 2)))
        axes = tuple(i for i in range(result.ndim) if i != (result.ndim - 1 if layer == "linear" else 1))
        np.testing.assert_allclose(db[0], arrays[2].sum(axes), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out.detach(), result, rtol=1e-12, atol=1e-12)
    for got, hand in zip((dx, dw), back(op, *arrays, tamper), strict=True):
        np.testing.assert_allclose(got, hand, rtol=1e-12, atol=1e-12)
    hit_nothing = np.array_equal(ahead(op, *arrays[:2], clean), ahead(op, *arrays[:2], tamper)) and all(
        np.array_equal(a, b) for a, b in zip(back(op, *arrays, clean), back(op, *arrays, tamper), strict=True)
    )
    assert not hit_nothing


class Net(nn.Module):
    """Two convolutions and a head; faults hit the second convolution or the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.second = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh().flatten(1))


class Squares:
    """Half the squared distance, summed."""

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (output - y).square().sum()

    def accuracy(self, output: Tensor, y: Tensor) -> Tensor:
        return output.new_zeros(())


def by_hand(
    weights: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, layer: str, tamper: Tamper
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of :class:`Net` with ``tamper`` in ``layer``."""
    first, second, head = Conv((1, 1), (1, 1), (1, 1)), Conv((2, 2), (0, 0), (1, 1)), Dense()
    at = {name: tamper if name == layer else clean for name in ("first", "second", "head")}
    u = np.tanh(ahead(first, x, weights["first"], at["first"]))
    v = np.tanh(ahead(second, u, weights["second"], at["second"]))
    flat = v.reshape(len(x), -1)
    out = ahead(head, flat, weights["head"], at["head"])
    grads = {}
    dflat, grads["head"] = back(head, flat, weights["head"], out - y, at["head"])
    dv = dflat.reshape(v.shape) * (1 - v**2)
    du, grads["second"] = back(second, u, weights["second"], dv, at["second"])
    grads["first"] = back(first, x, weights["first"], du * (1 - u**2), at["first"])[1]
    return 0.5 * ((out - y) ** 2).sum(), grads


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", ["second", "head"])
def test_the_gradients_of_the_faulted_step_are_those_of_the_faulted_graph(layer: str, site: str) -> None:
    """A whole step on the member route: what is downstream of the fault follows from it, what is upstream is clean."""
    torch.manual_seed(0)
    net = Net().double()
    x, y = torch.randn(3, 2, 5, 5).double(), torch.randn(3, 3).double()
    edit, hand = wrong(-7.25, 5)
    direction, operand = site.split("/")
    params = {k: p.detach().clone().unsqueeze(0) for k, p in net.named_parameters()}
    weights = {k.removesuffix(".weight"): p[0].numpy() for k, p in params.items()}
    made = MemberWork(net, Squares()).work(
        State.start(params, {}), Batch(x[None], y[None]), Ops({Site(layer, 0, direction, operand): edit})
    )
    found = {k.removesuffix(".weight"): g[0].numpy() for k, g in made.grads.items()}
    loss, grads = by_hand(weights, x.numpy(), y.numpy(), layer, lambda at, t: hand(t) if at == site else t)
    clean_loss, clean_grads = by_hand(weights, x.numpy(), y.numpy(), layer, clean)
    np.testing.assert_allclose(made.loss[0], loss, rtol=1e-12)
    for name in grads:
        np.testing.assert_allclose(found[name], grads[name], rtol=1e-10, atol=1e-12)
    changed = {name for name in grads if not np.array_equal(grads[name], clean_grads[name])}
    upstream = {"second": {"first"}, "head": {"first", "second"}}[layer]
    expected = {"forward": set(grads), "grad_input": upstream, "grad_weight": {layer}}[direction]
    if site in ("forward/a", "forward/b"):  # the hit layer's own gradient sees the fault through the loss
        assert loss != clean_loss
    assert changed == expected


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", LAYERS)
def test_identity_edits_give_the_bits_of_the_stock_operation(layer: str, site: str) -> None:
    """A twin takes the route of its faulted run and still computes what training computes. (At ``forward/out`` the bias
    is a separate addition, so only layers without one are equal to the bit there.)"""
    module, shape, _ = LAYERS[layer]
    module = module.float()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    direction, operand = site.split("/")

    def run() -> list[Tensor]:
        out = module(x)
        return [out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])]

    stock = run()
    with OpMode(module, Ops({Site("", 0, direction, operand): lambda t: t})):
        watched = run()  # the backward pass inside the mode: its own calls are not counted as the layer's
    for a, b in zip(stock, watched, strict=True):
        if site == "forward/out" and module.bias is not None:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


def test_the_backward_pass_is_not_counted_as_a_call_of_the_layer() -> None:
    """The gradients are computed by running the stock operation again, which must not shift the count of calls."""
    net, x, fired = nn.Linear(3, 2), torch.ones(4, 3), []
    edits = {Site("", 0, "grad_weight", "out"): lambda t: t, Site("", 1): lambda t: fired.append(1) or t}
    with OpMode(net, Ops(edits)):
        net(x).sum().backward()
        assert fired == []
        net(x)
    assert fired == [1]


def test_lanes_keep_the_right_results_elsewhere() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    x = torch.randn(1, 2, 4, 4).double()
    bad = replaced(x, torch.tensor([5]), torch.tensor([100.0]))
    lanes = (5, 21)
    with OpMode(module, Ops({Site("", 0, "forward", "a"): lambda t: Lanes(bad, lanes)})):
        out = module(x).flatten()
    right, faulty = module(x).flatten(), module(bad).flatten()
    expected = right.clone()
    expected[list(lanes)] = faulty[list(lanes)]
    assert torch.equal(out, expected) and not torch.equal(out, right)
    assert int((right != faulty).sum()) > 2


def test_the_trace_knows_which_gradients_a_step_needs() -> None:
    """The first layer's input needs no gradient; a frozen weight needs none either."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Flatten(), nn.Linear(8, 2))
    net[2].weight.requires_grad_(False)
    first, last = trace(net, torch.zeros(1, 1, 5, 5))
    assert first.directions == ("forward", "grad_weight") and last.directions == ("forward", "grad_input")
    assert first.shapes("grad_weight") == {"a": (1, 1, 5, 5), "b": (1, 2, 2, 2), "out": (2, 1, 3, 3)}
    assert last.shapes("grad_input") == {"a": (1, 2), "b": (2, 8), "out": (1, 8)}
    out = first.stock()(torch.zeros(first.a), torch.zeros(first.b), None)
    assert out.shape == (1, 2, 2, 2)


def test_a_site_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="site grad_weight/c: expected"):
        OpMode(nn.Linear(2, 2), Ops({Site("", 0, "grad_weight", "c"): lambda t: t}))


def test_inject_reaches_the_backward_pass_and_the_operands() -> None:
    """In a loop of one's own: a weight gradient with a wrong element; a weight read wrong once."""
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    x = torch.randn(5, 4)
    net(x).sum().backward()
    stock = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with dl.inject(net, layer="2", value=50.0, index=[4], direction="grad_weight") as hits:
        net(x).sum().backward()
    first, second = (p.grad for p in net.parameters())
    assert torch.equal(first, stock[0]) and second.flatten()[4] == 50.0
    assert torch.equal(second.flatten()[:4], stock[1].flatten()[:4])
    assert hits[0].old == (pytest.approx(float(stock[1][1, 1])),) and hits[0].shape == (2, 3)
    with dl.inject(net, layer="2", value=2.0, elements=2, operand="b") as hits:
        out = net(x)
    seen = net[2].weight.detach().clone()
    seen.view(-1)[list(hits[0].index)] = 2.0
    assert hits[0].index[1] - hits[0].index[0] == 3  # along the output channels
    torch.testing.assert_close(out, F.linear(net[:2](x), seen))
    with (
        pytest.raises(UserError, match="direction = 'gradweight'"),
        dl.inject(net, layer="2", value=1.0, index=[0], direction="gradweight"),
    ):
        pass
    with (
        pytest.raises(UserError, match="grad_input if the block held the backward pass"),
        dl.inject(net, layer="0", value=1.0, index=[0], direction="grad_input"),
    ):
        net(x).sum().backward()
