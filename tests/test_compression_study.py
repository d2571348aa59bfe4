"""``descentlab run compression``: what it says is what the formulas say; virtual workers and real processes agree."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from small import builder, digits, finish, plan_of

import descentlab as dl
from descentlab.analysis.failures import final_scores
from descentlab.cluster.link_specs import SimulatedLinkSpec
from descentlab.comm.powersgd import numbers_sent
from descentlab.comm.specs import PowerSgd, TopKElements
from descentlab.config.adaptive_rank import DEAD, study_of
from descentlab.config.resolve import resolve, resolve_settings
from descentlab.core.errors import UserError
from descentlab.engine.lockstep import Lockstep
from descentlab.launch.plan import make_plan
from descentlab.observe.sending import Sending
from descentlab.optim.specs import Sgd
from descentlab.store import Results
from descentlab.studies.compression import prediction
from descentlab.studies.compression.figures import prediction as prediction_figure
from descentlab.studies.compression.figures import update_s
from descentlab.studies.compression.measures import Run, _gathers, by_link, runs_of
from descentlab.workloads.specs import Mlp

SMALL = ("dataset=digits", "model.hidden=[16]", "batch_size=16", "schedule=constant", "observe.evaluate_every=0")
SHAPES = {"w1": (16, 64), "b1": (16,), "w2": (10, 16), "b2": (10,)}  # digits, 64-16-10


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The shipped study at its smallest, as a user starts it."""
    out = tmp_path_factory.mktemp("compression") / "run"
    return dl.run("compression", "size=quick", "link.bandwidth_mbps=50", "link.latency_ms=2", out=out)


def summary(results: Results) -> dict[str, Any]:
    return json.loads((Path(results.path) / "report" / "summary.json").read_text())


def test_summary_names_and_counts(quick: Results) -> None:
    """Time and bytes by hand: 90 updates of 10 ms, and messages over a ring of two at 50 Mbit/s and 2 ms a hop.

    Broken on purpose: counting one worker's bytes, or the latency once for two messages.
    """
    found = summary(quick)
    shapes = {"w1": (128, 64), "b1": (128,), "w2": (128, 128), "b2": (128,), "w3": (10, 128), "b3": (10,)}
    for method, rank in (("none", None), ("rank_1", 1), ("rank_8", 8)):
        sizes = [sum(int(np.prod(s)) for s in shapes.values())] if rank is None else numbers_sent(shapes, rank)
        payload = 4 * sum(sizes)
        expected = 90 * (0.010 + 2 * 2e-3 * len(sizes) + 8 * payload / 50e6)
        assert found[f"compression/{method}/bytes_sent"]["value"] == 90 * 2 * payload
        assert found[f"compression/{method}/time_s"]["value"] == pytest.approx(expected)
        accuracy = found[f"compression/{method}/accuracy"]
        assert set(accuracy) == {"value", "n", "low", "high", "method"} and accuracy["n"] == 2
        assert 0.3 < accuracy["value"] <= 1
    assert {"compression/adaptive/accuracy", "compression/rank_8_minus_rank_1/accuracy"} <= set(found)


def test_accuracy_is_that_of_the_end(quick: Results) -> None:
    """Not of the best evaluation."""
    ends = quick.frame.filter(pl.col("step") == 89).group_by("method").agg(pl.mean("test_accuracy"))
    found = summary(quick)
    for method, accuracy in ends.iter_rows():
        assert found[f"compression/{method}/accuracy"]["value"] == pytest.approx(accuracy)


def test_the_report_has_its_figures(quick: Results) -> None:
    folder = Path(quick.path) / "report" / "figures"
    assert {path.stem for path in folder.glob("*.png")} == {"tradeoff", "ranks", "breakdown", "pays"}
    text = (Path(quick.path) / "report" / "report.md").read_text()
    assert "simulated clock" in text and "iterations/s" in text and "never the best epoch" in text


