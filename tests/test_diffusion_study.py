"""The diffusion study end to end on a small cloud, against plain loops and numbers computed here."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from descentlab import store
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.stage import stage_keys
from descentlab.core.streams import Streams
from descentlab.launch import api
from descentlab.launch.block import run_block
from descentlab.launch.plan import program_of
from descentlab.studies.diffusion.clouds import Stages, clouds_of
from descentlab.studies.diffusion.report import build
from descentlab.studies.diffusion.setups import FOLDER, settings
from descentlab.studies.diffusion.spec import INPUTS, STUDY
from descentlab.workloads.datasets import sources
from descentlab.workloads.loading import load_data
from descentlab.workloads.specs import Mnist5k

SMALL = [
    *("size=quick", "runs=60", "splits.train=train[:128]", "splits.test=test[:40]", "batch_size=16"),
    *("reference.sgd.epochs=2", "reference.gd.steps=12", "hessians.steps=4", "hessians.every=2", "cloud.steps=11"),
    *("cloud.looks=6", "sampler=replacement", "optimizer.lr=0.05", "checkpoint_s=1000"),
]
STEPS, RUNS, BATCH = 11, 60, 16


def study(out: Path, *more: str) -> Path:
    given = {word.split("=")[0] for word in more}
    words = [word for word in SMALL if word.split("=")[0] not in given]
    assert api.run(resolve("diffusion", [*words, *more]), out, launcher="local") == 0
    return out


def blocks(out: Path, stage: str) -> list[Path]:
    plan = json.loads((out / "plan.json").read_text())
    return [out / "blocks" / b["key"] / "artifacts" for b in plan["blocks"] if b["stage"] == stage]


def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name) as held:
        return dict(held)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study(tmp_path_factory.mktemp("diffusion") / "out", "cloud.store=weights", "theory.closure=gaussian")


class Plain:
    """A 36-8-10 network as a few lines of torch, its weights in one vector, trained by autograd."""

    def __init__(self) -> None:
        data = load_data(Mnist5k())
        pooled = F.adaptive_avg_pool2d(data.x_train[:128].double(), 6).flatten(1)
        self.x, self.y = pooled, data.y_train[:128]

    def loss(self, theta: torch.Tensor, index: np.ndarray | slice = slice(None)) -> torch.Tensor:
        w1, b1, w2, b2 = theta[:288].view(8, 36), theta[288:296], theta[296:376].view(10, 8), theta[376:]
        out = F.silu(self.x[index] @ w1.T + b1) @ w2.T + b2
        return F.cross_entropy(out, self.y[index])

    def descend(self, theta: np.ndarray, lr: float, batches: list[Any]) -> np.ndarray:
        at = torch.from_numpy(theta.copy()).requires_grad_()
        for batch in batches:
            (g,) = torch.autograd.grad(self.loss(at, batch), at)
            at = (at - lr * g).detach().requires_grad_()
        return at.detach().numpy()


def test_every_stage_equals_plain_torch(done: Path) -> None:
    """Breaks when a stage starts elsewhere than where the one before ended, reads another loader, another rate or
    another number of steps, or when curvature is not of all training data."""
    plain, streams = Plain(), Streams(0)
    sgd, gd = (arrays(blocks(done, stage)[0], "theta.npz") for stage in ("sgd", "gd"))
    theta = gd["theta"]
    assert np.allclose(plain.descend(sgd["theta"], 0.1, [slice(None)] * 12), theta, atol=1e-12)
    cloud = arrays(blocks(done, "sgd_cloud")[0], "cloud.npz")
    for member in (0, 1, RUNS - 1):  # replicates count from 1
        drawn = [streams.integers("order", 128, BATCH, replicate=member + 1, step=t) for t in range(STEPS)]
        assert np.allclose(plain.descend(theta, 0.05, drawn), cloud["snapshots"][-1, member], atol=1e-12)
    path = arrays(blocks(done, "gd_control")[0], "path.npz")
    vectors = arrays(blocks(done, "curvature")[0], "curvature.npz")["eigenvectors"]
    assert np.allclose(
        plain.descend(theta, 0.05, [slice(None)] * STEPS), theta + vectors @ path["mean"][-1], atol=1e-12
    )
    at = torch.from_numpy(theta)
    found = arrays(blocks(done, "curvature")[0], "curvature.npz")
    exact = torch.autograd.functional.hessian(plain.loss, at).numpy()
    assert np.allclose(found["hessian"], exact, atol=1e-10)
    each = torch.stack([torch.func.grad(plain.loss)(at, np.array([n])) for n in range(128)]).numpy()
    assert np.allclose(found["covariance"], np.cov(each.T, bias=True), atol=1e-10)


def test_the_score_can_be_recomputed_from_what_is_stored(done: Path) -> None:
    """Breaks when V is not the covariance of the runs' ends, when full weights and snapshots disagree, or when a name
    other programs rely on is gone."""
    cloud, score = arrays(blocks(done, "sgd_cloud")[0], "cloud.npz"), arrays(blocks(done, "score")[0], "score.npz")
    weights = np.load(blocks(done, "sgd_cloud")[0] / "weights.npy", mmap_mode="r")
    gd = arrays(blocks(done, "gd")[0], "theta.npz")["theta"]
    assert weights.shape == (RUNS, STEPS + 1, 386) and (weights[:, 0] == gd).all()
    assert (weights[:, -1] == cloud["snapshots"][-1]).all()
    assert np.allclose(np.cov(weights[:, -1].T), score["V"], atol=1e-18, rtol=1e-9)
    assert {"V", "Vhat", "eigenvalues", "linear_Vhat"} <= score.keys() and score["Vhat"].shape == (386, 386)
    inside = (weights[:, cloud["steps"][2]] - gd) @ score["eigenvectors"]
    assert np.allclose(cloud["m2"][2], inside.var(0) * RUNS, rtol=1e-6, atol=1e-20)
    summary = json.loads((done / "report" / "summary.json").read_text())
    for name in ("log_correlation_all", "relative_error_all", "monte_carlo_floor"):
        assert summary[f"diffusion/lr=0.05/{name}"].keys() == {"value", "n", "low", "high", "method"}
    a, b = (np.einsum("ji,jk,ki->i", score["eigenvectors"], score[k], score["eigenvectors"]) for k in ("V", "Vhat"))
    live = b > 1e-12 * b.max()
    assert summary["diffusion/lr=0.05/relative_error_all"]["value"] == pytest.approx(
        np.sqrt(np.mean((a[live] / b[live] - 1) ** 2)), rel=1e-9
    )
    assert summary["diffusion/lr=0.05/monte_carlo_floor"]["value"] == pytest.approx((2 / (RUNS - 1)) ** 0.5)
    assert 0.7 < (a[live] / b[live]).mean() < 1.3 and 300 < live.sum() <= 386 - 9  # 9: what a softmax does not see


def test_two_predictions_of_one_cloud_are_both_reported(tmp_path: Path) -> None:
    """A grid over theory alone: the second cell has no runs of its own but its score. Fails when that cell is left out
    of the report or given the other's score, even while its own is missing, and when a cloud without runs is an error.
    """
    out = study(tmp_path / "out", "theory.closure=linear,gaussian", "stage=score", "runs=12")
    summary = json.loads((out / "report" / "summary.json").read_text())
    plan = json.loads((out / "plan.json").read_text())["blocks"]
    scores = {b["settings"]["theory"]["closure"]: out / "blocks" / b["key"] for b in plan if b["stage"] == "score"}
    assert len(blocks(out, "sgd_cloud")) == 1 and len(scores) == 2
    errors = []
    for closure, folder in scores.items():
        held = arrays(folder / "artifacts", "score.npz")
        a, b = (np.einsum("ji,jk,ki->i", held["eigenvectors"], held[k], held["eigenvectors"]) for k in ("V", "Vhat"))
        live = b > 1e-12 * b.max()
        errors.append(float(np.sqrt(np.mean((a[live] / b[live] - 1) ** 2))))
        told = summary[f"diffusion/lr=0.05/theory={closure}/relative_error_all"]["value"]
        assert told == pytest.approx(errors[-1], rel=1e-9)
    assert errors[0] != errors[1]
    (scores["gaussian"] / "done.json").unlink()
    results = store.load(out)
    assert [c.name for c in clouds_of(results, Stages.of(results))] == ["lr=0.05"]
    (blocks(out, "sgd_cloud")[0].parent / "done.json").unlink()
    build(store.load(out))


def test_validation_losses(done: Path) -> None:
    """Breaks when losses are not those of each run's end, or the mean model is not the mean of the weights."""
    found = arrays(blocks(done, "val_loss")[0], "losses.npz")
    cloud = arrays(blocks(done, "sgd_cloud")[0], "cloud.npz")
    data, plain = load_data(Mnist5k()), Plain()
    plain.x, plain.y = F.adaptive_avg_pool2d(data.x_test[:40].double(), 6).flatten(1), data.y_test[:40]
    ends = torch.from_numpy(cloud["snapshots"][-1])
    assert np.allclose(found["loss"][3], float(plain.loss(ends[3])), atol=1e-12)
    assert np.allclose(found["mean_model_loss"], float(plain.loss(ends.mean(0))), atol=1e-12)
    assert len(found["loss"]) == RUNS and found["loss"].std() > 0


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("theory.intervals=7", {"score"}),
        ("control.scaling=N/B", {"gd_control"}),
        ("hessians.every=1", {"hessians"}),
        ("cloud.looks=9", {"sgd_cloud", "gd_control", "val_loss", "score", "statistics", "language"}),
        ("hessians.runs=2", set()),
        ("optimizer.lr=0.01", {"hessians", "sgd_cloud", "gd_control", "val_loss", "score", "statistics", "language"}),
        ("reference.gd.steps=13", {*INPUTS} - {"sgd"}),  # stage language is of transformers, its key there all the same
        ("seed=3", {*INPUTS}),
        ("runs=61", {"val_loss", "score", "statistics", "language"}),
        ("processes=1", set()),
    ],
)
def test_a_setting_reruns_what_depends_on_it_and_nothing_else(setting: str, stages: set[str]) -> None:
    def keys(*more: str) -> dict[str, str]:
        given = {word.split("=")[0] for word in more}
        resolved = resolve("diffusion", [*(w for w in SMALL if w.split("=")[0] not in given), *more])
        return stage_keys(program_of(resolved.study).stages(resolved.cells[0]))

    before, after = keys(), keys(setting)
    assert {name for name in before if before[name] != after[name]} == stages


