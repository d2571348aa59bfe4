"""Exact faults from files: coordinates land on the right elements, values are the file's, mistakes name their place."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import descentlab as dl
from descentlab import store
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.opmode import OpRecord, trace
from descentlab.core.streams import Streams
from descentlab.launch.build import plan_fault, survey
from descentlab.launch.plan import planned_from_json, planned_json
from descentlab.perturb.replay import native_layer, translate
from descentlab.perturb.replay_files import COLUMNS, Place, PublishedFault
from descentlab.perturb.replay_specs import Replay
from descentlab.store import jsonl
from descentlab.workloads.base import Data

SMALL = ["size=quick", "dataset=digits", "model.pool=1", "batch_size=32", "optimizer=sgd,adam", "cases=1"]
ROW: dict[str, Any] = {
    "model": "resnet18",
    "stage": "fwrd_inject",
    "fmodel": "N16_RD",
    "target_worker": 0,
    "target_layer": "conv1",
    "target_epoch": 0,
    "target_step": 7,
    "inj_pos": "3/1/2/5,3/1/2/6,3/1/3/0",
    "inj_values": "1.5e4,-2.25,1e30",
    "learning_rate": 0.001,
    "seed": 123,
}
# conv1 of the small CNN on digits gives [32, 8, 4, 4]; N H W C 3/1/2/5 is N C H W (3, 5, 1, 2): ((3*8 + 5)*4 + 1)*4 + 2
INDEX = [470, 486, 391]


def write(path: Path, *rows: dict[str, Any], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def plan(path: Path, *settings: str, case: int = 0) -> Any:
    return planned_of([*SMALL, "fault=replay", f"fault.path={path}", *settings], case)


def planned_of(settings: list[str], case: int = 0) -> Any:
    """What a study would plan, without training anything."""
    cell = resolve("recovery", settings).cells[0]
    return plan_fault(cell, case, case, survey(cell))


def resnet_operations() -> list[OpRecord]:
    """Of the published ResNet-18, on two images of 16 x 16 pixels."""
    images = (torch.zeros(2, 3, 16, 16), torch.zeros(2).long())
    data = Data("x", *images, *images, *images, classes=10, source="", licence="")
    factory = resolve("recovery", ["model={name: resnet18, stem: 7x7}"]).cells[0].model.build()
    return trace(factory.build(data), images[0])


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> store.Results:
    folder = tmp_path_factory.mktemp("replay")
    path = write(folder / "faults.csv", {**ROW, "target_step": 1}, ROW)
    settings = [*SMALL, "fault=replay", f"fault.path={path}", "fault.row=1"]
    return dl.run("recovery", *settings, out=folder / "run", launcher="local")


def test_a_row_of_the_published_file_is_hit_exactly(replayed: store.Results) -> None:
    """From the CSV through plan.json and a worker to hits.jsonl. A transposed axis, a wrong row or a value drawn again
    would change these numbers."""
    assert len(replayed.hits) == 2 and {hit["optimizer"] for hit in replayed.hits} == {"sgd", "adam"}
    for hit in replayed.hits:
        assert (hit["step"], hit["layer"], hit["site"], hit["index"]) == (7, "conv1", "forward/out", INDEX)
        assert hit["new"] == [1.5e4, -2.25, float(np.float32(1e30))] and hit["old"] != hit["new"]


def test_the_settings_of_a_replay_are_shown_with_their_defaults(tmp_path: Path) -> None:
    """What ``show`` and ``run`` print first: ``path`` has no default to compare with, ``row`` and ``step`` have one."""
    path = write(tmp_path / "faults.csv", ROW)
    rows = resolve("recovery", [*SMALL, "fault=replay", f"fault.path={path}"]).effective()
    assert {row.key: row.is_default for row in rows if row.key.startswith("fault.")} == {
        "fault.path": False,
        "fault.row": True,
        "fault.hit": True,
        "fault.step": True,
    }


def test_a_hit_of_an_earlier_run_is_hit_again(replayed: store.Results, tmp_path: Path) -> None:
    """By case, by run, and from its campaign file: the same elements and values each time."""
    run = replayed.hits[1]["run"]
    sources = (f"hit={replayed.path}#0", f"path={replayed.path}/campaign.jsonl", f"path={replayed.path}/hits.jsonl")
    for source in (*sources, f"hit={replayed.path}#{run}"):
        settings = [*SMALL, "fault=replay", f"fault.{source}"]
        planned = planned_of(settings)
        assert (planned.step, planned.site.layer, list(planned.index)) == (7, "conv1", INDEX)
        assert [float(np.float32(v)) for v in planned.rule["values"]] == replayed.hits[0]["new"]
    again = dl.run("recovery", *settings, out=tmp_path / "again", launcher="local")
    for hit in again.hits:
        assert (hit["step"], hit["layer"], hit["index"]) == (7, "conv1", INDEX)
        assert hit["new"] == replayed.hits[0]["new"]


def test_every_case_may_have_its_own_row(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", ROW, {**ROW, "target_step": 9, "inj_pos": "0/0/0/0", "inj_values": "7"})
    assert [plan(path, "fault.row=null", case=case).step for case in (0, 1)] == [7, 9]
    assert plan(path, "fault.row=null", case=1).rule == {"kind": "value", "value": 7.0}
    assert plan(path, "fault.step=30").step == 30
    with pytest.raises(UserError, match=r"fault.row = 2: expected 0 to 1"):
        plan(path, "fault.row=null", case=2)


def test_infinite_values_survive_the_files(tmp_path: Path) -> None:
    planned = plan(write(tmp_path / "f.csv", {**ROW, "inj_values": "inf,nan,-1"}))
    again = planned_from_json(jsonl.loads(jsonl.dumps(planned_json(planned))))
    found = again.rule["values"]
    assert found[0] == math.inf and math.isnan(found[1]) and found[2] == -1


def test_the_content_of_the_file_is_part_of_a_runs_identity(tmp_path: Path) -> None:
    def ids() -> list[str]:
        settings = [*SMALL, "fault=replay", f"fault.path={tmp_path / 'f.csv'}"]
        return [run.id for run in resolve("recovery", settings).runs]

    write(tmp_path / "f.csv", ROW)
    before = ids()
    assert ids() == before
    write(tmp_path / "f.csv", {**ROW, "inj_values": "1,2,3"})
    assert not set(ids()) & set(before)


# where the published coordinates lie

GEOMETRIES = [(3, 1, 4), (3, 2, 4), (1, 2, 4), (7, 2, 8), (3, 2, 5)]  # kernel, stride, height and width


def published_operands(x: np.ndarray, w: np.ndarray, g: np.ndarray, stride: int) -> dict[str, np.ndarray]:
    """The operands that the published program convolves: x [N, H, W, C], w [H, W, I, O], g [N, H', W', O]."""
    size, k = x.shape[1], w.shape[0]
    total = max((g.shape[1] - 1) * stride + k - size, 0)
    before = total // 2
    spread = np.zeros((g.shape[0], (g.shape[1] - 1) * stride + 1, (g.shape[2] - 1) * stride + 1, g.shape[3]))
    spread[:, ::stride, ::stride] = g
    first = k - 1 - before
    last = size + k - 1 - first - spread.shape[1]
    padded = np.pad(x, ((0, 0), (before, total - before), (before, total - before), (0, 0)))
    return {
        "forward/a": x,
        "forward/b": w,
        "forward/out": g,
        "grad_input/a": np.pad(spread, ((0, 0), (first, last), (first, last), (0, 0))),
        "grad_input/b": w[::-1, ::-1].transpose(0, 1, 3, 2),
        "grad_input/out": x,
        "grad_weight/a": padded.transpose(3, 1, 2, 0),
        "grad_weight/b": spread.transpose(1, 2, 0, 3),
        "grad_weight/out": w.transpose(2, 0, 1, 3),
    }


def valid(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A convolution without padding, N H W C and H W I O."""
    x, w = torch.from_numpy(a.copy()).permute(0, 3, 1, 2), torch.from_numpy(b.copy()).permute(3, 2, 0, 1)
    return F.conv2d(x, w).permute(0, 2, 3, 1).numpy()


