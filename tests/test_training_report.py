"""The training report's tables per class and of time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

import descentlab as dl
from descentlab.store import Results
from descentlab.studies.training.report import build

WORDS = ["dataset=digits", "model=linear", "optimizer=sgd", "optimizer.lr=0.5", "steps=12"]


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("classes") / "out"
    return dl.run("training", *WORDS, "replicates=2", "observe.extra=[class_report]", out=out, launcher="local")


def test_each_class_as_scikit_learn_reports_it(classified: Results) -> None:
    """Recall, precision and support of the last evaluation against scikit-learn on the generator's own model.

    Broken on purpose: precision over the class's samples, or counts of the training set.
    """
    (last,) = (e for e in dl.train("training", *WORDS, "replicates=1", "observe.evaluate_every=0"))
    from descentlab.workloads.datasets.digits import load

    data = load()
    with torch.no_grad():
        called = last.model()(data.x_test).argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(data.y_test, called, zero_division=0)
    run = next(str(r["id"]) for r in classified.runs if r["replicate"] == 0)
    row = classified.frame.filter(pl.col("run") == run, pl.col("step") == 11)
    for name, expected in (("accuracy", recall), ("precision", precision), ("support", support)):
        found = [row[f"test_{name}_class_{k}"][0] for k in range(10)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    sections = {section.heading: section for section in build(classified).sections}
    table, figure = sections["Classes"].blocks
    assert [r[1] for r in table.rows] == list(range(10)) and [r[2] for r in table.rows] == support.tolist()
    both = classified.frame.filter(pl.col("step") == 11)
    for k, (_, _, _, shown, exact, harmonic) in enumerate(table.rows):
        means = [both[f"test_{name}_class_{k}"].mean() for name in ("accuracy", "precision")]
        assert (shown.value, exact.value) == pytest.approx(tuple(100 * m for m in means)) and shown.n == 2
        assert harmonic == pytest.approx(200 * means[0] * means[1] / sum(means))
    assert figure.name == "classes" and len(f1) == 10


def test_times_are_those_of_the_clock(classified: Results) -> None:
    (table,) = next(s for s in build(classified).sections if s.heading == "Time").blocks
    ((_, n, updates, seconds, per_step),) = table.rows
    ends = classified.frame.filter(pl.col("step") == 11)["wall_s"]
    assert (n, updates, seconds) == (2, 12, pytest.approx(ends.median()))
    assert per_step == pytest.approx(1e3 * seconds / 12)


def test_without_the_observable_there_are_no_classes(tmp_path: Path) -> None:
    found = dl.run("training", *WORDS, "replicates=1", out=tmp_path / "out", launcher="local")
    headings = [section.heading for section in build(found).sections]
    assert "Classes" not in headings and "Time" in headings
