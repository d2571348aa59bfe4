"""Which runs share a block, and that a run does not notice: alone, in slices or among many settings, the same bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from descentlab.config.resolve import resolve
from descentlab.engine.batched_cnn import BatchedCnn
from descentlab.engine.batched_mlp import BatchedMlp
from descentlab.engine.native import kernel
from descentlab.engine.program import RunPlan
from descentlab.launch import api
from descentlab.launch.packing import pack
from descentlab.launch.plan import make_plan
from descentlab.store import equal_tables, load

SGD = ["optimizer=sgd", "dataset=digits", "steps=4"]


def blocks(*words: str, study: str = "training") -> list[dict[str, Any]]:
    last = {word.partition("=")[0]: word for word in words}
    return make_plan(resolve(study, list(last.values())), {})[0]["blocks"]


def shape(*words: str) -> list[tuple[int, int, str]]:
    """(runs, variants, update) of every block."""
    return [(len(b["runs"]), len(b["variants"]), b["update"]) for b in blocks(*words)]


@pytest.mark.parametrize(
    ("model", "replicates", "expected"),
    [
        (["model=mlp", "model.pool=0", "model.hidden=[16]"], 109, 1),  # 32 * (64 * 16 + 16 * 10) multiplications each
        (["model=mlp", "model.pool=0", "model.hidden=[16]"], 110, 2),
        (["model=mlp", "model.pool=0", "model.hidden=[256]"], 64, 2),
        (["model=flexible_cnn"], 64, 2),
        (["model=flexible_cnn"], 63, 1),
    ],
)
def test_a_second_process_has_to_be_worth_it(model: list[str], replicates: int, expected: int) -> None:
    """Small networks in compiled code are split from 2^22 multiplications of an update on, everything from 64 members
    on. Fails when the batch or a layer is not counted."""
    found = blocks(*SGD, "batch_size=32", *model, f"replicates={replicates}")
    assert len(found) == expected


MANY = ",".join(f"0.{i:02}" for i in range(1, 18))  # 17 numbers


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optimizer.lr=0.1,0.2"], [(6, 1, "slices")]),
        (["optimizer.momentum=0.5,0.9", "optimizer.lr=0.1,0.2"], [(12, 2, "slices")]),
        (["optimizer.momentum=0,0.9"], [(3, 1, "slices")] * 2),  # zero switches the buffer off
        (["optimizer={name: sgd, momentum: 0.9, nesterov: true},{name: sgd, momentum: 0.9}"], [(6, 2, "slices")]),
        (["schedule=constant,linear,cosine"], [(9, 3, "slices")]),
        (["schedule.warmup_steps=0,1,5", "schedule=linear"], [(9, 3, "slices")]),
        ([f"optimizer.lr={MANY}", "replicates=2"], [(34, 1, "vectorised")]),
        ([f"optimizer.momentum={MANY}", "replicates=2"], [(34, 17, "vectorised")]),
        (["optimizer=adamw,adam,rmsprop"], [(9, 3, "slices")]),  # few settings: of whatever class
        (["optimizer=sgd,adam"], [(3, 1, "slices")] * 2),  # without momentum one keeps no slots
        (["optimizer=adam,torch.optim:RAdam"], [(3, 1, "slices")] * 2),
        (["optimizer=adamw,adam", "observe.extra=[descentlab.observe.corruption:Corruption]"], [(3, 1, "slices")] * 2),
        (["optimizer=adamw,adam", f"optimizer.lr={MANY}", "replicates=2"], [(34, 1, "vectorised")] * 2),
        (["optimizer=adamw,adam", "model=flexible_cnn"], [(3, 1, "slices")] * 2),  # not to the bit the same
        (["batch_size=16,32"], [(3, 1, "slices")] * 2),
        (["seed=1,2"], [(3, 1, "slices")] * 2),
        (["dtype=float32,float64"], [(3, 1, "slices")] * 2),
        (["optimizer=torch.optim:Rprop", "optimizer.lr=0.1,0.2"], [(6, 1, "slices")]),
        (["optimizer=torch.optim:RAdam", f"optimizer.lr={MANY}", "replicates=2"], [(34, 1, "rescaled")]),
        (["optimizer=torch.optim:RAdam", "optimizer.options={eps: 1e-8},{eps: 1e-7}"], [(3, 1, "slices")] * 2),
        (["model=lenet5", "dataset=mnist5k", "optimizer.lr=0.1,0.2", "replicates=2"], [(2, 1, "slices")] * 2),
    ],
)
def test_the_stated_rule(words: list[str], expected: list[tuple[int, int, str]]) -> None:
    assert shape(*SGD, "replicates=3", *words) == expected


def test_members_of_one_setting_stand_side_by_side() -> None:
    words = ["optimizer.lr=0.1,0.2", "optimizer.momentum=0.5,0.9", "replicates=3"]
    (block,) = blocks(*SGD, *words)
    kinds = [(plan["variant"], plan["lr"]) for plan in block["plans"]]
    assert kinds == sorted(kinds) and len(set(kinds)) == 4
    cells = {
        run.id: resolve("training", [*SGD, *words]).cells[run.cell] for run in resolve("training", [*SGD, *words]).runs
    }
    for plan in block["plans"]:
        assert block["variants"][plan["variant"]]["optimizer"]["momentum"] == cells[plan["id"]].optimizer.momentum  # type: ignore[attr-defined]


def test_a_run_and_its_twin_stay_together() -> None:
    words = ["optimizer=sgd", "optimizer.lr=0.1,0.2", "cases=4", "model=mlp", "dataset=digits", "model.pool=0"]
    (block,) = blocks(*words, study="recovery")
    assert len(block["runs"]) == 16
    pairs = {(p["replicate"], p["lr"]): [] for p in block["plans"]}  # type: ignore[var-annotated]
    for p in block["plans"]:
        pairs[p["replicate"], p["lr"]].append(p["perturbed"])
    assert all(sorted(roles) == [False, True] for roles in pairs.values()) and len(pairs) == 8


def test_length_in_epochs_and_steps() -> None:
    one = blocks("dataset=digits", "epochs=1", "replicates=1")[0]["steps"]
    assert one == make_plan(resolve("training", ["dataset=digits", "replicates=1"]), {})[0]["blocks"][0]["steps"] / 5
    assert blocks("dataset=digits", "epochs=1", "batch_size=128", "replicates=1")[0]["steps"] == one // 2
    assert blocks("dataset=digits", "epochs=3", "sampler=full", "replicates=1")[0]["steps"] == 3
    assert blocks("dataset=digits", "steps=17", "replicates=1")[0]["steps"] == 17


def units(sizes: Sequence[int]) -> list[list[RunPlan]]:
    return [[RunPlan(f"{i}-{j}", i, 1, 0.1) for j in range(size)] for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([1] * 40, 250, [40]),
        ([1] * 100, 250, [50, 50]),
        ([1] * 600, 250, [200, 200, 200]),
        ([2] * 4, 5, [4, 4]),
        ([7, 1, 1], 5, [7, 2]),
        ([36] * 3, 250, [72, 36]),
        ([36] * 12, 500, [216, 216]),
        ([90, 90, 90], 100, [90, 90, 90]),
        ([1, 200], 250, [1, 200]),
        ([], 5, []),
    ],
)
def test_blocks_are_filled_evenly_and_units_stay_whole(sizes: list[int], most: int, expected: list[int]) -> None:
    packed = pack(units(sizes), most)
    assert [len(block) for block in packed] == expected
    assert [run.id for block in packed for run in block] == [run.id for unit in units(sizes) for run in unit]


def table(path: Path, *words: str) -> pl.DataFrame:
    if not path.exists():
        resolved = resolve("training", [*words, "observe.evaluate_every=0", "processes=1"])
        assert api.run(resolved, path, launcher="local", with_report=False) == 0
    return load(path).frame


MLP_386 = ["model=mlp", "dataset=mnist5k", "steps=12", "replicates=2"]
GRIDS = {
    "slices": ["optimizer={NAME}", "optimizer.lr=0.01,0.03", "{KEY}=0.5,0.9"],
    "vectorised": ["optimizer={NAME}", f"optimizer.lr={MANY}", "{KEY}=0.5,0.9"],
}
ALONE = ["optimizer={NAME}", "optimizer.lr=0.03", "{KEY}=0.9"]


@pytest.mark.parametrize(("name", "key"), [("sgd", "momentum"), ("rmsprop", "alpha")])
def test_mlp_386_is_the_same_to_the_bit_alone_in_slices_and_among_many_settings(
    tmp_path: Path, name: str, key: str
) -> None:
    """Invariant 1 across settings. Fails when a slice gets its neighbour's momentum, or its rate only by rescaling."""

    def words(grid: list[str]) -> list[str]:
        return [*MLP_386, *(w.format(NAME=name, KEY=f"optimizer.{key}") for w in grid)]

    alone = table(tmp_path / "alone", *words(ALONE))
    ids = alone["run"].unique().to_list()
    shared = [c for c in alone.columns if c != "cell"]
    for update, grid in GRIDS.items():
        many = table(tmp_path / update, *words(grid))
        plan = json.loads((tmp_path / update / "plan.json").read_text())
        assert {block["update"] for block in plan["blocks"]} == {update}
        same = many.filter(pl.col("run").is_in(ids))
        assert equal_tables(same.select(shared), alone.select(shared)) == []
        mine = (pl.col("optimizer.lr") == 0.03) & (pl.col(f"optimizer.{key}") == 0.9)
        assert sorted(many.filter(mine)["run"].unique()) == sorted(ids)
        assert (many["lr"] == many["optimizer.lr"]).all()  # what was used is what the configuration column says


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_optimizers_of_four_classes_side_by_side_are_the_same_to_the_bit_as_alone(tmp_path: Path, model: str) -> None:
    """Fails when a member is updated by its neighbour's rule, or gets its neighbour's slots; ``slot_max`` sees both."""
    words = [f"model={model}", "dataset=mnist5k", "steps=12", "replicates=2"]
    names = ["{name: sgd, momentum: 0.9}", "adam", "rmsprop", "adamw"]
    mixed = table(tmp_path / "mixed", *words, f"optimizer={','.join(names)}")
    plan = json.loads((tmp_path / "mixed" / "plan.json").read_text())
    if model == "cnn" and not plan["compiled"]:
        pytest.skip("no C compiler on this machine: the network is vectorised, optimizer by optimizer")
    assert [len(block["variants"]) for block in plan["blocks"]] == [4]
    for i, name in enumerate(names):
        alone = table(tmp_path / str(i), *words, f"optimizer={name}")
        shared = [c for c in alone.columns if c in mixed.columns and c != "cell"]
        same = mixed.filter(pl.col("run").is_in(alone["run"].unique().to_list()))
        assert {"slot_max", "grad_norm", "update_norm"} <= set(shared) and same.height == 24
        assert equal_tables(same.select(shared), alone.select(shared)) == []


