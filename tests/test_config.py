"""Settings: layers, grids, documents, run ids, and what a mistake says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import PositiveInt

from descentlab.config import identity, yaml12
from descentlab.config.grid import product
from descentlab.config.overrides import parse_overrides
from descentlab.config.resolve import Resolved, _resolve, resolve
from descentlab.config.rooms import entries, kinds
from descentlab.config.schema import flatten
from descentlab.config.tree import StudyDef, StudySpec
from descentlab.core.errors import UserError, nearest
from descentlab.core.specs import extent
from descentlab.studies import registry


def ids(resolved: Resolved) -> list[str]:
    return [run.id for run in resolved.runs]


def lines(study: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve(study, list(overrides))
    return str(caught.value).splitlines()


def written(tmp_path: Path, document: dict[str, Any]) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml12.dump(document))
    return path


# Layers -------------------------------------------------------------------------------------------------------------


class ToySpec(StudySpec):
    """A study's settings for these tests."""

    study: str = "toy"
    steps: PositiveInt = 5
    cases: PositiveInt = extent(2)


def toy_plan(cells: Sequence[ToySpec]) -> list[tuple[int, int, str, dict[str, Any]]]:
    return [(i, case, "plain", {"case": case}) for i, cell in enumerate(cells) for case in range(cell.cases)]


TOY = StudyDef(
    name="toy",
    question="Does it resolve?",
    spec=ToySpec,
    presets={
        "default": {"grid": {"optimizer": ["sgd", {"name": "adam", "eps": 1e-3}]}, "steps": 6},
        "own": {"options": {"optimizer": {"adam": {"lr": 0.5}}}, "grid": {"seed": [0, 1]}},
    },
    sizes={"quick": {"cases": 1, "observe": {"evaluate_every": 3}}, "default": {}},
    plan=toy_plan,
    options={"optimizer": {"adam": {"lr": 0.25, "betas": (0.8, 0.9)}}},
)


def toy(*overrides: str, file: dict[str, Any] | None = None) -> Resolved:
    return _resolve("toy", TOY, dict(file or {}), parse_overrides(overrides), 100)


def optimizers(resolved: Resolved) -> list[dict[str, Any]]:
    return [{"name": c.optimizer.name, "lr": c.optimizer.lr} for c in resolved.cells]


def test_layers_in_their_order() -> None:
    assert flatten(toy().cells[0])["steps"] == 6  # preset over class
    assert toy("size=quick").cells[0].observe.evaluate_every == 3  # size over preset
    assert toy("size=quick", file={"observe": {"evaluate_every": 7}}).cells[0].observe.evaluate_every == 7
    assert toy("observe.evaluate_every=9", file={"observe": {"evaluate_every": 7}}).cells[0].observe.evaluate_every == 9
    assert flatten(toy(file={"size": "quick"}).cells[0])["cases"] == 1


def test_an_option_by_name_takes_the_presets_defaults_then_the_studys_then_the_class() -> None:
    assert flatten(toy("optimizer=adam").cells[0])["optimizer.betas"] == [0.8, 0.9]
    own = flatten(toy("preset=own", "optimizer=adam").cells[0])
    assert (own["optimizer.lr"], own["optimizer.betas"]) == (0.5, [0.9, 0.999])
    assert optimizers(toy("optimizer=adamw")) == [{"name": "adamw", "lr": 1e-3}]
    assert optimizers(toy("optimizer={name: adam, eps: 1e-2}")) == [{"name": "adam", "lr": 0.25}]


def test_a_name_narrows_several_widen_and_an_edit_reaches_every_option() -> None:
    assert [o["name"] for o in optimizers(toy())] == ["sgd", "adam"]
    assert [o["name"] for o in optimizers(toy("optimizer=rmsprop,adam"))] == ["rmsprop", "adam"]
    assert [o["lr"] for o in optimizers(toy("optimizer.lr=0.125"))] == [0.125, 0.125]
    wide = optimizers(toy("optimizer.lr=1,2"))
    assert wide == [{"name": n, "lr": lr} for n in ("sgd", "adam") for lr in (1.0, 2.0)]


