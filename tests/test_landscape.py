"""The loss landscape: a plane whose loss is known, directions by their definitions, the command line, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_curvature import classes, mlp
from torch import Tensor, nn
from typer.testing import CliRunner

import descentlab as dl
from descentlab.cli.main import app
from descentlab.core.errors import UserError
from descentlab.observe import landscape as module
from descentlab.report.landscape import document, levels

SPEC = [
    "model=mlp",
    "model.pool=0",
    "model.hidden=[4]",
    "dataset=digits",
    "optimizer=sgd",
    "optimizer.lr=0.5",
    "steps=7",
]
SPEC += ["batch_size=16", "processes=1"]


class Bowl(nn.Module):
    """Four weights; the loss below is a quadratic in them."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.expand(len(x), 4)


CURVATURE = torch.tensor([4.0, 1.0, 0.25, 2.0], dtype=torch.float64)


def bowl_loss(out: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (CURVATURE * out.square()).sum(1).mean()


BOWL = (torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize("kind", ["random", "hessian", "filter"])
def test_every_grid_point_has_the_loss_of_its_weights(kind: Any) -> None:
    """Rows are y and columns are x; breaks when they are exchanged or chunks are put together in another order."""
    model = Bowl()
    if kind == "filter":
        model, loss, data = mlp(6, 7, 4), F.cross_entropy, classes(30, 6, 4)
    else:
        loss, data = bowl_loss, BOWL
    found = dl.landscape(model, loss, data, directions=kind, resolution=5, span=0.7)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for i, j in ((0, 0), (1, 3), (4, 2)):
        weights = (
            start
            + found.x[j] * torch.from_numpy(found.directions[0])
            + found.y[i] * torch.from_numpy(found.directions[1])
        )
        torch.nn.utils.vector_to_parameters(weights, model.parameters())
        assert found.loss[i, j] == pytest.approx(float(loss(model(data[0]), data[1]).detach()), rel=1e-12)
    assert found.x[0] == -0.7 and found.x[-1] == 0.7 and np.isnan(found.shares).all()
    assert found.loss[2, 2] == pytest.approx(found.center_loss)


def test_hessian_directions_are_the_two_of_largest_curvature() -> None:
    found = dl.landscape(Bowl(), bowl_loss, BOWL, directions="hessian", resolution=3)
    np.testing.assert_allclose(np.abs(found.directions), [[1, 0, 0, 0], [0, 0, 0, 1]], atol=1e-6)
    assert found.labels == ("Hessian eigenvector 1 (eigenvalue 4)", "Hessian eigenvector 2 (eigenvalue 2)")


def test_filter_normalisation_by_hand() -> None:
    """Each row of a weight has the norm of the model's row, biases do not move (Li et al. 2018)."""
    model = mlp(6, 7, 4)
    found = dl.landscape(model, F.cross_entropy, classes(30, 6, 4), directions="filter", resolution=3)
    first = 0
    for p in model.parameters():
        for d in found.directions:
            part = d[first : first + p.numel()]
            if p.dim() == 1:
                assert not part.any()
            else:
                np.testing.assert_allclose(np.linalg.norm(part.reshape(p.shape), axis=1), p.detach().norm(dim=1))
        first += p.numel()


def test_principal_components_explain_what_they_should() -> None:
    """Paths in a plane tilted in the space, plus a known amount out of it: shares and projections by hand."""
    rng, t = np.random.default_rng(0), np.linspace(0, 1, 40)
    a, b, c = np.linalg.qr(rng.normal(size=(4, 3)))[0].T
    path = np.outer(5 * (t - 0.5), a) + np.outer(np.cos(9 * t), b) + np.outer(0.1 * np.sin(50 * t), c)
    found = dl.landscape(Bowl(), bowl_loss, BOWL, paths={"one": path}, resolution=4)
    spread = np.linalg.svd(path - path.mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(found.shares, spread[:2] / spread.sum(), rtol=1e-9)
    (drawn,) = found.paths
    np.testing.assert_allclose(drawn.xy, (path - path[-1]) @ found.directions.T, atol=1e-12)
    np.testing.assert_allclose(drawn.loss, 0.5 * (path**2 @ CURVATURE.numpy()), rtol=1e-12)
    assert 0.9 < drawn.inside < 1
    low, high = drawn.xy.min(0), drawn.xy.max(0)
    assert found.x[0] < low[0] and found.x[-1] > high[0] and found.y[0] < low[1] and found.y[-1] > high[1]


def test_batch_normalisation_takes_the_statistics_of_the_data_and_the_model_is_left_alone() -> None:
    """With stored statistics the surface would be that of a network nobody could have trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = classes(30, 6, 4)
    found = dl.landscape(model, F.cross_entropy, (x, y), directions="filter", resolution=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert found.center_loss == pytest.approx(float(F.cross_entropy(model.double().train()(x), y).detach()), rel=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mlp(6, 7, 4), classes(30, 6, 4)
    whole = dl.landscape(model, F.cross_entropy, data, directions="random", resolution=5)
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 * 81 * 7)
    np.testing.assert_allclose(
        dl.landscape(model, F.cross_entropy, data, directions="random", resolution=5).loss, whole.loss, rtol=1e-12
    )


def contents(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as held:
        return dict(held)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two directories below one folder, the second a run of another rate."""
    folder = tmp_path_factory.mktemp("landscape")
    dl.run("training", *SPEC, "replicates=2", "observe.snapshots_every=3", out=folder / "a", launcher="local")
    other = [word for word in SPEC if not word.startswith("optimizer.lr")]
    dl.run(
        "training",
        *other,
        "replicates=1",
        "optimizer.lr=0.1",
        "observe.snapshots_every=3",
        out=folder / "b",
        launcher="local",
    )
    return folder


def test_weights_along_the_runs_are_those_of_the_runs(trained: Path) -> None:
    """After 0, 3, 6 and, because runs end there, 7 updates; by the generator, which stores nothing, to the bit."""
    files = sorted(trained.glob("a/blocks/*/artifacts/weights-*.npz"))
    assert [int(file.stem.removeprefix("weights-")) for file in files] == [0, 3, 6, 7]
    last = contents(files[-1])
    *_, end = dl.train("training", *SPEC, "replicates=2", "observe.evaluate_every=1")
    for m, run in enumerate(end.runs):
        own = torch.cat([p.detach().flatten() for p in end.model(run).parameters()]).numpy()
        assert (last["weights"][m] == own).all()


def test_from_the_command_line(trained: Path, tmp_path: Path) -> None:
    """A folder of directories; the height of a path is the run's training loss on those samples."""
    out = tmp_path / "picture"
    done = CliRunner().invoke(
        app, ["landscape", str(trained), "--resolution", "5", "--samples", "200", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(out / "landscape.html") and (out / "landscape.png").stat().st_size > 10_000
    held = contents(out / "landscape.npz")
    assert [name.split("/")[0] for name in held["names"]] == ["a", "a", "b"]
    assert held["path_0_steps"].tolist() == [0, 3, 6, 7] and held["loss"].shape == (5, 5)
    assert held["center_loss"] == pytest.approx(held["path_0_loss"][-1])
    page = (out / "landscape.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert len(data["paths"]) == 3 and "% of the variance" in data["labels"][0]
    assert not re.search(r"https?://|<link|src=|@import|@TITLE@|@DATA@", page)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "nobody"], "--runs = 'nobody': expected one of"),
        (["--part", "validation", "--samples", "0"], "samples"),
    ],
)
def test_mistakes_on_the_command_line(trained: Path, words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["landscape", str(trained / "a"), *words])
    assert done.exit_code == 2 and message in done.output


def test_mistakes(tmp_path: Path) -> None:
    dl.run("training", *SPEC, "replicates=1", out=tmp_path / "bare", launcher="local")
    with pytest.raises(UserError, match=r"observe\.snapshots_every=10"):
        dl.landscape(tmp_path / "bare")
    with pytest.raises(UserError, match="directions = 'pca': expected paths of at least two points"):
        dl.landscape(Bowl(), bowl_loss, BOWL)
    with pytest.raises(UserError, match=r"paths = 'x': expected weights \[T, 4\] of this model"):
        dl.landscape(Bowl(), bowl_loss, BOWL, paths={"x": np.zeros((3, 5))})
    with pytest.raises(UserError, match="the first run must not have diverged"):
        dl.landscape(Bowl(), bowl_loss, BOWL, paths={"x": np.full((3, 4), np.nan)})
    with pytest.raises(UserError, match="directions = 'up': expected one of pca"):
        dl.landscape(Bowl(), bowl_loss, BOWL, directions="up")


def test_points_of_infinite_loss_and_names_from_outside_are_harmless() -> None:
    """What is not finite becomes null in the page; a name cannot end the script that holds the data."""
    path = np.cumsum(np.random.default_rng(0).normal(size=(6, 4)), 0)

    def steep(out: Tensor, y: Tensor) -> Tensor:
        return torch.exp(600 * bowl_loss(out, y))

    found = dl.landscape(Bowl(), steep, BOWL, paths={"</script><b>": path}, resolution=5)
    assert not np.isfinite(found.loss).all()
    page = document(found, "<title>")
    assert (
        "</script><b>" not in page
        and "&lt;title&gt;" in page
        and "Infinity" not in page
        and np.isfinite(levels(found)).all()
    )