def tensors(k: int, stride: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w, g as in :func:`published_operands`; all elements differ, none is 0."""
    out = -(-size // stride)
    shapes = (2, size, size, 3), (k, k, 3, 4), (2, out, out, 4)
    rng = np.random.default_rng(0)
    return tuple(rng.permutation(math.prod(s)).reshape(s) + 1.0 for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(("k", "stride", "size"), GEOMETRIES)
def test_the_operands_are_those_of_the_gradients(k: int, stride: int, size: int) -> None:
    """The geometry assumed of the published program computes autograd's gradients, so it is a possible one."""
    x, w, g = tensors(k, stride, size)
    operands = published_operands(x, w, g, stride)
    total = max((g.shape[1] - 1) * stride + k - size, 0)
    xt = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    wt = torch.from_numpy(w).permute(3, 2, 0, 1).requires_grad_()
    low, high = total // 2, total - total // 2
    F.conv2d(F.pad(xt, (low, high, low, high)), wt, stride=stride).backward(torch.from_numpy(g).permute(0, 3, 1, 2))
    assert xt.grad is not None and wt.grad is not None
    assert np.allclose(valid(operands["grad_input/a"], operands["grad_input/b"]), xt.grad.permute(0, 2, 3, 1).numpy())
    found = valid(operands["grad_weight/a"], operands["grad_weight/b"])[:, :k, :k]  # a rest that no window reached
    assert np.allclose(found, wt.grad.permute(1, 2, 3, 0).numpy())


@pytest.mark.parametrize(("k", "stride", "size"), GEOMETRIES)
def test_coordinates_mean_the_same_number(k: int, stride: int, size: int) -> None:
    """Every coordinate of every operand: our element holds the number that the published tensor has there, and a
    coordinate in the zeros of padding or spreading is refused."""
    x, w, g = tensors(k, stride, size)
    ours = {"x": x.transpose(0, 3, 1, 2), "w": w.transpose(3, 2, 0, 1), "g": g.transpose(0, 3, 1, 2)}
    shapes = [ours[name].shape for name in ("x", "w", "g")]
    record = OpRecord("l", 0, "conv", *shapes, options={"stride": (stride, stride), "padding": k // 2})
    roles = {"forward": "xwg", "grad_input": "gwx", "grad_weight": "xgw"}
    for site, tensor in published_operands(x, w, g, stride).items():
        direction, operand = site.split("/")
        held = ours[roles[direction][("a", "b", "out").index(operand)]].reshape(-1)
        refused = 0
        for position in np.ndindex(tensor.shape):
            fault = PublishedFault(Place("f", 0), "l", direction, operand, 0, 0, (position,), (1.0,))
            try:
                (flat,) = translate(fault, record)
                assert held[flat] == tensor[position], (site, position)
            except UserError:
                assert tensor[position] == 0, (site, position)
                refused += 1
        assert refused == (tensor == 0).sum()


def test_the_published_layers_are_the_networks_layers() -> None:
    """Twenty names, twenty convolutions, in the order of execution but for the shortcut of each block."""
    found = [op.layer for op in resnet_operations() if op.kind == "conv"]
    names = ["conv1"] + [f"basicblock_{b}_basic_{u}_conv{c}" for b in (1, 2, 3, 4) for u in (0, 1) for c in (1, 2)]
    names += [f"basicblock_{b}_basic_0_downsample" for b in (2, 3, 4)]
    assert len(found) == 20 and sorted(native_layer(name) for name in names) == sorted(found)
    assert native_layer("basicblock_2_basic_0_conv1") == "blocks.2.convs.0.0"
    assert native_layer("basicblock_4_basic_1_conv2") == "blocks.7.convs.1.0"


def test_a_backward_row_of_a_residual_network(tmp_path: Path) -> None:
    """``…_grad_in`` is the input's gradient; INPUT of it is the incoming gradient, with one zero around it."""
    path = write(
        tmp_path / "f.csv",
        {
            **ROW,
            "stage": "bkwd_inject",
            "fmodel": "INPUT",
            "target_layer": "basicblock_2_basic_0_conv2_grad_in",
            "inj_pos": "1/3/1/5",
            "inj_values": "8.98e17",
        },
    )
    planned = Replay(path=str(path)).build().plan(0, resnet_operations(), Streams(0), replicate=0, steps_per_epoch=49)
    assert (planned.site.layer, planned.site.direction, planned.site.operand) == (
        "blocks.2.convs.1.0",
        "grad_input",
        "a",
    )
    assert planned.shape == (2, 128, 4, 4) and planned.index == (((1 * 128 + 5) * 4 + 2) * 4 + 0,)
    assert planned.rule == {"kind": "value", "value": 8.98e17} and planned.step == 7


MISTAKES = [
    ({"stage": "forward"}, r"f\.csv row 0, stage = 'forward': expected one of fwrd_inject, bkwd_inject"),
    ({"fmodel": "N16RD"}, r"f\.csv row 0, fmodel = 'N16RD': .*did you mean 'N16_RD'"),
    ({"target_layer": "conv9"}, r"f\.csv row 0, target_layer = 'conv9': .*conv1, conv2, conv3, head.*did you mean"),
    ({"target_layer": "conv1_grad_in"}, r"row 0, target_layer = .*the stage is fwrd_inject"),
    ({"stage": "bkwd_inject"}, r"row 0, target_layer = 'conv1': expected a layer that ends in _grad_in or _grad_wt"),
    ({"stage": "bkwd_inject", "target_layer": "conv1_grad_in"}, r"an operation that a training step makes there"),
    ({"target_epoch": "-1"}, r"row 0, target_epoch = '-1': expected a whole number"),
    ({"target_step": "40"}, r"row 0, target_step = 40: expected 0 to 39"),
    ({"inj_pos": "3/1/x/5"}, r"row 0, inj_pos = '3/1/x/5': expected coordinates"),
    ({"inj_pos": ""}, r"row 0, inj_pos = '': expected at least one element"),
    ({"inj_pos": "3/1/2"}, r"row 0, inj_pos = '3/1/2': expected 4 coordinates"),
    ({"inj_pos": "3/4/2/5"}, r"row 0, inj_pos = '3/4/2/5': expected an element of conv1.*\[32, 8, 4, 4\]"),
    ({"inj_pos": "32/0/0/0"}, r"row 0, inj_pos = '32/0/0/0': expected an element of conv1"),
    ({"inj_values": "1,two"}, r"row 0, inj_values = 'two': expected a number"),
    ({"inj_values": "1,2"}, r"row 0, inj_values = '2 numbers': expected 1, or 3"),
]


@pytest.mark.parametrize(("change", "line"), MISTAKES)
def test_a_mistake_names_file_row_and_column(change: dict[str, str], line: str, tmp_path: Path) -> None:
    changed = {**ROW, **change}
    if "inj_pos" in change:
        changed["inj_values"] = "1"
    with pytest.raises(UserError, match=line) as caught:
        plan(write(tmp_path / "f.csv", changed))
    assert "\n" not in str(caught.value)


def test_mistakes_of_the_file_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fault\.path = .*none\.csv': expected a file that can be read"):
        plan(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"header = .*missing: inj_values"):
        plan(write(tmp_path / "a.csv", ROW, columns=tuple(c for c in COLUMNS if c != "inj_values")))
    with pytest.raises(UserError, match=r"fault\.row = 5: expected 0 to 0"):
        plan(write(tmp_path / "b.csv", ROW), "fault.row=5")
    text = write(tmp_path / "c.csv", ROW).read_text().replace('"', "")
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UserError, match=r"c\.csv row 0, columns = 15: expected 11.*quotation marks"):
        plan(tmp_path / "c.csv")
    (tmp_path / "d.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"d\.jsonl row 0, JSON = "):
        plan(tmp_path / "d.jsonl")


def test_mistakes_in_a_stored_line(tmp_path: Path) -> None:
    good = {"layer": "conv1", "site": "forward/out", "step": 3, "index": [4], "rule": {"kind": "value", "value": 1.0}}
    path = tmp_path / "f.jsonl"

    def planned(**change: Any) -> Any:
        path.write_text(json.dumps({k: v for k, v in {**good, **change}.items() if v is not None}) + "\n")
        return plan(path)

    assert planned().index == (4,)
    for change, line in (
        ({"rule": None}, "rule = '': expected a line with 'rule'"),
        ({"layer": "conv7"}, "row 0, layer = 'conv7': .*did you mean"),
        ({"index": [4096]}, "row 0, index = 4096: expected 0 to 4095"),
        ({"index": ["a"]}, "row 0, index = .*a list of flat indices"),
        ({"shape": [64, 8, 4, 4]}, r"shape = \[64, 8, 4, 4\]: expected \[32, 8, 4, 4\]"),
        ({"site": "forward/c"}, "site = 'forward/c': expected an operand"),
        ({"site": "sideways/out"}, "an operation that a training step makes there"),
        ({"step": -1}, "step = -1: expected a whole number"),
        ({"new": [1.0, 2.0]}, "new = .*expected 1 numbers"),
    ):
        with pytest.raises(UserError, match=line):
            planned(**change)


def test_a_reference_to_nothing(replayed: store.Results) -> None:
    from descentlab.perturb.replay_files import find_hit

    with pytest.raises(UserError, match=r"fault\.hit = .*#9': expected a case in .* \(0\)"):
        find_hit(f"{replayed.path}#9")
    with pytest.raises(UserError, match=r"expected a run in"):
        find_hit(f"{replayed.path}#no-such-run")
    for settings in (
        ["fault=replay"],
        ["fault=replay", "fault.path=a", "fault.hit=b#1"],
        ["fault=replay", "fault.hit=b"],
    ):
        with pytest.raises(UserError, match=r"path or hit|DIR#CASE"):
            resolve("recovery", settings)
