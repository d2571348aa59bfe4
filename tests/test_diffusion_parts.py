"""Pieces of the diffusion study and its theory against numbers that do not come from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from descentlab.config.resolve import resolve
from descentlab.core.errors import StudyError
from descentlab.studies.diffusion import report
from descentlab.studies.diffusion.clouds import Cloud, Stages
from descentlab.studies.diffusion.directions import chosen_directions, group_variances, look_times, snapshot_times
from descentlab.studies.diffusion.program import stages
from descentlab.studies.diffusion.program_cloud import Looks
from descentlab.studies.diffusion.program_curvature import CurvatureAlong
from descentlab.studies.diffusion.program_pull import Pull
from descentlab.studies.diffusion.reference_figures import across_rates, averaged_eigenvalues, tubes
from descentlab.studies.diffusion.score import bridge, score
from descentlab.studies.diffusion.spec import SEMANTICS, HessianRun
from descentlab.theory import diffusion
from descentlab.theory.closure import Averages, gaussian_closure
from descentlab.theory.orbit import period_two

RNG = np.random.default_rng(7)


@pytest.mark.parametrize(("rate", "ends_in_orbit"), [(2.0, True), (1.99, False), (0.5, False)])
def test_the_detector_on_a_quadratic(rate: float, ends_in_orbit: bool) -> None:
    """Breaks when an orbit of period two is not seen at lr lambda = 2, or is seen in a descent that converges: there
    the last steps have become rounding, or go on."""
    curvature, theta = np.array([rate, 0.3]), np.array([1.0, 1.0])
    path = [theta]
    for _ in range(20_000):
        theta = theta - curvature * theta
        path.append(theta)
    found = period_two(np.stack(path))
    assert found.period_two is ends_in_orbit
    if ends_in_orbit:
        assert found.ratio == pytest.approx(0.0, abs=1e-12) and found.step == pytest.approx(2.0)


def test_the_closure_is_exact_for_quadratic_samples() -> None:
    """Every sample has its own Hessian: then the averages are known and the recursion of all second moments is linear.
    Breaks with a wrong sign or age of the mean, or averages taken at the wrong time."""
    n, d, lr, batch, steps = 6, 3, 0.2, 2, 40
    half = RNG.normal(size=(n, d, d)) * 0.3
    hessians = np.eye(d) * 0.5 + (half + half.transpose(0, 2, 1)) / 2
    gradients = RNG.normal(size=(n, d)) * 0.1
    hessian, gradient = hessians.mean(0), gradients.mean(0)

    def average(mean: np.ndarray, covariance: np.ndarray) -> Averages:
        spread = hessians - hessian
        kick = spread @ mean + gradients - gradient
        noise = (np.einsum("nij,jk,nlk->il", spread, covariance, spread) + kick.T @ kick) / n
        return Averages(gradient + hessian @ mean, hessian, noise)

    mean, covariance = diffusion.multiplicative_covariance(hessians, gradients, lr, steps, batch_size=batch)
    errors = []
    for intervals in (2, 4, 40):
        *_, (t, m, v) = gaussian_closure(average, d, lr, [7, steps], batch_size=batch, intervals=intervals)
        assert t == steps and np.allclose(m, mean, atol=1e-12)
        errors.append(np.abs(v / covariance - 1).max())
    assert errors[2] < 1e-9 and errors[1] < errors[0] < 0.1
    linear = diffusion.finite_time_covariance(hessian, np.cov(gradients.T, bias=True) / batch, lr, steps)
    assert np.abs(linear / covariance - 1).max() > 2 * errors[0]  # what the closure is for


def test_variances_along_eigenvectors_are_the_diagonal() -> None:
    values, noise = np.array([1.3, 0.2, 0.0, -0.1]), np.array([0.5, 0.4, 0.3, 0.2])
    h, c = np.diag(values), np.diag(noise)
    a = diffusion.finite_time_covariance(h, c, 0.1, 33)
    assert np.allclose(np.diag(a), diffusion.finite_time_variances(values, noise, 0.1, 33), rtol=1e-12)
    sizes = {"batch_size": 4, "population": 23}
    a = diffusion.bridge_covariance(h, c, 0.1, 33, **sizes)
    assert np.allclose(np.diag(a), diffusion.bridge_variances(values, noise, 0.1, 33, **sizes), rtol=1e-12)
    more = {"momentum": 0.7, "weight_decay": 0.05, "nesterov": True}
    a = diffusion.momentum_covariance(h, c, 0.1, 33, **more)
    assert np.allclose(np.diag(a), diffusion.momentum_variances(values, noise, 0.1, 33, **more), rtol=1e-12)


def drawn(n: int, truth: np.ndarray, prediction: np.ndarray, vectors: np.ndarray) -> dict[str, np.ndarray]:
    x = RNG.multivariate_normal(np.zeros(len(truth)), truth, n, method="eigh")
    groups = group_variances(x @ vectors)
    return {
        "V": np.cov(x.T),
        "Vhat": prediction,
        "eigenvectors": vectors,
        "runs": np.array(n),
        "group_variances": groups,
    }


def test_the_score_of_a_right_and_of_wrong_predictions() -> None:
    """Breaks when a flat direction is scored, when a prediction that is off by 20 % passes, or when directions that
    are right one by one and wrong together pass the band."""
    d, n = 40, 400
    vectors = np.linalg.qr(RNG.normal(size=(d, d)))[0]
    scales = np.append(np.geomspace(1e-4, 1, d - 2), [0.0, 0.0])
    truth = vectors * scales @ vectors.T
    right = score(drawn(n, truth, truth, vectors))
    assert right is not None and right.live.sum() == d - 2 and right.flat_largest < 1e-12
    assert right.relative_error < 1.3 * right.floor and right.inside > 0.85 and right.outside < 0.06
    off = score(drawn(n, truth, 1.2 * truth, vectors))
    assert off is not None and off.relative_error > 1.8 * off.floor and off.inside < 0.7
    turned = truth.copy()
    turned += (
        0.6
        * np.sqrt(scales[20] * scales[21])
        * (np.outer(vectors[:, 20], vectors[:, 21]) + np.outer(vectors[:, 21], vectors[:, 20]))
    )
    together = score(drawn(n, turned, truth, vectors))
    assert together is not None and together.inside > 0.85
    assert together.spectrum.max() > right.spectrum.max()


def test_the_bridge_s_ratio_is_half_and_has_an_interval() -> None:
    d, n, epoch = 30, 500, 10
    values, vectors, lr = np.full(d, 1e-5), np.eye(d), 0.01
    half = np.eye(d) * 0.5
    held = drawn(n, half, half, vectors)
    ended = {f"{k}_{epoch // 2}": held[k] for k in ("V", "Vhat", "runs", "group_variances")}
    times = {"times": np.array([5, 11]), "independent_variances": np.ones((2, d)), "eigenvalues": values}
    found = bridge({**ended, **times, "eigenvectors": vectors, "lr": np.array(lr), "steps_per_epoch": np.array(epoch)})
    assert found is not None and found.expected == pytest.approx(0.5) and found.directions == d
    low, high = found.ratio.low, found.ratio.high
    assert low is not None and high is not None and low < 0.5 < high and high - low < 0.1


def test_a_run_that_is_not_finite_is_out_and_the_others_are_untouched() -> None:
    """Breaks when a NaN reaches a mean, or when the others' numbers depend on its being there."""
    theta = RNG.normal(size=(5, 3))
    vectors = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    broken = theta.copy()
    broken[2] = np.nan
    made = []
    for rows in (np.delete(theta, 2, axis=0), broken):
        looks = Looks([4, 9], [9], np.zeros(3), vectors, np.array([2, 0]), {})
        looks.look(4, rows * 0, {})
        looks.look(9, rows, {"b": torch.ones(len(rows), 2)})
        made.append(looks)
    alone, with_it = (one.arrays() for one in made)
    assert np.array_equal(alone["mean"][1], with_it["mean"][1]) and np.array_equal(alone["m2"][1], with_it["m2"][1])
    assert with_it["n"].tolist()[1] == 4 and made[1].lost(list("abcde")) == {"c": 4}
    resumed = Looks([4, 9], [9], np.zeros(3), vectors, np.array([2, 0]), made[1].held()).arrays()
    assert all(np.array_equal(resumed[k], with_it[k], equal_nan=True) for k in with_it)


