"""The training study's settings, each against a plain loop or plain numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import descentlab as dl
from descentlab import store
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.state import State
from descentlab.engine.driver import Engine
from descentlab.engine.recorder import Recorder
from descentlab.launch.block import build_engine
from descentlab.launch.plan import make_plan, read_block
from descentlab.optim.averaging import Average, ema, poly
from descentlab.studies.training.spec import TrainingSpec

BASE = ["dataset=digits", "model=linear", "batch_size=64", "optimizer=sgd", "optimizer.lr=0.1", "replicates=1"]


class Trained:
    """One block of a study, trained here; ``weights[t]``: the first member's after t updates."""

    def __init__(self, *words: str, until: int | None = None, saved: dict[str, Any] | None = None) -> None:
        given = {word.split("=")[0] for word in words}
        base = [word for word in BASE if word.split("=")[0] not in given]
        self.resolved = resolve("training", [*base, *words])
        plan, _ = make_plan(self.resolved, {})
        (block,) = [read_block(b) for b in plan["blocks"]]
        self.cell = TrainingSpec.model_validate(block.settings)
        self.recorder = Recorder()
        held = saved or {"state": None, "step": 0, "ended": {}}
        self.engine: Engine = build_engine(block, self.cell, held["state"], held["step"], self.recorder, held["ended"])
        self.weights = [self._first()]
        for progress in self.engine.run():
            if self.engine.slots:
                self.weights.append(self._first())
            if progress.step == until:
                break
        self.frame = pl.DataFrame(self.recorder.flush()[0]) if len(self.recorder) else pl.DataFrame()

    def _first(self) -> dict[str, torch.Tensor]:
        return {n: p[0].clone() for n, p in self.engine.state.params.items()}

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the first replicate's update ``step``."""
        zero = np.zeros(1, dtype=np.int64)
        index = torch.from_numpy(self.engine.parts.sampler.indices(zero, zero, np.array([step])))[0]
        x, y = self.engine.parts.train
        return x[index], y[index]

    def column(self, name: str) -> list[float]:
        return self.frame[name].drop_nulls().to_list()

    def evaluated(self) -> list[int]:
        return self.frame.filter(pl.col("test_loss").is_not_null())["step"].to_list()


def plain_linear(start: dict[str, torch.Tensor]) -> nn.Linear:
    model = nn.Linear(64, 10)
    model.load_state_dict({"weight": start["layers.1.weight"], "bias": start["layers.1.bias"]})
    return model


