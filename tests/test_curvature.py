"""Hessians against brute force and against closed forms; Lanczos against the dense eigenvalues."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.observe import lanczos


def brute_force(model: nn.Module, loss: object, data: tuple[Tensor, Tensor]) -> Tensor:
    """One double-backward pass per row, on the model itself (which must be float64)."""
    params = list(model.parameters())
    value = loss(model(data[0]), data[1])  # type: ignore[operator]
    grads = torch.autograd.grad(value, params, create_graph=True)
    rows = []
    for g in torch.cat([g.flatten() for g in grads]):
        row = torch.autograd.grad(g, params, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if r is None else r for r, p in zip(row, params, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


class Cnn(nn.Module):
    """A convolution, BatchNorm and a head; ``unused`` parameters that the loss does not see."""

    def __init__(self, unused: int = 0) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Linear(2, 3)
        if unused:
            self.unused = nn.Parameter(torch.zeros(unused))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).tanh().mean((2, 3)))


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def classes(n: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, inputs, dtype=torch.float64, generator=g), torch.randint(outputs, (n,), generator=g)


@pytest.mark.parametrize("training", [True, False])
def test_hessian_equals_double_autograd_rows(training: bool) -> None:
    """A model with BatchNorm and one parameter that the loss does not see."""
    torch.manual_seed(2)
    net = Cnn(unused=2).double().train(training)
    x, y = torch.randn(6, 1, 9, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = dl.hessian(net, F.cross_entropy, (x, y))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    shown = Cnn().double().train(training)
    shown.load_state_dict({k: v for k, v in before.items() if k != "unused"})
    expected = brute_force(shown, F.cross_entropy, (x, y))
    assert torch.equal(found, found.T)
    names = [name for name, p in net.named_parameters() for _ in range(p.numel())]
    used = [i for i, name in enumerate(names) if name != "unused"]
    assert (found[used][:, used] - expected).abs().max() < 1e-10 * expected.abs().max().clamp(min=1)
    assert not found[[i for i, name in enumerate(names) if name == "unused"]].any()


def test_chunks_and_single_precision_models_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mlp(4, 5, 3).float(), classes(20, 4, 3)
    whole = dl.hessian(model, F.cross_entropy, (data[0].float(), data[1]))
    assert whole.dtype == torch.float64 and next(model.parameters()).dtype == torch.float32
    monkeypatch.setattr("descentlab.observe.curvature.CHUNK_BYTES", 8 * len(whole) * 7)
    torch.testing.assert_close(
        dl.hessian(model, F.cross_entropy, (data[0].float(), data[1])), whole, rtol=0, atol=1e-15
    )


def test_quadratic_has_its_known_hessian() -> None:
    """1/2 |Theta A^T|^2 / n summed over rows: A^T A for every row; a linear loss has none."""
    torch.manual_seed(0)
    a = torch.randn(5, 3, dtype=torch.float64)
    model = nn.Linear(3, 2, bias=False).double()
    found = dl.hessian(model, lambda out, y: 0.5 * out.square().sum(), (a, torch.zeros(5)))
    expected = torch.from_numpy(np.kron(np.eye(2), a.numpy().T @ a.numpy()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not dl.hessian(model, lambda out, y: out.sum(), (a, torch.zeros(5))).any()


@pytest.mark.parametrize("k", [1, 4])
def test_lanczos_equals_eigvalsh(k: int) -> None:
    model, data = mlp(6, 7, 4), classes(40, 6, 4)
    dense = torch.linalg.eigvalsh(dl.hessian(model, F.cross_entropy, data)).flip(0)[:k]
    top = dl.top_k(model, F.cross_entropy, data, k)
    torch.testing.assert_close(top.values, dense, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(top.vectors.T @ top.vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    assert top.residuals.max() < 1e-8
    torch.testing.assert_close(dl.top_k(model, F.cross_entropy, data, k, method="dense").values, dense)


@pytest.mark.parametrize("k", [1, 3])
def test_lanczos_restarts_in_little_memory(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than 3 k + 10 vectors of 157 weights: needs restarts, loses nothing. Breaks when the Ritz vectors that
    are kept are not coupled to the next one."""
    monkeypatch.setattr("descentlab.observe.curvature.BASIS_BYTES", 1)
    restarts: list[int] = []
    restart = lanczos._restart
    monkeypatch.setattr(lanczos, "_restart", lambda *a: restarts.append(1) or restart(*a))
    model, data = mlp(12, 9, 4), classes(40, 12, 4)
    dense = torch.linalg.eigvalsh(dl.hessian(model, F.cross_entropy, data)).flip(0)[:k]
    top = dl.top_k(model, F.cross_entropy, data, k)
    assert restarts
    torch.testing.assert_close(top.values, dense, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(top.vectors.T @ top.vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    assert top.residuals.max() < 1e-8


def test_lanczos_goes_on_beside_an_invariant_space() -> None:
    """Three distinct eigenvalues with multiplicity: all n are found when all n are asked for."""
    model = nn.Linear(3, 2, bias=False).double()
    scale = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    top = dl.top_k(model, lambda out, y: 0.5 * out.square().sum(), (scale, torch.zeros(3)), 6)
    assert top.values.tolist() == pytest.approx([9, 9, 4, 4, 1, 1])


def test_what_cannot_be_done_is_said() -> None:
    model, data = mlp(6, 7, 4), classes(10, 6, 4)
    n = sum(p.numel() for p in model.parameters())
    with pytest.raises(UserError, match=rf"{8 * n * n:,} bytes. top_k"):
        dl.hessian(model, F.cross_entropy, data, max_bytes=1000)
    with pytest.raises(UserError, match="k = 99: expected 1 to 81"):
        dl.top_k(model, F.cross_entropy, data, 99)
    with pytest.raises(UserError, match="iterations = 3"):
        dl.top_k(model, F.cross_entropy, data, 2, iterations=3)
    with pytest.raises(UserError, match="lanczos or dense"):
        dl.top_k(model, F.cross_entropy, data, 2, method="magic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one number"):
        dl.hessian(model, lambda out, y: out.sum(1), data)
    with pytest.raises(UserError, match="require a gradient"):
        dl.hessian(nn.Flatten(), F.cross_entropy, data)
    assert math.isfinite(float(dl.top_k(model, F.cross_entropy, data).values[0]))
