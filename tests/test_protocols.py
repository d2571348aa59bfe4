"""Protocols of the recovery study: a baseline that others continue, optimizers that track another's trajectory.

The oracles are torch's own optimizers on the same gradients, and the scratch protocol, which shares no hand-over code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from descentlab.config.resolve import resolve
from descentlab.config.yaml12 import dump
from descentlab.core.errors import UserError, UserErrors
from descentlab.core.state import State
from descentlab.launch.block import run_block
from descentlab.launch.plan import make_plan, read_block
from descentlab.launch.prepare import prepare, resolved_rows
from descentlab.optim.handover import Handover, Tracking
from descentlab.optim.specs import OPTIMIZERS
from descentlab.optim.stacked import Rule, StackedOptimizer
from descentlab.store import RunDirectory, equal_tables, load

SMALL = ["model=mlp", "dataset=digits", "recovery_steps=6", "fault.last_epoch=0", "processes=1"]
SPIKE = ["model=mlp", "dataset=digits", "fault={name: event, target: gradient, op: mul, magnitude: 1e4, step: 12}"]


def planned(path: Path, *words: str) -> RunDirectory:
    """The directory of a study before its first step."""
    resolved = resolve("recovery", list(words))
    made = prepare(resolved, path, True)
    directory = RunDirectory.create(path, "recovery", dump(resolved.document), overwrite=True)
    directory.replace_json("plan.json", made["plan"])
    directory.replace_jsonl("campaign.jsonl", made["campaign"])
    directory.replace_jsonl("resolved.jsonl", resolved_rows(resolved))
    return directory


def trained(path: Path, *words: str) -> Any:
    directory = planned(path, *words)
    for block in directory.read_json("plan.json")["blocks"]:
        assert run_block(path, block["key"]) == "done"
    return load(path)


def rows(frame: pl.DataFrame, **where: Any) -> pl.DataFrame:
    """What was measured, without who it was measured on."""
    chosen = frame.filter(pl.all_horizontal(pl.col(k) == v for k, v in where.items()))
    measured = ["step", "train_loss", "train_accuracy", "lr", "grad_norm", "update_norm", "slot_max", "test_loss"]
    return chosen.sort("replicate", "step").select("replicate", *measured).with_columns(run=pl.lit(""), attempt=0)


# Scratch is what it was


def test_scratch_changes_no_run_id() -> None:
    """The ids of the commit before protocols existed. Fails when a new key enters the identity at its default."""
    for words, head in (([], "c05be57b6ad5"), (["preset=published"], "d940f53a2716")):
        ids = "".join(run.id for run in resolve("recovery", words).runs)
        assert hashlib.sha256(ids.encode()).hexdigest()[:12] == head


# What is shared, and when


def test_optimizers_share_the_prefix_and_the_faulty_update() -> None:
    """One member up to the fault, two on it, then one per run. Fails when a test optimizer trains its own prefix."""
    words = [*SMALL, "protocol=baseline", "baseline=adam", "cases=1", "optimizer=sgd,adam,rmsprop"]
    (block,) = make_plan(resolve("recovery", words), {})[0]["blocks"]
    plan = read_block(block).plan
    hit = plan.runs[0].planned[0].step
    slots = [plan.slots(step) for step in (0, hit - 1, hit, hit + 1)]
    assert [len(s) for s in slots] == [1, 1, 2, 6]
    assert [len(slot.runs) for slot in slots[2]] == [3, 3] and {len(slot.runs) for slot in slots[3]} == {1}
    assert sorted({run.perturbed for run in slot.runs} == {True} for slot in slots[2]) == [False, True]
    assert block["member_steps"] == hit + 2 + 6 * 6
    names = [block["variants"][slot.variant]["optimizer"]["name"] for slot in slots[3]]
    assert sorted(names) == ["adam", "adam", "rmsprop", "rmsprop", "sgd", "sgd"]
    assert {slot.lr for slot in slots[2]} == {0.01} and {slot.lr for slot in slots[3]} == {0.1, 0.01, 0.003}


def test_stages_of_two_optimizers_have_the_same_prefix() -> None:
    from descentlab.launch.plan import program_of, stage_entries

    def keys(optimizer: str, protocol: str = "baseline") -> dict[str, str]:
        resolved = resolve("recovery", [*SMALL, f"protocol={protocol}", "baseline=adam", f"optimizer={optimizer}"])
        return {s["name"]: s["key"] for s in stage_entries(program_of(resolved.study).stages(resolved.cells[0]))}

    one, other = keys("sgd"), keys("rmsprop")
    assert {name for name in one if one[name] != other[name]} == {"recovery", "comparison"}
    assert keys("sgd", "shadow")["recovery"] != one["recovery"]


# The same optimizer again is no hand-over at all


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    return trained(tmp_path_factory.mktemp("scratch"), *SMALL, "cases=2", "optimizer=adam,sgd").frame


@pytest.mark.parametrize(("protocol", "baseline"), [("baseline", "adam"), ("baseline", "sgd"), ("shadow", "adam")])
def test_the_same_optimizer_equals_the_continuous_run_to_the_bit(
    tmp_path: Path, scratch: pl.DataFrame, protocol: str, baseline: str
) -> None:
    """Twin and faulted run, hand-over in the middle. Fails when a slot, the count of updates or a rate is not kept."""
    words = ["cases=2", f"protocol={protocol}", f"baseline={baseline}", "optimizer=adam,sgd,rmsprop"]
    results = trained(tmp_path, *SMALL, *words)
    for role in ("twin", "fault"):
        mine = rows(results.frame, optimizer=baseline, role=role)
        assert equal_tables(mine, rows(scratch, optimizer=baseline, role=role)) == []
        before = pl.col("step") <= pl.col("hit_step")
        prefixes = [rows(results.frame.filter(before), optimizer=o, role=role) for o in ("adam", "sgd", "rmsprop")]
        assert prefixes[0].height > 10
        assert equal_tables(prefixes[0], prefixes[1]) == equal_tables(prefixes[0], prefixes[2]) == []
    hits = {(h["case"], h["optimizer"]): h for h in results.hits}
    assert len(hits) == 6
    for case in (0, 1):
        assert {tuple(hits[case, o]["new"]) for o in ("adam", "sgd", "rmsprop")} == {tuple(hits[case, "adam"]["new"])}
    after = results.frame.filter(pl.col("step") > pl.col("hit_step"))
    rates = {o: after.filter(pl.col("optimizer") == o)["lr"].unique().to_list() for o in ("adam", "sgd", "rmsprop")}
    assert rates == {"adam": [0.01], "sgd": [0.1], "rmsprop": [0.003]}


def test_baseline_and_shadow_have_the_same_prefix(tmp_path: Path) -> None:
    """Tracking moves no weight. Fails when a shadow steps on the weights (AdamW's decay would show)."""
    frames = {}
    for protocol in ("baseline", "shadow"):
        words = ["cases=1", f"protocol={protocol}", "baseline=sgd", "optimizer=adamw", "optimizer.weight_decay=0.5"]
        frames[protocol] = trained(tmp_path / protocol, *SMALL, *words).frame
    before = [f.filter(pl.col("step") <= pl.col("hit_step")) for f in frames.values()]
    assert equal_tables(*(rows(f, role="fault") for f in before)) == []
    after = [rows(f, role="fault")["update_norm"][-1] for f in frames.values()]
    assert after[0] != after[1]  # one starts without a second moment, the other has tracked one


# Slots: torch is the oracle


def rule(name: str, **settings: Any) -> Rule:
    return OPTIMIZERS.parse({"name": name, **settings}).build()


def start(members: int = 1) -> State:
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(members, 3, 2, generator=generator), "b": torch.randn(members, 2, generator=generator)}
    return State.start(params, {})


