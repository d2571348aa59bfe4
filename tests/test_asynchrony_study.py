"""The asynchrony study from the command's settings to its report: budgets, errors, names, verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import descentlab as dl
from descentlab.analysis.contrasts import HIGHER, IDENTICAL, LOWER
from descentlab.analysis.failures import Score, Scores
from descentlab.analysis.paired import paired_test
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.launch.conditions import timeline_of
from descentlab.launch.plan import make_plan
from descentlab.studies.asynchrony import figures, pictures, program, program_paths, report
from descentlab.studies.asynchrony.names import conditions
from descentlab.studies.asynchrony.outcomes import QUESTIONS, Outcomes, difference_name, outcomes, pairs
from descentlab.studies.asynchrony.presets import LEVELS, RECOMMENDED
from descentlab.studies.asynchrony.spec import STUDY, AsynchronySpec

SMALL = ["dataset=digits", "model=linear", "batch_size=16", "steps=40", "replicates=3", "observe.evaluate_every=10"]
GRID = ["timeline=barrier,asynchronous", "partition=sample,label", "optimizer.momentum=0,0.9", "optimizer.lr=0.1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study through the flat namespace: two timelines, two partitions, two momenta, the quick report."""
    out = tmp_path_factory.mktemp("asynchrony") / "out"
    (out.parent / "study.yaml").write_text(
        "study: asynchrony\npreset: bare\nsize: quick\ndataset: digits\nmodel: linear\n"
        "batch_size: 16\nsteps: 40\nworkers: 3\n"
        "observe: {every: 1, evaluate_every: 10}\noptimizer: {name: sgd, lr: 0.1}\n"
        "grid:\n  timeline: [barrier, asynchronous]\n  partition: [sample, label]\n  optimizer.momentum: [0, 0.9]\n"
    )
    dl.run(str(out.parent / "study.yaml"), "processes=1", out=out)
    return out


def test_the_report_answers_three_questions_first(finished: Path) -> None:
    """Question, then planned contrasts with Holm's correction, then a verdict for each; noise is called noise."""
    text = (finished / "report" / "report.md").read_text()
    places = [text.index(question) for question in QUESTIONS.values()]
    assert places == sorted(places) and max(places) < text.index("## Planned contrasts")
    assert "Holm p" in text and "within noise" in text
    for figure in ("curves", "contrasts_delay", "contrasts_partition", "contrasts_momentum", "gap", "staleness"):
        assert (finished / "report" / "figures" / f"{figure}.png").stat().st_size > 5000
    summary = json.loads((finished / "report" / "summary.json").read_text())
    for name in ("barrier,sample,m=0", "asynchronous,label,m=0.9"):
        item = summary[f"asynchrony/{name}/accuracy"]
        assert set(item) == {"value", "n", "low", "high", "method"} and item["n"] == 3
    names = [name for name in summary if name.startswith("asynchrony/contrast/")]
    assert len({name.split("/")[2] for name in names}) == 3


def test_each_question_is_a_family_of_its_own(finished: Path) -> None:
    """Holm's p by hand from the stored differences of one question; the report says how large each family is.

    Broken by one correction over all 16 contrasts, or by families that are not said.
    """
    results = dl.load(finished)
    made = report.build(results)
    shown = {str(row[0]): row[4] for row in made.contrasts.rows}  # type: ignore[union-attr]
    for question, own in report.families(pairs(outcomes(results))).items():
        tested = [paired_test(pair.differences, 0.05 / len(own)).p for pair in own]
        raw = np.array([1.0 if p is None else p for p in tested])
        order, running = np.argsort(raw), 0.0
        for rank, place in enumerate(order):
            running = max(running, min(1.0, (len(raw) - rank) * raw[place]))
            assert shown[own[place].name] == (None if tested[place] is None else pytest.approx(running))
        heads = [verdict for verdict in made.verdicts if verdict.text.startswith(QUESTIONS[question])]
        assert len(heads) == 1 and f"a family of {len(own)} contrasts" in heads[0].detail
        assert f"{len(own)} for {question}" in made.contrasts.caption  # type: ignore[union-attr]