def test_moments_in_time_and_directions() -> None:
    times = look_times(1111, 60, 60, [500])
    assert {1, 30, 60, 500, 1111} <= set(times) and times == sorted(set(times)) and len(times) <= 63
    assert look_times(4, 10, 60, []) == [1, 2, 3, 4] and snapshot_times(1111, 60, [7]) == [7, 30, 1111]
    chosen = chosen_directions(np.arange(386.0), 12)
    assert chosen[:4].tolist() == [385, 384, 383, 382] and chosen[-4:].tolist() == [3, 2, 1, 0] and len(chosen) == 12
    assert chosen_directions(np.arange(3.0), 12).tolist() == [2, 1, 0]


def test_the_averaged_hessian_over_runs_and_rates() -> None:
    """Four runs' means of noisy matrices of one known truth: the interval over runs holds its eigenvalues, and the
    figure across rates shows the sizes with their intervals. Breaks when runs are not the unit."""
    values = np.array([-0.5, 0.2, 1.0, 3.0])
    basis = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    each = []
    for _ in range(4):
        noise = RNG.normal(size=(4, 4)) * 0.02
        each.append(basis * values @ basis.T + noise + noise.T)
    found = {"mean_hessian": np.stack(each), "steps": np.arange(3)}
    ends = averaged_eigenvalues(found)
    assert ends.shape == (4, 3) and (ends[:, 1] < values).all() and (values < ends[:, 2]).all()
    assert (ends[:, 2] - ends[:, 1] < 0.3).all()
    lonely = averaged_eigenvalues({"mean_hessian": found["mean_hessian"][:2]})
    assert np.isnan(lonely[:, 1:]).all() and np.allclose(lonely[:, 0], values, atol=0.1)
    traces = np.array([[1.0, 0.9, 1.1], [5.0, 4.5, 5.5]])
    figure = across_rates(
        np.array([0.01, 0.05]), traces, traces[:, 0], {"a": found, "b": found}, {"a": (1, 0.9, 1.1), "b": (1, 1, 1)}
    )
    bars = figure.axes[0].containers[0].lines[2][0].get_segments()
    assert np.allclose([np.sort(bar[:, 1]) for bar in bars], traces[:, 1:])


