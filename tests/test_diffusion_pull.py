"""The pull towards where descent ended: every stage has it, against algebra and plain loops; what rounding allows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from test_diffusion_polish import POINT, form
from test_diffusion_study import BATCH, RUNS, SMALL, STEPS, Plain, arrays, blocks, study

from descentlab import store
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.streams import Streams
from descentlab.launch.build import workload
from descentlab.report.figures import SINGLE, new_figure, plain_log_ticks
from descentlab.studies.diffusion import contrasts, control, program_polish, verdicts
from descentlab.studies.diffusion.clouds import Stages, clouds_of
from descentlab.studies.diffusion.program_curvature import dense_hessian, set_weights
from descentlab.studies.diffusion.program_polish import polished
from descentlab.studies.diffusion.program_pull import Pull
from descentlab.studies.diffusion.program_theory import CloudAverages
from descentlab.studies.diffusion.reference_figures import gradient_norms
from descentlab.studies.diffusion.report import build
from descentlab.theory.closure import gaussian_closure
from descentlab.theory.diffusion import finite_time_covariance, mean_displacement

GAMMA = 0.3
WORDS = ("reference.gd.polish=both", "reference.gd.polish_steps=300", f"reference.gd.localise={GAMMA}")
CLOSURE = ("theory.closure=gaussian", "theory.intervals=1", "theory.draws=1", "theory.hessians=1")


class Pulled(Plain):
    """The plain network with the pull written out."""

    def __init__(self, anchor: np.ndarray) -> None:
        super().__init__()
        self.anchor = torch.from_numpy(anchor)

    def loss(self, theta: torch.Tensor, index: np.ndarray | slice = slice(None)) -> torch.Tensor:
        return super().loss(theta, index) + GAMMA / 2 * (theta - self.anchor).square().sum()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study(tmp_path_factory.mktemp("pull") / "out", *WORDS, "theory.closure=linear")


@pytest.mark.parametrize("method", ["lbfgs", "newton", "both"])
def test_a_saddle_with_enough_pull_has_the_minimum_that_algebra_says(method: str) -> None:
    """(A + gamma) theta = b + gamma anchor, with a curvature of -0.5. Fails without the pull in gradient or Hessian."""
    module, work, _ = form([-0.5, 1.0, 3.0])
    anchor = np.array([0.3, -1.0, 2.0])
    theta, path = polished(method, module, work, np.zeros(3), 400, 1e-9, lambda done: None, Pull(2.0, anchor))
    a, b = module.a.numpy(), module.b.numpy()
    assert path[-1] <= 1e-9 and np.allclose(theta, np.linalg.solve(a + 2 * np.eye(3), b + 2 * anchor), atol=1e-8)


def test_every_stage_has_the_pull(done: Path) -> None:
    """theta*, runs, control, Hessians and noise against the loss with the pull written out, by autograd. Fails when one
    stage works without it, with another strength or towards another point."""
    at = arrays(blocks(done, "gd")[0], "theta.npz")
    theta, plain, streams = at["theta"], Pulled(at["gd_theta"]), Streams(0)
    where = torch.from_numpy(theta).requires_grad_()
    (slope,), (bare,) = (torch.autograd.grad(f(where), where) for f in (plain.loss, Plain().loss))
    assert float(slope.norm()) < 1e-6 and float(bare.norm()) > 1e-3
    assert at["polish_gradients"][-1] == pytest.approx(float(slope.norm()), rel=1e-3, abs=1e-12)
    found = arrays(blocks(done, "curvature")[0], "curvature.npz")
    exact = torch.autograd.functional.hessian(plain.loss, where.detach()).numpy()
    assert np.allclose(found["hessian"], exact, atol=1e-10) and np.allclose(
        found["gradient"], slope.numpy(), atol=1e-12
    )
    each = torch.stack([torch.func.grad(plain.loss)(where.detach(), np.array([n])) for n in range(128)]).numpy()
    assert np.allclose(found["covariance"], np.cov(each.T, bias=True), atol=1e-10)
    drawn = {m: [streams.integers("order", 128, BATCH, replicate=m, step=t) for t in range(STEPS)] for m in (1, RUNS)}
    cloud = arrays(blocks(done, "sgd_cloud")[0], "cloud.npz")
    for member, batches in drawn.items():  # replicates count from 1
        assert np.allclose(plain.descend(theta, 0.05, batches), cloud["snapshots"][-1, member - 1], atol=1e-12)
    control = arrays(blocks(done, "gd_control")[0], "path.npz")["mean"][-1]
    assert np.abs(control).max() < 1e-6  # descent from a critical point stays there
    along = arrays(blocks(done, "hessians")[0], "hessians.npz")
    for k, step in enumerate(along["steps"].tolist()):  # of the first run
        here = torch.from_numpy(plain.descend(theta, 0.05, drawn[1][:step]))
        of_batch = torch.autograd.functional.hessian(lambda t, s=step: plain.loss(t, drawn[1][s]), here).numpy()
        assert np.allclose(along["eigenvalues"][0, k], np.linalg.eigvalsh(of_batch), atol=1e-10)
    assert along["steps"].tolist() == [0, 2]


def test_the_score_and_the_report_are_of_the_loss_with_the_pull(done: Path) -> None:
    """Fails when theory leaves the pull out, or when the report says "critical" without saying of what."""
    found, score = arrays(blocks(done, "curvature")[0], "curvature.npz"), arrays(blocks(done, "score")[0], "score.npz")
    expected = finite_time_covariance(found["hessian"], found["covariance"] / BATCH, 0.05, STEPS)
    assert np.allclose(score["Vhat"], expected, rtol=1e-9, atol=1e-18)
    a, b = (np.einsum("ji,jk,ki->i", score["eigenvectors"], score[k], score["eigenvectors"]) for k in ("V", "Vhat"))
    live = b > 1e-12 * b.max()
    assert 0.8 < (a[live] / b[live]).mean() < 1.2
    made = build(store.load(done))
    assert any(
        n.startswith(f"Runs, control and prediction are those of the loss with a pull of {GAMMA}") for n in made.notes
    )
    says = next(v for v in made.verdicts if v.text.startswith("theta* is"))
    assert says.text.startswith(f"theta* is a critical point of the loss with a pull of {GAMMA} towards where descent")
    assert f"{GAMMA} / 2 |theta - where descent ended|^2" in says.detail
    summary = json.loads((done / "report" / "summary.json").read_text())
    assert summary["diffusion/theta/critical"]["value"] == 1 and summary["diffusion/theta/pull"]["value"] == GAMMA


@pytest.mark.parametrize("method", ["top_k", "density"])
def test_curvature_without_a_matrix_has_the_pull(method: str, done: Path, tmp_path: Path) -> None:
    """Against the dense Hessians of the same batches. Fails when the pull is missing, or there twice."""
    dense = arrays(blocks(done, "hessians")[0], "hessians.npz")["eigenvalues"]
    out = study(tmp_path / "out", *WORDS, "stage=hessians", f"hessians.method={method}", "hessians.k=3")
    found = arrays(blocks(out, "hessians")[0], "hessians.npz")
    if method == "top_k":
        assert np.allclose(np.sort(found["eigenvalues"]), dense[:, :, -3:], rtol=1e-8)
    else:
        assert found["nodes"].max() == pytest.approx(dense.max(), rel=0.02)
        assert found["nodes"][found["weights"] > 0].min() > dense.min() - 0.05


def test_averages_over_a_cloud_have_the_pull(done: Path) -> None:
    """Of a cloud without spread, moved by m: gradient and Hessian of loss and pull there, by autograd; of one with
    spread the noise is that without the pull. Fails when the closure sees the loss alone, or calls the pull noise."""
    at = arrays(blocks(done, "gd")[0], "theta.npz")
    plain = Pulled(at["gd_theta"])
    average = averages(at, Pull(GAMMA, at["gd_theta"]))
    moved = np.random.default_rng(1).normal(size=386) * 0.02
    found = average(moved, np.zeros((386, 386)))
    where = torch.from_numpy(at["theta"] + moved).requires_grad_()
    (slope,) = torch.autograd.grad(plain.loss(where), where)
    assert np.allclose(found.gradient, slope.numpy(), atol=1e-12)
    exact = torch.autograd.functional.hessian(plain.loss, where.detach()).numpy()
    assert np.allclose(found.hessian, exact, atol=1e-10)
    spread = np.eye(386) * 1e-3
    with_pull, without = (averages(at, p)(moved, spread).noise for p in (Pull(GAMMA, at["gd_theta"]), Pull()))
    assert np.allclose(with_pull, without, atol=1e-12)


def averages(at: dict[str, np.ndarray], pull: Pull) -> CloudAverages:
    """What stage score averages with, as in the study of ``done``."""
    cell = resolve("diffusion", [*SMALL, *CLOSURE], limit=None).cells[0]
    work = workload(cell)
    module = work.module(Streams(0), 0)
    set_weights(module, at["theta"])
    curvature = arrays(at["folder"].item(), "curvature.npz") if "folder" in at else {}
    return CloudAverages(cell, module, work, pull, curvature, lambda done: None)


def test_the_closure_is_given_the_pull(tmp_path: Path) -> None:
    """Vhat of the study against the closure called by hand with the pull. Fails when stage score leaves it out."""
    out = study(tmp_path / "out", *WORDS, *CLOSURE, "stage=score", "runs=4")
    at = arrays(blocks(out, "gd")[0], "theta.npz")
    found = averages({**at, "folder": np.array(blocks(out, "curvature")[0])}, Pull(GAMMA, at["gd_theta"]))
    score = arrays(blocks(out, "score")[0], "score.npz")
    times = sorted({*score["times"].tolist(), *score["snapshot_steps"].tolist()})
    own = found.own.intervals
    *_, (last, _, expected) = gaussian_closure(found, 386, 0.05, times, batch_size=BATCH, intervals=own)
    assert last == STEPS and np.allclose(score["Vhat"], expected, rtol=1e-9, atol=1e-18)


def test_a_polished_point_is_one_that_the_runs_can_have(tmp_path: Path) -> None:
    """float32: theta* is rounded to it, what is left of the gradient is about what rounding gives, and is called
    critical. Fails when the polish works in float32, or rounding is not allowed for."""
    words = ("reference.gd.polish=newton", f"reference.gd.localise={GAMMA}", "reference.gd.tolerance=1e-9")
    out = study(tmp_path / "out", *words, "stage=curvature", "dtype=float32")
    at = arrays(blocks(out, "gd")[0], "theta.npz")
    assert (at["theta"] == at["theta"].astype(np.float32)).all() and at["polish_gradients"][-1] <= 1e-9
    summary = json.loads((out / "report" / "summary.json").read_text())
    norm, rounding = (summary[f"diffusion/theta/{k}"]["value"] for k in ("gradient_norm", "gradient_rounding"))
    assert 1e-9 < norm < 2 * rounding < 1e-6 and summary["diffusion/theta/critical"]["value"] == 1


def test_what_rounding_gives() -> None:
    """Against weights rounded at random. Fails when a unit is another dtype's, or not each weight's own."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    hessian, theta = basis * np.geomspace(1e-3, 100, 30) @ basis.T, rng.normal(size=30) * np.geomspace(0.01, 10, 30)
    norms = []
    for _ in range(2000):
        free = theta * (1 + 1e-3 * rng.random(30))
        norms.append(np.linalg.norm(hessian @ (free.astype(np.float32) - free)) ** 2)
    assert verdicts._rounding(hessian, theta, "float32") == pytest.approx(np.sqrt(np.mean(norms)), rel=0.1)


