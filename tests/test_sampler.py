"""Which samples a step sees: frequencies, exact draws, shared orders, full batches, and what a mistake says."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.streams import Streams
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.program import BlockPlan, RunPlan
from descentlab.launch.build import build_parts, survey, workload
from descentlab.optim.specs import Sgd
from descentlab.studies.training.spec import TrainingSpec
from descentlab.workloads.specs import SAMPLERS, Digits, Full, Mlp, Replacement, Shuffle

N, B = 97, 5
MEMBERS = np.array([3, 0])


def made(block: Any, seed: int = 11) -> Any:
    return SAMPLERS.parse(block).build()(N, B, Streams(seed))


def cell(**settings: Any) -> TrainingSpec:
    base = {"dataset": Digits(), "model": Mlp(pool=0, hidden=[8]), "optimizer": Sgd(lr=0.1), "dtype": "float64"}
    return TrainingSpec(**{**base, **settings})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shuffle", [[70, 21, 90, 37, 77], [79, 15, 61, 74, 50]]),
        ("replacement", [[21, 75, 86, 91, 60], [70, 34, 60, 84, 63]]),
    ],
)
def test_exact_draws(name: str, expected: list[list[int]]) -> None:
    """Stored results depend on these numbers; they are those of the version before ``sampler`` was a setting."""
    drawn = made(name).indices(MEMBERS, np.array([0, 1]), np.array([20, 2]))
    assert drawn.tolist() == expected and drawn.dtype == np.int64


def test_the_default_shuffles_and_keeps_old_run_ids() -> None:
    words = ["fault=none", "timeline=barrier", "compressor=none", "optimizer=sgd", "schedule=linear", "batch_size=32"]
    resolved = resolve("crossed", words)
    assert resolved.cells[0].sampler == Shuffle()
    assert [run.id for run in resolved.runs][:3] == ["d3e7dac8a2f9", "9c184dbc2afc", "f7978195b0e8"]
    other = resolve("crossed", [*words, "sampler=replacement"])
    assert not {run.id for run in resolved.runs} & {run.id for run in other.runs}


def test_an_epoch_of_shuffle_meets_no_sample_twice() -> None:
    sampler = made("shuffle")
    assert sampler.steps_per_epoch == 19
    one = np.array([1])
    for epoch in range(3):
        seen = [sampler.indices(one, 0 * one, one * 0 + 19 * epoch + b)[0] for b in range(19)]
        assert len(set(np.concatenate(seen).tolist())) == 95


def test_replacement_draws_every_sample_equally_often() -> None:
    """Chi-squared over 97 samples, and repeats inside a batch as often as independent draws have them."""
    sampler, steps = made("replacement"), 8000
    drawn = sampler.indices(np.zeros(steps, int), np.zeros(steps, int), np.arange(steps))
    counts = np.bincount(drawn.ravel(), minlength=N)
    expected = steps * B / N
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 50 < chi2 < 160  # 96 degrees of freedom: outside with probability 1e-4
    repeats = np.mean([len(set(row)) < B for row in drawn.tolist()])
    alone = float(np.prod(1 - np.arange(B) / N))
    assert abs(repeats - (1 - alone)) < 4 * np.sqrt(alone * (1 - alone) / steps)


@pytest.mark.parametrize("name", ["shuffle", "replacement"])
def test_a_member_draws_the_same_alone_and_among_others(name: str) -> None:
    replicates, workers, positions = np.array([0, 3, 3, 7]), np.array([0, 0, 1, 0]), np.array([4, 21, 21, 4])
    together = made(name)
    for _ in range(3):  # the sampler remembers orders between calls
        rows = together.indices(replicates, workers, positions)
        for m in range(4):
            alone = made(name).indices(replicates[m : m + 1], workers[m : m + 1], positions[m : m + 1])
            assert (alone[0] == rows[m]).all()
        positions = positions + 13
    assert not (rows[1] == rows[2]).all() and not (rows[0] == rows[3]).all()


@pytest.mark.parametrize("name", ["shuffle", "replacement"])
def test_shared_batches_are_those_of_replicate_0(name: str) -> None:
    """Fails when the replicate is left in the key, or the worker is taken out of it."""
    shared, own = made({"name": name, "shared": True}), made(name)
    for position in (0, 5, 40):
        at = np.full(2, position)
        rows = shared.indices(MEMBERS, 0 * MEMBERS, at)
        assert (rows[0] == rows[1]).all()
        assert (rows[0] == own.indices(0 * MEMBERS, 0 * MEMBERS, at)[0]).all()
        assert not (rows[0] == own.indices(MEMBERS, 0 * MEMBERS, at)[0]).all()
        assert not (rows[0] == shared.indices(MEMBERS, 0 * MEMBERS + 1, at)[0]).all()


def test_full_is_every_sample_in_order() -> None:
    sampler = made("full")
    assert (sampler.batch_size, sampler.steps_per_epoch) == (N, 1)
    assert (sampler.indices(MEMBERS, 0 * MEMBERS, 0 * MEMBERS + 8) == np.arange(N)).all()


def train(spec: TrainingSpec, steps: int) -> Lockstep:
    runs = tuple(RunPlan(f"r{r}", r, steps, spec.optimizer.lr) for r in (0, 2))  # type: ignore[attr-defined]
    engine = Lockstep(BlockPlan("k", 0, "vmap", runs), build_parts(spec, "vmap"))
    for _ in engine.run():
        pass
    return engine


def test_full_is_gradient_descent() -> None:
    spec = cell(sampler=Full())
    engine, work = train(spec, 12), workload(spec)
    module = work.module(Streams(0), 2)
    for _ in range(12):
        module.zero_grad()
        nn.functional.cross_entropy(module(work.data.x_train), work.data.y_train).backward()
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(0.1 * p.grad)  # type: ignore[operator]
    for name, p in module.named_parameters():
        torch.testing.assert_close(engine.state.params[name][1], p.detach(), rtol=1e-11, atol=1e-13)
    assert engine.state.clock["epoch"].tolist() == [11, 11]
    assert survey(spec).steps_per_epoch == 1


def test_replicates_with_shared_batches_differ_in_their_start_only() -> None:
    """The batches the engine trains on are those of ``shared``: replicate 2 from its own start on replicate 0's."""
    spec = cell(sampler=Replacement(shared=True), batch_size=16)
    engine, work = train(spec, 9), workload(spec)
    module = work.module(Streams(0), 2)
    for step in range(9):
        index = torch.from_numpy(Streams(0).integers("order", len(work.data.x_train), 16, replicate=0, step=step))
        module.zero_grad()
        nn.functional.cross_entropy(module(work.data.x_train[index]), work.data.y_train[index]).backward()
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(0.1 * p.grad)  # type: ignore[operator]
    for name, p in module.named_parameters():
        torch.testing.assert_close(engine.state.params[name][1], p.detach(), rtol=1e-11, atol=1e-13)


