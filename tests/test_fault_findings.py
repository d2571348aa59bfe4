"""Faults in networks with and without BatchNorm, end to end: what breaks, what the report calls it, which tensors."""

from __future__ import annotations

import json

import polars as pl
import pytest
import torch
from torch import nn

import descentlab as dl
from descentlab import core, store
from descentlab.analysis.results import CORRUPT
from descentlab.observe.corruption import Corruption
from descentlab.studies.recovery.corruption import corrupt_shares, corruption_figure
from descentlab.studies.recovery.report import answer
from descentlab.testing import check_observable

STEPS = 50  # what a label needs


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> store.Results:
    """16 values of 1e30 in the second convolution at step 30; both networks, SGD with momentum and Adam."""
    fault = ["fault=N16_RD", "fault.value_mode=fixed", "fault.value=1e30", "fault.step=30", "fault.layer=conv2"]
    more = ["size=quick", "cases=1", f"recovery_steps={STEPS}", "observe.evaluate_every=10"]
    grid = ["optimizer=sgd,adam", "model.batch_norm=true,false", "observe.extra=[corruption]"]
    return dl.run("recovery", *fault, *more, *grid, out=tmp_path_factory.mktemp("norm") / "out", launcher="local")


def rate(study: store.Results, condition: str, label: str) -> float:
    summary = json.loads((study.path / "report" / "summary.json").read_text())
    return summary[f"recovery/{condition}/outcome/{label}"]["value"]


def test_without_batchnorm_the_run_goes_non_finite_where_the_other_does_not(study: store.Results) -> None:
    """Done-line (c) of the fault laboratory, for SGD: the activation goes on to the next gradient and the weights are
    moved by it; BatchNorm divides it away. Adam's update is bounded whatever the gradient, so it stays finite: there
    the second moment overflows instead and those weights never move again."""
    runs = study.frame.filter(pl.col("role") == "fault")
    bad = runs.group_by("optimizer", "model.batch_norm").agg(
        (pl.col("nonfinite_params") > 0).any().alias("weights"), pl.col("slot_max").is_infinite().any().alias("slot")
    )
    found = {(o, n): (w, s) for o, n, w, s in bad.iter_rows()}
    assert found["sgd", False][0] and not found["sgd", True][0]
    assert found["adam", False] == (False, True) and found["adam", True] == (False, False)
    assert rate(study, "sgd,batch_norm=false", "ImmediateInfNan") == 1.0


def test_with_batchnorm_the_report_says_low_test_accuracy(study: store.Results) -> None:
    """Done-line (b): training goes on as normal, the running variance is what is broken."""
    for optimizer in ("sgd", "adam"):
        assert rate(study, f"{optimizer},batch_norm=true", "LowTestAccuracy") == 1.0
    text = (study.path / "report" / "report.md").read_text()
    assert "outcomes: LowTestAccuracy 1" in text


def test_the_report_shows_corruption_by_layer(study: store.Results) -> None:
    """After SGD without BatchNorm all weights are lost; with BatchNorm none is; Adam's gradient is, its weights not."""
    recovery = answer(study).recovery
    shares = corrupt_shares(recovery, study)
    worst = {
        (condition, kind): share
        for condition, kind, share in shares.group_by("condition", "kind").agg(pl.col("share").max()).iter_rows()
    }
    assert worst["sgd,batch_norm=false", "weights"] == worst["sgd,batch_norm=false", "gradient"] == 1.0
    assert worst["sgd,batch_norm=true", "weights"] == worst["adam,batch_norm=true", "gradient"] == 0.0
    assert worst["adam,batch_norm=false", "weights"] == 0.0 < worst["adam,batch_norm=false", "gradient"] < 1.0
    assert "## Corruption by layer" in (study.path / "report" / "report.md").read_text()
    assert len(corruption_figure(recovery, shares).axes) == 2


def test_the_observable_counts_by_hand() -> None:
    """NaN, infinity and beyond 1e6 count, 1e6 itself does not."""
    check_observable(Corruption(), shipped=True)
    assert CORRUPT == core.corrupt.CORRUPT
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 5))
    with torch.no_grad():
        model[2].weight.fill_(1.0).view(-1)[:4] = torch.tensor([float("nan"), float("-inf"), 2e6, 1e6])
        model[0].weight.fill_(0.0)
        model[0].bias.copy_(torch.tensor([1.0, 0.0, 0.0, -1e7]))
    with dl.corruption(model) as counts:
        model(torch.zeros(3, 2))
    assert counts.weights == {"0.weight": (0, 8), "0.bias": (1, 4), "2.weight": (3, 20), "2.bias": (0, 5)}
    assert counts.activations == {"0": (3, 12), "1": (0, 12), "2": (3, 15)}  # NaN in the first of five outputs
    assert counts.share() == 4 / 37 and counts.beyond() and not counts.beyond(0.2)
    assert not model[0]._forward_hooks