def test_one_stage_more_runs_and_a_changed_setting_continue_what_is_there(tmp_path: Path) -> None:
    """Breaks when a stage asked for alone runs others than those it needs, or when earlier blocks are made again."""
    out = study(tmp_path / "out", "stage=hessians", "runs=30")
    assert {p.parent.name for p in blocks(out, "gd")} and not blocks(out, "sgd_cloud")
    found = arrays(blocks(out, "hessians")[0], "hessians.npz")
    assert found["steps"].tolist() == [0, 2] and found["eigenvalues"].shape == (1, 2, 386)
    assert np.allclose(found["mean_hessian"][0], found["mean_hessian"][0].T)
    first = {p: p.stat().st_mtime_ns for p in (out / "blocks").glob("*/done.json")}
    study(out, "runs=30")
    study(out, "runs=34", "theory.intervals=2", "hessians.runs=3")
    assert all(p.stat().st_mtime_ns == at for p, at in first.items())
    assert sorted(len(arrays(p, "cloud.npz")["runs"]) for p in blocks(out, "sgd_cloud")) == [4, 30]
    assert int(arrays(blocks(out, "score")[-1], "score.npz")["runs"]) == 34
    more = arrays(blocks(out, "hessians")[1], "hessians.npz")  # of the second and third member, whose batches differ
    assert more["mean_hessian"].shape == (2, 386, 386) and np.ptp(more["eigenvalues"][:, 0, -1]) > 1e-3