def gradients(steps: int, members: int = 1, spike: int | None = None) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [
        {"w": torch.randn(members, 3, 2, generator=generator), "b": torch.randn(members, 2, generator=generator)}
        for _ in range(steps)
    ]
    if spike is not None:
        made[spike] = {name: 1e6 * g for name, g in made[spike].items()}
    return made


WATCHED = [
    rule("sgd", lr=0.1, momentum=0.9),
    rule("sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    rule("rmsprop", lr=0.1, alpha=0.9, momentum=0.5, centered=True),
    rule("adam", lr=0.1, amsgrad=True),
    rule("adamw", lr=0.1, weight_decay=0.3),
    rule("nadam", lr=0.1),
    rule("adagrad", lr=0.1, initial_accumulator_value=0.1),
    rule("adadelta", lr=0.1),
]


@pytest.mark.parametrize("tracked", WATCHED, ids=lambda r: r.cls.__name__)
def test_tracked_slots_equal_torchs(tracked: Rule) -> None:
    """The primary trajectory is unmoved, and after the hand-over the next update is torch's, to the bit: SGD's
    momentum has torch's sign and scale, RMSprop's average starts at 0, Adagrad's sum where it is told to, and no dummy
    step has decayed a weight. Fails with any of these defects, or when the faulty gradient is left out."""
    primary = rule("adam", lr=0.01)
    optimizer = Tracking(StackedOptimizer(primary, rules=[tracked, primary], by_rate=True), leading=[1])
    optimizer.assign([1])
    state, alone, grads = start(), start(), gradients(6, spike=4)
    watcher = {n: torch.nn.Parameter(p[0].clone()) for n, p in start().params.items()}
    oracle = tracked.make(list(watcher.values()), tracked.lr)
    plain, rate = StackedOptimizer(primary), torch.tensor([0.01], dtype=torch.float64)
    for g in grads[:5]:
        for name, p in watcher.items():
            p.data.copy_(state.params[name][0])
            p.grad = g[name][0].clone()
        oracle.step()
        optimizer.apply(state, {n: t.clone() for n, t in g.items()}, rate)
        plain.apply(alone, {n: t.clone() for n, t in g.items()}, rate)
    assert all(torch.equal(state.params[n], alone.params[n]) for n in state.params)
    optimizer.assign([0])
    Handover([tracked, primary])(state, 0, 1, 0, "tracked")
    for name, p in watcher.items():
        for slot, value in oracle.state[p].items():
            if slot != "step" and value is not None:
                assert torch.equal(state.slots[slot][name][0], value), slot
        p.data.copy_(state.params[name][0])
        p.grad = grads[5][name][0].clone()
    oracle.step()
    optimizer.apply(state, grads[5], torch.tensor([tracked.lr], dtype=torch.float64))
    assert all(torch.equal(state.params[name][0], p) for name, p in watcher.items())
    assert "tracked" not in state.shared


def constant(optimizer: Rule, steps: int) -> tuple[State, StackedOptimizer]:
    """After ``steps`` updates on one constant gradient."""
    state, stepped = start(), StackedOptimizer(optimizer)
    for _ in range(steps):
        g = {name: torch.full_like(p, 0.5) for name, p in state.params.items()}
        stepped.apply(state, g, torch.tensor([0.0], dtype=torch.float64))
    return state, stepped


ADAM, RMS = rule("adam", betas=(0.9, 0.99)), rule("rmsprop", alpha=0.8, momentum=0.5)


@pytest.mark.parametrize(
    ("old", "new", "kept", "fresh"),
    [
        (ADAM, rule("sgd", momentum=0.7), {"momentum_buffer"}, set()),
        (ADAM, rule("sgd"), set(), set()),
        (ADAM, rule("adamw", betas=(0.5, 0.9)), {"exp_avg", "exp_avg_sq"}, set()),
        (ADAM, rule("nadam"), {"exp_avg", "exp_avg_sq", "mu_product"}, set()),
        (ADAM, rule("adam", amsgrad=True), {"exp_avg", "exp_avg_sq"}, {"max_exp_avg_sq"}),
        (ADAM, RMS, {"square_avg"}, {"momentum_buffer"}),
        (ADAM, rule("rmsprop", centered=True), {"square_avg", "grad_avg"}, set()),
        (ADAM, rule("adadelta"), {"square_avg"}, {"acc_delta"}),
        (RMS, ADAM, {"exp_avg_sq"}, {"exp_avg"}),
        (RMS, rule("rmsprop", alpha=0.9, momentum=0.5), {"square_avg"}, set()),
        (rule("sgd", momentum=0.9), rule("sgd", momentum=0.5), {"momentum_buffer"}, set()),
    ],
    ids=lambda x: x.cls.__name__ if isinstance(x, Rule) else None,
)
def test_a_carried_slot_is_what_the_new_optimizer_would_have(
    old: Rule, new: Rule, kept: set[str], fresh: set[str]
) -> None:
    """Under a constant gradient, where both optimizers know the same. Fails when a slot is copied without its unit
    (Adam's first moment is a tenth of SGD's buffer), or without the count its bias correction needs."""
    (state, _), (own, _) = constant(old, 7), constant(new, 7)
    Handover([old, new])(state, 0, 0, 1, "carried")
    assert int(state.opt_step[0]) == 7
    for slot in kept:
        for name in ("w", "b"):
            torch.testing.assert_close(state.slots[slot][name], own.slots[slot][name], rtol=1e-5, atol=0)
    others = set(state.slots) - kept if old.cls is not new.cls or fresh else set()
    assert all((t == 0).all() for slot in others for t in state.slots[slot].values()) and fresh <= others


ADAGRAD = rule("adagrad", lr=0.1, initial_accumulator_value=0.1)


@pytest.mark.parametrize(
    ("old", "new", "how"),
    [
        (rule("sgd", momentum=0.9), ADAM, "carried"),  # no second moment to count on from
        (ADAM, ADAGRAD, "carried"),  # nobody else has a sum of squares
        (ADAM, rule("adam", betas=(0.9, 0.99)), "dropped"),
        (ADAGRAD, ADAGRAD, "dropped"),
        (rule("nadam"), rule("nadam"), "dropped"),
        (RMS, rule("sgd", momentum=0.9), "carried"),  # its momentum is of scaled gradients
    ],
    ids=lambda x: x.cls.__name__ if isinstance(x, Rule) else None,
)
def test_starting_anew_is_torchs_start(old: Rule, new: Rule, how: str) -> None:
    """Values at which a rule starts are restored, not zeroed. Fails when Adagrad's sum starts again at 0 or NAdam's
    product of momenta is kept; torch's own first step is the oracle."""
    state, _ = constant(old, 5)
    Handover([old, new])(state, 0, 0, 1, how)
    optimizer = StackedOptimizer(old, rules=[old, new], by_rate=True)
    optimizer.assign([1])
    weights = {n: torch.nn.Parameter(p[0].clone()) for n, p in state.params.items()}
    oracle = new.make(list(weights.values()), 0.1)
    for g in gradients(3):
        for name, p in weights.items():
            p.grad = g[name][0].clone()
        oracle.step()
        optimizer.apply(state, g, torch.tensor([0.1], dtype=torch.float64))
    assert all(torch.equal(state.params[name][0], p) for name, p in weights.items())


def test_members_of_different_classes_do_not_see_each_other() -> None:
    """Five rules in one block, each equal to torch alone. Fails when a rule is given another one's slots."""
    rules = [WATCHED[i] for i in (0, 2, 3, 5, 6)]
    state = start(5)
    optimizer = StackedOptimizer(rules[0], rules=rules, by_rate=True)
    optimizer.assign(range(5))
    weights = [{n: torch.nn.Parameter(p[m].clone()) for n, p in state.params.items()} for m in range(5)]
    oracles = [r.make(list(w.values()), 0.1) for r, w in zip(rules, weights, strict=True)]
    for g in gradients(4, members=5):
        for m, (w, oracle) in enumerate(zip(weights, oracles, strict=True)):
            for name, p in w.items():
                p.grad = g[name][m].clone()
            oracle.step()
        optimizer.apply(state, g, torch.full((5,), 0.1, dtype=torch.float64))
    assert all(torch.equal(state.params[n][m], w[n]) for m, w in enumerate(weights) for n in w)
    seen = [set().union(*bound.optimizer.state.values()) for bound in optimizer._bound]
    assert seen == [{"step"}.union(*oracle.state.values()) for oracle in oracles]


# The state that an empty start erases


def test_carried_adam_freezes_where_dropped_state_does_not(tmp_path: Path) -> None:
    """A gradient 1e4 times too large: Adam's second moment holds it for thousands of steps. Handed over or tracked it
    freezes whoever continues with it; dropped (as published) nobody notices. Two optimizers share the struck member,
    which is struck once. Fails when slots are not carried, or when an event acts once per run of a member."""
    speed: dict[str, dict[str, float]] = {}
    for how in ("protocol=baseline", "protocol=baseline carry_state=false", "protocol=shadow"):
        words = [*SPIKE, "cases=1", "recovery_steps=60", *how.split(), "baseline=adam", "optimizer=adamw,adam"]
        results = trained(tmp_path / str(len(speed)), *words)
        last = results.frame.filter(pl.col("step") >= 62)
        found = {}
        for (name,), part in last.group_by("optimizer"):
            mean = {role: part.filter(pl.col("role") == role)["update_norm"].mean() for role in ("fault", "twin")}
            found[str(name)] = float(mean["fault"]) / float(mean["twin"])  # type: ignore[arg-type]
        speed[how] = found
        at = results.frame.filter((pl.col("step") == 12) & (pl.col("optimizer") == "adam")).sort("role")["grad_norm"]
        assert np.isclose(at[0] / at[1], 1e4, rtol=1e-5)
        assert sorted(h["optimizer"] for h in results.hits) == ["adam", "adamw"]
    for name in ("adam", "adamw"):
        assert speed["protocol=baseline"][name] < 0.05 and speed["protocol=shadow"][name] < 0.05
        assert speed["protocol=baseline carry_state=false"][name] > 0.5


# Kill and resume, and mistakes


@pytest.mark.parametrize("protocol", ["baseline", "shadow"])
def test_interrupted_before_and_after_the_hand_over(tmp_path: Path, protocol: str) -> None:
    """Interrupted at every third update and continued: the same table. Fails when tracked slots are no part of the
    checkpoint, or a hand-over on the step of a checkpoint is done twice or not at all."""
    words = [*SMALL, "cases=2", f"protocol={protocol}", "baseline=adam", "optimizer=sgd,rmsprop"]
    whole = trained(tmp_path / "whole", *words)
    directory = planned(tmp_path / "cut", *words)
    (block,) = directory.read_json("plan.json")["blocks"]
    times = 0
    while True:
        seen: list[int] = []
        made = run_block(directory.path, block["key"], tick=seen.append, stop=lambda: len(seen) >= 3)  # noqa: B023
        times += 1
        if made == "done":
            break
    assert times > 3
    assert equal_tables(load(tmp_path / "cut").frame, whole.frame) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["protocol=baseline"], r"baseline = 'none': expected an optimizer that trains up to the fault"),
        (["protocol=shadow"], r"baseline = 'none': expected an optimizer that trains .* protocol = shadow"),
        (["baseline=adam"], r"baseline = 'adam': expected no baseline beside protocol = scratch"),
        (["protocol=baseline", "baseline=adamm"], r"baseline = 'adamm': expected one of .*did you mean 'adam'\?"),
        (["protocol=basline", "baseline=adam"], r"protocol = 'basline': expected .*baseline"),
        (["carry_state=false"], r"carry_state = False: expected protocol = baseline"),
        (["protocol=shadow", "baseline=adam", "carry_state=true"], r"carry_state = True: expected protocol = baseline"),
        (["protocol=baseline", "baseline=adam", "arm=skip"], r"arm = 'skip': expected none beside protocol = baseline"),
        (["protocol=shadow", "baseline=adam", "optimizer=torch.optim:Rprop"], r"optimizer = 'torch.optim:Rprop'"),
    ],
)
def test_a_mistake_is_one_line(words: Sequence[str], line: str) -> None:
    with pytest.raises((UserError, UserErrors), match=line) as caught:
        resolve("recovery", words if words[-1].startswith("optimizer") else ["optimizer=adam", *words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("protocol", "fault", "line"),
    [
        ("baseline", "{name: event, target: gradient, op: mul, magnitude: 2, step: 3, duration: 4}", "many steps"),
        ("shadow", "{name: event, target: slot, slot: first_moment, op: mul, magnitude: 2, step: 3}", "never read"),
    ],
)
def test_an_event_that_does_not_fit_is_refused_before_training(protocol: str, fault: str, line: str) -> None:
    words = ["model=mlp", "dataset=digits", f"protocol={protocol}", "baseline=adam", "optimizer=sgd", f"fault={fault}"]
    with pytest.raises(UserError, match=line):
        make_plan(resolve("recovery", words), {})


def test_optimizer_settings_of_the_study_hold_for_the_baseline_too() -> None:
    cell = resolve("recovery", ["preset=published", "protocol=baseline", "baseline=sgd", "optimizer=adam"]).cells[0]
    assert cell.model_dump()["baseline"]["momentum"] == 0.9 and cell.model_dump()["baseline"]["lr"] == 1e-3
