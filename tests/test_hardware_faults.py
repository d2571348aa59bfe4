"""The 18 types of hardware fault: where, how many, which values; and the same again in the files of a study.

Oracles: numpy transposes for the order of elements, ``struct`` for bits, the operands for copies. The gradients of a
faulted step are in test_hardware_sites.py.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from descentlab import store
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.opmode import OpMode, OpRecord, trace
from descentlab.core.protocols import Hit, Planned
from descentlab.core.streams import Streams
from descentlab.launch import api
from descentlab.perturb.catalogue import TYPES
from descentlab.perturb.specs import (
    FAULTS,
    HARDWARE,
    HardwareFault,
    Input,
    Input16,
    N16Rd,
    N64Input16,
    N64WtGlb,
    Rd,
    RdGlb,
    Wt,
    Wt16,
)
from descentlab.perturb.values import finite_patterns, flipped, realised

NAMES = list(TYPES)

# A 1x1 convolution from 4 to 32 channels on two 3x3 images: input [2, 4, 3, 3] holds 0 to 71, weight [32, 4, 1, 1] one
# over 1 to 128, result [2, 32, 3, 3]. Element 21 of the input is sample 0, channel 2, row 1, column 0.
TINY_X = torch.arange(72.0).view(2, 4, 3, 3)
PATTERNS = [-1451747935518720.0, -8.535879749656684e32, -1.6521575929478678e23]
GOLDEN: dict[str, tuple[str, list[int], int, dict[str, Any]]] = {  # operand, first elements, how many, rule
    "INPUT": ("a", [21], 1, {"kind": "flip", "bit": 27}),
    "INPUT_16": ("a", [21], 1, {"kind": "flip", "bit": 27, "lanes": list(range(147, 283, 9))}),
    "WT": ("b", [100], 1, {"kind": "flip", "bit": 27}),
    "WT_16": ("b", [100], 1, {"kind": "flip", "bit": 27, "lanes": [*range(227, 234), *range(513, 522)]}),
    "RBFLIP": ("out", [174], 1, {"kind": "flip", "bit": 27}),
    "RD": ("out", [174], 1, {"kind": "value", "value": PATTERNS[0]}),
    "RD_CORRECT": ("out", [174], 1, {"kind": "copy", "from": [36]}),
    "ZERO": ("out", [174], 1, {"kind": "zero"}),
    "N16_RD": ("out", [147, 156, 165, 174], 16, {"kind": "values", "values": PATTERNS}),
    "N16_RD_CORRECT": ("out", [147, 156, 165, 174], 16, {"kind": "copy", "from": [36, 78, 190, 262]}),
    "RD_GLB": ("out", [147, 156, 165, 174], 416, {"kind": "values", "values": PATTERNS}),
    "RD_CORRECT_GLB": ("out", [147, 156, 165, 174], 416, {"kind": "copy", "from": [36, 78, 190, 262]}),
    "N64_INPUT": ("a", [0, 9, 18, 27, 1, 10], 64, {"kind": "copy", "from": [4, 9, 23, 32]}),
    "N64_WT": ("b", [0, 4, 8, 12], 64, {"kind": "copy", "from": [8, 17, 42, 58]}),
    "N64_INPUT_16": ("a", [0, 9, 18], 64, {"kind": "copy", "from": [4, 9], "lanes": list(range(432, 568, 9))}),
    "N64_WT_16": (
        "b", [0, 4, 8], 64, {"kind": "copy", "from": [8, 17], "lanes": [*range(164, 171), *range(450, 459)]},
    ),
    "N64_INPUT_GLB": ("a", [0, 9, 18, 27], 64, {"kind": "copy", "from": [4, 9, 23, 32]}),
    "N64_WT_GLB": ("b", [0, 4, 8, 12], 128, {"kind": "copy", "from": [8, 17, 42, 58]}),
}  # fmt: skip


def tiny() -> nn.Conv2d:
    net = nn.Conv2d(4, 32, 1, bias=False)
    net.weight = nn.Parameter(1.0 / torch.arange(1.0, 129.0).view(32, 4, 1, 1))
    return net


def plan(spec: HardwareFault, ops: list[OpRecord], replicate: int = 1) -> Planned:
    return spec.build().plan(0, ops, Streams(0), replicate=replicate, steps_per_epoch=4)


def spec_of(name: str, **settings: Any) -> HardwareFault:
    return FAULTS.options[name](**settings)  # type: ignore[return-value]


def walked(t: np.ndarray, *, kernel: bool, linear: bool = False) -> np.ndarray:
    """A tensor's elements in N H W C or H W I O order."""
    if kernel:
        return np.moveaxis(t, (0, 1), (-1, -2)).ravel()
    return t.ravel() if linear else np.moveaxis(t, 1, -1).ravel()