def test_contrasts_are_paired_differences_of_the_table(finished: Path) -> None:
    """One contrast of each kind from the frame by hand: accuracy, the gap, and the difference of differences."""
    frame = dl.load(finished).frame.drop_nulls("test_loss")
    last = frame.filter(pl.col("step") == 39).sort("replicate")

    def of(timeline: str, partition: str, momentum: float) -> pl.DataFrame:
        keys = {"timeline": timeline, "partition": partition, "optimizer.momentum": momentum}
        return last.filter(*(pl.col(key) == value for key, value in keys.items()))

    summary = json.loads((finished / "report" / "summary.json").read_text())

    def value(name: str) -> float:
        return summary[f"asynchrony/contrast/{name}"]["value"]

    def accuracy(*where: Any) -> np.ndarray:
        return 100 * of(*where)["test_accuracy"].to_numpy()

    def gap(*where: Any) -> np.ndarray:
        part = of(*where)
        return (part["test_loss"] - part["train_set_loss"]).to_numpy()

    slow, wait = ("asynchronous", "barrier")
    found = value("delay/asynchronous \u2212 barrier (label,m=0.9)")
    assert found == pytest.approx((accuracy(slow, "label", 0.9) - accuracy(wait, "label", 0.9)).mean())
    assert value("momentum/gap of m=0.9 \u2212 m=0 (barrier,sample)") == pytest.approx(
        (gap(wait, "sample", 0.9) - gap(wait, "sample", 0.0)).mean()
    )
    both = [accuracy(t, "label", 0.0) - accuracy(t, "sample", 0.0) for t in (slow, wait)]
    assert value("partition/label \u2212 sample (asynchronous,m=0), less the same behind a barrier") == pytest.approx(
        (both[0] - both[1]).mean()
    )


