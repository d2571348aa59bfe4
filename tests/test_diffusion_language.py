"""What the study says of a transformer's attention and embeddings, against loops and numbers written down here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_diffusion_study import study, text_stub

from descentlab.config.resolve import resolve
from descentlab.core.errors import StudyError, UserError
from descentlab.studies.diffusion import language_figures, program
from descentlab.studies.diffusion.program_language import QUANTITIES, attention_maps, language, marks, parts, quantities
from descentlab.workloads.models.nanogpt import NanoGPT


def model(layers: int = 2, heads: int = 2) -> NanoGPT:
    torch.manual_seed(0)
    made = NanoGPT(7, 5, 4, heads, layers, 6).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p))
    return made


def test_attention_maps_equal_a_loop_over_tokens() -> None:
    """Breaks when queries and keys, heads or layers are mixed up, or a later token is seen."""
    made, ids = model(), torch.randint(0, 7, (3, 5))
    found = attention_maps(made, ids)
    assert found.shape == (2, 2, 5, 5) and np.allclose(found.sum(-1), 1)
    x = made.token(ids) + made.position(torch.arange(5))
    for layer, block in enumerate(made.blocks):
        qkv = (block.norm1(x) @ block.attention.qkv.weight.T).detach()
        for head in range(2):
            q, k = qkv[..., 2 * head : 2 * head + 2], qkv[..., 4 + 2 * head : 6 + 2 * head]
            for a in range(5):
                rows = []
                for b in range(3):
                    weights = [math.exp(float(q[b, a] @ k[b, c]) / math.sqrt(2)) for c in range(a + 1)]
                    rows.append([w / sum(weights) for w in weights] + [0.0] * (4 - a))
                assert np.allclose(found[layer, head, a], np.mean(rows, axis=0))
        x = block(x)


def test_quantities_of_known_weights() -> None:
    made = model(layers=1, heads=1)
    even = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    with torch.no_grad():
        made.token.weight.zero_()
        made.token.weight[:2, 0] = torch.tensor([3.0, -3.0])  # one direction
        made.position.weight.zero_()
        made.position.weight[:, 1] = torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0])
    found = dict(zip(QUANTITIES, quantities(made, even[None, None]), strict=True))
    assert found["attention_entropy"] == pytest.approx(1.0)
    assert found["attention_previous"] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5]))
    assert found["token_rank"] == pytest.approx(1.0) and found["token_length"] == pytest.approx((18 / 7) ** 0.5)
    assert found["position_neighbours"] == pytest.approx((1 + 1 - 1 + 1) / 4)
    shifted = np.eye(5, k=-1)
    shifted[0, 0] = 1.0
    looking_back = dict(zip(QUANTITIES, quantities(made, shifted[None, None]), strict=True))
    assert looking_back["attention_entropy"] == 0 and looking_back["attention_previous"] == 1


def test_shares_follow_the_weights_and_runs_are_compared_with_theta() -> None:
    """Only the head's weights move: all spread is there. Breaks when a weight is counted to another group."""
    made, rng = model(), np.random.default_rng(0)
    theta = torch.cat([p.detach().flatten() for p in made.parameters()]).numpy()
    names, index = parts(made)
    assert names == ["token", "position", "norms", "attention", "hidden layers", "head"] and len(index) == len(theta)
    ends = np.repeat(theta[None], 30, axis=0)
    ends[:, index == names.index("head")] += rng.normal(size=(30, 28))
    start = index == names.index("position")
    ends[:, start] += rng.normal(size=(30, int(start.sum()))) * 1e-9
    ids, hessian = torch.randint(0, 7, (9, 5)), np.eye(len(theta))
    found = language(made, ids, [theta * 0.5, theta], [0, -1], ends, {"hessian": hessian})
    assert found["spread_share"][names.index("head")] == pytest.approx(1.0, abs=1e-6)
    assert np.allclose(found["curvature_share"], found["size"] / len(theta))
    table = language_figures.table({"x": (found, language_figures.items(found))})
    assert table.rows[2][1] == "token length" and table.rows[2][2] == pytest.approx(table.rows[2][3] / 2)
    assert {row[-1] for row in table.rows[4:5]} <= {"within noise", "rises", "falls"}
    assert language_figures.picture(found).get_axes()