def flip_by_struct(value: float, bit: int) -> float:
    """Bit 0 is the sign of the big-endian float32 word."""
    (word,) = struct.unpack(">I", struct.pack(">f", value))
    return struct.unpack(">f", struct.pack(">I", word ^ (1 << (31 - bit))))[0]


def expected_new(rule: dict[str, Any], old: np.ndarray, tensor: np.ndarray) -> list[float]:
    """The values a rule makes, without torch."""
    kind = rule["kind"]
    if kind == "flip":
        assert rule["word"] == "float32"
        return [flip_by_struct(v, rule["bit"]) for v in old]
    if kind == "copy":
        return tensor.ravel()[rule["from"]].tolist()
    return {"zero": [0.0] * len(old), "values": rule.get("values"), "value": [rule.get("value")] * len(old)}[kind]


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    """Position, count and value of every type, and the hit that is recorded. Broken on purpose: N C H W for N H W C
    order, the sign as bit 31, 16 for 64: the types concerned fail. (Upstream wrote one value whatever the type.)"""
    net = tiny()
    found = plan(spec_of(name, layer="", step=0), trace(net, TINY_X))
    operand, first, count, rule = GOLDEN[name]
    assert (found.site.direction, found.site.operand) == ("forward", operand)
    assert list(found.index[: len(first)]) == first and len(found.index) == count
    for key, value in rule.items():
        assert found.rule[key][: len(value)] == value if isinstance(value, list) else found.rule[key] == value
    hits: list[Hit] = []
    model = spec_of(name).build()
    with OpMode(net, model.realise(found, hits, attempt=0)):
        out = net(TINY_X)
    x, w = TINY_X.numpy(), net.weight.detach().numpy()
    right = np.einsum("nihw,oi->nohw", x, w[:, :, 0, 0])
    tensor = {"a": x, "b": w, "out": right}[operand]
    (hit,) = hits
    old = tensor.ravel()[list(found.index)]
    np.testing.assert_allclose(hit.old, old, rtol=2e-6)
    np.testing.assert_allclose(hit.new, expected_new(dict(found.rule), np.array(hit.old), tensor), rtol=2e-6)
    wrong = tensor.copy()
    wrong.ravel()[list(found.index)] = hit.new
    operands = {"a": x, "b": w} | {operand: wrong}
    faulty = wrong if operand == "out" else np.einsum("nihw,oi->nohw", operands["a"], operands["b"][:, :, 0, 0])
    if "lanes" in found.rule:
        faulty, computed = right.copy(), faulty
        faulty.ravel()[found.rule["lanes"]] = computed.ravel()[found.rule["lanes"]]
        assert not np.array_equal(faulty, right)
    np.testing.assert_allclose(out.detach(), faulty, rtol=1e-5, atol=1e-5)
    with OpMode(net, model.realise(found, hits, attempt=1)):  # transient: a repeated step is clean
        np.testing.assert_allclose(net(TINY_X).detach(), right, rtol=1e-5)