def test_a_run_that_diverged_is_out_of_the_averaged_hessian() -> None:
    """Three runs of four Hessians, all of them the identity; run 1 is lost after the first. Breaks when a sum over some
    steps is divided by all of them, when NaN reaches the others, or when the lost one's trace is averaged."""
    along = CurvatureAlong(HessianRun(steps=8, every=2, runs=3), torch.nn.Linear(1, 1), None, Pull(), {})
    for run, steps in ((0, (0, 2, 4, 6)), (1, (0,)), (2, (0, 2, 4, 6))):
        for step in steps:
            along._sums[run] = along._sums.get(run, 0) + np.eye(2)
            along._keep("eigenvalues", run, step, np.ones(2))
    found = along.arrays()
    assert found["steps"].tolist() == [0, 2, 4, 6] and np.isnan(found["mean_hessian"][1]).all()
    assert np.array_equal(found["mean_hessian"][[0, 2]], [np.eye(2)] * 2)
    assert np.array_equal(averaged_eigenvalues(found)[:, 0], [1.0, 1.0])
    cloud = Cloud("x", {}, None, None, [{"needs": {"curvature": ["c"]}}], None, [])
    held = Stages(Path(), [{"key": "c", "stage": "curvature", "needs": {}}], {"c": {"hessian": 2 * np.eye(2)}})
    assert report._trace_share(cloud, held, found) == (0.5, 0.5, 0.5)


def test_a_cloud_whose_every_run_diverged_has_no_averaged_hessian() -> None:
    along = CurvatureAlong(HessianRun(steps=8, every=2), torch.nn.Linear(1, 1), None, Pull(), {})
    along._sums[0] = np.eye(2)
    along._keep("eigenvalues", 0, 0, np.ones(2))
    found = along.arrays()
    assert found["eigenvalues"].shape == (1, 4, 2) and np.isnan(found["mean_hessian"]).all()
    assert np.isnan(averaged_eigenvalues(found)).all()
    assert tubes({"x": found}).get_axes()


def test_hessians_of_an_earlier_version_are_made_again_or_refused(tmp_path: Path) -> None:
    """Breaks when a block with arrays of another shape keeps its key and its runs their ids."""
    (cell,) = resolve("diffusion", ["size=quick", "runs=4", "sampler=shuffle"]).cells
    raised = {stage.name: stage.semantics for stage in stages(cell) if stage.semantics != 1}
    assert raised == SEMANTICS == {"hessians": 2}
    assert cell.identity_of("hessians")["semantics"] == {"hessians": 2} and "semantics" not in cell.identity_of("score")
    (with_polish,) = resolve("diffusion", ["size=quick", "sampler=shuffle", "reference.gd.polish=lbfgs"]).cells
    assert with_polish.identity_of("score")["semantics"] == {"gd": 2}
    folder = tmp_path / "blocks" / "b" / "artifacts"
    folder.mkdir(parents=True)
    np.savez(folder / "hessians.npz", steps=np.arange(3), eigenvalues=np.ones((3, 5)))
    with pytest.raises(StudyError, match=r"hessians.npz was written by an earlier version"):
        Stages(tmp_path, []).arrays({"key": "b", "stage": "hessians"})
