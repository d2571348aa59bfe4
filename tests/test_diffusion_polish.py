"""theta*: polishing on a quadratic, a saddle and a network, and when the report may say "critical point"; the ways
curvature is measured along a run; the control's learning rate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_diffusion_study import Plain, arrays, blocks, study
from torch import nn

from descentlab import store
from descentlab.studies.diffusion import control, verdicts
from descentlab.studies.diffusion.program_polish import polished
from descentlab.studies.diffusion.report import build
from descentlab.studies.diffusion.verdicts import Point
from descentlab.theory.diffusion import mean_displacement

POINT = Point(1e-9, 0.1, 3.0, 0, 0, 0.1, 1e-6, False, 1.9, (), (0.01,))


class Form(nn.Module):
    """theta^T A theta / 2 - b theta, as a model of one parameter vector."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(len(b), dtype=torch.float64))
        self.a, self.b = torch.from_numpy(a), torch.from_numpy(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.theta @ self.a @ self.theta / 2 - self.theta @ self.b).expand(len(x), 1)


def form(values: list[float]) -> tuple[Form, Any, np.ndarray]:
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    a, b = basis * np.array(values) @ basis.T, rng.normal(size=len(values))
    work = SimpleNamespace(
        loss=lambda out, y: out.mean(), data=SimpleNamespace(x_train=torch.zeros(3, 1), y_train=torch.zeros(3))
    )
    return Form(a, b), work, np.linalg.solve(a, b)


@pytest.mark.parametrize("method", ["lbfgs", "newton", "both"])
def test_polish_ends_at_the_minimum_of_a_quadratic(method: str) -> None:
    """Curvatures over three decades. Breaks when a step has the wrong sign or length, or stops too early."""
    module, work, minimum = form([0.05, 0.3, 1.0, 40.0])
    theta, path = polished(method, module, work, np.ones(4), 400, 1e-7, lambda done: None)
    assert path[-1] <= 1e-7 < path[0] and np.allclose(theta, minimum, rtol=1e-4)
    assert np.allclose(np.concatenate([p.detach().numpy() for p in module.parameters()]), theta)


def test_newton_goes_to_a_saddle_and_lbfgs_goes_down() -> None:
    module, work, saddle = form([-0.5, 1.0, 3.0])
    theta, path = polished("newton", module, work, saddle + 0.1, 100, 1e-10, lambda done: None)
    assert path[-1] <= 1e-10 and np.allclose(theta, saddle, atol=1e-8)
    lost, _ = polished("lbfgs", module, work, saddle + 0.1, 20, 1e-10, lambda done: None)
    heights = [float(module.a.numpy() @ t @ t / 2 - module.b.numpy() @ t) for t in (lost, saddle)]
    assert heights[0] < heights[1] - 1e-3


@pytest.mark.parametrize("method", ["lbfgs", "newton"])
def test_a_polished_network_is_what_the_report_says(method: str, tmp_path: Path) -> None:
    """The gradient at theta* by plain autograd on the network written out, and the word in the report. Breaks when the
    polished weights are not those the other stages start from."""
    more = (f"reference.gd.polish={method}", "reference.gd.polish_steps=400", "stage=curvature")
    out = study(tmp_path / "out", *more, "reference.gd.tolerance=2e-3", "reference.gd.steps=100")
    theta = arrays(blocks(out, "gd")[0], "theta.npz")
    plain = Plain()
    at = torch.from_numpy(theta["theta"]).requires_grad_()
    (gradient,) = torch.autograd.grad(plain.loss(at), at)
    norm = float(gradient.norm())
    assert norm == pytest.approx(theta["polish_gradients"][-1], rel=1e-6)
    assert norm < theta["polish_gradients"][0] / 3 and not np.allclose(theta["theta"], theta["gd_theta"])
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert summary["diffusion/theta/gradient_norm"]["value"] == pytest.approx(norm, rel=1e-6)
    critical = summary["diffusion/theta/critical"]["value"] == 1
    assert critical == (norm <= 2e-3)
    texts = [verdict.text for verdict in build(store.load(out)).verdicts]
    assert any(t.startswith("theta* is a critical point" if critical else "theta* is not") for t in texts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "theta* is a critical point, a minimum"),
        ({"negative": 3}, "theta* is a critical point, a saddle with 3 falling directions"),
        ({"gradient": 1e-5}, "theta* is not a critical point: |gradient| = 1e-05"),
        ({"orbit": True}, "theta* is not a critical point: descent goes round it in an orbit of period two"),
        ({"orbit": True, "polish": (1e-3, 1e-9)}, "theta* is a critical point, a minimum"),
        ({"flat": 9}, "theta* is a critical point, no direction falls, 9 are flat to second order"),
    ],
)
def test_the_word_critical_is_used_where_it_holds(change: dict[str, Any], said: str) -> None:
    assert verdicts.point_verdict(replace(POINT, **change)).text.startswith(said)


