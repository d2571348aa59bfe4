"""Events against numpy by hand: every target and op, when they act, what a twin, a resumed run and a rival see."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import polars as pl
import pytest
import torch
from small import digits, finish, numbers, quadratic
from small_events import LR, STEPS, made, of, pair, plan
from torch import nn

import descentlab as dl
from descentlab.analysis.pollution import last_abnormal
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.protocols import Strike
from descentlab.core.streams import Streams
from descentlab.core.tree import leaves
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.program import RunPlan, Slot
from descentlab.engine.virtual import Virtual
from descentlab.launch import build
from descentlab.launch.plan import planned_from_json, planned_json
from descentlab.optim.specs import Adam, Optimizer, RmsProp, Sgd
from descentlab.perturb.event_specs import BatchSwap, Event, GradientNoise, Kick, LabelNoise, LrSpike
from descentlab.studies.crossed.spec import CrossedSpec
from descentlab.theory.slots import steps_until_normal
from descentlab.workloads.specs import SmallCnn

EVENT = {"step": 2}


class Hand:
    """What happens at each moment of step t; nothing unless overridden."""

    def __init__(self, **moments: Callable[..., Any]) -> None:
        self.moments = moments

    def __call__(self, name: str, t: int, x: Any) -> Any:
        return self.moments[name](t, x) if name in self.moments else x


def by_hand(cell: CrossedSpec, hand: Hand, steps: int = STEPS) -> list[np.ndarray]:
    """Theta after 0, 1, … updates of replicate 0."""
    theta, a, batch = numbers(made(cell)[1], 0)
    adam = cell.optimizer.name == "adam"
    rule = oracles.Adam() if adam else oracles.Momentum(cell.optimizer.momentum)  # type: ignore[attr-defined]
    out = [theta]
    for t in range(steps):
        theta = hand("weights", t, theta)
        z, inputs = hand("labels", t, batch(0, hand("batch", t, t))), hand("inputs", t, a)
        g = hand("gradient", t, oracles.quadratic_gradient(theta, inputs, z))
        theta = hand("before", t, theta)
        hand("slots", t, rule)
        theta = rule.step(theta, g, hand("lr", t, LR))
        hand("slots_after", t, rule)
        theta = hand("after", t, theta)
        out.append(theta)
    return out


def at(step: int, f: Callable[[Any], Any]) -> Callable[[int, Any], Any]:
    return lambda t, x: f(x) if t == step else x


def put(index: Sequence[int], f: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """``f`` of the flat elements ``index``, the others as they were."""

    def changed(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x.flat[list(index)] = f(x.flat[list(index)])
        return x

    return changed


def flipped(x: float, bit: int) -> float:
    """One bit of a double, counted from the sign."""
    word = struct.unpack(">Q", struct.pack(">d", x))[0] ^ (1 << (63 - bit))
    return struct.unpack(">d", struct.pack(">Q", word))[0]


def second_moment(rule: Any) -> None:
    rule.v = put([1, 5], lambda x: x * 1e4)(rule.v)


def velocity(rule: Any) -> None:
    rule.v = put([0], lambda x: x * 0 + 7.0)(rule.v)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean()))


Z = {
    t: Streams(0).normal("event/gradient/theta", 24, replicate=0, worker=0, step=t).reshape(4, 6) for t in range(STEPS)
}
K = Streams(0).normal("event/weights/theta", 24, replicate=0, worker=0, step=2).reshape(4, 6)
WEIGHTS = {"target": "weights", **EVENT}
MUL = {"op": "mul", "magnitude": 3.0, **EVENT}
SET_FIRST = {"op": "set", "magnitude": 7.0, "parameter": "theta", "index": [0], **EVENT}
CASES: dict[str, tuple[dict[str, Any], Hand]] = {
    "weights set": (
        {**WEIGHTS, "op": "set", "magnitude": 9.0, "parameter": "theta", "index": [3, 7]},
        Hand(weights=at(2, put([3, 7], lambda x: 9.0))),
    ),
    "weights flip": (
        {**WEIGHTS, "op": "flip", "bit": 5, "parameter": "theta", "index": [4]},
        Hand(weights=at(2, put([4], lambda x: flipped(x[0], 5)))),
    ),
    "weights kick": (
        {**WEIGHTS, "op": "kick", "magnitude": 2.5},
        Hand(weights=at(2, lambda x: x + 2.5 * K / np.linalg.norm(K))),
    ),
    "weights before the update": (
        {**WEIGHTS, "op": "add", "magnitude": 1.0, "where": "pre_apply"},
        Hand(before=at(2, lambda x: x + 1.0)),
    ),
    "weights after the update": (
        {**WEIGHTS, "op": "mul", "magnitude": 0.5, "where": "post_apply"},
        Hand(after=at(2, lambda x: 0.5 * x)),
    ),
    "gradient spike": ({"target": "gradient", **MUL}, Hand(gradient=at(2, lambda g: 3.0 * g))),
    "gradient add, relative": (
        {"target": "gradient", "op": "add", "magnitude": 2.0, "relative": True, **EVENT},
        Hand(gradient=at(2, lambda g: g + 2.0 * rms(g))),
    ),
    "gradient noise to the end": (
        {"target": "gradient", "op": "noise", "magnitude": 0.1, "duration": None, **EVENT},
        Hand(gradient=lambda t, g: g + 0.1 * Z[t] if t >= 2 else g),
    ),
    "worker's gradient": ({"target": "worker_gradient", **MUL}, Hand(gradient=at(2, lambda g: 3.0 * g))),
    "loss": ({"target": "loss", **MUL, "magnitude": -1.0}, Hand(gradient=at(2, lambda g: -g))),
    "learning rate": ({"target": "lr", **MUL}, Hand(lr=at(2, lambda lr: 3.0 * lr))),
    "momentum": (
        {"target": "slot", "slot": "momentum", **SET_FIRST},
        Hand(slots=at(2, velocity)),
    ),
    "second moment": (
        {"target": "slot", "slot": "second_moment", **MUL, "magnitude": 1e4, "parameter": "theta", "index": [1, 5]},
        Hand(slots=at(2, second_moment)),
    ),
    "second moment after the update": (
        {
            "target": "slot", "slot": "second_moment", **MUL, "magnitude": 1e4, "parameter": "theta", "index": [1, 5],
            "where": "post_apply",
        },
        Hand(slots_after=at(2, second_moment)),
    ),
    "targets": ({"target": "labels", "op": "add", "magnitude": 2.0, **EVENT}, Hand(labels=at(2, lambda z: z + 2.0))),
    "inputs": ({"target": "inputs", **MUL}, Hand(inputs=at(2, lambda a: 3.0 * a))),
    "for three steps": (
        {"target": "gradient", **MUL, "duration": 3},
        Hand(gradient=lambda t, g: 3 * g if 2 <= t < 5 else g),
    ),
    "intermittent": (
        {"target": "gradient", **MUL, "duration": None, "every": 2},
        Hand(gradient=lambda t, g: 3 * g if t in (2, 4) else g),
    ),
    "drifting": (
        {"target": "gradient", "op": "mul", "magnitude": 1.0, "drift": 1.5, "duration": None, **EVENT},
        Hand(gradient=lambda t, g: g * 1.5 ** (t - 2) if t >= 2 else g),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_event_does_what_it_says(name: str) -> None:
    """Theta after six updates, float64, 1e-12; the twin's as if nothing was planned; one hit, at the first step.

    Broken on purpose: acting one step late, on the twin, before instead of after the update; the power of the drift
    counted from step 0; ``every`` counted from step 0: each fails.
    """
    settings, hand = CASES[name]
    adam = settings.get("slot") == "second_moment"
    cell = of(Event(**settings), **({"optimizer": Adam(lr=LR)} if adam else {}))
    engine = finish(Lockstep(pair(cell), made(cell)[1]))
    twin, fault = (engine.state.params["theta"][m].numpy() for m in range(2))
    np.testing.assert_allclose(twin, by_hand(cell, Hand())[-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(fault, by_hand(cell, hand)[-1], rtol=0, atol=1e-12)
    assert np.abs(twin - fault).max() > 1e-3
    hits = engine.recorder.flush()[1]
    assert [(h["run"], h["step"], h["applied"]) for h in hits] == [("0-fault", 2, True)]
    assert hits[0]["activations"] == {"for three steps": 3, "intermittent": 2}.get(
        name, 4 if cell.fault.duration is None else 1
    )  # type: ignore[attr-defined]
    if settings.get("index"):
        assert hits[0]["index"] == settings["index"] and hits[0]["elements"] == len(settings["index"])


def test_old_and_new_values_are_stored() -> None:
    cell = of(Event(target="weights", op="mul", magnitude=2.0, elements=3, **EVENT))
    engine = finish(Lockstep(pair(cell), made(cell)[1]))
    before = by_hand(cell, Hand())[2].flatten()
    hit = engine.recorder.flush()[1][0]
    assert len(set(hit["index"])) == 3 and hit["tensor"] == "theta" and hit["layer"] == "theta"
    np.testing.assert_allclose(hit["old"], before[hit["index"]], rtol=0, atol=1e-13)
    assert hit["new"] == [2.0 * x for x in hit["old"]]


def test_noise_and_kicks_have_the_stated_size() -> None:
    """Relative noise: as large as the gradient itself. A kick moves the weights by the stated share of their norm."""
    cell = of(GradientNoise(magnitude=1.0, step=0), dataset={"name": "quadratic", "rows": 60, "dimension": 50, "n": 32})
    parts = made(cell)[1]
    engine = finish(Lockstep(pair(cell, steps=1), parts))
    start = parts.fresh(0)[0]["theta"]
    twin, fault = ((start - engine.state.params["theta"][m]) / LR for m in range(2))
    assert abs(float((fault - twin).norm() / twin.norm()) - 1.0) < 0.05  # 3,000 elements: 1.3 % standard error
    kicked = of(Kick(magnitude=0.25, step=0), optimizer=Sgd(lr=1e-12))
    parts = made(kicked)[1]
    engine = finish(Lockstep(pair(kicked, steps=1), parts))
    start = parts.fresh(0)[0]["theta"]
    assert float((engine.state.params["theta"][1] - start).norm() / start.norm()) == pytest.approx(0.25, rel=1e-6)


def test_another_batch_and_the_rate_by_their_short_names() -> None:
    """The batch is one of the same epoch and not the one that was due; which one is in the hit."""
    cell = of(BatchSwap(**EVENT))
    engine = finish(Lockstep(pair(cell), made(cell)[1]))
    hit = engine.recorder.flush()[1][0]
    other = int(hit["new"][0])
    assert hit["old"] == [2.0] and other in (0, 1, 3)
    hand = Hand(batch=at(2, lambda i: other))
    np.testing.assert_allclose(engine.state.params["theta"][1].numpy(), by_hand(cell, hand)[-1], rtol=0, atol=1e-12)
    spike = of(LrSpike(magnitude=5.0, **EVENT))
    engine = finish(Lockstep(pair(spike), made(spike)[1]))
    hand = Hand(lr=at(2, lambda lr: 5.0 * lr))
    np.testing.assert_allclose(engine.state.params["theta"][1].numpy(), by_hand(spike, hand)[-1], rtol=0, atol=1e-12)


def test_wrong_labels_give_the_gradient_of_wrong_labels() -> None:
    """One step on a network against autograd on labels that are all 3; the twin is untouched."""
    fault = Event(target="labels", op="set", magnitude=3, step=0)
    cell = digits(workers=1, fault=fault, dtype="float64", optimizer=Sgd(lr=0.1))
    parts, work = made(cell)[1], build.workload(cell)
    engine = finish(Lockstep(pair(cell, steps=1), parts))
    index = torch.from_numpy(parts.sampler.indices(*(np.zeros(1, dtype=np.int64),) * 3)[0])
    for m, labels in enumerate((work.data.y_train[index], torch.full((16,), 3))):
        module = work.module(parts.streams, 0)
        nn.functional.cross_entropy(module(work.data.x_train[index]), labels).backward()
        for name, p in module.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(engine.state.params[name][m], p.detach() - 0.1 * p.grad, rtol=0, atol=1e-13)


def test_label_noise_takes_the_stated_share_to_all_other_classes() -> None:
    """50 batches of 64: 30 % (4 standard errors: 3.2 %) change, to each other class alike, anew on each step."""
    effects = made(digits(workers=1, batch_size=64))[1].effects
    planned = plan(digits(workers=1, batch_size=64, fault=LabelNoise(fraction=0.3, step=0)))
    assert effects is not None
    labels = torch.arange(64) % 10
    seen = []
    for t in range(50):
        y = labels.clone().unsqueeze(0)
        effects.change(Strike([planned], [0], np.array([0]), t), {"labels": y})
        seen.append(y[0])
    new = torch.stack(seen)
    assert abs(float((new != labels).double().mean()) - 0.3) < 0.033 and not torch.equal(seen[0], seen[1])
    shifts = ((new - labels) % 10)[new != labels].bincount(minlength=10)[1:].double()
    assert float(((shifts - shifts.mean()) ** 2 / shifts.mean()).sum()) < 26.1  # chi-square, 8 d.f., 1 in 1,000


@pytest.mark.parametrize(("where", "weight"), [("pre_forward", 0.9), ("post_forward", 1.0)])
def test_batchnorm_buffers(where: str, weight: float) -> None:
    """A variance set before the forward pass is mixed with the batch's, one set after it stays."""
    fault = Event(target="buffer", op="set", magnitude=50.0, parameter="running_var", where=where, step=0)
    small = {"model": SmallCnn(channels=[2, 2, 2], pool=1), "dtype": "float64", "optimizer": Sgd(lr=0.1), "workers": 1}
    cell = digits(**small, fault=fault, batch_size=8)
    engine = finish(Lockstep(pair(cell, steps=1), made(cell)[1]))
    seen = 0
    for name, b in engine.state.buffers.items():
        if name.endswith("running_var"):
            batch = (b[0] - 0.9) / 0.1  # the twin's: 0.9 * 1 + 0.1 * variance of the batch
            torch.testing.assert_close(b[1], weight * 50.0 + (1.0 - weight) * batch)
            seen += 1
        else:
            assert torch.equal(b[0], b[1])
    assert seen == 3