def test_the_table_has_staleness_and_clocks(finished: Path) -> None:
    """A barrier is never stale; nobody waiting is W - 1 = 2 versions late in the mean, and faster per update."""
    frame = dl.load(finished).frame
    barrier, free = (frame.filter(pl.col("timeline") == name) for name in ("barrier", "asynchronous"))
    assert barrier["staleness"].max() == 0 and barrier["weight_gap"].max() == 0
    assert barrier["worker"].unique().to_list() == [-1] and set(free["worker"]) == {0, 1, 2}
    assert free["staleness"].mean() == pytest.approx(2.0, abs=0.25) and free["weight_gap"].mean() > 0
    assert free["virtual_s"].max() < barrier["virtual_s"].max() / 2
    assert barrier["samples"].max() == 3 * free["samples"].max() == 3 * 40 * 16


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["workers=11", "partition=label"], "workers = 11: expected at most 10 with partition = label"),
        (["workers=0"], "workers = 0: expected a value greater than 0"),
        (["delay=trace", "delay.path=nowhere.csv"], "delay.path = 'nowhere.csv': expected a readable file"),
        (["steps=10", "epochs=1"], "epochs = 1.0: expected only one of steps, samples, epochs, time_s; steps is given"),
        (["samples=10"], "samples = 10: expected at least one update"),
        (["time_s=0.001"], "time_s = 0.001: expected time for one update at least"),
        (
            ["timeline=barrier", "time_s=1", "delay=constant", "delay.mean_s=0", "cost.compute_s=0"],
            "1024 take 0 s",
        ),
        (["timeline=backup", "timeline.backup=5"], "timeline.backup = 5: expected fewer than workers = 5"),
        (["timeline=softsync", "timeline.splits=6"], "timeline.splits = 6: expected at most workers = 5"),
        (["timeline=round_robin"], "timeline = 'round_robin': expected asynchronous"),
        (["timeline=asynchronous", "timeline.delay=gamma"], "timeline.delay"),
        (["delay=gaussian", "delay.level=small", "delay.mean_s=0.2"], "mean_s = 0.2: expected no mean beside level"),
        (["local_steps=4"], "local_lr = None: expected a learning rate for local_steps = 4"),
        (["local_lr=0.1"], "local_lr = 0.1: expected null beside local_steps = 1"),
        (
            ["partition=sample", "sampler=replacement"],
            "partition = 'sample': expected shared beside sampler = replacement",
        ),
        (["partition=quantity", "partition.ratio=1e6"], "batch_size = 16: expected at most the 0 samples that worker"),
        (["partition=labels"], "did you mean 'label'?"),
        (["evaluate_on=[train]"], "a list with test"),
        (["worker_momentum=1"], "worker_momentum = 1"),
        (["engine=process", "worker_momentum=0.5"], "worker_momentum = 0.5: expected 0"),
        (["engine=process", "cost.latency_s=0.1"], "cost.latency_s = 0.1: expected nothing: real processes have"),
        (["engine=process", "engine.interface=nowhere0"], "nowhere0"),
    ],
)
def test_a_mistake_is_one_clear_error(settings: list[str], says: str) -> None:
    """Said before anything runs, with the key, the value and what was expected."""
    base = [word for word in SMALL if word.split("=")[0] not in {s.split("=")[0] for s in settings}]
    if any(word.split("=")[0] in ("epochs", "samples", "time_s") for word in settings) and "steps=10" not in settings:
        base = [word for word in base if not word.startswith("steps")]
    if not any(word.startswith("timeline") for word in settings):
        base.append("timeline=asynchronous")
    with pytest.raises(UserError) as raised:
        make_plan(resolve("asynchrony", ["preset=bare", *base, *settings]), {})
    assert says in str(raised.value)


def test_a_negative_trace_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("0.1\n-0.5\n")
    with pytest.raises(UserError, match=r"row 2, column 1 is -0\.5"):
        make_plan(resolve("asynchrony", ["preset=bare", *SMALL, "delay=trace", f"delay.path={file}"]), {})


def cell(*words: str) -> AsynchronySpec:
    """The one cell that these settings are."""
    return resolve("asynchrony", ["preset=bare", *SMALL, *words]).cells[0]


def test_budgets() -> None:
    """Equal updates, equal samples (a barrier's update takes 5 batches), equal passes, equal virtual time."""

    def updates(*words: str) -> int:
        given = [word for word in SMALL if not word.startswith("steps")]
        base = resolve("asynchrony", ["preset=bare", *given, *words]).cells[0]
        return program.horizon(base, ())[0]

    slow, wait = "timeline=asynchronous", "timeline=barrier"
    assert (updates(slow, "steps=80"), updates(wait, "steps=80")) == (80, 80)
    assert (updates(slow, "samples=8000"), updates(wait, "samples=8000")) == (500, 100)
    assert updates("timeline=softsync", "samples=8000") == 250
    assert updates(slow, "samples=8000", "local_steps=5", "local_lr=0.1") == 100
    n = len(program._data(cell()).x_train)
    assert updates(slow, "epochs=2") == 2 * n // 16
    constant = ["delay=constant", "delay.mean_s=0.1", "cost.compute_s=0.15"]
    assert (updates(wait, "time_s=10", *constant), updates(slow, "time_s=10", *constant)) == (40, 200)


def test_messages_have_the_size_of_the_weights() -> None:
    """64 x 10 + 10 weights of four bytes over 2,600 bytes/s: a second each way."""
    made = cell("timeline=barrier", "delay=constant", "delay.mean_s=0", "cost.compute_s=0", "cost.bytes_per_s=2600")
    assert program.ticks(made, 1)[0].time_s == pytest.approx(2.0)
    assert timeline_of(made, 2600) == program.timeline(made)


