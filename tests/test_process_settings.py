"""``engine=process`` as a setting: what it refuses and how, run ids, and a whole run with its table and its log."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

import descentlab as dl
from descentlab.cluster.timeline import RecordedTimeline
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.engine.journal import read_ticks
from descentlab.engine.recorder import Recorder
from descentlab.engine.virtual import Virtual
from descentlab.launch.block import build_engine, open_block
from descentlab.launch.build import build_parts
from descentlab.launch.notices import measured_time
from descentlab.launch.plan import make_plan
from descentlab.store import RunDirectory
from descentlab.studies.asynchrony.program_paths import recorded

PLAIN = ["dataset=digits", "fault=none", "compressor=none", "optimizer=sgd", "replicates=1", "dtype=float64"]
REAL = [*PLAIN, "engine=process", "timeline=asynchronous", "timeline.delay=constant", "timeline.delay.mean_s=0"]


def given(settings: list[str]) -> list[str]:
    """:data:`REAL`, and instead of its own what ``settings`` say."""
    keys = [setting.partition("=")[0] for setting in settings]
    kept = [own for own in REAL if not any(own.startswith((f"{key}=", f"{key}.")) for key in keys)]
    return [*kept, *settings]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["engine=proces"], r"engine = 'proces': expected one of process, virtual.*did you mean 'process'"),
        (["engine=my.module:Engine"], r"engine = 'my.module:Engine': expected one of process, virtual"),
        (["engine.timeout_s=0"], r"engine.timeout_s = 0: expected a value greater than 0"),
        (["engine.timeout_s=-1"], r"engine.timeout_s = -1: expected a value greater than 0"),
        (["engine.start_timeout_s=soon"], r"engine.start_timeout_s = 'soon': expected a number"),
        (["engine.restarts=-1"], r"engine.restarts = -1: expected a value greater than or equal to 0"),
        (["engine.port=70000"], r"engine.port = 70000: expected a value less than or equal to 65535"),
        (["engine.memory=disk"], r"engine.memory = 'disk': expected one of auto, shared, socket"),
        (["engine.transport=mpi"], r"engine.transport = 'mpi': expected one of local, ray"),
        (
            ["engine.interface=nosuch0"],
            r"engine.interface = 'nosuch0': expected a network interface of this machine \(",
        ),
        (["engine.delay=1"], r"engine.delay = 1: expected a setting of"),
        (["workers=1", "timeline=barrier"], r"workers = 1: expected at least 2 beside timeline = barrier"),
        (["timeline=constant"], r"engine = 'process': .*timeline:constant: staleness of real processes is whatever"),
        (["fault=N16_RD"], r"engine = 'process': .*fault:N16_RD: .*use engine virtual"),
        (["compressor=powersgd"], r"engine = 'process': .*compressor:powersgd: .*use engine virtual"),
        (["arm=skip"], r"engine = 'process': .*arm:skip: .*use engine virtual"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_one_clear_line(settings: list[str], line: str) -> None:
    """Before anything runs: the key, the value, what would have been right."""
    with pytest.raises(UserError, match=rf"^{line}"):
        make_plan(resolve("crossed", given(settings)), {})


def test_only_the_name_is_part_of_a_runs_identity() -> None:
    """Ids of virtual runs are those from before there was a choice; time limits and transports change none.

    Broken by a default that enters the id, or a process run under the id of a virtual one.
    """

    def ids(*settings: str) -> list[str]:
        return [run.id for run in resolve("crossed", [*PLAIN, "timeline=asynchronous", *settings]).runs]

    assert ids("engine=virtual") == ids()
    real = ids("engine=process")
    assert real != ids() and real == ids("engine=process", "engine.timeout_s=1", "engine.memory=socket")


def test_a_whole_run(tmp_path: Path) -> None:
    """Two servers one after the other; rows as the virtual engine gives, with wall time and measured staleness; the log
    of each, replayed on the virtual clock, gives the losses in the table.

    Staleness counted from the current version, or two runs packed into one block, would fail.
    """
    settings = given(["replicates=2", "workers=2", "steps=30", "observe.extra=[weight_norm]"])
    dl.run("crossed", *settings, out=tmp_path / "out")
    directory, results = RunDirectory.open(tmp_path / "out"), dl.load(tmp_path / "out")
    assert [row["status"] for row in results.status] == ["done", "done"]
    for key in directory.block_keys():
        ticks = read_ticks(directory.block_folder(key) / "timeline.jsonl")
        block, cell = open_block(directory, key)
        rows = results.frame.filter(pl.col("run") == block.plan.runs[0].id)
        assert rows["staleness"].to_list() == [t - tick.versions[0] for t, tick in enumerate(ticks)]
        assert rows["worker"].to_list() == [tick.workers[0] for tick in ticks]
        assert rows["virtual_s"].to_list() == [tick.time_s for tick in ticks] and rows["wall_s"].is_sorted()
        drawn = recorded(tmp_path / "out", block.plan.runs[0].id, 20)  # what the report draws
        assert [(time_s, workers) for time_s, workers, _ in drawn] == [(t.time_s, t.workers) for t in ticks[:20]]
        replay = Virtual(block.plan, build_parts(cell, "vmap"), timeline=RecordedTimeline(ticks))
        for _ in replay.run():
            pass
        columns, _ = replay.recorder.flush()
        norm = sum(float(p.square().sum()) for p in replay.state.params.values()) ** 0.5
        assert rows["weight_norm"][-1] == pytest.approx(norm)
        for name in ("train_loss", "grad_norm", "weight_gap", "weight_norm"):
            assert columns[name].to_list() == pytest.approx(rows[name].to_list(), rel=1e-9, abs=1e-12)
        assert rows["test_accuracy"][-1] == pytest.approx(columns["test_accuracy"][-1])


def test_the_timeline_decides_who_waits() -> None:
    """Gradients per update and the bound, from the settings. Broken by a timeline that is ignored."""
    expected = {"asynchronous": (1, None), "bounded": (1, 3), "softsync": (2, None), "barrier": (4, None)}
    for name, waiting in expected.items():
        resolved = resolve("crossed", [*PLAIN, "engine=process", f"timeline={name}", "workers=4", "steps=5"])
        plan, _ = make_plan(resolved, {})
        from descentlab.launch.plan import read_block

        engine = build_engine(read_block(plan["blocks"][0]), resolved.cells[0], None, 0, Recorder())
        assert (engine.quorum, engine.bound) == waiting  # type: ignore[attr-defined]


def test_a_computing_time_that_processes_do_not_keep_is_said() -> None:
    """Silence would read as if workers slept for it."""
    set_ = ["cost.compute_s=0.02"]
    (line,) = measured_time(resolve("asynchrony", ["engine=process", *set_]).cells)
    assert line.startswith("cost.compute_s = 0.02 is for the virtual clock")
    assert measured_time(resolve("asynchrony", set_).cells) == []