@pytest.mark.parametrize(
    "fault",
    [
        LabelNoise(fraction=0.5, step=3),
        GradientNoise(step=3),
        Event(target="inputs", op="noise", magnitude=0.5, step=3, duration=None),
        Event(target="slot", slot="momentum", op="mul", magnitude=1.3, step=3, duration=None),
        Event(target="weights", op="add", magnitude=0.01, step=3, duration=None, probability=0.5),
    ],
    ids=lambda fault: fault.target,
)
def test_a_twin_is_the_same_to_the_bit_before_and_a_resumed_run_after(fault: Event) -> None:
    """Invariants 4 and 6: the table before the first step is equal; a state saved in the middle of the event, as a
    checkpoint does, goes on to the same bits. Broken on purpose: noise drawn from a counter that the state lacks."""
    cell = digits(workers=1, fault=fault)
    whole = finish(Lockstep(pair(cell, (0, 1), steps=9), made(cell)[1]))
    columns = whole.recorder.flush()[0]
    rows = list(zip(columns["run"], columns["step"], columns["train_loss"], columns["grad_norm"], strict=True))
    for r in (0, 1):
        twin, run = ({row[1]: row[2:] for row in rows if row[0] == f"{r}-{role}"} for role in ("twin", "fault"))
        assert all(twin[t] == run[t] for t in range(3)) and any(twin[t] != run[t] for t in range(3, 9))
    half = finish(Lockstep(pair(cell, (0, 1), steps=9), made(cell)[1]), until=5)
    saved = type(half.state).from_state_dict(half.state.clone().state_dict())
    rest = finish(Lockstep(pair(cell, (0, 1), steps=9), made(cell)[1], saved, 5))
    for a, b in zip(leaves(whole.state.server), leaves(rest.state.server), strict=True):
        assert torch.equal(a, b)