def test_class_counts_for_the_figure() -> None:
    """What the report draws: every training sample once by sample; whole by truncate=false; all to everyone shared."""
    n = len(program._data(cell()).x_train)
    by_sample = np.array(program.counts(cell("partition=sample").model_dump(mode="json")))
    assert by_sample.shape == (5, 10) and by_sample.sum() == n
    whole = np.array(program.counts(cell("partition=label", "partition.truncate=false").model_dump(mode="json")))
    assert whole.sum() == n and ((whole > 0).sum(0) == 1).all()
    assert np.array(program.counts(cell("partition=shared").model_dump(mode="json"))).sum() == 5 * n


def test_names_say_what_differs() -> None:
    cells = resolve("asynchrony", []).cells
    names = conditions([c.model_dump(mode="json") for c in cells])
    assert names[0] == "single,m=0" and "barrier,label,m=0.9" in names
    assert "asynchronous,small:only_slow2,sample,m=0" in names and len(set(names)) == len(names) == 14
    assert (
        difference_name("asynchronous,label,m=0.9", "barrier,label,m=0.9")
        == "asynchronous \u2212 barrier (label,m=0.9)"
    )


def test_published_presets() -> None:
    """Every script and all eleven recommendations; the numbers the document has."""
    recommended = [name for name in STUDY.presets if name.startswith("recommended_")]
    assert len(recommended) == len(RECOMMENDED) == 11
    cells = {name: resolve("asynchrony", [f"preset={name}"]).cells for name in STUDY.presets}
    assert {c.optimizer.momentum for c in cells["momentum"]} == {0.0, 0.5, 0.9, 0.99}
    assert {c.workers for c in cells["delay"]} == {2, 5, 10}
    assert {getattr(c.staleness_rule, "lam", None) for c in cells["compensation"]} == {None, 2.0, 5.0}
    assert {c.delay.level for c in cells["gaussian"]} == set(LEVELS)
    assert {c.model.name for c in cells["optimizers"]} == {"lenet5", "cnn1"}
    assert {c.timeline.name for c in cells["speed"]} == {"barrier", "asynchronous"}
    assert all(c.optimizer.lr == 0.005 and c.batch_size == 32 and c.epochs == 6 for c in cells["delay"])
    assert len(cells["claims"]) == 12 and {c.dataset.name for c in cells["claims"]} == {"mnist5k"}


def test_the_planned_contrasts_do_not_depend_on_the_data(finished: Path) -> None:
    """Of two timelines, partitions and momenta: 4 of each factor, and how two of them change without waiting."""
    summary = json.loads((finished / "report" / "summary.json").read_text())
    names = [name.removeprefix("asynchrony/contrast/") for name in summary if "/contrast/" in name]
    counts = {question: sum(name.startswith(question) for name in names) for question in QUESTIONS}
    assert counts == {"delay": 4, "partition": 4 + 2, "momentum": 4 + 2}
    assert {LOWER, HIGHER, IDENTICAL} == {"lower", "higher", "identical"}


def test_the_early_stop_mark_is_where_the_validation_loss_is_least(finished: Path) -> None:
    """The mark against the medians of the table; broken by the training loss, or the last evaluation, in its place."""
    results = dl.load(finished)
    cells = outcomes(results).cells[:3]
    picture = figures.validation(results.frame, cells)
    for ax, one in zip(picture.axes, cells, strict=False):
        part = results.frame.filter(pl.col("cell") == one.index).drop_nulls("validation_loss")
        medians = part.group_by("step").agg(pl.col("validation_loss").median()).sort("validation_loss")
        (mark,) = [line for line in ax.lines if line.get_marker() == "v"]
        assert list(mark.get_xdata()) == [medians["step"][0]]
        assert list(mark.get_ydata()) == [medians["validation_loss"][0]]