def test_when_it_pays_is_the_clock_s_own_time(tmp_path: Path) -> None:
    """At the link the runs had, the time of an update is the one they took: four workers, sums and gathered messages.
    The formula of the one for the other, or two workers for four, fails; so does a report that takes one cell's."""
    settings = [s for s in SMALL if s.split("=")[0] not in ("workers", "link", "observe.every")]
    cells = ["compressor=none,topk,sign,powersgd", "workers=4,3", "compute_ms=3", "observe.every=1"]
    link = "link={name: simulated, bandwidth_mbps: 5, latency_ms: 2}"
    found = dl.run(
        "compression", *settings, *cells, link, "steps=6", "replicates=1", out=tmp_path / "o", launcher="local"
    )
    methods = {str(run["id"]): str(run["labels"]["method"]) for run in found.runs}
    runs = runs_of(found, final_scores(found, [[run] for run in methods], 10), methods)
    assert sorted(run.workers for run in runs) == [3] * 4 + [4] * 4 and sum(run.gathers for run in runs) == 4
    for run in runs:
        assert update_s(run, 5.0, 0.002) == pytest.approx(run.time_s / run.steps, rel=1e-9), run.method
    text = (tmp_path / "o" / "report" / "report.md").read_text()
    assert "3 ms for a gradient" in text and "3 or 4 workers" in text


def run_over(rate: float, **link: Any) -> Run:
    """A run of two real processes, 10 updates."""
    name = link.pop("id", "r")
    link = {"name": "real", "bandwidth_mbps": rate, "ingress_mbps": None, "changes": {}, **link}
    sums = {"compute_s": 0.01}
    return Run(
        name, "none", 0, 10, 0.9, 1.0, 2e6, 10.0, sums, bandwidth_mbps=rate, measured_s=0.1, busy_s=0.01, link=link
    )


def test_links_that_differ_in_anything_are_told_apart() -> None:
    runs = [run_over(10), run_over(10, ingress_mbps=2), run_over(10, changes={"5": 1}), run_over(10), run_over(20)]
    found = by_link(runs)
    assert [len(own) for own in found.values()] == [1, 2, 1, 1] and len(found) == 4
    assert "10 Mbit/s, ingress_mbps 2, changes {}" in found
    assert list(by_link([run_over(10), run_over(10)])) == [""]