@pytest.mark.parametrize("method", ["top_k", "density"])
def test_curvature_without_a_matrix_along_runs(method: str, tmp_path: Path) -> None:
    """The same steps of the same two runs measured densely: the k largest eigenvalues agree, and the quadrature's mean
    is the trace over D. Breaks when a run or a step is taken for another."""
    more = ("stage=hessians", "hessians.runs=2", "hessians.k=3")
    dense = arrays(blocks(study(tmp_path / "a", *more), "hessians")[0], "hessians.npz")
    out = study(tmp_path / "b", *more, f"hessians.method={method}")
    found = arrays(blocks(out, "hessians")[0], "hessians.npz")
    assert found["steps"].tolist() == dense["steps"].tolist() == [0, 2]
    assert np.allclose(np.trace(dense["mean_hessian"], axis1=1, axis2=2), dense["eigenvalues"].sum(2).mean(1))
    if method == "top_k":
        assert found["eigenvalues"].shape == (2, 2, 3) and found["vectors"].shape == (2, 2, 386, 3)
        assert np.allclose(np.sort(found["eigenvalues"]), dense["eigenvalues"][:, :, -3:], rtol=1e-8)
        return
    values, (probes, _) = dense["eigenvalues"], found["nodes"].shape[2:]
    mean = (found["weights"] * found["nodes"]).sum(3).mean(2)
    error = np.sqrt(2 * (values**2).sum(2) / probes) / values.shape[2]  # Hutchinson's, Gaussian probes
    assert (np.abs(mean - values.mean(2)) < 4 * error).all()
    assert found["nodes"].max() == pytest.approx(dense["eigenvalues"].max(), rel=0.02)


def test_the_control_s_rate_is_scaled_by_batch_over_samples(tmp_path: Path) -> None:
    """B / N = 16 / 128. Breaks with N / B, or with the validation samples counted."""
    out = study(tmp_path / "out", "control.scaling=B/N", "runs=40")
    path = arrays(blocks(out, "gd_control")[0], "path.npz")
    assert float(path["lr"]) == pytest.approx(0.05 * 16 / 128)
    theta, plain = arrays(blocks(out, "gd")[0], "theta.npz")["theta"], Plain()
    curvature = arrays(blocks(out, "curvature")[0], "curvature.npz")
    end = plain.descend(theta, 0.05 * 16 / 128, [slice(None)] * 11)
    assert np.allclose(end, theta + curvature["eigenvectors"] @ path["mean"][-1], atol=1e-12)
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert summary["diffusion/lr=0.05/control_lr"]["value"] == pytest.approx(0.00625)
    ratio, expected = (summary[f"diffusion/lr=0.05/control_ratio{e}"] for e in ("", "_predicted"))
    own, other = (mean_displacement(curvature["hessian"], curvature["gradient"], r, 11) for r in (0.05, 0.00625))
    assert expected["value"] == pytest.approx(own @ other / (other @ other)) and 3 < expected["value"] < 8
    assert ratio["low"] - 0.5 < expected["value"] < ratio["high"] + 0.5


def test_the_mean_beside_gradient_descent_on_a_known_cloud() -> None:
    """A Gaussian cloud whose mean is 1.5 times the control's displacement along one direction, and equal elsewhere."""
    rng, d, n = np.random.default_rng(5), 6, 400
    gone, root = np.array([1.0, 0.3, 0, 0, 0, 0]), np.array([0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    centre = gone + np.array([0.5, 0, 0, 0, 0, 0])
    x = centre + rng.normal(size=(n, d)) * root
    held = {"eigenvectors": np.eye(d), "runs": np.array(n), "lr": np.array(0.1), "mean": x.mean(0), "V": np.cov(x.T)}
    path = {"lr": np.array(0.1), "steps": np.array([3]), "mean": gone[None]}
    found = control.items(held, path, {"hessian": np.eye(d), "gradient": np.ones(d)})
    truth = centre @ gone / (gone @ gone)
    ratio = found["control_ratio"]
    assert ratio.low is not None and ratio.high is not None and ratio.low < truth < ratio.high
    assert ratio.high - ratio.low == pytest.approx(3.92 * 0.2 / n**0.5 / (gone @ gone), rel=0.2)
    assert found["control_differs"].value == 1 and found["control_ratio_predicted"].value == pytest.approx(1.0)
    assert control.table({"x": found}).rows[0][6] == "further"


def test_one_precision_in_all_stages(tmp_path: Path) -> None:
    """Every stored weight is a float32 number, and none is where float64 was asked for. Breaks when a stage trains in
    another precision than the others."""
    for dtype in ("float32", "float64"):
        out = study(tmp_path / dtype, f"dtype={dtype}", "runs=8", "cloud.snapshots=[3]", "hessians.steps=1")
        held = [arrays(blocks(out, stage)[0], "theta.npz")["theta"] for stage in ("sgd", "gd")]
        held += list(arrays(blocks(out, "sgd_cloud")[0], "cloud.npz")["snapshots"])
        basis = arrays(blocks(out, "curvature")[0], "curvature.npz")["eigenvectors"]
        control = held[1] + basis @ arrays(blocks(out, "gd_control")[0], "path.npz")["mean"][-1]
        for theta in held:
            assert (theta == theta.astype(np.float32)).all() == (dtype == "float32")
        apart = np.abs(control - control.astype(np.float32))
        assert (apart.max() < 1e-12) == (dtype == "float32")