@pytest.mark.parametrize("words", [["model=mlp"], ["model=cnn"], ["model=cnn", "workers=2"]])
def test_gradients_written_over_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """One worker lends the memory of its last gradient; of several nobody does."""
    if kernel(torch.float32) is None:
        pytest.skip("no C compiler on this machine: nothing is written over")
    words = [*words, "dataset=mnist5k", "steps=9", "replicates=2", "optimizer={name: sgd, momentum: 0.9}"]
    lent = table(tmp_path / "lent", *words)
    for kind in (BatchedMlp, BatchedCnn):
        monkeypatch.setattr(kind, "reuses", False)
    assert equal_tables(lent, table(tmp_path / "own", *words)) == []


def test_an_observable_of_somebody_elses_may_keep_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the next gradient is written over the one it holds: then nothing ever moves."""
    (tmp_path / "keeper.py").write_text(
        "import torch\n"
        "class Moved:\n"
        "    name, needs, last = 'moved', frozenset({'grad'}), None\n"
        "    def measure(self, m):\n"
        "        now = next(iter(m.grads.values()))\n"
        "        same = self.last is not None and torch.equal(now, self.last)\n"
        "        self.last = now\n"
        "        return {'same': torch.full((len(now),), float(same))}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["model=mlp", "dataset=mnist5k", "steps=5", "replicates=2", "observe.extra=[keeper:Moved]"]
    assert table(tmp_path / "run", *words)["same"].to_list() == [0.0] * 10


def test_schedules_are_each_members_own(tmp_path: Path) -> None:
    words = [*SGD, "replicates=2", "schedule={name: linear, steps: 8},{name: exponential, factor: 0.5}"]
    frame = table(tmp_path / "s", *words)
    for name, rate in (("linear", lambda t: 0.5 * (1 - t / 8)), ("exponential", lambda t: 0.5 * 0.5**t)):
        part = frame.filter(pl.col("schedule") == name)
        assert part.height == 8
        assert [abs(lr - rate(t)) < 1e-15 for t, lr in part.select("step", "lr").iter_rows()] == [True] * 8


def test_an_earlier_plan_is_continued_as_it_was() -> None:
    """Blocks already planned stay; a plan written before variants existed is read as one variant."""
    from descentlab.launch.plan import read_block

    words = [*SGD, "optimizer.momentum=0.5,0.9", "replicates=2"]
    known = make_plan(resolve("training", words), {})[0]
    more = make_plan(resolve("training", [*SGD, "optimizer.momentum=0.5,0.9,0.95", "replicates=2"]), known)[0]
    assert more["blocks"][: len(known["blocks"])] == known["blocks"] and len(more["blocks"][-1]["runs"]) == 2
    old = known["blocks"][0]
    old = {k: v for k, v in old.items() if k not in ("variants", "update")}
    old["plans"] = [{k: v for k, v in p.items() if k not in ("variant", "group")} for p in old["plans"]]
    block = read_block(old)
    assert (block.variants, block.update) == (({},), "slices") and {r.variant for r in block.plan.runs} == {0}
