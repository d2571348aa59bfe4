"""Spectra, traces, Gauss-Newton matrices and gradient noise against dense matrices and loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_curvature import brute_force, classes, mlp
from torch import Tensor, nn

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.observe.noise import alignment
from descentlab.workloads.models.nanogpt import NanoGPT


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return mlp(6, 7, 4), classes(40, 6, 4)


def test_gauss_newton_equals_the_jacobian_form(net: Any) -> None:
    """sum_i J_i^T (diag p - p p^T) J_i / N with Jacobians by rows; it is no Hessian, and is positive semi-definite."""
    model, (x, y) = net
    params = list(model.parameters())
    expected = torch.zeros(81, 81, dtype=torch.float64)
    for sample in x:
        out = model(sample.unsqueeze(0))[0]
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(o, params, retain_graph=True)]) for o in out]
        p = out.detach().softmax(0)
        expected += torch.stack(rows).T @ (torch.diag(p) - torch.outer(p, p)) @ torch.stack(rows) / len(x)
    found = dl.hessian(model, F.cross_entropy, (x, y), matrix="ggn")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12
    assert not torch.allclose(found, dl.hessian(model, F.cross_entropy, (x, y)), atol=1e-3)


def test_a_block_is_a_part_of_the_whole(net: Any) -> None:
    model, data = net
    whole = dl.hessian(model, F.cross_entropy, data)
    first = 6 * 7 + 7
    torch.testing.assert_close(dl.hessian(model, F.cross_entropy, data, parameters=["2"]), whole[first:, first:])
    torch.testing.assert_close(dl.hessian(model, F.cross_entropy, data, parameters=["0.weight"]), whole[:42, :42])
    with pytest.raises(UserError, match=r"parameters = '0.wieght'.*0\.weight"):
        dl.hessian(model, F.cross_entropy, data, parameters=["0.wieght"])


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_batches_of_different_sizes_are_the_whole(net: Any, matrix: Any) -> None:
    """Breaks when batches count equally instead of by their samples."""
    model, (x, y) = net
    batches = [(x[:25], y[:25]), (x[25:37], y[25:37]), (x[37:], y[37:])]
    found = dl.hessian(model, F.cross_entropy, batches, matrix=matrix)
    torch.testing.assert_close(found, dl.hessian(model, F.cross_entropy, (x, y), matrix=matrix), rtol=1e-10, atol=1e-13)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) * F.silu(self.b(right))


def test_named_inputs_and_a_loss_of_ones_own() -> None:
    torch.manual_seed(0)
    model = TwoInputs().double()
    x = {"left": torch.randn(9, 3), "right": torch.randn(9, 4)}
    found = dl.hessian(model, lambda out, y: out.tanh().square().mean(), (x, None))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = model.a, model.b

        def forward(self, both: Tensor) -> Tensor:
            return self.a(both[:, :3]) * F.silu(self.b(both[:, 3:]))

    both = torch.cat([x["left"], x["right"]], dim=1).double()
    expected = brute_force(Plain(), lambda out, y: out.tanh().square().mean(), (both, both))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_attention() -> None:
    """The 960-parameter transformer: dense, by rows, and the top of its spectrum."""
    torch.manual_seed(0)
    model = NanoGPT(25, 16, 8, 1, 1, 8, 0.0).double()
    ids = torch.randint(25, (2, 17))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    data = ids[:, :-1], ids[:, 1:]
    found = dl.hessian(model, loss, data)
    assert len(found) == 960
    torch.testing.assert_close(found, brute_force(model, loss, data), rtol=1e-9, atol=1e-12)
    top = dl.top_k(model, loss, data, 2)
    torch.testing.assert_close(top.values, torch.linalg.eigvalsh(found)[-2:].flip(0), rtol=1e-8, atol=1e-10)


METHODS = ("hutchinson", "hutch++", "xtrace")


def estimates(net: Any, method: Any, matrix: Any) -> tuple[Tensor, float]:
    """(errors of 100 seeds, the root mean square of the stated standard errors)."""
    model, data = net
    exact = float(dl.hessian(model, F.cross_entropy, data, matrix=matrix).trace())
    found = [
        dl.trace(model, F.cross_entropy, data, method=method, products=30, matrix=matrix, seed=s) for s in range(100)
    ]
    assert all(t.products <= 30 for t in found)
    stated = torch.tensor([t.standard_error for t in found]).square().mean().sqrt()
    return torch.tensor([t.value - exact for t in found]), float(stated)


@pytest.mark.parametrize("method", METHODS)
def test_traces_and_their_errors(net: Any, method: str) -> None:
    """No bias, and the stated standard error is the true one within a factor of 1.6 (xtrace's is known to be rough).
    Breaks with a leave-one-out that leaves nothing out."""
    errors, stated = estimates(net, method, "hessian")
    spread = float(errors.std())
    assert abs(float(errors.mean())) < 4 * spread / 10
    assert 1 / 1.6 < spread / stated < 1.6


def test_subspaces_pay_where_the_spectrum_decays(net: Any) -> None:
    """A Gauss-Newton matrix of eight samples (rank at most 24): each method beats the one before."""
    model, (x, y) = net
    plain, plus, exchanged = (float(estimates((model, (x[:8], y[:8])), m, "ggn")[0].std()) for m in METHODS)
    assert exchanged < plus < 0.5 * plain


def test_a_small_matrix_is_summed_exactly(net: Any) -> None:
    model, data = net
    exact = float(dl.hessian(model, F.cross_entropy, data).trace())
    found = dl.trace(model, F.cross_entropy, data, products=200)
    assert found.value == pytest.approx(exact, rel=1e-12) and found.standard_error == 0 and found.products == 81


def test_spectral_density(net: Any) -> None:
    """Moments within their errors; with as many steps as rows the nodes are the eigenvalues; the curve is the sum of
    Gaussians at the eigenvalues, within its noise."""
    model, data = net
    dense = dl.hessian(model, F.cross_entropy, data)
    values = torch.linalg.eigvalsh(dense)
    found = dl.spectral_density(model, F.cross_entropy, data, probes=30, steps=40)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(30, dtype=torch.float64))
    for power in (1, 2, 3):
        value, error = found.moment(power)
        assert abs(value - float((values**power).sum())) < 4 * error
    assert found.moment(0) == pytest.approx((81.0, 0.0), abs=1e-9)
    at = torch.linspace(float(values[0]) - 0.2, float(values[-1]) + 0.2, 60, dtype=torch.float64)
    z = (at[:, None] - values) / 0.1
    exact = (torch.exp(-0.5 * z**2) / (0.1 * math.sqrt(2 * math.pi))).mean(1)
    assert float((found.density(at, 0.1) - exact).abs().mean() / exact.mean()) < 0.15
    whole = dl.spectral_density(model, F.cross_entropy, data, probes=1, steps=81)
    held = whole.nodes[0][whole.weights[0] > 1e-12]
    assert float((held[:, None] - values).abs().min(1).values.max()) < 1e-8


def test_a_probe_that_is_exhausted_early() -> None:
    """Three distinct eigenvalues: three nodes hold all the weight."""
    model = nn.Linear(3, 2, bias=False).double()
    scale = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    found = dl.spectral_density(model, lambda out, y: 0.5 * out.square().sum(), (scale, torch.zeros(3)), steps=6)
    assert ((found.weights > 1e-12).sum(1) == 3).all()
    assert found.nodes[0, :3].tolist() == pytest.approx([1, 4, 9])


def test_gradient_covariance_equals_a_loop(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = net
    each = []
    for a, b in zip(x, y, strict=True):
        loss = F.cross_entropy(model(a.unsqueeze(0)), b.unsqueeze(0))
        each.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(each)
    monkeypatch.setattr("descentlab.observe.noise.CHUNK_BYTES", 8 * 81 * 7)  # chunks of 7 samples
    found = dl.gradient_covariance(model, F.cross_entropy, (x, y))
    torch.testing.assert_close(found.mean, g.mean(0), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.covariance, torch.cov(g.T, correction=0), rtol=1e-9, atol=1e-14)
    assert found.samples == 40


def test_alignment() -> None:
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    same = alignment(a, 3 * a)
    assert same == pytest.approx((1.0, 3.0, 0.0), abs=1e-12)
    other = alignment(torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))
    assert other == pytest.approx((1 / math.sqrt(2), 0.5, 1 / math.sqrt(2)))


def test_what_cannot_be_done_is_said(net: Any) -> None:
    model, data = net
    with pytest.raises(UserError, match="method = 'magic': expected one of xtrace"):
        dl.trace(model, F.cross_entropy, data, method="magic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="products = 3: expected at least 4"):
        dl.trace(model, F.cross_entropy, data, products=3)
    with pytest.raises(UserError, match="probes = 0"):
        dl.spectral_density(model, F.cross_entropy, data, probes=0)
    with pytest.raises(UserError, match="matrix = 'fisher'"):
        dl.hessian(model, F.cross_entropy, data, matrix="fisher")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one batch"):
        dl.hessian(model, F.cross_entropy, [])
    mixing = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    with pytest.raises(UserError, match=r"model\.eval"):
        dl.gradient_covariance(mixing, F.cross_entropy, data)
    assert dl.gradient_covariance(mixing.eval(), F.cross_entropy, data).covariance.shape == (36, 36)
    with pytest.raises(UserError, match="the covariance of 81 parameters takes"):
        dl.gradient_covariance(model, F.cross_entropy, data, max_bytes=100)
