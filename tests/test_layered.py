"""The written-out Hessian of plain networks against double-backward rows; what it must refuse; ensembles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_curvature import brute_force, classes
from torch import Tensor, nn

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.observe import curvature, layered
from descentlab.workloads.models.mlp import MLP


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


@pytest.fixture
def written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The general route is closed, so that a result can only come from the written-out one."""

    def closed(*_: object) -> Tensor:
        raise AssertionError("the general route was taken")

    monkeypatch.setattr(curvature, "_rows", closed)


def deep(end: nn.Module | None = None) -> nn.Sequential:
    """Four linear maps of odd widths, one without bias, one without activation after it, nested."""
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Linear(7, 4, bias=False), nn.GELU(), nn.Linear(4, 6))
    layers = [nn.Flatten(), nn.Linear(5, 7), nn.SiLU(), inner, nn.Dropout(0.5).eval(), nn.Linear(6, 3)]
    return nn.Sequential(*layers, *([] if end is None else [end])).double()


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "cross entropy": F.cross_entropy,
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
    "ignored": lambda out, y: F.cross_entropy(out, torch.where(y == 1, -100, y)),
    "square": lambda out, y: (out - F.one_hot(y, 3)).square().sum() / len(y),
    "linear": lambda out, y: out.sum(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("end", [None, nn.Tanh()])
def test_every_block_equals_brute_force(name: str, end: nn.Module | None, written_out: None) -> None:
    """Breaks without the term of da/dz (blocks of two layers), without s'' (a layer's own block), or with E_lm of the
    wrong layer: each is seen only with at least three layers, hence four here."""
    model, data = deep(end), classes(30, 5, 3)
    expected = brute_force(model, LOSSES[name], data) if name != "linear" or end else None
    found = dl.hessian(model, LOSSES[name], data)
    assert torch.equal(found, found.T)
    if expected is None:  # brute force cannot differentiate what has no second derivative in the last layer's bias
        expected = curvature.operator(model, LOSSES[name], data).rows(torch.eye(len(found), dtype=torch.float64))
    assert float((found - expected).abs().max()) < 1e-10 * max(1.0, float(expected.abs().max()))


def test_the_386_parameters_of_the_published_network(written_out: None) -> None:
    torch.manual_seed(0)
    model = MLP((36, 8, 10)).double()
    data = torch.rand(64, 1, 6, 6, dtype=torch.float64), torch.randint(10, (64,))
    found = dl.hessian(model, F.cross_entropy, data)
    assert len(found) == 386
    assert float((found - brute_force(model, F.cross_entropy, data)).abs().max()) < 1e-10


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("activation", layered.ELEMENTWISE)
def test_activations_and_both_matrices(activation: type[nn.Module], matrix: Any) -> None:
    """Against the general route, product by product."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double()
    data = classes(20, 4, 3)
    rows = curvature.operator(model, F.cross_entropy, data, matrix).rows(torch.eye(43, dtype=torch.float64))
    assert layered.recognise(model)
    torch.testing.assert_close(dl.hessian(model, F.cross_entropy, data, matrix=matrix), rows, rtol=1e-10, atol=1e-13)


def test_chunks_of_samples_and_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, written_out: None) -> None:
    model, data = deep(), classes(200, 5, 3)
    whole = dl.hessian(model, F.cross_entropy, data)
    monkeypatch.setattr(layered, "CHUNK_BYTES", 8 * 64 * 20)
    assert layered._chunk(layered.recognise(model), curvature.stacked(model, None), 1) == 64  # type: ignore[arg-type]
    torch.testing.assert_close(dl.hessian(model, F.cross_entropy, data), whole, rtol=0, atol=1e-15)
    parts = [(data[0][:70], data[1][:70]), (data[0][70:], data[1][70:])]
    torch.testing.assert_close(dl.hessian(model, F.cross_entropy, parts), whole, rtol=0, atol=1e-15)


def test_blocks_of_layers_and_frozen_parameters(written_out: None) -> None:
    model, data = deep(), classes(30, 5, 3)
    whole = brute_force(model, F.cross_entropy, data)
    at = dict(zip([name for name, _ in model.named_parameters()], torch.split(
        torch.arange(len(whole)), [p.numel() for p in model.parameters()]), strict=True))  # fmt: skip
    for wanted in (["1"], ["3.2.bias"], ["1.weight", "5"]):
        rows = torch.cat([i for name, i in at.items() if any(name == w or name.startswith(f"{w}.") for w in wanted)])
        found = dl.hessian(model, F.cross_entropy, data, parameters=wanted)
        torch.testing.assert_close(found, whole[rows][:, rows], rtol=0, atol=1e-12)
    model[1].bias.requires_grad_(False)
    rows = torch.cat([i for name, i in at.items() if name != "1.bias"])
    torch.testing.assert_close(dl.hessian(model, F.cross_entropy, data), whole[rows][:, rows], rtol=0, atol=1e-12)


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_what_is_no_plain_network_takes_the_general_route() -> None:
    """Each would get a wrong Hessian if it were taken for a plain network."""
    torch.manual_seed(0)
    tied = nn.Linear(4, 4)
    hooked = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    hooked[0].register_forward_hook(lambda module, args, out: out**2)
    doubled: type[MLP] = type("Doubled", (MLP,), {"forward": lambda self, x: self.layers(x) ** 2})
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    squeezed = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh())
    dropped = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    data = classes(12, 4, 4)
    for model in (nn.Sequential(tied, nn.Tanh(), tied), hooked, doubled((4, 3, 4)), Twice(tied), normed, squeezed):
        model = model.double()
        assert layered.recognise(model) is None
        torch.testing.assert_close(
            dl.hessian(model, F.cross_entropy, data), brute_force(model, F.cross_entropy, data), rtol=0, atol=1e-12
        )
    assert layered.recognise(dropped) is None and layered.recognise(dropped.eval())
    assert layered.recognise(MLP((4, 3, 2))) and not layered.recognise(MLP((4, 3, 2), batch_norm=True))


class Wrong(torch.autograd.Function):
    """x^2 whose backward pass takes x for a constant of the other factor's first element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0].roll(1, -1)


def test_wrong_second_derivatives_of_an_operation_are_noticed() -> None:
    """torch's weight_norm has them on a CPU; here an operation of our own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Wrong.apply(self.map(x))  # type: ignore[no-untyped-call]

    with pytest.raises(UserError, match="second derivatives are right: rows and columns differ by"):
        curvature._rows(curvature.operator(Net(), F.cross_entropy, classes(12, 4, 4)))


def test_a_loss_that_mixes_samples_takes_the_general_route() -> None:
    model, data = deep(), classes(12, 5, 3)

    def contrast(out: Tensor, y: Tensor) -> Tensor:
        return (out @ out.T).softmax(1).square().mean()

    found = dl.hessian(model, contrast, data)
    torch.testing.assert_close(found, brute_force(model, contrast, data), rtol=0, atol=1e-12)


@pytest.mark.parametrize("plain", [True, False])
def test_an_ensemble_equals_its_members_and_a_nan_member_touches_no_other(plain: bool) -> None:
    torch.manual_seed(5)
    model = deep() if plain else nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    assert (layered.recognise(model) is not None) is plain
    data, n = classes(20, 5, 3), sum(p.numel() for p in model.parameters())
    weights = flat(model) + 0.3 * torch.randn(4, n, dtype=torch.float64)
    weights[1] = torch.nan
    found = dl.hessian(model, F.cross_entropy, data, weights=weights)
    assert found.shape == (4, n, n)
    assert torch.isnan(found[1]).any()
    for m in (0, 2, 3):
        torch.nn.utils.vector_to_parameters(weights[m], model.parameters())
        torch.testing.assert_close(found[m], brute_force(model, F.cross_entropy, data), rtol=0, atol=1e-12)
        alone = dl.hessian(model, F.cross_entropy, data, weights=weights[m])
        assert torch.equal(alone, dl.hessian(model, F.cross_entropy, data))
    weights[1] = weights[0]
    healthy = dl.hessian(model, F.cross_entropy, data, weights=weights)
    assert torch.equal(found[[0, 2, 3]], healthy[[0, 2, 3]])


def test_mistakes() -> None:
    model, data = deep(), classes(20, 5, 3)
    n = len(flat(model))
    with pytest.raises(UserError, match=rf"weights = \(3,\): expected \({n},\) or \(members, {n}\)"):
        dl.hessian(model, F.cross_entropy, data, weights=torch.zeros(3))
    with pytest.raises(UserError, match=rf"50 members of {n} parameters each takes {400 * n * n:,} bytes. top_k"):
        dl.hessian(model, F.cross_entropy, data, weights=torch.zeros(50, n), max_bytes=8 * n * n)