@torch.no_grad()
def scored(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float(F.cross_entropy(model(x), y))


def reference(run: Trained, optimizer: Any, steps: int, clip: float | None = None) -> nn.Linear:
    """The same batches through a plain model and a plain torch optimizer made by ``optimizer(model)``."""
    model = plain_linear(run.weights[0])
    rule = optimizer(model)
    for step in range(steps):
        x, y = run.batch(step)
        rule.zero_grad()
        F.cross_entropy(model(x.flatten(1)), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        rule.step()
    return model


def assert_ends_at(run: Trained, model: nn.Linear) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(run.weights[-1][f"layers.1.{name}"], p.detach(), rtol=2e-5, atol=1e-6)


# Length, epochs, accumulation -----------------------------------------------------------------------------------------

LENGTHS = [
    (["epochs=2"], 40),  # 1,280 samples in batches of 64
    (["steps=7"], 7),
    (["samples=700"], 10),
    (["epochs=3", "steps_per_epoch=7"], 21),
    (["epochs=3", "samples_per_epoch=200"], 9),
    (["epochs=4", "steps_per_epoch=6", "accumulation=2"], 24),  # the earlier tool made half of these steps
    (["epochs=1", "accumulation=4"], 20),
    (["samples=700", "steps_per_epoch=4"], 10),  # crashed in the earlier tool
]


@pytest.mark.parametrize(("words", "steps"), LENGTHS)
def test_length(words: list[str], steps: int) -> None:
    """Epochs, steps and samples; accumulation changes no length."""
    assert Trained(*words).frame.height == steps


def test_epochs_of_another_length_go_on_through_the_data() -> None:
    """Breaks when an epoch of N steps starts a new pass: the batches are those of uninterrupted passes."""
    a, b = Trained("steps=25"), Trained("steps=25", "steps_per_epoch=6")
    assert all(torch.equal(a.batch(t)[0], b.batch(t)[0]) for t in range(25))
    assert torch.equal(a.weights[-1]["layers.1.weight"], b.weights[-1]["layers.1.weight"])
    assert b.column("epoch") == [t // 6 for t in range(25)]


def test_evaluations_at_the_end_of_epochs() -> None:
    assert Trained("epochs=4", "steps_per_epoch=6", "evaluate_epochs=2").evaluated() == [11, 23]
    assert Trained("steps=14", "steps_per_epoch=6", "evaluate_epochs=1").evaluated() == [5, 11, 13]
    assert Trained("epochs=2", "evaluate_epochs=1").evaluated() == [19, 39]


@pytest.mark.parametrize("model", ["model=linear", "model=mlp", "model=cnn"])
def test_an_accumulated_step_is_the_step_of_the_whole_batch(model: str) -> None:
    """To rounding, for the written-out, the vectorised and the member route (without BatchNorm)."""
    words = [model, "steps=5", "optimizer=adam", "schedule=cosine", "schedule.steps=null", "schedule.warmup_steps=3"]
    words += ["model.pool=0"] if "mlp" in model else ["model.batch_norm=false"] if "cnn" in model else []
    whole, parts = Trained(*words, "dtype=float64"), Trained(*words, "dtype=float64", "accumulation=4")
    for name, p in whole.weights[-1].items():
        torch.testing.assert_close(parts.weights[-1][name], p, rtol=1e-9, atol=1e-11)
    assert parts.column("lr") == whole.column("lr")
    np.testing.assert_allclose(parts.column("train_loss"), whole.column("train_loss"), rtol=1e-10)


def test_accumulation_cuts_dropout_masks_with_the_batch() -> None:
    """The same samples are dropped at as in the whole batch."""
    words = ["model=mlp", "model.pool=0", "model.dropout=0.5", "steps=3", "dtype=float64"]
    whole, parts = Trained(*words), Trained(*words, "accumulation=2")
    for name, p in whole.weights[-1].items():
        torch.testing.assert_close(parts.weights[-1][name], p, rtol=1e-9, atol=1e-12)


def test_a_schedule_of_open_length_spans_the_run() -> None:
    found = Trained("steps=8", "schedule=cosine", "schedule.steps=null", "schedule.warmup_steps=2").column("lr")
    half = [0.05 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    np.testing.assert_allclose(found, [half[0] / 2, *half[1:]], rtol=1e-12)


# Clipping, decay, averages --------------------------------------------------------------------------------------------


def test_clipping() -> None:
    """As torch clips; the norm that is recorded is the one before."""
    run = Trained("steps=6", "clip_norm=0.2")
    assert_ends_at(run, reference(run, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), 6, clip=0.2))
    assert min(run.column("grad_norm")) > 0.2
    np.testing.assert_allclose(run.column("update_norm"), 0.02, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "cls", "settings"),
    [
        (["optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9"], torch.optim.SGD, {"momentum": 0.9}),
        (["optimizer=adamw", "optimizer.lr=0.1"], torch.optim.AdamW, {}),
    ],
)
def test_biases_have_their_own_decay(words: list[str], cls: Any, settings: dict) -> None:
    """Against torch's parameter groups; breaks when biases decay like weights, or slots of one group get lost."""
    run = Trained("steps=6", *words, "optimizer.weight_decay=0.5", "bias_decay=0.1")

    def make(model: nn.Linear) -> Any:
        groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "weight_decay": 0.1}]
        return cls(groups, lr=0.1, **settings)

    assert_ends_at(run, reference(run, make, 6))


def test_a_grid_of_many_rates_has_biases_decay_too() -> None:
    """More than 16 settings take the vectorised form; member 0 is as it is alone."""
    rates = ",".join(str(0.1 + i / 100) for i in range(18))
    many = Trained("steps=4", "bias_decay=0.2", "optimizer.weight_decay=0.1", f"optimizer.lr={rates}")
    alone = Trained("steps=4", "bias_decay=0.2", "optimizer.weight_decay=0.1", "optimizer.lr=0.1")
    assert many.engine.state.members == 18
    assert torch.equal(many.weights[-1]["layers.1.bias"], alone.weights[-1]["layers.1.bias"])


def _average(share: Any, values: list[float]) -> list[float]:
    """The averages of one weight that takes these values, the first one being its start."""
    state = State.start({"w": torch.full((1, 1), values[0], dtype=torch.float64)}, {})
    average = Average(share)
    average.start(state)
    found = []
    for value in values[1:]:
        state.params["w"].fill_(value)
        state.opt_step.add_(1)
        average.update(state)
        found.append(float(state.server["average"]["params"]["w"]))
    return found