def test_arguments_mean_the_same_in_any_order() -> None:
    a = toy("optimizer=adam", "optimizer.lr=1e-3,1e-2", "steps=3")
    b = toy("steps=3", "optimizer.lr=1e-3,1e-2", "optimizer=adam")
    assert (ids(a), a.document) == (ids(b), b.document)
    assert [o["lr"] for o in optimizers(a)] == [1e-3, 1e-2]


def test_one_value_ends_a_grid_of_a_lower_layer() -> None:
    resolved = toy("seed=5", "preset=own")
    assert [cell.seed for cell in resolved.cells] == [5]
    assert "grid" not in resolved.document


def test_replacing_a_block_says_what_it_drops() -> None:
    assert toy("optimizer=adam").notes == ["optimizer=adam drops what was set for 'adam': eps = 0.001"]
    assert toy("optimizer={name: adam, eps: 1}").notes == []  # set anew
    assert toy("optimizer=adam", "optimizer.eps=1").notes == []
    assert toy("optimizer=sgd").notes == ["optimizer=sgd drops what was set for 'adam': eps = 0.001"]
    file = {"optimizer": {"name": "adam", "lr": 0.75}}
    assert toy("optimizer=sgd,adam", file=file).notes == ["optimizer=sgd,adam drops what was set for 'adam': lr = 0.75"]
    assert toy("optimizer=sgd", file={"optimizer": "adam"}).notes == []  # it was as the study has it
    wide = {"grid": {"optimizer.lr": [1, 2]}, "optimizer": "adam"}
    assert toy("optimizer=sgd", file=wide).notes == ["optimizer=sgd drops the grid over optimizer.lr"]


def test_a_size_asked_for_says_which_of_its_settings_the_file_keeps() -> None:
    notes = toy("size=quick", file={"cases": 9}).notes
    assert notes == ["size=quick does not change what the file sets: cases = 9"]


def test_duplicates_are_run_once_and_said_once() -> None:
    resolved = toy("optimizer=sgd,sgd,{name: sgd},adam", "seed=1,1.0")
    assert len(resolved.cells) == 2
    assert resolved.notes[:2] == [
        "optimizer: sgd is given more than once and run once",
        "seed: 1.0 is given more than once and run once",
    ]


def test_an_option_without_settings_stays_as_it_is_beside_one_with() -> None:
    resolved = resolve("crossed", ["fault.step=7"])
    assert {getattr(cell.fault, "step", None) for cell in resolved.cells} == {None, 7}  # type: ignore[attr-defined]
    assert resolved.notes == ["fault.step does not apply to 'none', which has no settings"]
    wide = resolve("crossed", ["fault.step=7,8"])
    assert len(wide.cells) == 24
    assert "8 of 32 cells repeat another and are run once" in wide.notes


def test_the_grid_of_the_shipped_studies() -> None:
    assert (len(resolve("recovery").cells), len(resolve("recovery").runs)) == (4, 80)
    assert (len(resolve("crossed").cells), len(resolve("crossed", ["size=quick"]).runs)) == (16, 48)
    published = {c.optimizer.name: flatten(c)["optimizer.lr"] for c in resolve("recovery", ["preset=published"]).cells}
    assert published == dict.fromkeys(["sgd", "adam", "rmsprop", "adamw"], 1e-3)


def test_a_third_partys_optimizer_and_its_free_arguments() -> None:
    resolved = toy("optimizer={name: my.module:Class, lr: 0.5}", "optimizer.options.beta=1,2")
    assert [flatten(c)["optimizer.options.beta"] for c in resolved.cells] == [1, 2]
    assert len(set(ids(resolved))) == 4


