"""Curvature every k steps of a loop of one's own; directions that inputs leave exactly flat; ten million parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_curvature import brute_force, classes, mlp
from torch import Tensor, nn

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.observe import along, operators
from descentlab.workloads.models.mlp import MLP
from descentlab.workloads.models.nanogpt import NanoGPT
from descentlab.workloads.specs import Mlp, Mnist5k


def trained(log: along.CurvatureLog, steps: int = 7) -> tuple[list[int], list[Tensor]]:
    """(steps that were measured, brute-force Hessians at them) of gradient descent on changing batches."""
    model, (x, y), seen, expected = mlp(3, 4, 3), classes(60, 3, 3), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        batch = x[8 * step : 8 * step + 8], y[8 * step : 8 * step + 8]
        if log(model, step, batch):
            seen.append(step)
            expected.append(brute_force(model, F.cross_entropy, batch))
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return seen, expected


def test_every_third_step(tmp_path: Path) -> None:
    log = dl.CurvatureLog(F.cross_entropy, every=3, what="dense")
    seen, expected = trained(log)
    log.save(tmp_path / "curvature.npz")
    with np.load(tmp_path / "curvature.npz") as held:
        assert held["step"].tolist() == seen == [0, 3, 6]
        np.testing.assert_allclose(held["hessian"], torch.stack(expected).numpy(), atol=1e-12)
        np.testing.assert_allclose(held["eigenvalues"], np.linalg.eigvalsh(held["hessian"]), atol=1e-14)
        assert held["weights"].shape == (3, 31) and not (held["weights"][0] == held["weights"][1]).all()


@pytest.mark.parametrize(
    ("what", "options"), [("top_k", {"k": 2}), ("trace", {}), ("density", {"probes": 9, "steps": 31})]
)
def test_without_a_matrix(what: Any, options: dict[str, int]) -> None:
    log = dl.CurvatureLog(F.cross_entropy, every=3, what=what, **options)
    _, expected = trained(log)
    held, exact = log.arrays(), np.linalg.eigvalsh(torch.stack(expected).numpy())
    if what == "top_k":
        np.testing.assert_allclose(held["eigenvalues"], exact[:, :-3:-1], rtol=1e-8)
    elif what == "trace":
        np.testing.assert_allclose(held["trace"], exact.sum(1), rtol=1e-9)
    else:  # as many steps as rows: every node with weight is an eigenvalue
        at = held["node_weights"] > 1e-9
        nearest = np.abs(held["nodes"][..., None] - exact[:, None, None]).min(-1)
        assert nearest[at].max() < 1e-7


def test_mistakes() -> None:
    with pytest.raises(UserError, match="what = 'all': expected one of dense"):
        dl.CurvatureLog(F.cross_entropy, what="all")
    with pytest.raises(UserError, match="every = 0"):
        dl.CurvatureLog(F.cross_entropy, every=0)
    with pytest.raises(UserError, match="a batch"):
        dl.CurvatureLog(F.cross_entropy)(mlp(3, 3), 0)
    log = dl.CurvatureLog(F.cross_entropy, classes(5, 3, 3), what="dense", max_bytes=99)
    with pytest.raises(UserError, match=r"takes 1,152 bytes. top_k and spectral_density need no matrix"):
        log(mlp(3, 3), 0)


def test_inputs_that_never_vary_leave_directions_flat() -> None:
    """One input is always 0, one always 0.7, one the sum of two others: with a bias three directions for each of four
    outputs; the Hessian and the gradient vanish there, and nowhere else."""
    x, y = classes(50, 7, 3)
    x[:, 2], x[:, 4], x[:, 6] = 0.0, 0.7, x[:, 0] + x[:, 1]
    model = mlp(7, 4, 3)
    found = along.flat_directions(model, x)
    assert (found.number, found.constant) == (12, 2)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(12, dtype=torch.float64))
    matrix = brute_force(model, F.cross_entropy, (x, y))
    assert float((matrix @ found.basis).abs().max()) < 1e-14
    assert int((torch.linalg.eigvalsh(matrix).abs() < 1e-13).sum()) == 12 + 5  # and those of the softmax, below
    shift = torch.zeros(len(matrix), dtype=torch.float64)
    shift[-3:] = 1.0  # the same to every logit
    assert float((matrix @ shift).abs().max()) < 1e-14
    bare = nn.Sequential(nn.Linear(7, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))
    assert along.flat_directions(bare, x).number == 8  # without a bias a constant input is like any other
    with pytest.raises(UserError, match=r"begins with nn\.Linear"):
        along.flat_directions(nn.Sequential(nn.Tanh(), nn.Linear(7, 3)), x)


def test_flat_directions_of_the_published_network() -> None:
    """MLP-386 on pooled MNIST: the corner of an image is always black, eight hidden units do not see it."""
    factory = Mlp(pool=6, hidden=[8]).build()
    data = Mnist5k().build()
    assert factory.stem is not None
    x, y = factory.stem(data.x_train), data.y_train
    torch.manual_seed(0)
    model = MLP((36, 8, 10)).double()
    found = along.flat_directions(model, x)
    black = int((x == x[0]).all(0).sum())
    assert found.constant == black and found.number == 8 * black
    matrix = dl.hessian(model, F.cross_entropy, (x.double(), y))
    values = torch.linalg.eigvalsh(matrix)
    if found.number:
        assert float((matrix @ found.basis).abs().max()) < 1e-14
    scale = float(values.abs().max())
    assert int((values.abs() < 1e-14 * scale).sum()) >= found.number


def test_a_product_with_ten_million_parameters() -> None:
    """The nanoGPT of 10.8 million parameters (attention, layer norms) against central differences of its gradient."""
    torch.manual_seed(0)
    model = NanoGPT(65, 16, 384, 6, 6, 4 * 384, 0.0).double()
    n = sum(p.numel() for p in model.parameters())
    assert n > 1e7
    ids = torch.randint(65, (1, 17))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    v = torch.randn(n, dtype=torch.float64) / n**0.5
    found = operators.operator(model, loss, (ids[:, :-1], ids[:, 1:])).product(v)
    params, sides = list(model.parameters()), []
    for sign in (1, -1):
        with torch.no_grad():
            for p, part in zip(params, v.split([p.numel() for p in params]), strict=True):
                p += (sign if sign > 0 else 2 * sign) * 1e-4 * part.view_as(p)
        value = loss(model(ids[:, :-1]), ids[:, 1:])
        sides.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, params)]))
    expected = (sides[0] - sides[1]) / 2e-4
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    with pytest.raises(UserError, match=r"bytes. top_k and spectral_density need no matrix"):
        dl.hessian(model, loss, (ids[:, :-1], ids[:, 1:]))
