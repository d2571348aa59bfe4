"""Invariants 1, 2, 4, 5 and 7: a member equals the same run alone; twins equal their runs before the hit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from torch import nn

from descentlab.core.opmode import Ops
from descentlab.core.protocols import Batch
from descentlab.core.state import State
from descentlab.core.tree import Tree, leaves, stack
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.parts import Parts
from descentlab.engine.program import BlockPlan, Route, RunPlan
from descentlab.launch.build import build_parts, survey, workload
from descentlab.optim.specs import Adam, Sgd
from descentlab.perturb.specs import N16Rd
from descentlab.studies.recovery.spec import RecoverySpec
from descentlab.workloads.specs import Digits, Mlp, SmallCnn

ROUTES: list[Route] = ["vmap", "member"]
CNN = {"model": SmallCnn(channels=[4, 4, 6], pool=1), "optimizer": Sgd(lr=0.05, momentum=0.9)}
MLP = {"model": Mlp(hidden=[7], pool=0), "optimizer": Adam(lr=1e-3)}


def cell(**settings: Any) -> RecoverySpec:
    return RecoverySpec(**{"dataset": Digits(), "dtype": "float64", "batch_size": 16, "recovery_steps": 6, **settings})


def train(
    parts: Parts, runs: Sequence[RunPlan], route: Route, share: bool = True
) -> tuple[Lockstep, pl.DataFrame, list]:
    engine = Lockstep(BlockPlan("k", 0, route, tuple(runs), share), parts)
    for _ in engine.run():
        pass
    columns, hits = engine.recorder.flush()
    return engine, pl.DataFrame(columns, strict=False).sort("run", "step"), hits


def undisturbed(lr: float, replicates: Sequence[int], stop: int) -> list[RunPlan]:
    return [RunPlan(f"r{r}", r, stop, lr) for r in replicates]


def relative(a: Tree, b: Tree) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("settings", [MLP, CNN], ids=["mlp", "cnn"])
def test_gradients_at_equal_parameters_equal_those_of_a_plain_module(settings: dict, route: Route) -> None:
    spec = cell(**settings)
    parts, work = build_parts(spec, route), workload(spec)
    fresh = [parts.fresh(r) for r in range(3)]
    state = State.start(stack([p for p, _ in fresh]), stack([b for _, b in fresh]))
    x, y = work.data.x_train[:48].view(3, 16, *work.data.x_train.shape[1:]), work.data.y_train[:48].view(3, 16)
    got = parts.many.work(state, Batch(x, y))
    for r in range(3):
        module = work.module(parts.streams, r)
        loss = nn.functional.cross_entropy(module(x[r]), y[r])
        loss.backward()
        assert abs(float(got.loss[r] - loss.detach())) <= 1e-13
        for name, p in module.named_parameters():
            assert p.grad is not None and float((got.grads[name][r] - p.grad).abs().max()) <= 1e-13
        for name, b in module.named_buffers():
            torch.testing.assert_close(got.buffers[name][r], b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("settings", [MLP, CNN], ids=["mlp", "cnn"])
def test_a_member_equals_a_plain_training_loop(settings: dict, route: Route) -> None:
    """Invariant 1. Broken on purpose: drawing batches with worker + 1, or sharing one BatchNorm buffer, fails."""
    spec = cell(**settings)
    parts, work = build_parts(spec, route), workload(spec)
    lr = float(spec.optimizer.lr)  # type: ignore[attr-defined]
    engine, _, _ = train(parts, undisturbed(lr, (3, 0, 8), 40), route)
    module = work.module(parts.streams, 0)
    optimizer = parts.optimizer.rule.make(list(module.parameters()), lr)  # type: ignore[attr-defined]
    for step in range(40):
        epoch, batch = divmod(step, len(work.data.x_train) // 16)
        order = parts.streams.permutation("order", len(work.data.x_train), replicate=0, worker=0, step=epoch)
        index = torch.from_numpy(order[batch * 16 : batch * 16 + 16])
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(work.data.x_train[index]), work.data.y_train[index]).backward()
        optimizer.step()
    alone = {k: p.detach() for k, p in module.named_parameters()}
    assert relative({k: p[1] for k, p in engine.state.params.items()}, alone) <= 1e-12
    for name, b in module.named_buffers():
        torch.testing.assert_close(engine.state.buffers[name][1], b, rtol=1e-12, atol=1e-12)


def test_mlp_386_is_the_same_to_the_bit_alone_and_in_company() -> None:
    spec = cell(model=Mlp(), optimizer=Sgd(lr=0.1), dtype="float32", batch_size=64)
    together, _, _ = train(build_parts(spec, "vmap"), undisturbed(0.1, range(20), 25), "vmap")
    alone, _, _ = train(build_parts(spec, "vmap"), undisturbed(0.1, [13], 25), "vmap")
    for name, p in alone.state.params.items():
        assert torch.equal(p[0], together.state.params[name][13])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("settings", [MLP, CNN], ids=["mlp", "cnn"])
def test_a_nan_member_leaves_the_others_to_the_bit(settings: dict, route: Route) -> None:
    spec = cell(**settings)
    states = []
    for poisoned in (False, True):
        parts = build_parts(spec, route)
        engine = Lockstep(BlockPlan("k", 0, route, tuple(undisturbed(0.05, range(4), 12))), parts)
        for progress in engine.run():
            if poisoned and progress.step == 3:
                next(iter(engine.state.params.values()))[2] = math.nan
        states.append(engine.state)
    clean, broken = states
    for a, b in zip(leaves(clean.server), leaves(broken.server), strict=True):
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])
    assert next(iter(broken.params.values()))[2].isnan().all()


def test_dropout_draws_from_the_streams() -> None:
    """Alone = in company, and a second time the same, whatever the global generator does."""
    spec = cell(model=Mlp(hidden=[9], pool=0, dropout=0.3), optimizer=Sgd(lr=0.1))
    ends = []
    for route, replicates, place in (("vmap", (0, 1, 2), 1), ("member", (0, 1, 2), 1), ("vmap", (1,), 0)):
        torch.manual_seed(len(ends))
        engine, _, _ = train(build_parts(spec, route), undisturbed(0.1, replicates, 10), route)  # type: ignore[arg-type]
        ends.append({k: p[place] for k, p in engine.state.params.items()})
    assert relative(ends[1], ends[0]) <= 1e-12 and relative(ends[2], ends[0]) <= 1e-12


def faulted(spec: RecoverySpec, cases: Sequence[int] = (0, 1)) -> list[RunPlan]:
    site = survey(spec)
    model = spec.fault.build()
    runs = []
    for case in cases:
        planned = model.plan(case, site.operations, site.streams, replicate=case, steps_per_epoch=10)
        for role in ("twin", "fault"):
            lr = float(spec.optimizer.lr)  # type: ignore[attr-defined]
            runs.append(RunPlan(f"{case}-{role}", case, planned.step + 6, lr, (planned,), role == "fault"))
    return runs


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("settings", [MLP, CNN], ids=["mlp", "cnn"])
def test_a_fork_equals_training_both_from_scratch(settings: dict, route: Route) -> None:
    """Invariant 4. Broken on purpose: forking from the state before the last update, or a stream keyed by run."""
    spec = cell(**settings, fault=N16Rd(value_mode="log_uniform", value_high=1e6, last_epoch=0))
    runs = faulted(spec)
    _, shared, hits = train(build_parts(spec, route), runs, route)
    _, scratch, scratch_hits = train(build_parts(spec, route), runs, route, share=False)
    assert shared.columns == scratch.columns and len(shared) == len(scratch)
    for name in ("train_loss", "grad_norm", "update_norm", "test_loss"):
        a, b = shared[name].fill_null(0.0).to_torch(), scratch[name].fill_null(0.0).to_torch()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert [h["index"] for h in hits] == [h["index"] for h in scratch_hits] and len(hits) == 2
    for frame, exact in ((shared, True), (scratch, route == "member")):
        for run in (r for r in runs if r.perturbed):
            hit = run.planned[0].step
            pair = [frame.filter(pl.col("run") == f"{run.replicate}-{role}") for role in ("twin", "fault")]
            before = [f.filter(pl.col("step") < hit).drop("run", "wall_s") for f in pair]
            if exact:
                assert before[0].equals(before[1])  # to the bit
            else:  # two members of one vectorised call: rounding may depend on the place in the stack
                assert_frame_equal(before[0], before[1], rel_tol=1e-12, abs_tol=1e-12)
            at = [f.filter(pl.col("step") == hit)["train_loss"][0] for f in pair]
            assert at[0] != at[1]


def test_the_same_fault_meets_every_optimizer_and_is_stored() -> None:
    """Invariant 5. Broken on purpose: adding the optimizer's name to the stream's purpose."""
    found = []
    for optimizer in (Sgd(lr=0.05), Adam(lr=1e-3)):
        spec = cell(**{**CNN, "optimizer": optimizer}, fault=N16Rd(value_mode="log_uniform", last_epoch=0))
        _, _, hits = train(build_parts(spec, "vmap"), faulted(spec, range(4)), "vmap")
        found.append(hits)
    for a, b in zip(*found, strict=True):
        assert all(a[k] == b[k] for k in ("case", "step", "layer", "index", "rule", "new"))
        assert len(a["index"]) == len(a["old"]) == len(a["new"]) == 16
        assert all(v == a["rule"]["value"] for v in a["new"]) and a["old"] != a["new"]


def test_a_transient_fault_does_not_fire_again() -> None:
    spec = cell(**CNN, fault=N16Rd(value_mode="log_uniform"))
    model, planned = spec.fault.build(), faulted(spec, [0])[1].planned[0]
    assert model.realise(planned, [], attempt=0).edits and not model.realise(planned, [], attempt=1).edits


def test_nothing_planned_changes_nothing() -> None:
    """Invariant 7: an empty interception, a fault that is only planned (the twin's), no compression: the same bits."""
    spec = cell(**CNN, fault=N16Rd(value_mode="log_uniform", last_epoch=0))
    parts = build_parts(spec, "member")
    twin = next(r for r in faulted(spec) if not r.perturbed)
    plain = RunPlan(twin.id, twin.replicate, twin.stop, twin.lr)
    a, _, _ = train(build_parts(spec, "member"), [twin], "member")
    b, _, _ = train(build_parts(spec, "member"), [plain], "member")
    assert twin.planned[0].site.layer != "head"  # a bias added apart may round differently; conv layers have none
    assert all(torch.equal(x, y) for x, y in zip(leaves(a.state.server), leaves(b.state.server), strict=True))
    view, batch = a.state, Batch(parts.train[0][:16].unsqueeze(0), parts.train[1][:16].unsqueeze(0))
    x, y = parts.single.work(view, batch), parts.single.work(view, batch, Ops())
    assert all(torch.equal(p, q) for p, q in zip(leaves(x.grads), leaves(y.grads), strict=True))
