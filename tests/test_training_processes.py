"""The training study with workers: virtual ones against a plain loop, processes under DDP against virtual ones."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread

import numpy as np
import polars as pl
import pytest
import torch
from test_compression_study import kill_one
from test_training import Trained, plain_linear
from torch.nn import functional as F

import descentlab as dl
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.launch.plan import make_plan

WORDS = ["dataset=digits", "batch_size=16", "optimizer=sgd", "optimizer.lr=0.2", "optimizer.weight_decay=1e-3"]
WORDS += ["dtype=float64", "replicates=1", "workers=2", "observe.evaluate_every=15"]


def test_two_workers_take_the_mean_of_their_gradients() -> None:
    """Against a plain loop over both workers' batches. Broken on purpose: one worker's batch twice, or the sum."""
    run = Trained("workers=2", "steps=6", "dtype=float64")
    model = plain_linear(run.weights[0]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = run.engine.parts.train
    zero = np.zeros(1, dtype=np.int64)
    for step in range(6):
        optimizer.zero_grad()
        for worker in (zero, zero + 1):
            index = torch.from_numpy(run.engine.parts.sampler.indices(zero, worker, zero + step))[0]
            (F.cross_entropy(model(x[index].flatten(1)), y[index]) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(run.weights[6]["layers.1.weight"], model.weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("words", "steps"),
    [(["epochs=3"], 30), (["samples=640"], 5), (["steps=7"], 7), (["epochs=1", "steps_per_epoch=9"], 9)],
)
def test_an_epoch_is_a_pass_of_all_workers_together(words: list[str], steps: int) -> None:
    """1,280 digits in batches of 64 are 20 batches: 10 updates of two workers."""
    run = Trained("workers=2", *words)
    assert run.engine.step == steps


def test_evaluations_and_epochs_count_updates() -> None:
    run = Trained("workers=2", "epochs=3", "evaluate_epochs=1")
    assert run.evaluated() == [9, 19, 29]
    assert run.frame.sort("step")["epoch"].to_list() == [0] * 10 + [1] * 10 + [2] * 10


def test_processes_equal_virtual_workers_through_a_kill(tmp_path: Path) -> None:
    """Two processes under torchrun, one of them killed after a checkpoint: every gradient's norm and every evaluation
    of last and averaged weights, BatchNorm's statistics among them, as with two virtual workers to 1e-9 (float64).

    Broken on purpose: averages that are not in the checkpoint; another worker's batches; buffers averaged only where
    an evaluation is due.
    """
    words = [*WORDS, "model=mlp", "model.batch_norm=true", "averaging=ema_0.9", "clip_norm=0.5", "bias_decay=0"]
    words += [
        "schedule=cosine",
        "schedule.steps=null",
        "epochs=2",
        "checkpoint_s=0.01",
        "head_init=zero",
        "seed_model=3",
    ]
    words += ["evaluate_on=[test, validation]"]
    virtual = dl.run("training", *words, out=tmp_path / "virtual", launcher="local").frame.sort("step")
    killed: list[int] = []
    over = Event()
    killer = Thread(target=kill_one, args=(tmp_path / "real", killed, over))
    killer.start()
    try:
        real = dl.run("training", *words, "engine=process", out=tmp_path / "real", launcher="local").frame.sort("step")
    finally:
        over.set()
        killer.join()
    assert killed and real["step"].to_list() == virtual["step"].to_list() == list(range(80))
    names = [
        f"{part}_{what}" for part in ("test", "validation") for what in ("loss", "loss_average", "accuracy_average")
    ]
    for name in ("grad_norm", "update_norm", "lr", *names):
        np.testing.assert_allclose(real[name].drop_nulls(), virtual[name].drop_nulls(), rtol=1e-9, err_msg=name)
    assert real["test_loss_average"].drop_nulls().len() == 6
    assert real["samples"].to_list() == virtual["samples"].to_list()


REFUSED = [
    (["accumulation=2"], "accumulation = 2: expected 1 beside engine = process"),
    (["amp=bfloat16"], "amp = 'bfloat16': expected none beside engine = process"),
    (["compile=inductor"], "compile = 'inductor': expected none beside engine = process"),
    (["max_loss=10"], "max_loss = 10.0: expected null beside engine = process"),
    (["patience=3"], "patience = 3: expected null beside engine = process"),
    (["best_checkpoint=true"], "best_checkpoint = True: expected false beside engine = process"),
    (["observe.reduce=moments"], "observe.reduce = 'moments': expected none beside engine = process"),
    (["observe.snapshots_every=5"], "observe.snapshots_every = 5: expected 0 beside engine = process"),
]


@pytest.mark.parametrize(("words", "text"), REFUSED)
def test_what_processes_cannot_do_is_refused(words: list[str], text: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(resolve("training", ["dataset=digits", "engine=process", "workers=2", *words]), {})
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)


def test_too_few_samples_for_all_workers() -> None:
    with pytest.raises(UserError, match="samples = 100: expected at least one batch of 64 for each of 2 workers"):
        resolve("training", ["dataset=digits", "batch_size=64", "workers=2", "samples=100"])


def test_the_generator_says_that_it_has_no_processes() -> None:
    with pytest.raises(UserError, match="engine = 'process': expected lockstep"):
        next(dl.train("training", "dataset=digits", "engine=process", "workers=2", "steps=3"))


def test_one_worker_is_as_before() -> None:
    """Ids and settings of runs made before there were workers."""
    plain, said = (
        resolve("training", ["dataset=digits", *more]).runs for more in ([], ["workers=1", "engine=lockstep"])
    )
    assert [run.id for run in plain] == [run.id for run in said]
    assert (
        pl.Series([run.id for run in resolve("training", ["dataset=digits", "workers=2"]).runs])
        .is_in([run.id for run in plain])
        .sum()
        == 0
    )