def test_members_do_not_touch_each_other() -> None:
    """Invariant 1: runs with events of their own, alone and in company, one of them set to NaN-producing size."""
    cell = digits(workers=1, fault=LabelNoise(fraction=0.5, step=2), dtype="float64")
    together = finish(Lockstep(pair(cell, (0, 1, 2)), made(cell)[1]))
    single = finish(Lockstep(pair(cell, (1,)), made(cell)[1]))
    for name, p in single.state.params.items():
        for role in (0, 1):
            torch.testing.assert_close(p[role], together.state.params[name][2 + role], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", [Sgd(lr=LR), Sgd(lr=LR, momentum=0.9), Adam(lr=LR), RmsProp(lr=LR)], ids=str)
def test_every_optimizer_meets_the_same_event_and_a_missing_slot_is_said(optimizer: Optimizer) -> None:
    """Invariant 5. SGD keeps no second moment: one line that says so, and not a bit of difference to its twin."""
    fault = Event(target="slot", slot="second_moment", op="set", magnitude=4.0, elements=2, **EVENT)
    cell = of(fault, optimizer=optimizer)
    engine = finish(Lockstep(pair(cell), made(cell)[1]))
    hit = engine.recorder.flush()[1][0]
    reference = plan(of(fault, optimizer=Adam(lr=0.5)))
    assert plan(cell) == reference
    same = torch.equal(engine.state.params["theta"][0], engine.state.params["theta"][1])
    if optimizer.name == "sgd":
        assert same and not hit["applied"] and hit["activations"] == 0
        assert hit["reason"] == "this optimizer keeps no second_moment of theta"
    else:
        assert not same and hit["applied"] and tuple(hit["index"]) == reference.index and hit["new"] == [4.0, 4.0]


def test_a_transient_does_not_act_again_when_a_step_is_repeated() -> None:
    """attempt > 0 is a repeated step: a transient is over, a lasting event is still there."""
    for duration, again in ((1, False), (2, True), (None, True)):
        cell = of(Event(target="gradient", op="mul", magnitude=3.0, duration=duration, step=0))
        plan_ = pair(cell, steps=1)
        engine = Lockstep(plan_, made(cell)[1])
        engine.state.clock["attempt"] += 1
        engine = finish(engine)
        twin, fault = engine.state.params["theta"]
        assert torch.equal(twin, fault) != again


def test_intermittent_by_chance() -> None:
    """With probability 0.25, about a quarter of 400 steps after the first, and other steps in another replicate."""
    cell = of(Event(target="lr", op="mul", magnitude=2.0, duration=None, probability=0.25, step=0))
    engine = finish(Lockstep(pair(cell, (0, 1), steps=400), made(cell)[1]))
    columns = engine.recorder.flush()[0]
    acted: dict[str, set[int]] = {"0-fault": set(), "1-fault": set()}
    for run, step, lr in zip(columns["run"], columns["step"], columns["lr"], strict=True):
        if run in acted and lr == 2.0 * LR:
            acted[run].add(step)
    assert all(0 in steps and abs(len(steps) - 100) < 4 * 8.7 for steps in acted.values())
    assert acted["0-fault"] != acted["1-fault"]


def test_steps_and_json_both_ways() -> None:
    planned = plan(of(Event(target="weights", op="add", magnitude=1.0, step=5, duration=7, every=3, elements=2)))
    assert list(planned.steps(100)) == [5, 8, 11] and list(planned.steps(9)) == [5, 8]
    assert [t for t in range(20) if planned.active(t)] == [5, 8, 11]
    assert list(replace(planned, duration=None).steps(12)) == [5, 8, 11]
    assert planned_from_json(planned_json(planned)) == planned
    old = {k: v for k, v in planned_json(planned).items() if k not in ("duration", "every")}
    assert planned_from_json(old).duration == 1
    assert RunPlan("a", 0, 20, LR, (planned,), True).forks_at() == 5
    assert Slot((RunPlan("a", 0, 20, LR, (planned,), True),)).planned_at(5) is None  # no route of its own


def test_stale_workers_read_changed_weights() -> None:
    """On the virtual clock a change of the weights at rest is part of the version that stale workers read later."""
    fault = Event(target="weights", op="add", magnitude=1.0, step=2)
    cell = quadratic(fault=fault, timeline={"name": "constant", "staleness": 2}, optimizer=Sgd(lr=LR))
    engine = finish(Virtual(pair(cell), made(cell)[1], timeline=cell.timeline.build()))
    theta, a, batch = numbers(engine.parts, 0)
    versions = [theta]
    for t in range(STEPS):
        if t == 2:
            versions[2] = versions[2] + 1.0
        g = [oracles.quadratic_gradient(versions[max(0, t - 2)], a, batch(w, t)) for w in range(2)]
        versions.append(versions[t] - LR * np.mean(g, axis=0))
    np.testing.assert_allclose(engine.state.params["theta"][1].numpy(), versions[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_spike_freezes_adam_as_long_as_predicted_and_displaces_sgd(optimizer: str) -> None:
    """``preset=spike`` on the quadratic: one gradient 100 times as large. Within 10 % of theory for Adam, whose
    updates are small until then; SGD is moved by lr (G - g) and the next update is normal.

    The prediction is for a constant gradient, so the learning rate is so small that the gradient moves by less than
    1e-3 of itself in the window, and beta2 = 0.99 keeps the window short.
    """
    betas = ["optimizer.betas=[0.9,0.99]"] if optimizer == "adam" else []
    base = ["preset=spike", "dataset=quadratic", "dataset.noise=0", "model=matrix", "dtype=float64", "batch_size=8"]
    more = [f"optimizer={optimizer}", "optimizer.lr=1e-7", "fault.step=300", "fault.magnitude=100"]
    (cell,) = resolve("recovery", [*base, *more, *betas]).cells
    parts = replace(made(cell)[1], evaluate_every=0, every=5 if betas else 1)
    engine = Lockstep(pair(cell, steps=1000 if betas else 310), parts)  # type: ignore[arg-type]
    columns = finish(engine).recorder.flush()[0]
    steps = pl.DataFrame(columns).pivot(on="run", index="step", values="update_norm").sort("step")
    ratio = (steps["0-fault"] / steps["0-twin"]).to_numpy()
    after = steps["step"].to_numpy() - 300
    abnormal = last_abnormal(after, ratio)
    if optimizer == "adam":
        predicted = steps_until_normal("adam", 100, beta2=0.99)
        assert abnormal is not None and abnormal > 500 and abs(abnormal - predicted) < 0.1 * predicted
        assert ratio[after == 50].item() < 0.2
    else:
        assert ratio[after == 0].item() == pytest.approx(100)
        assert ratio[after == 1].item() == pytest.approx(1, abs=1e-3)


def test_a_spike_freezes_adam_on_real_images_too() -> None:
    """``preset=spike`` on mnist5k, beta2 = 0.99 for a short window: within a factor 2 of theory (found: 0.7 of it), by
    the moving average over 105 steps. One batch's gradient is not G times the typical one in every weight."""
    (cell,) = resolve(
        "recovery", ["preset=spike", "optimizer=adam", "optimizer.betas=[0.9,0.99]", "fault.step=300"]
    ).cells
    engine = Lockstep(pair(cell, steps=1400), replace(made(cell)[1], evaluate_every=0))  # type: ignore[arg-type]
    steps = pl.DataFrame(finish(engine).recorder.flush()[0]).pivot(on="run", index="step", values="update_norm")
    after = steps.sort("step").filter(pl.col("step") > 300)
    ratio = (after["0-fault"] / after["0-twin"]).rolling_mean(21, center=True).drop_nulls()
    frozen = 5 * (11 + (ratio < 0.9).arg_true()[-1])
    predicted = steps_until_normal("adam", 1000, beta2=0.99)
    assert predicted == 1060 and predicted / 2 < frozen < 2 * predicted and ratio[0] < 0.5


def test_a_recovery_study_from_the_command_line(tmp_path: Path) -> None:
    """Adam's second moment is hit in every case; SGD has none, and hits.jsonl, report and summary say so."""
    model = ["dataset=digits", "model=mlp", "model.pool=0", "model.hidden=[8]", "optimizer=sgd,adam"]
    fault = ["fault=event", "fault.target=slot", "fault.slot=second_moment", "fault.op=set", "fault.magnitude=1e6"]
    more = ["fault.last_epoch=0", "cases=2", "size=quick", "batch_size=128"]
    results = dl.run("recovery", *model, *fault, *more, out=tmp_path / "out", launcher="local")
    assert {(h["optimizer"], h["applied"]) for h in results.hits} == {("sgd", False), ("adam", True)}
    assert len(results.hits) == 4 and all(c["site"] == "slot/pre_apply" for c in results.campaign)
    text = (results.path / "report" / "report.md").read_text()
    assert "sgd: the event could not happen in 2 runs (this optimizer keeps no second\\_moment)" in text
    with pytest.raises(UserError, match=r"fault.parameter = 'conv1'"):
        dl.run("recovery", *model, *fault, *more, "fault.parameter=conv1", out=tmp_path / "no", launcher="local")