def test_a_cloud_that_was_interrupted_ends_the_same(tmp_path: Path, done: Path) -> None:
    """Breaks when a checkpoint of a stage lacks what was looked at before it."""
    out = tmp_path / "out"
    whole = blocks(done, "sgd_cloud")[0].parent.name
    plan = json.loads((done / "plan.json").read_text())
    needed = [key for b in plan["blocks"] if b["key"] == whole for keys in b["needs"].values() for key in keys]
    for name in ("descentlab.json", "plan.json", "resolved.jsonl", "study.yaml"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes((done / name).read_bytes())
    for key in needed:
        (out / "blocks").mkdir(exist_ok=True)
        (out / "blocks" / key).symlink_to(done / "blocks" / key)
    made = []
    assert run_block(out, whole, tick=made.append, stop=lambda: len(made) >= 6) == "interrupted"
    assert run_block(out, whole) == "done"
    a, b = (arrays(d / "blocks" / whole / "artifacts", "cloud.npz") for d in (done, out))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    x, y = (np.load(d / "blocks" / whole / "artifacts" / "weights.npy") for d in (done, out))
    assert np.array_equal(x, y)


def test_every_figure_is_drawn(done: Path) -> None:
    """Breaks when a stage's figure is lost; a quick study leaves most of them out."""
    results = store.load(done)
    made = build(replace(results, spec={**results.spec, "size": "default"}))
    names = {figure.name for figure in made.figures()}
    assert names >= {"agreement", "whitened", "modes-lr-0.05", "components", "fans", "test-losses", "loss", "process"}
    assert names >= {"gradient-norm", "eigenvalues", "alignment"}
    assert len({figure.name for figure in build(results).figures()}) < len(names)


def test_the_table_has_every_stage_and_every_run(done: Path) -> None:
    results = store.load(done)
    counts = {role: rows["run"].n_unique() for (role,), rows in results.frame.group_by("role")}
    assert counts == dict.fromkeys(set(INPUTS) - {"language"}, 1) | {"sgd_cloud": RUNS}
    assert {row["status"] for row in results.status} == {"done"}


def test_a_model_too_large_for_a_matrix_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bytes\. top_k and spectral_density need no matrix"):
        study(tmp_path / "out", "model.hidden=[400]", "stage=curvature", "reference.sgd.epochs=1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["sampler=full"],
            r"sampler = 'full': expected shuffle or replacement; gradient descent is the stage gd_control",
        ),
        (["schedule=cosine", "schedule.steps=5"], r"schedule = 'cosine': expected constant"),
        (["cloud.snapshots=[5,500]"], r"cloud.snapshots = 500: expected steps up to cloud.steps = 105"),
        (["stage=hesians"], r"stage = 'hesians': expected .*hessians"),
        (["preset=exp1-5"], r"preset = 'exp1-5': expected one of .*exp1-4"),
    ],
)
def test_mistakes(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve("diffusion", ["size=quick", *words])


def test_a_set_up_with_a_missing_or_unknown_key_is_one_error() -> None:
    """Breaks when a published file is taken with defaults in the place of what it does not say."""
    whole: dict[str, Any] = dict.fromkeys(("DATASET_VAL",), "mnist") | {
        **{"DATASET_TRAIN": "mnist", "MODEL": "mlp", "SAMPLE_SIZE": 6400, "BATCH_SIZE": 64, "LR": 0.1, "SEED": 42},
        **{"EPOCHS_SGD": 10, "EPOCHS_GD": 10, "HESSIAN_STEPS": 5, "MANY_RUNS_SAMPLES": 4, "MANY_RUNS_STEPS": 9},
        **{"LRS_LIST": [0.1], "DATALOADER": "default", "GD_SCALING": "N/B", "DTYPE": "float32", "DEVICE": "cpu"},
    }
    made = settings(whole, "x.yaml")
    assert made["control"] == {"scaling": "B/N"} and made["cloud"] == {"steps": 8} and made["sampler"] == "shuffle"
    with pytest.raises(UserError, match=r"x.yaml = 'DTYPE': expected a set-up with all of .*; this key is missing"):
        settings({k: v for k, v in whole.items() if k != "DTYPE"}, "x.yaml")
    with pytest.raises(UserError, match=r"x.yaml = 'DTPYE': expected only keys of a set-up.*'DTYPE'"):
        settings({**whole, "DTPYE": 1}, "x.yaml")
    with pytest.raises(UserError, match=r"x.yaml: MODEL = 'mpl': expected one of mlp, cnn, nanogpt"):
        settings({**whole, "MODEL": "mpl"}, "x.yaml")


def text_stub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tinyshakespeare be a text written here."""
    monkeypatch.setenv("DESCENTLAB_DATA", str(folder))
    source = sources.TINYSHAKESPEARE
    (folder / source.files[0].path).write_text(TEXT)
    checksum = f"sha256:{hashlib.sha256(TEXT.encode()).hexdigest()}"
    own = replace(source, files=(replace(source.files[0], checksum=checksum),))
    for module in [m for n, m in sys.modules.items() if n.startswith("descentlab.workloads.datasets")]:
        if getattr(module, "TINYSHAKESPEARE", None) is source:
            monkeypatch.setattr(module, "TINYSHAKESPEARE", own)


TEXT = "First Citizen:\nBefore we proceed any further, hear me speak. " * 40


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.yaml")))
def test_every_published_set_up_runs_to_its_report(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a thousandth of its size, on images that need no download and a text written here."""
    preset = STUDY.presets[name]
    words = [f"preset={name}", "scale=0.0005", "batch_size=8", "optimizer.lr=0.01", "processes=1", "hessians.every=2"]
    if preset["dataset"]["name"] == "mnist":
        words.append("dataset=mnist5k")
    if preset["dataset"]["name"] == "tinyshakespeare":
        text_stub(tmp_path, monkeypatch)
        words.append("dataset.characters=900")
    if name == "exp1-4":
        words.append("dataset.n=40")
    out = tmp_path / "out"
    assert api.run(resolve("diffusion", words), out, launcher="local") == 0
    assert "diffusion/theta/critical" in json.loads((out / "report" / "summary.json").read_text())
    assert store.load(out).spec["dtype"] == preset["dtype"]


def test_the_table_scores_every_prediction(done: Path) -> None:
    """Closure, linear, continuous time and the published formula, each recomputed here from the stored matrices."""
    (table,) = [
        b for s in build(store.load(done)).sections for b in s.blocks if hasattr(b, "rows") and len(b.rows) == 4
    ]
    names = [row[1] for row in table.rows]
    assert names == ["gaussian closure", "linear", "continuous time (Ornstein-Uhlenbeck)", "published: stationary"]
    score, curvature = (arrays(blocks(done, s)[0], f"{s}.npz") for s in ("score", "curvature"))
    u, values = curvature["eigenvectors"], curvature["eigenvalues"]
    noise = np.diag(u.T @ curvature["covariance"] @ u) / BATCH
    measured, closure = (np.diag(u.T @ score[k] @ u) for k in ("V", "Vhat"))
    live = closure > 1e-12 * closure.max()
    gone = np.abs(values) * 0.05 * STEPS < 1e-9
    grown = np.where(gone, 0.05 * STEPS, -np.expm1(-2 * values * 0.05 * STEPS) / np.where(gone, 1, 2 * values))
    for row, variance in (
        (table.rows[2], 0.05 * noise * grown),
        (table.rows[3], 0.05 * noise / (2 * np.abs(values) + 1e-6)),
    ):
        ratio = measured[live] / variance[live]
        assert row[5] == pytest.approx(np.sqrt(np.mean((ratio - 1) ** 2)), rel=1e-6)
        assert row[4] == pytest.approx(np.corrcoef(np.log(measured[live]), np.log(variance[live]))[0, 1], rel=1e-6)