def test_a_prediction_is_of_the_slower_direction_and_of_one_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100000 bytes at 2 Mbit/s are 0.4 s, whichever direction is so slow; of a link that changes nothing is said."""
    monkeypatch.setattr(prediction, "latencies", lambda results: {"r": 0.0})
    (found,) = prediction.predictions(None, [run_over(10, ingress_mbps=2), run_over(10, changes={"5": 1})])  # type: ignore[arg-type]
    assert (found.bandwidth_mbps, found.n) == (2, 1) and found.predicted_s == pytest.approx(0.01 + 0.4)


def test_messages_of_older_tables_are_gathered_where_the_compressor_did_so() -> None:
    assert _gathers({}, "topk") and _gathers({"gathered": None}, "sign") and not _gathers({}, "powersgd")
    assert _gathers({"gathered": 3}, "powersgd") and not _gathers({"gathered": 0}, "topk")


def test_a_clock_of_an_older_checkpoint_goes_on_without_the_count_of_gathered_messages() -> None:
    """Its rows then do not claim one."""
    cell = digits(compressor=TopKElements())
    parts = builder(cell)()
    parts.link = SimulatedLinkSpec().build()
    engine = finish(Lockstep(plan_of(cell, 4), parts), until=2)
    before = int(engine.state.shared["link"].pop("gathered")[0])
    finish(engine)
    assert before > 0 and int(engine.state.shared["link"]["messages"][0]) == 2 * before
    assert set(Sending().measure(SimpleNamespace(state=engine.state))) == {"messages", "link_s"}  # type: ignore[arg-type]


def test_more_links_than_markers() -> None:
    figure = prediction_figure([prediction.Predicted("none", rate, 0.1, 0.1, 1) for rate in range(1, 13)])
    assert len(figure.axes) == 1


def test_an_adaptive_run_changes_its_rank(tmp_path: Path) -> None:
    """Columns ``rank`` and ``gradient_change``; the rank is high again right after the rate drops at update 150."""
    policy = "{name: accordion, low: 1, high: 4, interval: 1, warm_epochs: 1, lr_cooldown: 1, threshold: 5}"
    schedule = "schedule={name: multistep, milestones: [150], factor: 0.1}"
    settings = [s for s in SMALL if not s.startswith("schedule")]
    run = dl.run(
        "compression",
        *settings,
        schedule,
        f"compressor={{name: powersgd, policy: {policy}}}",
        "steps=180",
        "replicates=1",
        out=tmp_path / "run",
        launcher="local",
    )
    rank = run.frame.sort("step")["rank"].to_list()
    assert set(rank) == {1.0, 4.0} and rank[0] == 4.0 and rank[149] == 1.0 and rank[150] == 4.0
    assert run.frame["gradient_change"].is_finite().any()


def test_every_epoch_has_its_row(quick: Results) -> None:
    """Method, epoch, mean rank and gradient norm of its updates, over two replicates, by a sum of our own."""
    text = (Path(quick.path) / "report" / "report.md").read_text().split("Every epoch")[1]
    head, rows = (
        text.split("\n| method")[1].split("\n")[0],
        [line for line in text.splitlines() if "| adaptive |" in line],
    )
    names = ["method", *(name.strip() for name in head.strip(" |").split("|"))]
    own = quick.frame.filter(pl.col("method") == "adaptive")
    assert len(rows) == own["epoch"].n_unique() > 1
    for row in rows:
        found = dict(zip(names, (cell.strip() for cell in row.strip(" |").split("|")), strict=True))
        epoch = own.filter(pl.col("epoch") == int(found["epoch"]))
        assert float(found["rank"]) == pytest.approx(epoch["rank"].mean(), rel=1e-2)
        norms = epoch.group_by("run").agg(pl.mean("grad_norm"))["grad_norm"]
        assert float(found["gradient norm"]) == pytest.approx(norms.mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["compressor={name: powersgd, rank: 17}"], r"compressor.rank = 17: expected at most 16"),
        (["compressor={name: powersgd, policy: {name: accordion, high: 99}}"], "compressor.policy.high = 99"),
        (["compressor={name: powersgd, policy: {name: calibration, candidates: [1, 40]}}"], "policy.candidates = 40"),
        (["compressor={name: powersgd, policy: acordion}"], "did you mean 'accordion'"),
        (["compressor={name: powersgd, policy: budget}"], "one of kilobytes and milliseconds"),
        (["compressor={name: topk, fraction: 2}"], "fraction"),
        (["link=real", "engine=lockstep"], "which has no processes"),
        (["compressor=torch_powersgd"], "powersgd does the same here"),
        (["engine=process", "link=simulated"], "none or real beside engine = process"),
        (
            ["compressor=powersgd", "compressor.policy={name: calibration, accordion: {low: 40, high: 40}}"],
            "compressor.policy.accordion.low = 40: expected at most 16",
        ),
        (["link=simulate"], "did you mean 'simulated'"),
        (["link={name: real, jitter_ms: 2}"], "expected a latency_ms beside it"),
        (["epochs=2", "steps=5"], "steps or epochs, not both"),
    ],
)
def test_a_mistake_is_one_clear_error(settings: list[str], text: str) -> None:
    rest = [s for s in SMALL if s.split("=")[0] not in {t.split("=")[0] for t in settings}]
    with pytest.raises(UserError, match=text):
        make_plan(
            resolve(
                "compression",
                ["compressor=none", *rest, *settings] if "compressor" not in str(settings) else [*rest, *settings],
            ),
            {},
        )


# ---- real processes

REAL = (*SMALL, "dtype=float64", "replicates=1", "steps=60", "link=none", "checkpoint_s=0.01", "optimizer.lr=0.2")
POLICY = "{name: schedule, ranks: [3, 1, 2], steps: [20, 41]}"


def kill_one(folder: Path, killed: list[int], over: Event) -> None:
    """SIGKILL the second of the two processes once a checkpoint of them counts."""
    while not over.is_set() and not killed:
        if list(folder.glob("blocks/*/checkpoint.pt")):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    words = (process / "cmdline").read_bytes().split(b"\0")
                    own = dict(w.split(b"=", 1) for w in (process / "environ").read_bytes().split(b"\0") if b"=" in w)
                except OSError:
                    continue
                if str(folder).encode() in words and b"descentlab.launch.rank" in words and own.get(b"RANK") == b"1":
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.append(int(process.name))
                    return
        time.sleep(0.005)


def test_processes_equal_lockstep_through_a_kill_and_changes_of_rank(tmp_path: Path) -> None:
    """Two processes under torchrun; one is killed after a checkpoint, torchrun starts both again, and they end where
    lockstep ends: test loss and every averaged gradient's norm to 1e-9 (float64), bytes to the byte.

    Broken on purpose: a residual or a Q that is not in the checkpoint, or another worker's batches.
    """
    compressor = f"compressor={{name: powersgd, policy: {POLICY}}}"
    virtual = dl.run("compression", *REAL, compressor, out=tmp_path / "virtual", launcher="local").frame.sort("step")
    killed: list[int] = []
    over = Event()
    killer = Thread(target=kill_one, args=(tmp_path / "real", killed, over))
    killer.start()
    try:
        real = dl.run("compression", *REAL, compressor, "engine=process", out=tmp_path / "real", launcher="local")
    finally:
        over.set()
        killer.join()
    frame = real.frame.sort("step")
    assert killed and frame["step"].to_list() == list(range(60))
    np.testing.assert_allclose(frame["grad_norm"], virtual["grad_norm"], rtol=1e-9)
    np.testing.assert_allclose(frame["test_loss"][-1], virtual["test_loss"][-1], rtol=1e-9)
    assert frame["bytes_sent"].to_list() == virtual["bytes_sent"].to_list()
    assert frame["rank"].to_list() == virtual["rank"].to_list()
    assert (frame["collective_s"] > 0).all() and frame["virtual_s"].is_sorted()
    assert not list((tmp_path / "real").glob("blocks/*/meeting*"))
    lines = [json.loads(line) for line in (tmp_path / "real" / "events.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["kind"] == "environment"]  # at the start, and after the kill
    assert len(measured) == 2 and all(m["latency_s"] > 0 and m["bandwidth_mbps"] > 0 for m in measured)


# ---- what a reset would cost


CHANGE, AFTER = 120, 20  # updates before and after the change of rank


def losses_around_a_change(how: str) -> np.ndarray:
    """Loss on the training set after each update, ``[updates, 6 replicates]``, at a rate small enough for a smooth
    curve; rank 2 becomes 1 after ``CHANGE`` updates: ``kept``; ``owed``: what is owed is forgotten; ``reset``: all is,
    as if the compressor was made anew."""
    cell = digits(
        compressor=PowerSgd(rank=2),
        optimizer=Sgd(lr=0.02, momentum=0.9),
        model=Mlp(pool=0, hidden=[64, 64]),
        batch_size=32,
    )
    engine = Lockstep(plan_of(cell, CHANGE + AFTER, replicates=list(range(6))), builder(cell)())
    found = []
    for progress in engine.run():
        parts, state = engine.parts, engine.state
        if progress.step >= CHANGE - 30:
            measured = parts.evaluator.evaluate(state, parts.train[0][:1000], parts.train[1][:1000])[0]
            found.append(measured.numpy())
        if progress.step == CHANGE:
            state.shared.update(parts.compressor.resize(state.shared, 1, parts.streams))
            if how != "kept":
                for owed in state.worker["memory"]["residual"].values():
                    owed.zero_()
            if how == "reset":
                fresh = type(parts.compressor)(1).start(state.params, 2, parts.streams, engine.replicates)[1]
                state.shared["q"] = fresh["q"]
    return np.array(found)


def test_a_reset_dips_and_a_change_does_not() -> None:
    """Where the memory was kept, every one of six replicates' losses goes on falling through the change as it did
    before, at most a quarter faster or slower. Where it was reset, all six lie above that for the next 20 updates, by
    more than four standard errors; what makes it so is what was owed, for forgetting only that does the same.

    Broken on purpose: a ``resize`` that clears what is owed lets ``kept`` fall on ``reset``.
    """
    kept, reset, owed = (losses_around_a_change(how) for how in ("kept", "reset", "owed"))
    at = len(kept) - AFTER  # the first loss after the change
    assert (reset[:at] == kept[:at]).all()
    before, after = kept[at - 5] - kept[at - 1], kept[at - 1] - kept[at + 3]
    assert (np.abs(after / before - 1) < 0.25).all()
    for other in (reset, owed):
        shortfall = (other[at:] - kept[at:]).mean(0)
        assert (shortfall > 0).all() and shortfall.mean() > 4 * shortfall.std(ddof=1) / np.sqrt(6)


# ---- the other program's files

THEIRS = {
    "seed": 1,
    "model": {"name": "resnet18", "num_classes": 100},
    "dataset": {"name": "cifar100", "batch_size": 128},
    "training": {"epochs": 300, "learning_rate": 0.2, "nesterov": True, "scheduler": "multistep", "warmup_epochs": 5},
    "powerSGD": {"min_compression_rate": 2},
    "compression": {"start_power_iterations": 10, "base_rank": 4, "use_fixed_rank": True, "fixed_rank_value": 4},
}


def test_their_file_is_read() -> None:
    """195 updates an epoch; drops at epochs 155 and 255, five after its milestones, as its schedulers make them."""
    settings, notes = study_of(THEIRS)
    (cell,) = resolve_settings(settings).cells
    assert (cell.seed, cell.steps, cell.batch_size, cell.optimizer.lr) == (1, 300 * 195, 128, 0.2)
    assert cell.schedule.milestones == (155 * 195, 255 * 195) and cell.schedule.warmup_steps == 5 * 195
    assert (cell.compressor.rank, cell.compressor.start_iteration, cell.compressor.min_compression_rate) == (4, 10, 2)
    assert any("5 epochs after training.milestones" in note for note in notes)


def test_published_case_3_a_fixed_rank_is_clamped_to_its_bounds() -> None:
    """The other six cases are in test_compression_rules.py."""
    bounds = {"use_fixed_rank": True, "min_rank": 2, "max_rank": 4}
    ranks = [
        study_of({**THEIRS, "compression": {**bounds, "fixed_rank_value": rank}})[0]["compressor"]["rank"]
        for rank in (1, 3, 9)
    ]
    assert ranks == [2, 3, 4]


@pytest.mark.parametrize(
    ("compression", "extra", "policy"),
    [
        ({}, {"accordion": {"enable": True}}, "accordion"),
        ({"calibration": {"enable": True}}, {"accordion": {"enable": True}}, "calibration"),
        ({"rank_schedule": {"ranges": [{"start_epoch": 0, "end_epoch": 9, "rank": 4}]}}, {}, "schedule"),
    ],
)
def test_their_rules_are_ours(compression: dict[str, Any], extra: dict[str, Any], policy: str) -> None:
    """Omitting use_fixed_rank_after_calibration locks the rank there, and so it does here."""
    settings, _ = study_of({**THEIRS, **extra, "compression": compression})
    (cell,) = resolve_settings(settings).cells
    assert cell.compressor.policy.name == policy and cell.compressor.start_iteration == 100
    assert getattr(cell.compressor.policy, "then", "fixed") == "fixed"
    if policy == "schedule":
        assert (cell.compressor.policy.ranks, cell.compressor.policy.steps) == ([4, 1], [10])


@pytest.mark.parametrize("key", DEAD)
def test_a_dead_key_is_refused_by_name(key: str) -> None:
    room, name = key.split(".")
    with pytest.raises(UserError, match=f"{key} = .*never read it"):
        study_of({**THEIRS, room: {**THEIRS.get(room, {}), name: 1}})


def test_an_unknown_key_and_a_bad_value_are_said_at_once() -> None:
    wrong = {**THEIRS, "model": {"name": "resnet101", "depth": 3}}
    with pytest.raises(UserError, match=r"model.depth = 3"):
        study_of(wrong)
    with pytest.raises(UserError, match=r"model.name = 'resnet101': expected one of resnet18"):
        study_of({**wrong, "model": {"name": "resnet101"}})