# Documents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study", "overrides"),
    [
        ("recovery", []),
        ("recovery", ["preset=published", "size=quick"]),
        ("recovery", ["optimizer=adam,sgd", "optimizer.lr=1e-5,1e16", "seed=3"]),
        ("recovery", ["fault=RD", "model={name: mlp, hidden: [4, 4]}", "observe.every=2"]),
        ("crossed", ["timeline=round_robin", "workers=2,3", "fault.layer=no"]),
        ("crossed", ["optimizer=sgd", "optimizer.momentum=0,0.5", "compressor=powersgd,none", "size=full"]),
        ("recovery", ["model=a.module:Net", "model.options={width: 3, name: x}"]),
    ],
)
def test_the_document_fed_back_gives_the_same_runs(tmp_path: Path, study: str, overrides: list[str]) -> None:
    first = resolve(study, overrides)
    again = resolve(written(tmp_path, first.document))
    assert again.document == first.document
    assert [vars(run) for run in again.runs] == [vars(run) for run in first.runs]
    assert again.cells == first.cells
    assert again.notes == []  # nothing is dropped or repeated any more


def test_a_file_may_be_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("study: recovery\nsize: quick\noptimizer: {lr: 1e-3}\ngrid:\n  optimizer: [adam, sgd]\n")
    assert optimizers(resolve(path)) == [{"name": "adam", "lr": 1e-3}, {"name": "sgd", "lr": 1e-3}]
    assert optimizers(resolve(str(path), ["optimizer=adamw"])) == [{"name": "adamw", "lr": 1e-2}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optimizer: adam", "expected settings with a 'study:' key"),
        ("- 1", "expected settings with a 'study:' key"),
        ("study: recovry", "did you mean 'recovery'?"),
        (
            "study: recovery\nsize: qick",
            "size = 'qick': expected one of default, full, large, medium, quick, small. did you mean 'quick'?",
        ),
        ("study: recovery\nstudy: crossed", "the key 'study' is given twice"),
        ("study: recovery\noptimizer: [adam, sgd]", "to compare several, write adam,sgd without brackets"),
        ("study: recovery\ngrid: {optimizer: adam}", "grid.optimizer = 'adam': expected a list"),
        ("study: recovery\ngrid: 3", "grid = 3: expected a block"),
        ("study: recovery\nseed: 1\ngrid: {seed: [1, 2]}", "seed = 'a value and a grid': expected one of the two"),
        ("study: recovery\ngrid: {study: [crossed]}", "study = ['crossed']: expected one value"),
        ("study: recovery\noptimiser: {lr: 1}", "did you mean 'optimizer.lr'?"),
        ("study: recovery\noptimizer.lr: 1e-3", "expected a block in a file, optimizer: {lr: 0.001}"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert says in lines(path)[0]


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    assert "expected a readable file (No such file or directory)" in lines(str(tmp_path / "none.yaml"))[0]
    (tmp_path / "d.yaml").mkdir()
    assert "expected a readable file (Is a directory)" in lines(tmp_path / "d.yaml")[0]


# Identity -----------------------------------------------------------------------------------------------------------


def test_ids_ignore_how_much_is_run_and_where() -> None:
    base = ids(resolve("recovery"))
    for override in ("size=full", "cases=12", "device=cpu", "processes=3", "share_prefix=false"):
        changed = ids(resolve("recovery", [override]))
        assert set(base) <= set(changed), override
    for override in ("seed=1", "batch_size=32", "observe.every=2", "dtype=float64", "recovery_steps=99"):
        assert not set(base) & set(ids(resolve("recovery", [override]))), override


def test_ids_depend_on_value_not_on_spelling_or_order() -> None:
    assert ids(toy("optimizer.lr=1")) == ids(toy("optimizer.lr=1.0")) == ids(toy("optimizer.lr=10e-1"))
    assert ids(toy("optimizer={name: adam, lr: 2, eps: 3}")) == ids(toy("optimizer={eps: 3, name: adam, lr: 2}"))
    assert ids(toy("optimizer={name: m:C, options: {a: 1, b: 2}}")) == ids(
        toy("optimizer={name: m:C, options: {b: 2.0, a: 1.0}}")
    )
    assert ids(toy("steps=6", "optimizer=sgd")) == ids(toy("optimizer={name: sgd, momentum: 0}"))


def run_id(cell: StudySpec, replicate: int, role: str, labels: dict[str, Any]) -> str:
    return identity.run_id(identity.cell_key(cell), replicate, role, labels)


def test_ids_tell_replicate_role_label_and_study_apart() -> None:
    cell = ToySpec()
    made = {
        run_id(cell, 0, "twin", {}),
        run_id(cell, 1, "twin", {}),
        run_id(cell, 0, "fault", {}),
        run_id(cell, 0, "twin", {"case": 0}),
        run_id(ToySpec(study="other"), 0, "twin", {}),
        run_id(StudySpec(study="toy"), 0, "twin", {}),
    }
    assert len(made) == 5  # the last has the first's settings, all at their defaults


def test_semantics_change_ids() -> None:
    class Newer(ToySpec):
        """The same settings with another meaning."""

        semantics = 2

    assert run_id(Newer(), 0, "plain", {}) != run_id(ToySpec(), 0, "plain", {})


def test_the_canonical_text_and_an_id_are_frozen() -> None:
    """Old directories are resumed by these: a change here must be deliberate."""
    value = {"b": 1.0, "a": [0.1, -0.0, True, None, "é"], "c": float("inf")}
    assert identity.canonical(value) == r'{"a":[0.1,0,true,null,"\u00e9"],"b":1,"c":{"float":"inf"}}'
    assert identity.canonical({"x": 1e16}) != identity.canonical({"x": 1e16 + 2})
    assert len(run_id(ToySpec(), 0, "plain", {})) == 12


@given(st.dictionaries(st.text(max_size=4), st.integers() | st.floats(allow_nan=False) | st.booleans(), max_size=5))
def test_canonical_text_is_independent_of_order(value: dict[str, Any]) -> None:
    assert identity.canonical(value) == identity.canonical(dict(reversed(list(value.items()))))


def test_ids_are_the_same_in_every_process() -> None:
    code = (
        "import json; from descentlab.config.resolve import resolve;"
        "print(json.dumps([r.id for s in ('recovery', 'crossed') for r in resolve(s, ['seed=1,2']).runs]))"
    )
    made = []
    for seed in ("0", "12345"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        made.append(json.loads(done.stdout))
    here = [i for study in ("recovery", "crossed") for i in ids(resolve(study, ["seed=1,2"]))]
    assert made == [here] * 2
    assert len(set(here)) == len(here)


# What a mistake says ------------------------------------------------------------------------------------------------

OPTIMIZERS = "adadelta, adagrad, adam, adamw, amsgrad, nadam, rmsprop, sgd"
STUDIES = "recovery, crossed, training, diffusion, asynchrony, compression"
MISTAKES = [
    ("recovry", [], f"study = 'recovry': expected one of {STUDIES}, a YAML file or module:Name"),
    ("recovery", ["optimizer=adma"], f"optimizer = 'adma': expected one of {OPTIMIZERS} or module:Name."),
    ("recovery", ["optimizer=adma"], "did you mean 'adam'?"),
    ("recovery", ["optimiser.lr=0.1"], "optimiser.lr = 0.1: expected a setting of the study."),
    ("recovery", ["optimiser.lr=0.1"], "did you mean 'optimizer.lr'?"),
    ("recovery", ["optimizer.rl=0.1"], "did you mean 'optimizer.lr'?"),
    ("recovery", ["momentum=0.1"], "did you mean 'optimizer.momentum'?"),
    ("recovery", ["evaluate_evry=1"], "evaluate_evry = 1: expected a setting of the study"),
    ("recovery", ["optimizer.lr=-1"], "optimizer.lr = -1: expected a value greater than 0"),
    ("recovery", ["optimizer.lr=fast"], "optimizer.lr = 'fast': expected a number"),
    ("recovery", ["optimizer.lr=.inf"], "optimizer.lr = inf: expected a finite number"),
    ("recovery", ["batch_size=1.5"], "batch_size = 1.5: expected a whole number"),
    ("recovery", ["batch_size=true"], "batch_size = True: expected a number"),
    ("recovery", ["fault.step=soon"], "fault.step = 'soon': expected an integer"),
    ("recovery", ["model.batch_norm=maybe"], "model.batch_norm = 'maybe': expected true or false"),
    ("recovery", ["dtype=float23"], "dtype = 'float23': expected one of float32, float64. did you mean 'float32'?"),
    ("recovery", ["device=gpu"], "device = 'gpu': expected one of auto, cpu, cuda, cuda:N, mps"),
    (
        "recovery",
        ["model={name: mlp, activation: silo}"],
        "expected one of silu, relu, tanh, gelu. did you mean 'silu'?",
    ),
    ("recovery", ["model={name: mlp, hiden: [8]}"], "model.hiden = [8]: expected a setting of 'mlp' (hidden,"),
    ("recovery", ["model={name: mlp, hiden: [8]}"], "did you mean 'model.hidden'?"),
    ("recovery", ["model={name: mlp, hidden: [8, 0]}"], "model.hidden[1] = 0: expected a value greater than 0"),
    ("recovery", ["model={name: mlp, hidden: 8}"], "model.hidden = 8: expected a list"),
    ("recovery", ["model=mlp", "model.hidden=16,8"], "for one list write model.hidden=[16, 8]"),
    ("recovery", ["model.channels=[1,2]"], "model.channels = [1, 2]: expected at least 3 items, not 2"),
    ("recovery", ["optimizer=adam", "optimizer.betas=[0.9]"], "optimizer.betas = [0.9]: expected a longer list"),
    ("recovery", ["optimizer=[adam,sgd]"], "to compare several, write adam,sgd without brackets"),
    ("recovery", ["optimizer=null"], f"optimizer = None: expected a name ({OPTIMIZERS})"),
    ("recovery", ["optimizer={name: 3}"], f"expected a name ({OPTIMIZERS}) or a block"),
    ("recovery", ["optimizer.name=adam"], "to choose an option write optimizer=adam"),
    ("recovery", ["optimizer.momentum=0.5"], "a setting of every option in the grid; 'adam' has lr, betas,"),
    ("recovery", ["optimizer.momentum=0.5,0.9"], "a setting of every option in the grid; 'adam' has lr, betas,"),
    ("recovery", ["observe=5"], "observe = 5: expected a block of settings (every, evaluate_every, extra"),
    ("recovery", ["seed.x=1"], "seed.x = 1: expected no key below seed, which is a single value"),
    ("recovery", ["cases=3,5"], "cases = [3, 5]: expected one value: it says how much or where to run"),
    (
        "recovery",
        ["preset=publishd"],
        "preset = 'publishd': expected one of default, published, spike. did you mean 'published'?",
    ),
    (
        "recovery",
        ["size=quick,full"],
        "size = ['quick', 'full']: expected one of default, full, large, medium, quick, small",
    ),
    ("recovery", ["size.x=1"], "size.x = '1': expected no key below size"),
    ("recovery", ["study=crossed"], "study = 'crossed': expected the study before the settings"),
    ("recovery", ["grid.seed=1"], "write key=value1,value2"),
    ("recovery", ["fault=none"], "fault = 'none': expected a fault"),
    ("recovery", ["fault.value_low=1e30"], "fault.value_low = 1e+30: expected at most value_high"),
    ("recovery", ["observe={every: 2}", "observe.every=3"], "observe.every = [2, 3]: expected one value per key"),
    ("crossed", ["fault.step=200"], "fault.step = 200: expected a step below steps = 200"),
    (
        "crossed",
        ["compressor=powersdg"],
        "compressor = 'powersdg': expected one of bf16, fp16, none, powersgd, sign, topk, torch_powersgd",
    ),
    ("json:loads", [], "study = 'json:loads': expected a StudyDef, not a function"),
    ("no_such_module:X", [], "study = 'no_such_module:X': expected an importable module"),
    ("json:NOTHING", [], "study = 'json:NOTHING': expected a name defined in module 'json'"),
]


@pytest.mark.parametrize(("study", "overrides", "says"), MISTAKES)
def test_a_mistake_is_one_line_with_what_was_expected(study: str, overrides: list[str], says: str) -> None:
    said = lines(study, *overrides)
    assert len(said) == 1
    assert says in said[0]
    for leaked in ("pydantic", "http", "Input should", "Option", "Spec"):
        assert leaked not in said[0]


def test_all_mistakes_of_a_grid_are_said_at_once() -> None:
    said = lines("recovery", "optimizer=adma,sgd", "model=cn", "seed=-1", "fault.value_low=1e30", "colour=1", "size=b")
    starts = ("optimizer = 'adma'", "model = 'cn'", "seed = -1", "fault.value_low", "colour = 1", "size = 'b'")
    assert len(said) == len(starts)
    for start in starts:
        assert any(line.startswith(start) for line in said), start


def test_one_bad_cell_among_good_ones_is_said_once() -> None:
    assert lines("recovery", "optimizer.lr=0.1,-1") == ["optimizer.lr = -1: expected a value greater than 0"]


def test_a_grid_too_large_is_refused_before_it_is_made() -> None:
    axes = {("seed",): list(range(1000)), ("optimizer", "lr"): list(range(1000)), ("batch_size",): list(range(1000))}
    with pytest.raises(UserError, match="grid = 1000000000: expected at most 10000 cells"):
        product(axes)
    with pytest.raises(UserError, match=r"at most 3 cells. it is 4 optimizer"):
        resolve("recovery", limit=3)


def test_product_order_is_stable() -> None:
    points = product({("a",): [1, 2], ("b",): ["x", "y"]})
    assert [tuple(p.values()) for p in points] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert product({}) == [{}]


def test_the_nearest_name_ignores_case() -> None:
    assert nearest("n16_rd", ["none", "RD", "N16_RD"]) == "did you mean 'N16_RD'?"
    assert nearest("zzzz", ["none", "RD"]) == ""


# What is shown ------------------------------------------------------------------------------------------------------


def test_effective_settings_mark_what_the_study_has_by_default() -> None:
    assert all(row.is_default for row in resolve("recovery").effective())
    changed = {r.key for r in resolve("recovery", ["size=quick", "optimizer.lr=1,2"]).effective() if not r.is_default}
    quick = {"cases", "recovery_steps", "fault.last_epoch", "observe.evaluate_every"}
    assert changed == {"size", "optimizer.lr", *quick}
    rows = {row.key: row for row in resolve("recovery", ["optimizer=adam"]).effective()}
    assert (rows["optimizer"].is_default, rows["optimizer.lr"].is_default) == (False, True)  # adam's lr in this study
    key, value, default = rows["batch_size"]
    assert (key, value, default) == ("batch_size", 64, True)


def test_what_varies() -> None:
    assert resolve("recovery", ["optimizer=adam"]).varying == []
    assert resolve("recovery", ["optimizer=adam", "optimizer.lr=1,2", "seed=0,1"]).varying == ["seed", "optimizer.lr"]
    assert {"optimizer", "optimizer.lr"} <= set(resolve("recovery").varying)


@pytest.mark.parametrize("kind", kinds())
def test_everything_listed_has_a_line_about_it(kind: str) -> None:
    listed = entries(kind)
    assert listed
    assert all(entry.summary and entry.summary != entry.name for entry in listed)


def test_third_party_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_study.py").write_text(
        "from dataclasses import replace\nfrom descentlab.studies.recovery.spec import STUDY as ONE\n"
        "STUDY = replace(ONE, name='mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    resolved = resolve("my_study:STUDY", ["cases=1"])
    assert resolved.study.name == "mine"
    assert ids(resolve(written(tmp_path, resolved.document))) == ids(resolved)
    assert registry.find("recovery").name == "recovery"