def test_verdicts_are_corrected_for_the_number_of_quantities() -> None:
    """One of seven quantities has p = 0.02 by itself and 0.14 among seven; another is beyond doubt."""
    n, q = 9, len(QUANTITIES)
    shape = np.linspace(-1, 1, n)[:, None] * np.ones(q)
    error = shape[:, 0].std(ddof=1) / math.sqrt(n)
    shift = np.zeros(q)
    shift[1], shift[2] = 2.896 * error, -50 * error  # t of 8 degrees of freedom: p = 0.02
    found = {"quantities": np.array(QUANTITIES), "values": np.zeros((2, q)), "run_values": shape + shift}
    table = language_figures.table({"x": (found, language_figures.items(found))})
    low = table.rows[1][5].low
    assert low is not None and low > 0 and table.rows[1][6] == pytest.approx(6 * 0.02, rel=0.01)
    assert [row[-1] for row in table.rows] == ["within noise"] * 2 + ["falls"] + ["within noise"] * 4


def test_moments_of_training() -> None:
    assert marks(1) == [0, 1] and marks(10_000)[:4] == [0, 1, 2, 3] and marks(10_000)[-1] == 10_000


def test_an_image_network_has_no_attention() -> None:
    with pytest.raises(UserError, match=r"stage = 'language': expected another stage for model = mlp"):
        resolve("diffusion", ["size=quick", "stage=language"])


def test_the_stage_runs_and_its_moments_begin_at_the_initial_weights(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    text_stub(tmp_path, monkeypatch)
    words = ["dataset=tinyshakespeare", "dataset.characters=400", "model=nanogpt", "model.width=4", "stage=language"]
    out = study(tmp_path / "out", *words, "runs=6", "splits.train=train[:64]", "cloud.projections=3")
    (file,) = list((out / "blocks").glob("*/artifacts/language.npz"))
    with np.load(file) as held:
        found = dict(held)
    assert found["steps"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, -1] and found["run_values"].shape == (6, 7)
    assert found["values"][0, 0] > 0.99  # untrained: looks everywhere alike
    with np.load(next((out / "blocks").glob("*/artifacts/theta.npz"))) as held:
        assert held["path"].shape[1] == held["theta"].shape[0] if "path" in held else True


TEXT = ["dataset=tinyshakespeare", "dataset.characters=400", "model=nanogpt", "model.width=4", "stage=language"]
TEXT += ["runs=6", "splits.train=train[:64]", "cloud.projections=3"]


def test_a_cloud_without_runs_leaves_a_report_without_its_attention(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Every run diverges. Breaks when the stage takes means over no runs, or the report expects them."""
    text_stub(tmp_path, monkeypatch)
    out = study(tmp_path / "out", *TEXT, "optimizer.lr=1e30")
    (file,) = list((out / "blocks").glob("*/artifacts/language.npz"))
    with np.load(file) as held:
        assert dict(held) == {"runs": 0}
    text = (out / "report" / "report.md").read_text()
    assert "not finite" in text.replace("non-finite", "not finite") and "Attention and embeddings" not in text


def test_a_training_of_an_earlier_version_is_refused_in_one_line() -> None:
    """Breaks when what an earlier version did not keep ends in a KeyError."""

    class Given:
        cell, block = None, {}

        def workload(self, cell):  # type: ignore[no-untyped-def]
            return None

        def inputs(self, stage, name):  # type: ignore[no-untyped-def]
            ends = {"snapshots": np.zeros((1, 4, 2)), "snapshot_steps": np.array([9]), "runs": np.arange(4)}
            return [{**ends, "steps_per_epoch": np.array(3)}]

        def input(self, stage, name):  # type: ignore[no-untyped-def]
            return {"theta": np.zeros(2)}

    (cell,) = resolve("diffusion", ["size=quick", "runs=4", "sampler=shuffle"]).cells
    bench = Given()
    bench.cell = cell
    with pytest.raises(StudyError, match="stage sgd of this directory was computed by an earlier version"):
        program._language(bench, cell)