def test_trajectories_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were stored are the paths on the plane, ends where runs end; accuracy by class in a table.

    Broken by paths of another run or step, or by a plane of another loss.
    """
    words = [word for word in SMALL if not word.startswith("steps")]
    words += ["size=quick", "steps=12", "workers=2", "timeline=barrier,asynchronous", "processes=1"]
    words += ["observe.snapshots_every=4", "observe.extra=[per_class_accuracy]"]
    dl.run("asynchrony", "preset=bare", *words, out=tmp_path / "out")
    results = dl.load(tmp_path / "out")
    found = outcomes(results)
    names = {cell.runs[0]: cell.name for cell in found.cells}
    paths = program_paths.trails(tmp_path / "out", names)
    assert [held[0].tolist() for held in paths.values()] == [[0, 4, 8, 12]] * 2
    plane = program_paths.surface(found.cells[0].settings, paths)
    data = program._data(cell())
    x, y = data.x_train[: program_paths.SAMPLES].double(), data.y_train[: program_paths.SAMPLES]
    for path, (_, weights) in zip(plane.paths, paths.values(), strict=True):
        matrix, bias = torch.from_numpy(weights[-1]).double().split([640, 10])
        loss = torch.nn.functional.cross_entropy(x.flatten(1) @ matrix.view(10, 64).T + bias, y)
        assert path.loss[-1] == pytest.approx(float(loss)) and path.steps.tolist() == [0, 4, 8, 12]
    monkeypatch.setattr(pictures, "is_brief", lambda results: False)
    (section,) = pictures._trajectories(results, found.cells)
    assert section.blocks[0].name == "trajectories"  # type: ignore[union-attr]
    (table,) = report._by_class(found, report.cell_summary(found, results))
    rows = results.frame.filter(pl.col("cell") == 0, pl.col("step") == 11)
    assert [column.name for column in table.columns] == ["condition", *(f"class {k} (%)" for k in range(10))]
    column = "test_accuracy_class_3"
    assert table.rows[0][4].value == pytest.approx(100 * rows[column].mean())


def test_figures_of_the_cluster(finished: Path) -> None:
    """Bars of a worker end where its gradients arrive; class counts add up to the partition's."""
    settings = dl.load(finished).runs[-1]["settings"]
    updates, counts = program.updates(settings, 12), program.counts(settings)
    drawn = figures.timelines({"it": (3, updates)}).axes[0]
    marks = [line for line in drawn.lines if line.get_marker() == "|"]
    assert [len(line.get_xdata()) for line in marks] == [sum(w in who for _, who, _ in updates) for w in range(3)]
    slow = [(0.1 * (t + 1), (1,), 0.0) for t in range(40)] + [(4.05, (0,), 40.0), (8.0, (0,), 0.0)]
    assert figures.timelines({"it": (2, slow)}).axes[0].get_xlim()[1] > 8.0  # two updates of the slowest are seen
    bars = figures.class_counts({"label": counts}).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == np.array(counts).sum()


def test_failed_runs_count_at_chance_in_every_accuracy() -> None:
    """A run that failed with a good last row, and one that ended in NaN: neither flatters the mean nor removes it."""
    ends = {
        "a": {"train_set_accuracy": 0.8, "test_accuracy_class_3": 0.6},
        "b": {"train_set_accuracy": 0.9, "test_accuracy_class_3": 0.9},
        "c": {"train_set_accuracy": np.nan, "test_accuracy_class_3": np.nan},
    }
    scores = Scores({run: Score(run, "done" if run == "a" else "failed") for run in ends}, 2.3, 0.1)
    made = report._more(Outcomes([], scores, {}, ends), list(ends))
    assert made["train_accuracy"].value == pytest.approx((0.8 + 0.1 + 0.1) / 3) and made["train_accuracy"].n == 3
    assert made["class_3"].value == pytest.approx((0.6 + 0.1 + 0.1) / 3)