def test_averages_in_numbers() -> None:
    """poly_8 of 1 to 5 as published; ema_0.999 keeps 0.999 of the old, where the earlier tool kept 0.001."""
    np.testing.assert_allclose(_average(poly(8), [7, 1, 2, 3, 4, 5]), [1, 1.9, 2.8, 3.7, 4.6])
    np.testing.assert_allclose(_average(poly(0), [7, 1, 2, 6]), [1, 1.5, 3])
    np.testing.assert_allclose(_average(ema(0.999), [0, 1, 1]), [0.001, 0.001999])


def test_averaged_weights_and_statistics_are_evaluated_beside_the_last() -> None:
    """BatchNorm statistics are averaged too; the columns are those of a plain network with the averaged tensors."""
    words = ["model=mlp", "model.pool=0", "model.batch_norm=true", "steps=6", "dtype=float64"]
    run = Trained(*words, "averaging=ema_0.8", "observe.evaluate_every=0")
    plain = Trained(*words, "observe.evaluate_every=0")
    want = run.weights[0]
    for w in run.weights[1:]:
        want = {n: 0.8 * want[n] + 0.2 * w[n] for n in want}
    held = run.engine.state.server["average"]
    for name, p in want.items():
        torch.testing.assert_close(held["params"][name][0], p, rtol=1e-12, atol=1e-14)
    stats = [n for n in held["buffers"] if n.endswith("running_mean")]
    assert stats and all(not torch.equal(held["buffers"][n], run.engine.state.buffers[n]) for n in stats)
    module = run.engine.parts.single.module
    module.load_state_dict({**{n: p[0] for tree in held.values() for n, p in tree.items()}})
    x, y = run.engine.parts.test
    loss = scored(module.eval(), x, y)
    assert run.column("test_loss_average") == pytest.approx([loss], rel=1e-10)
    assert run.column("test_loss") == plain.column("test_loss")


def test_the_average_alone_is_evaluated_on_request() -> None:
    both = Trained("steps=5", "averaging=poly_2")
    only = Trained("steps=5", "averaging=poly_2", "averaging.only=true")
    assert only.column("test_loss") == both.column("test_loss_average") != both.column("test_loss")
    assert "test_loss_average" not in only.frame.columns


# Starts, losses, sets -------------------------------------------------------------------------------------------------


def test_a_head_of_zeros_begins_at_chance() -> None:
    run = Trained("model=mlp", "model.pool=0", "head_init=zero", "steps=2")
    assert run.column("train_loss")[0] == pytest.approx(math.log(10), rel=1e-6)
    assert not any(p.any() for n, p in run.weights[0].items() if n.startswith("layers.3"))
    assert run.weights[0]["layers.1.weight"].any()


def test_seeds_of_model_and_training_are_separate() -> None:
    a, b, c = (Trained("steps=1", *w) for w in (["seed=1"], ["seed=2", "seed_model=1"], ["seed=1", "seed_model=5"]))
    name = "layers.1.weight"
    assert torch.equal(a.weights[0][name], b.weights[0][name]) and not torch.equal(
        a.weights[0][name], c.weights[0][name]
    )
    assert not torch.equal(a.batch(0)[1], b.batch(0)[1]) and torch.equal(a.batch(0)[1], c.batch(0)[1])


def test_the_square_loss_of_classes() -> None:
    """Half the mean squared distance to unit vectors, by numpy."""
    run = Trained("steps=2", "loss=square")
    x, y = run.batch(0)
    out = x.flatten(1).numpy() @ run.weights[0]["layers.1.weight"].numpy().T + run.weights[0]["layers.1.bias"].numpy()
    assert run.column("train_loss")[0] == pytest.approx(
        0.5 * ((out - np.eye(10)[y.numpy()]) ** 2).sum(1).mean(), rel=1e-5
    )
    assert 0 <= run.column("test_accuracy")[-1] <= 1


def test_several_sets_are_evaluated() -> None:
    run = Trained("steps=4", "evaluate_on=[test,validation,train]", "observe.evaluate_every=0")
    model = plain_linear(run.weights[-1])
    data = run.cell.dataset.build()
    for part, column in (("test", "test"), ("validation", "validation"), ("train", "train_set")):
        x, y = (getattr(data, f"{axis}_{part}") for axis in "xy")
        assert run.column(f"{column}_loss") == pytest.approx([scored(model, x.flatten(1), y)], rel=1e-5)


# Stopping -------------------------------------------------------------------------------------------------------------

EVERY = ["observe.evaluate_every=1"]


@pytest.mark.parametrize("watch", ["test_loss", "test_accuracy", "train_set_loss"])
def test_a_flat_metric_stops(watch: str) -> None:
    """Ties are no improvement: the first evaluation is the best, the next three end the run."""
    run = Trained("steps=30", "patience=3", f"watch={watch}", "optimizer.lr=1e-30", "evaluate_on=[test,train]", *EVERY)
    assert run.frame.height == 4