@pytest.mark.parametrize(
    ("change", "critical"),
    [
        ({}, True),
        ({"gradient": 1.7e-5}, False),
        ({"rounding": 0.0}, False),
        ({"polish": (1e-3, 2e-6)}, False),
        ({"polish": ()}, False),
    ],
)
def test_rounding_is_allowed_for_where_a_polish_came_far_enough(change: dict[str, Any], critical: bool) -> None:
    """Fails when a point that no polish has found, or one that did not come below the tolerance, gains by rounding."""
    point = replace(POINT, gradient=1.5e-5, rounding=8e-6, polish=(1e-3, 1e-7))
    assert replace(point, **change).critical == critical


def test_a_pull_without_a_polish_is_refused() -> None:
    with pytest.raises(UserError, match=r"reference.gd.localise = 0.1.*lbfgs, newton or both"):
        resolve("diffusion", ["reference.gd.localise=0.1"])


def test_landscape_is_that_of_the_loss(done: Path) -> None:
    """Fails when a contrast between clouds with and without a pull shows the pull as curvature."""
    at = arrays(blocks(done, "gd")[0], "theta.npz")
    values = np.linalg.eigvalsh(torch.autograd.functional.hessian(Plain().loss, torch.from_numpy(at["theta"])).numpy())
    results = store.load(done)
    stages = Stages.of(results)
    (cloud,) = clouds_of(results, stages)
    found = contrasts.measure(results, stages, cloud).values
    assert found["sharpness"] == pytest.approx(np.log(values[-1])) and found["negative share"] > 0.1
    loss = float(Plain().loss(torch.from_numpy(at["theta"])))
    assert found["test loss"] - found["generalisation gap"] == pytest.approx(loss)