class Stride:
    """A third party's: every ``gap``-th sample."""

    def __init__(self, n: int, batch_size: int, streams: Any, gap: int = 3) -> None:
        self.n, self.batch_size, self.steps_per_epoch, self.gap = n, batch_size, 7, gap

    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return (positions[:, None] + self.gap * np.arange(self.batch_size)) % self.n


class Overdraws(Stride):
    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return super().indices(replicates, workers, positions) + self.n


class Short(Stride):
    def indices(self, replicates: np.ndarray, workers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return super().indices(replicates, workers, positions)[:, 1:]


def test_a_third_partys_sampler() -> None:
    sampler = made({"name": f"{__name__}:Stride", "options": {"gap": 2}})
    assert sampler.indices(MEMBERS, MEMBERS, np.array([0, 4])).tolist() == [[0, 2, 4, 6, 8], [4, 6, 8, 10, 12]]
    assert survey(cell(sampler={"name": f"{__name__}:Stride"})).steps_per_epoch == 7


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"name": f"{__name__}:Overdraws"}, "indices from 0 to 96, not 97 to 109"),
        ({"name": f"{__name__}:Short"}, "indices of shape [members, 5], integers, not int64 [2, 4]"),
        ({"name": f"{__name__}:Stride", "options": {"gup": 1}}, "a class that takes (n, batch_size, streams)"),
        ({"name": "builtins:dict"}, "a class that takes (n, batch_size, streams)"),
        ({"name": "collections:Nothing"}, "a name defined in module 'collections'"),
    ],
)
def test_a_class_that_is_no_sampler_is_one_line(block: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        made(block)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["sampler=shufle"],
            "sampler = 'shufle': expected one of full, replacement, shuffle or module:Name. did you mean",
        ),
        (["sampler=full", "batch_size=64"], "batch_size = 64: expected no batch_size beside sampler = full"),
        (["sampler=full,shuffle", "batch_size=32"], "batch_size = 32: expected no batch_size beside sampler = full"),
        (["sampler.shared=3"], "sampler.shared = 3: expected"),
        (["sampler=full", "sampler.shared=true"], "sampler.shared"),
        (["sampler=replacement", "batch_size=0"], "batch_size = 0"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve("training", words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_larger_than_the_data_is_one_line() -> None:
    for name in ("shuffle", "replacement"):
        with pytest.raises(UserError, match="batch_size = 100000: expected at most the"):
            survey(resolve("training", [f"sampler={name}", "dataset=digits", "batch_size=100000"]).cells[0])
    assert survey(resolve("training", ["sampler=full", "dataset=digits"]).cells[0]).steps_per_epoch == 1