def _stop(values: list[float], patience: int, better: str) -> int:
    """The evaluation after which a run stops, by a second reading of the rule."""
    for i in range(len(values)):
        past = values[: i + 1]
        best = past.index(min(past) if better == "min" else max(past))
        if i - best >= patience:
            return i
    return len(values) - 1


@pytest.mark.parametrize(("watch", "better"), [("test_loss", "min"), ("test_accuracy", "max"), ("train_loss", "min")])
def test_early_stopping_has_a_direction(watch: str, better: str) -> None:
    """Works on a loss, which must fall; breaks when higher always counts as better."""
    words = ["steps=60", "optimizer.lr=1", "batch_size=16", *EVERY]
    free = Trained(*words)
    values = free.frame[watch].to_list()
    run = Trained(*words, "patience=4", f"watch={watch}")
    stop = _stop(values, 4, better)
    assert 4 < stop < 59, "the test needs a run that stops in the middle"
    assert run.frame["step"].to_list() == list(range(stop + 1))
    assert run.frame[watch].to_list() == values[: stop + 1]


def test_runs_stop_each_for_itself_and_after_a_resume() -> None:
    """A run ends where it would alone, whatever it trains beside; saved in the middle, the rest is the same."""
    words = ["steps=40", "patience=3", "watch=test_loss", *EVERY]
    together = Trained(*words, "optimizer.lr=1e-30,0.2,1.5")
    alone = [Trained(*words, f"optimizer.lr={lr}").frame.height for lr in ("1e-30", "0.2", "1.5")]
    counts = [together.frame.filter(pl.col("run") == r.id).height for r in together.resolved.runs]
    assert counts == alone and len(set(counts)) > 1
    half = Trained(*words, "optimizer.lr=1e-30,0.2,1.5", until=10)
    saved = {"state": half.engine.state, "step": 10, "ended": half.engine.parts.stopping.state_dict()}
    rest = Trained(*words, "optimizer.lr=1e-30,0.2,1.5", saved=saved)
    both = pl.concat([half.frame, rest.frame]).drop("wall_s")
    assert both.sort("run", "step").equals(together.frame.drop("wall_s").sort("run", "step"))


def test_a_diverged_run_ends_and_is_not_done(tmp_path: Path) -> None:
    """Status diverged, with the step and the loss; the run beside it goes on to the same bits as without it."""
    words = [
        "steps=20",
        "max_loss=50",
        "observe.evaluate_every=0",
        *(w for w in BASE if "lr=" not in w and "steps" not in w),
    ]
    both = dl.run("training", *words, "optimizer.lr=0.1,1e6", out=tmp_path / "both", launcher="local")
    alone = dl.run("training", *words, "optimizer.lr=0.1", out=tmp_path / "alone", launcher="local")
    states = {line["status"]: line for line in both.status}
    assert set(states) == {"done", "diverged"} and states["done"]["steps"] == 20
    bad = states["diverged"]
    rows = both.frame.filter(pl.col("run") == bad["run"]).sort("step")
    assert rows.height == bad["steps"] == bad["diverged_step"] + 1 < 20
    assert rows["train_loss"].to_list()[-1] > 50 and max(rows["train_loss"].to_list()[:-1]) <= 50
    assert "more than max_loss = 50" in bad["message"]
    columns = [c for c in alone.frame.columns if c in both.frame.columns and c not in (*store.VOLATILE, "cell")]
    good = both.frame.filter(pl.col("run") == states["done"]["run"]).sort("step")
    assert good.select(columns).equals(alone.frame.sort("step").select(columns))


def test_nan_counts_as_too_large() -> None:
    run = Trained("steps=20", "max_loss=1e30", "optimizer.lr=1e38")
    assert run.frame.height < 20 and len(run.engine.parts.stopping.ended) == 1


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    """The file holds the weights of the best evaluation, not the last ones."""
    words = ["steps=40", "best_checkpoint=true", "watch=test_loss", "optimizer.lr=2", *EVERY]
    found = dl.run("training", *words, *(w for w in BASE if "lr=" not in w), out=tmp_path / "x", launcher="local")
    frame = found.frame.sort("step")
    (file,) = (tmp_path / "x" / "blocks").glob("*/artifacts/best-*.npz")
    held = np.load(file)
    assert int(held["step"]) == int(frame["test_loss"].arg_min()) < 39
    assert float(held["value"]) == frame["test_loss"].min()
    names = ("layers.1.weight", "layers.1.bias")
    model = plain_linear({n: torch.from_numpy(held[f"params/{n}"]) for n in names})
    data = resolve("training", BASE).cells[0].dataset.build()
    loss = scored(model, data.x_test.flatten(1), data.y_test)
    assert loss == pytest.approx(frame["test_loss"].min(), rel=1e-5)