def test_newton_takes_over_where_lbfgs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty curvatures over three decades and too few iterations of L-BFGS; a quadratic has one Hessian. Fails when the
    second does not start where the first ended, or makes a Hessian per step."""
    made = []

    def counted(*given: Any) -> np.ndarray:
        made.append(1)
        return dense_hessian(*given)

    monkeypatch.setattr(program_polish, "dense_hessian", counted)
    module, work, minimum = form(np.geomspace(1e-2, 10, 40).tolist())
    reached = {m: polished(m, module, work, np.ones(40), 20, 1e-9, lambda done: None) for m in ("lbfgs", "both")}
    (_, first), (theta, both) = reached["lbfgs"], reached["both"]
    assert first[-1] > 1e-4 and both[: len(first)] == first and both[-1] <= 1e-9
    assert np.allclose(theta, minimum, atol=1e-6) and len(both) > len(first) + 2 and len(made) == 1


def test_a_polish_that_comes_nowhere_ends_with_finite_weights() -> None:
    """x^3 / 3 + x has a slope of at least 1 and no lower end. Fails when damping grows until it overflows, or when
    weights that are not finite are kept."""

    class Cubic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.x**3 / 3 + self.x).expand(len(x), 1)

    for method in ("newton", "lbfgs"):
        theta, path = polished(method, Cubic(), form([1.0])[1], np.array([0.5]), 2000, 1e-9, lambda done: None)
        assert np.isfinite(theta).all() and np.isfinite(path).all() and path[-1] >= 1 and len(path) < 50


def test_a_directory_of_an_earlier_version_keeps_its_control(tmp_path: Path) -> None:
    """Without the setting in what it has stored. Fails when blocks are compared by all their settings."""
    out = study(tmp_path / "out", "runs=12", "theory.closure=linear")
    for name in ("plan.json", "resolved.jsonl"):
        text = (out / name).read_text()
        if name == "plan.json":
            assert '"localise"' in text
            text = re.sub(r',\s*"localise":\s*0\.0', "", text)
            assert '"localise"' not in text
            (out / name).write_text(text)
    results = store.load(out)
    (cloud,) = clouds_of(results, Stages.of(results))
    assert cloud.control is not None and cloud.hessians and not build(results).failures.rows


def test_a_directory_with_a_setting_that_is_gone_keeps_its_control(tmp_path: Path) -> None:
    """Fails when a block that this version cannot read as settings ends the report, or is matched with none."""
    out = study(tmp_path / "out", "runs=12", "theory.closure=linear")
    plan = json.loads((out / "plan.json").read_text())
    for block in plan["blocks"]:
        block["settings"]["reference"]["gd"]["gone"] = 3
    (out / "plan.json").write_text(json.dumps(plan))
    results = store.load(out)
    for run in results.runs:
        run["settings"]["reference"]["gd"]["gone"] = 3
    (cloud,) = clouds_of(results, Stages.of(results))
    assert cloud.control is not None and len(cloud.hessians) == 1


def test_hessians_of_a_cloud_that_has_not_ended_do_not_end_the_report(tmp_path: Path) -> None:
    words = ("optimizer.lr=0.05,0.01", "sampler=replacement,shuffle", "runs=12", "theory.closure=linear")
    out = study(tmp_path / "out", *words)
    plan = json.loads((out / "plan.json").read_text())["blocks"]
    late = [b for b in plan if b["stage"] == "sgd_cloud" and b["settings"]["sampler"]["name"] == "shuffle"]
    for block in late:
        (out / "blocks" / block["key"] / "done.json").unlink()
    results = store.load(out)
    assert len(late) == 2 and [c for c in clouds_of(results, Stages.of(results)) if c.hessians and not c.members]
    build(results)


def test_descent_that_stays_has_no_ratio() -> None:
    """A control that moves by rounding alone; one that is N / B = 60 times slower. Fails when a ratio of rounding is
    shown, or when a slow control loses its ratio."""
    rng, d, n = np.random.default_rng(3), 4, 200
    hessian, slope = np.diag([0.1, 0.2, 0.3, 0.4]), rng.normal(size=d)
    lr, steps = 0.01, 50
    score = {"eigenvectors": np.eye(d), "runs": np.array(n), "lr": np.array(lr), "V": np.eye(d) * 1e-6}
    for slow, stays in ((lr / 60, False), (lr, True)):
        gradient = slope * (1e-12 if stays else 1.0)
        gone = mean_displacement(hessian, gradient, slow, steps)
        mean = mean_displacement(hessian, gradient, lr, steps) + rng.normal(size=d) * 1e-3 / n**0.5
        path = {"lr": np.array(slow), "steps": np.array([steps]), "mean": gone[None]}
        found = control.items({**score, "mean": mean}, path, {"hessian": hessian, "gradient": gradient})
        assert ("control_ratio" in found) != stays and ("control_ratio_predicted" in found) != stays
        assert "control_displacement" in found
        (row,) = control.table({"x": found}).rows
        assert (row[6] == "descent hardly moves") == stays


def test_clouds_of_other_lengths_have_controls_of_their_own(tmp_path: Path) -> None:
    """Fails when a cloud of 11 steps is shown with a descent of 7."""
    out = study(tmp_path / "out", "cloud.steps=7,11", "runs=12", "theory.closure=linear")
    results = store.load(out)
    clouds = clouds_of(results, Stages.of(results))
    assert [c.settings["cloud"]["steps"] for c in clouds] == [7, 11]
    assert [c.control["settings"]["cloud"]["steps"] for c in clouds if c.control is not None] == [7, 11]
    assert not [n for n in build(results).notes if "not shown" in n]


def test_a_control_that_no_cloud_is_shown_with_is_named(tmp_path: Path) -> None:
    """Fails when one of two controls of a cloud is left out without a word."""
    out = study(tmp_path / "out", "control.scaling=default,B/N", "runs=12", "theory.closure=linear")
    assert len(blocks(out, "gd_control")) == 2 and len(blocks(out, "sgd_cloud")) == 1
    notes = [n for n in build(store.load(out)).notes if "not shown" in n]
    assert len(notes) == 1 and notes[0].startswith("The gd_control with control.scaling = ")
    assert ", lr = 0.05 is not shown" in notes[0]


def test_the_polish_has_a_panel_of_its_own() -> None:
    """Fails when the polish is drawn over the steps of descent, where its points fall on one another."""
    rows = pl.DataFrame({"step": [0, 9, 99], "grad_norm": [1.0, 0.1, 0.01]})
    left, right = gradient_norms(rows, (1e-2, 1e-4, 1e-6), 1e-5).axes
    assert left.lines[0].get_xdata().tolist() == [1, 10, 100]
    assert list(right.lines[0].get_xdata()) == [0, 1, 2] and list(right.lines[1].get_ydata()) == [1e-5, 1e-5]
    assert len(gradient_norms(rows, ()).axes) == 1


def test_a_log_axis_of_less_than_a_decade_has_ticks() -> None:
    figure = new_figure(SINGLE, 2.0)
    ax = figure.subplots()
    ax.plot([0, 1], [1.93, 3.2])
    ax.set_yscale("log")
    plain_log_ticks(ax)
    assert len(ax.get_yticks()) >= 3 and all(1.8 < t < 3.5 for t in ax.get_yticks())