class Middle(nn.Module):
    """A strided grouped convolution after another one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 24, 1)
        self.conv = nn.Conv2d(24, 40, 3, stride=2, padding=1, groups=2)
        self.head = nn.Linear(40 * 9, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.first(x)).flatten(1))


MIDDLE = trace(Middle(), torch.zeros(4, 1, 6, 6))


@pytest.mark.parametrize("layer", ["conv", "head"])
@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("name", NAMES)
def test_runs_lie_along_channels_and_spans_are_bounded(name: str, direction: str, layer: str) -> None:
    """At every site, 6 draws each: aligned runs of 1, 16 or 64 on the walk through the tensor, as many as the type
    says. Broken on purpose: weights walked O first, runs not aligned, a span past the end."""
    kind = TYPES[name]
    record = next(r for r in MIDDLE if r.layer == layer)
    for replicate in range(6):
        found = plan(spec_of(name, layer=layer, direction=direction), MIDDLE, replicate)
        shape = record.shapes(direction)[found.site.operand]
        assert found.shape == shape and found.site.layer == layer and found.site.direction == direction
        assert found.site.operand == {"input": "a", "weight": "b", "output": "out"}[kind.target]
        numbers = np.arange(math.prod(shape)).reshape(shape)
        order = walked(numbers, kernel=shape == record.b, linear=layer == "head")
        n = min(kind.run, len(order))
        start = int(np.flatnonzero(order == found.index[0])[0])
        assert start % n == 0 and len(found.index) % n == 0
        assert list(found.index) == order[start : start + len(found.index)].tolist()
        assert len(found.index) == n or (kind.span and len(found.index) <= 64 * n)


def test_a_span_is_uniform_up_to_its_bound_or_to_the_end_of_the_tensor() -> None:
    """Spans over a weight of 24 runs of 64, element i of the walk being i; null = unbounded, as published."""
    ops = trace(nn.Linear(1, 24 * 64, bias=False), torch.zeros(2, 1))
    runs = {(p.index[0] // 64, (p.index[-1] + 1) // 64) for p in (plan(N64WtGlb(), ops, i) for i in range(100))}
    assert max(end for _, end in runs) == 24  # what is left is less than the default bound
    bounded = [plan(N64WtGlb(max_span=4), ops, i) for i in range(300)]
    lengths = [len(p.index) // 64 for p in bounded if p.index[0] // 64 <= 20]
    assert all(abs(lengths.count(k) - len(lengths) / 4) < 4 * math.sqrt(len(lengths) * 3 / 16) for k in range(1, 5))
    free = [plan(N64WtGlb(max_span=None), ops, i) for i in range(300)]
    first = np.array([p.index[0] // 64 for p in free])
    share = (np.array([len(p.index) // 64 for p in free]) - 0.5) / (24 - first)  # of what is left: uniform in (0, 1)
    assert abs(share.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 300) and share.std() > 0.2


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("cls", [Input16, Wt16, N64Input16])
@pytest.mark.parametrize("layer", ["conv", "head"])
def test_sixteen_lanes_see_the_wrong_operand(cls: type[HardwareFault], direction: str, layer: str) -> None:
    """Upstream left these types as their plain ones. The lanes are 16 consecutive channels of one pixel (first operand)
    or 16 consecutive positions of one channel (second), clamped; at least one depends on a wrong element. Broken on
    purpose: lanes drawn without looking at what the element feeds."""
    record = next(r for r in MIDDLE if r.layer == layer)
    for replicate in range(8):
        found = plan(cls(layer=layer, direction=direction), MIDDLE, replicate)
        shapes = record.shapes(direction)
        shape, lanes = shapes["out"], found.rule["lanes"]
        kernel, linear = direction == "grad_weight", layer == "head"
        table = walked(np.arange(math.prod(shape)).reshape(shape), kernel=kernel, linear=linear)
        channels = shape[0] if kernel else shape[1]
        table = table.reshape(-1, channels)  # positions x channels
        places = [tuple(int(v[0]) for v in np.nonzero(table == lane)) for lane in lanes]
        along, across = (1, 0) if found.site.operand == "a" else (0, 1)
        assert len({p[across] for p in places}) == 1
        run = [p[along] for p in places]
        assert run == list(range(run[0], run[0] + min(16, table.shape[along])))
        assert set(lanes) & depends(record, direction, found)


def depends(record: OpRecord, direction: str, found: Planned) -> set[int]:
    """The results that change when a hit element does, by ``torch.nn.grad`` and matrix products."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(record.shapes(direction)[k], generator=g, dtype=torch.float64) + 0.5 for k in ("a", "b"))

    def compute(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if record.kind == "linear":
            return {"forward": lambda: a @ b.T, "grad_input": lambda: a @ b, "grad_weight": lambda: b.T @ a}[
                direction
            ]()
        grad = torch.nn.grad
        settings = {"stride": 2, "padding": 1, "groups": 2}
        if direction == "forward":
            return torch.nn.functional.conv2d(a, b, None, **settings)
        if direction == "grad_input":
            return grad.conv2d_input(record.a, b, a, **settings)
        return grad.conv2d_weight(a, record.b, b, **settings)

    before = compute(a, b)
    target = a if found.site.operand == "a" else b
    target.view(-1)[list(found.index)] += 1.0
    return set(torch.nonzero(compute(a, b).flatten() != before.flatten()).flatten().tolist())


def test_an_element_that_feeds_nothing_is_not_drawn_for_lanes() -> None:
    """A 1x1 kernel with stride 2 reads a quarter of its input; asking for another element is an error."""
    ops = trace(nn.Conv2d(4, 20, 1, stride=2), torch.zeros(1, 4, 4, 4))
    for i in range(20):
        _, _, row, column = np.unravel_index(plan(Input16(), ops, i).index[0], (1, 4, 4, 4))
        assert row % 2 == 0 and column % 2 == 0
    with pytest.raises(
        UserError, match=r"fault.index = \[1\]: expected an element that at least one result depends on"
    ):
        plan(Input16(index=[1]), ops)


@pytest.mark.parametrize("bit", range(32))
def test_a_flip_inverts_one_bit_of_the_big_endian_word(bit: int) -> None:
    values = torch.tensor([1.0, -0.15625, 3.0e38, 1e-40, 0.0, math.inf])
    for value, got in zip(values.tolist(), flipped(values, bit, "float32").tolist(), strict=True):
        expected = flip_by_struct(value, bit)
        assert got == expected or (math.isnan(got) and math.isnan(expected))
    assert torch.equal(flipped(values[:1].double(), 1, "float32"), torch.tensor([math.inf]).double())


@pytest.mark.parametrize("bit", range(16))
def test_sixteen_bit_words(bit: int) -> None:
    """The value is rounded to the word (to nearest, ties to even) and read there. 1 + 2^-8 is a tie in bfloat16."""
    values = np.array([1.0, -2.718281828, 1.00390625, 65000.0, 6e-8], dtype=np.float32)
    halves = values.astype(np.float16).view(np.uint16) ^ np.uint16(1 << (15 - bit))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(
            flipped(torch.from_numpy(values), bit, "float16").numpy(), halves.view(np.float16).astype(np.float32)
        )
    words = values.view(np.uint32)
    rounded = (words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    brain = ((rounded ^ np.uint32(1 << (15 - bit))) << np.uint32(16)).view(np.float32)
    np.testing.assert_array_equal(flipped(torch.from_numpy(values), bit, "bfloat16").numpy(), brain)


@pytest.mark.parametrize(("word", "bits"), [("float32", 32), ("bfloat16", 16), ("float16", 16)])
def test_random_patterns_are_finite_words_with_uniform_bits(word: str, bits: int) -> None:
    """4,000 draws: every bit about half the time (exponent bits a little less: NaN and infinity are redrawn)."""
    values = np.array(finite_patterns(Streams(0), 4000, word, replicate=0))
    assert np.isfinite(values).all() and len(set(values.tolist())) > (3700 if bits == 32 else 3000)
    held = torch.tensor(values).to(getattr(torch, word))
    assert torch.equal(held.double(), torch.tensor(values))  # each is a number of that format
    words = held.view(torch.int32 if bits == 32 else torch.int16).numpy().astype(np.int64) & ((1 << bits) - 1)
    ones = np.array([((words >> k) & 1).mean() for k in range(bits)])
    assert (abs(ones - 0.5) < 0.045).all()
    drawn = plan(Rd(word=word), trace(tiny(), TINY_X)).rule["value"]
    assert drawn == float(torch.tensor(drawn).to(getattr(torch, word)))
    assert {plan(Input(word=word), trace(tiny(), TINY_X), i).rule["bit"] for i in range(250)} == set(range(bits))


def test_what_is_not_a_number_is_overwritten() -> None:
    """The published multiplication by a 0/1 mask keeps NaN and infinity where they are hit."""
    x = torch.tensor([math.nan, math.inf, 2.0])
    old, new = realised({"kind": "value", "value": 5.0}, x, torch.tensor([0, 1]))
    assert new.tolist() == [5.0, 5.0] and math.isnan(old[0])


def test_directions_layers_and_bits_are_uniform() -> None:
    """Weight gradients are drawn as often as input gradients (upstream never drew one). Chi-square, 1 in 10,000."""

    def share(counted: list[Any], kinds: int) -> None:
        counts = [counted.count(k) for k in set(counted)]
        assert len(counts) == kinds
        expected = len(counted) / kinds
        statistic = sum((n - expected) ** 2 / expected for n in counts)
        assert statistic < {2: 15.2, 3: 18.5, 32: 72.0}[kinds]

    drawn = [plan(Input(direction="any"), MIDDLE, i) for i in range(900)]
    share([p.site.direction for p in drawn], 3)
    share([p.site.layer for p in drawn if p.site.direction == "forward"], 3)
    share([p.site.layer for p in drawn if p.site.direction == "grad_input"], 2)  # not of the first layer
    share([p.rule["bit"] for p in drawn], 32)
    share([plan(Wt(direction="backward"), MIDDLE, i).site.direction for i in range(400)], 2)


def test_settings_that_are_given_fix_their_draw_and_leave_the_others() -> None:
    free = plan(N16Rd(value_mode="log_uniform"), MIDDLE, 3)
    fixed = plan(N16Rd(value_mode="log_uniform", layer=free.site.layer, step=7), MIDDLE, 3)
    assert fixed.step == 7 and fixed.rule == free.rule
    assert plan(N16Rd(value_mode="fixed", value=-3.5), MIDDLE).rule == {"kind": "value", "value": -3.5}
    listed = {plan(Rd(value_mode="list", values=[1.0, -2.0]), MIDDLE, i).rule["value"] for i in range(40)}
    assert listed == {1.0, -2.0}
    flat = plan(Rd(layer="conv", index=[0, 39]), MIDDLE)
    assert flat.index == (0, 39) and len(flat.rule["values"]) == 2
    assert plan(Rd(layer="conv", index=[[1, 2, 0, 2]]), MIDDLE).index == (40 * 9 + 2 * 9 + 2,)
    assert plan(Rd(layer="conv", direction="grad_weight", index=[[39, 11, 2, 2]]), MIDDLE).index == (40 * 12 * 9 - 1,)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ("RD layer=convv1", "fault.layer = 'convv1': expected one of conv1, .* did you mean 'conv1'"),
        (
            "WT direction=grad_input layer=conv1",
            r"fault.direction = 'grad_input': expected an operation layer 'conv1' makes in training \(forward, grad_w",
        ),
        ("RD layer=conv1 index=[4096]", "fault.index = 4096: expected 0 to 4095, .* shape .32, 8, 4, 4."),
        ("RD layer=head index=[[0,10]]", r"fault.index = \[0, 10\]: expected coordinates inside .* .32, 10."),
        ("RD layer=head index=[[0,1,2]]", r"fault.index = \[0, 1, 2\]: expected coordinates inside"),
    ],
)
def test_what_the_model_cannot_have_is_one_line_before_training(settings: str, text: str, tmp_path: Path) -> None:
    fault = [f"fault.{word}" if "=" in word else f"fault={word}" for word in settings.split()]
    small = ["size=quick", "dataset=digits", "model.pool=1", "batch_size=32", "cases=1", *fault]
    with pytest.raises(UserError, match=text) as caught:
        api.run(resolve("recovery", small), tmp_path / "out", launcher="local")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out/blocks/*/*"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["fault=RD", "fault.value=3"], "fault.value = 3.0: expected value_mode = fixed, for this is native"),
        (["fault.value_mode=native"], "fault.value_high = 1000000000000.0: expected value_mode = log_uniform"),
        (["fault=RD", "fault.value_mode=fixed"], "fault.value = None: expected a number"),
        (["fault=RD", "fault.value_mode=list"], r"fault.values = \[\]: expected at least one number"),
        (["fault=RD", "fault.values=[1]"], r"fault.values = \[1.0\]: expected value_mode = list"),
        (["fault=ZERO", "fault.word=float16"], "fault.word"),
        (["fault=RD", "fault.max_span=3"], "fault.max_span"),
        (["fault.word=float16"], "fault.word = float16: expected value_mode = native"),
        (["fault=RD_GLB", "fault.max_span=3", "fault.index=[1]"], "fault.max_span = 3: expected no index"),
        (["fault=RD", "fault.direction=backwards"], "fault.direction = 'backwards': expected"),
        (["fault=RD", "fault.index=[-1]"], "fault.index"),
        (["fault=N32_RD"], "fault = 'N32_RD': expected one of"),
    ],
)
def test_a_setting_that_is_not_read_is_refused(settings: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        resolve("recovery", settings)
    assert "\n" not in str(caught.value)


def test_old_runs_keep_their_ids_and_new_meanings_get_new_ones() -> None:
    """log_uniform, once the only mode, is no part of the identity; native is, though it is the default."""
    assert N16Rd(value_mode="log_uniform", value_high=1e12).identity() == {"name": "N16_RD", "value_high": 1e12}
    assert RdGlb().identity() == {"name": "RD_GLB", "value_mode": "native"}


def test_the_registry_is_the_catalogue() -> None:
    assert [cls.model_fields["name"].default for cls in HARDWARE] == NAMES
    assert [t.number for t in TYPES.values()] == list(range(1, 19))
    assert all((cls.__doc__ or "").endswith(".") for cls in HARDWARE)


# The same through the study: 18 types x 2 optimizers, one case each, at the first layer.


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> store.Results:
    small = ["size=quick", "dataset=digits", "model={name: cnn, pool: 1, channels: [16, 16, 16]}", "batch_size=16"]
    fault = [f"fault={','.join(NAMES)}", "fault.step=1", "fault.layer=conv1"]
    out = tmp_path_factory.mktemp("types") / "out"
    resolved = resolve("recovery", [*small, *fault, "cases=1", "recovery_steps=1", "optimizer=sgd,adam"])
    assert api.run(resolved, out, launcher="local", with_report=False) == 0
    return store.load(out)


def scene(results: store.Results, run: str) -> dict[str, np.ndarray]:
    (file,) = results.path.glob(f"blocks/*/artifacts/hit-{run}.npz")
    with np.load(file) as held:
        return dict(held)


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_hit_is_what_the_fault_did(name: str, results: store.Results) -> None:
    """From the files alone: batch and weights before the hit give the old values, the rule the new ones. Both
    optimizers met the same fault (upstream hit each at a place of its own)."""
    settings = {run["id"]: run["settings"] for run in results.runs}
    hits = [h for h in results.hits if settings[h["run"]]["fault"]["name"] == name]
    assert sorted(h["optimizer"] for h in hits) == ["adam", "sgd"]
    same = [{k: h[k] for k in ("step", "site", "layer", "rule", "index")} for h in hits]
    assert same[0] == same[1] and same[0]["step"] == 1 and same[0]["layer"] == "conv1"
    planned = [c for c in results.campaign if c["fault"] == name]
    assert len(planned) == 1 and all(planned[0][k] == v for k, v in same[0].items())
    for hit in hits:
        held = scene(results, hit["run"])
        x, w = held["x"], held["params/conv1.weight"]
        padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
        out = np.zeros((len(x), len(w), x.shape[2] // 2, x.shape[3] // 2), np.float32)
        for r, c in np.ndindex(3, 3):
            out += np.einsum("nihw,oi->nohw", padded[:, :, r : r + 7 : 2, c : c + 7 : 2], w[:, :, r, c])
        tensor = {"forward/a": x, "forward/b": w, "forward/out": out}[hit["site"]]
        assert planned[0]["shape"] == list(tensor.shape)
        numbers = walked(np.arange(tensor.size).reshape(tensor.shape), kernel=hit["site"] == "forward/b").tolist()
        at, n = numbers.index(hit["index"][0]), len(hit["index"])
        assert numbers[at : at + n] == hit["index"] and (TYPES[name].span or n == TYPES[name].run)
        old = np.array(hit["old"])
        np.testing.assert_allclose(old, tensor.ravel()[hit["index"]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(hit["new"], expected_new(hit["rule"], old, tensor), rtol=1e-4, atol=1e-5)


def test_every_fault_that_changes_a_value_changes_the_step(results: store.Results) -> None:
    """Twins and faulted runs side by side: the batch's loss or the update differs wherever the fault wrote something
    that can matter, and nothing differs before. (Upstream, a fault of the first layer did nothing.)"""
    frame = results.frame
    by_id = {
        run["id"]: (run["settings"]["fault"]["name"], run["settings"]["optimizer"]["name"], run["role"])
        for run in results.runs
    }
    rows = {(*by_id[r["run"]], r["step"]): (r["train_loss"], r["grad_norm"]) for r in frame.to_dicts()}
    changed = set()
    for name in NAMES:
        for optimizer in ("sgd", "adam"):
            fault, twin = ([rows[name, optimizer, role, step] for step in (0, 1)] for role in ("fault", "twin"))
            assert fault[0] == twin[0]
            if json.dumps(fault[1]) != json.dumps(twin[1]):
                changed.add(name)
    assert {"RD", "N16_RD", "N16_RD_CORRECT", "RD_GLB", "RD_CORRECT_GLB", "N64_INPUT", "N64_WT"} <= changed
    assert len(changed) >= 12  # the others hit a pixel or a bit that does not show in float32


def test_each_layer_is_a_point_of_the_grid() -> None:
    """``fault.layer=each`` against the same layers spelled out: equal ids. Fails when a layer that does not make the
    operation is among them, or one is missing."""
    words = ["dataset=digits", "optimizer=sgd,adam", "cases=2"]
    for direction, layers in (("forward", "conv1,conv2,conv3,head"), ("grad_input", "conv2,conv3,head")):
        own = [*words, f"fault.direction={direction}"]
        each, spelled = (resolve("recovery", [*own, f"fault.layer={layer}"]).runs for layer in ("each", layers))
        assert sorted(run.id for run in each) == sorted(run.id for run in spelled)
    two = resolve("recovery", [*words, "model=cnn,linear", "fault.layer=each"])
    assert len(two.cells) == 2 * (4 + 1)
    with pytest.raises(UserError, match=r"model = 'cnn': expected"):
        resolve("recovery", ["dataset=gaussian_mixture", "model=cnn", "fault.layer=each"])