def test_what_data_and_model_decide_is_written_back() -> None:
    """plan.json says classes, shapes and sizes; 64 x 10 + 10 weights, not the width of the head's input."""
    plan, _ = make_plan(resolve("training", [*BASE, "steps=1", "splits.train=train[:50%]"]), {})
    samples = {"train": 640, "validation": 157, "test": 360}
    want = {"samples": samples, "classes": 10, "input_shape": [1, 8, 8], "parameters": 650}
    assert plan["blocks"][0]["inferred"] == want


def test_off_is_off() -> None:
    """Settings at their defaults leave ids as they were before the settings existed, and build nothing."""
    run = Trained("steps=1")
    assert set(run.cell.identity()) == {"study", "dataset", "model", "optimizer", "schedule", "steps", "observe"}
    assert run.engine.parts.average is None and run.engine.parts.stopping is None
    assert type(run.engine.parts.optimizer).__name__ == "StackedOptimizer"
    assert "average" not in run.engine.state.server


MISTAKES = [
    (["epochs=2", "samples=500"], "samples = 500: expected steps or epochs, not both"),
    (["samples=5"], "samples = 5: expected at least one batch of 64"),
    (["steps_per_epoch=3", "samples_per_epoch=300"], "only one of it and steps_per_epoch"),
    (["accumulation=5"], "accumulation = 5: expected a divisor of batch_size = 64"),
    (["evaluate_on=[validation]"], "expected a list with test"),
    (["patience=2", "watch=test_los"], "watch = 'test_los': expected one of test_loss"),
    (["patience=2", "watch=lr", "observe.extra=[per_class_accuracy]"], "direction = 'auto': expected max or min"),
    (["patience=2", "watch=test_loss_average"], "expected one of test_loss, test_accuracy, train_loss"),
    (["averaging=meen"], "averaging = 'meen': expected one of ema, none, poly"),
    (["splits.train=trian"], "splits.train = 'trian': expected a part such as train"),
    (["splits.train=train[:120%]"], "splits.train = 'train[:120%]': expected at most 100%"),
]


@pytest.mark.parametrize(("words", "text"), MISTAKES)
def test_a_mistake_is_one_line(words: list[str], text: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve("training", [*BASE, *words])
    assert text in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_only_the_training_study_fills_in_a_schedules_length() -> None:
    with pytest.raises(UserError, match="only the training study"):
        resolve("crossed", ["schedule=cosine", "schedule.steps=null"])


# The generator --------------------------------------------------------------------------------------------------------


def test_the_generator_gives_rows_and_models_at_each_evaluation(tmp_path: Path) -> None:
    """The same rows as ``run`` stores; a model scores what its row says; a consumer may leave."""
    words = [*(w for w in BASE if "replicates" not in w), "replicates=2", "steps=25", "averaging=ema_0.5"]
    seen = list(dl.train("training", *words))
    assert [e.step for e in seen] == [4, 14, 24]  # every ten steps, the last one among them
    stored = dl.run("training", *words, out=tmp_path / "x", launcher="local").frame
    rows = pl.concat([e.rows for e in seen], how="diagonal").sort("run", "step").drop("wall_s")
    assert rows.equals(stored.sort("run", "step").select(rows.columns))
    data = resolve("training", words).cells[0].dataset.build()
    last = next(iter(dl.train("training", *words)))
    for run in last.runs:
        (row,) = last.rows.filter(pl.col("run") == run, pl.col("step") == last.step).iter_rows(named=True)
        for average, column in ((False, "test_loss"), (True, "test_loss_average")):
            model = last.model(run, average=average)
            assert scored(model, data.x_test, data.y_test) == pytest.approx(row[column], rel=1e-5)
    with pytest.raises(UserError, match=r"run = .*: expected one of"):
        last.model("nobody")


def test_the_generator_yields_a_run_that_ends_early() -> None:
    words = [*BASE, "steps=30", "patience=2", "watch=test_loss", "observe.evaluate_every=1"]
    words = [w for w in words if "lr=" not in w] + ["optimizer.lr=1e-30"]
    seen = list(dl.train("training", *words))
    assert [e.step for e in seen] == [0, 1, 2] and seen[-1].model() is not None
