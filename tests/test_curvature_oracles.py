"""Curvature against two published libraries of the ``dev`` and ``curvature`` extras; skipped where they are absent."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from test_curvature import classes
from torch import Tensor, nn

import descentlab as dl
from descentlab.workloads.models.mlp import MLP

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")  # theirs
TESTED = {"curvlinops": "3.0.1", "hessian_eigenthings": "1.0.0a5"}
DISTRIBUTIONS = {"curvlinops": "curvlinops-for-pytorch", "hessian_eigenthings": "hessian-eigenthings"}


def library(name: str) -> ModuleType:
    """The imported library, or a skip that says how to get it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version(DISTRIBUTIONS[name])
    except PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTIONS[name]}=={TESTED[name]} is not installed: pip install -e '.[curvature]'")
    if found != TESTED[name]:
        pytest.skip(f"{DISTRIBUTIONS[name]} {found} is installed; tested with {TESTED[name]}, other versions differ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        return importlib.import_module(name)


class Written(nn.Module):
    """SiLU as a product: curvlinops 3.0.1 refuses ``nn.SiLU``, whose backward pass has no forward-mode derivative."""

    def forward(self, z: Tensor) -> Tensor:
        return z * z.sigmoid()


def twins() -> tuple[MLP, nn.Sequential]:
    """A SiLU network of ours and the same weights with the activation written out."""
    torch.manual_seed(0)
    ours = MLP((6, 5, 4)).double()
    theirs = nn.Sequential(nn.Linear(6, 5), Written(), nn.Linear(5, 4)).double()
    theirs.load_state_dict(
        {f"{k - 1}.{p}": ours.layers[k].get_parameter(p) for k in (1, 3) for p in ("weight", "bias")}
    )
    return ours, theirs


def attention() -> tuple[nn.Module, Any, tuple[Tensor, Tensor]]:
    """One head of attention with explicit softmax, a gelu and a norm, on sequences.

    The norm is written out: with ``nn.LayerNorm`` curvlinops' forward-over-reverse products disagree with finite
    differences of the gradient by a factor (torch 2.13.0), and its matrix is not symmetric.
    """

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            z = F.gelu((q @ k.mT / 2).softmax(-1) @ v)
            z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True) + 1e-5).sqrt()
            return self.out(z).mean(1)

    torch.manual_seed(1)
    return Head().double(), F.cross_entropy, (torch.randn(10, 5, 4, dtype=torch.float64), torch.arange(10) % 3)


def test_curvlinops_refuses_silu_still() -> None:
    """The reason for :class:`Written`: when this fails, the tests can use the real activation."""
    lib = library("curvlinops")
    ours, _ = twins()
    operator = lib.HessianLinearOperator(
        ours, nn.CrossEntropyLoss(), list(ours.parameters()), [classes(12, 6, 4)], check_deterministic=False
    )
    with pytest.raises(NotImplementedError, match="silu_backward"):
        operator @ torch.ones(operator.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_curvlinops_dense(matrix: Any) -> None:
    """The whole matrix, over two batches of unequal size, for a network that takes the written-out route."""
    lib = library("curvlinops")
    ours, theirs = twins()
    x, y = classes(30, 6, 4)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    made = lib.HessianLinearOperator if matrix == "hessian" else lib.GGNLinearOperator
    operator = made(theirs, nn.CrossEntropyLoss(), list(theirs.parameters()), batches, check_deterministic=False)
    expected = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    found = dl.hessian(ours, F.cross_entropy, batches, matrix=matrix)
    assert float((found - expected).abs().max()) < 1e-10


def test_curvlinops_attention_and_top_k() -> None:
    """A model of the general route, and SciPy's eigsh on their operator."""
    lib = library("curvlinops")
    model, loss, data = attention()
    params = list(model.parameters())
    operator = lib.HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [data], check_deterministic=False)
    expected = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    assert float((dl.hessian(model, loss, data) - expected).abs().max()) < 1e-10
    top = eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)[::-1].copy()
    found = dl.top_k(model, loss, data, 3).values
    torch.testing.assert_close(found, torch.from_numpy(top), rtol=1e-8, atol=1e-10)


def test_curvlinops_traces() -> None:
    """Their XTrace and ours, on the same operator, are within four standard errors of each other."""
    lib = library("curvlinops")
    model, loss, data = attention()
    params = list(model.parameters())
    operator = lib.HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [data], check_deterministic=False)
    torch.manual_seed(0)
    theirs = torch.stack([lib.xtrace(operator, 40) for _ in range(10)])
    ours = dl.trace(model, loss, data, products=40)
    spread = float((theirs.var() / 10 + ours.standard_error**2).sqrt())
    assert abs(float(theirs.mean()) - ours.value) < 4 * spread


def test_eigenthings_dense_and_top_k() -> None:
    """SiLU and attention as they are; eigenvalues by their Lanczos with reorthogonalisation."""
    lib = library("hessian_eigenthings")
    from hessian_eigenthings.loss_fns.standard import supervised_loss

    ours, _ = twins()
    for model, data in ((ours, classes(30, 6, 4)), attention()[::2]):
        operator = lib.HessianOperator(model, [data], supervised_loss(F.cross_entropy))
        expected = torch.stack([operator.matvec(e) for e in torch.eye(operator.size, dtype=torch.float64)])
        assert float((dl.hessian(model, F.cross_entropy, data) - expected).abs().max()) < 1e-10
        theirs = lib.lanczos(operator, k=3, max_iter=operator.size, reorthogonalize=True, which="LA", seed=0)
        found = dl.top_k(model, F.cross_entropy, data, 3)
        torch.testing.assert_close(found.values, theirs.eigenvalues, rtol=1e-7, atol=1e-9)
        assert float((theirs.eigenvectors @ found.vectors).det().abs()) == pytest.approx(1, abs=1e-6)


def test_eigenthings_gauss_newton_and_density() -> None:
    """Moments of both spectral densities agree within their errors."""
    lib = library("hessian_eigenthings")
    from hessian_eigenthings.loss_fns.standard import supervised_forward, supervised_loss_of_output

    model, loss, data = attention()
    operator = lib.GGNOperator(model, [data], supervised_forward, supervised_loss_of_output(F.cross_entropy))
    expected = torch.stack([operator.matvec(e) for e in torch.eye(operator.size, dtype=torch.float64)])
    found = dl.hessian(model, loss, data, matrix="ggn")
    assert float((found - expected.detach()).abs().max()) < 1e-10
    theirs = lib.trace(operator, num_matvecs=60, method="hutchinson", seed=0)
    ours = dl.spectral_density(model, loss, data, probes=20, steps=20, matrix="ggn")
    value, error = ours.moment(1)
    assert abs(value - float(theirs.estimate)) < 4 * (error**2 + float(theirs.stderr) ** 2) ** 0.5
