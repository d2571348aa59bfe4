"""Every flag of the published distributed programs is taken, translated, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from descentlab.cli import compat_workers
from descentlab.cli.compat_workers import native
from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError

BASE = ["--dataset", "fashion_mnist"]


def cell(program: str, *words: str) -> Any:
    """The one cell that a published command line is."""
    (found,) = resolve("asynchrony", native(program, [*BASE, *words]).settings).cells
    return found


def test_defaults_are_the_published_ones() -> None:
    """lr .01, no momentum, batches of 32, one epoch, a world of three: two workers."""
    found = cell("async")
    assert (found.optimizer.lr, found.optimizer.momentum, found.batch_size, found.workers) == (0.01, 0.0, 32, 2)
    assert (found.timeline.name, found.partition.name, found.staleness_rule.name) == ("asynchronous", "shared", "none")
    assert found.delay.build().seconds(2, 3, None, 0).max() == 0.0 and found.epochs == 2  # one pass of each worker
    assert cell("sync").timeline.name == "barrier" and cell("nn_train").workers == 1
    assert cell("nn_train").model.name == "lenet5" and cell("nn_train", "--alt_model").model.name == "cnn1"


def test_every_flag_reaches_a_setting() -> None:
    words = (
        "--train_split 0.5 --lr 0.005 --momentum 0.9 --batch_size 64 --epochs 6 --model_accuracy --seed --world_size 6"
    )
    words += " --delay --slow_worker_1 --delay_intensity long --delay_type constant --split_labels --compensation"
    found = cell("async", *words.split(), "--no_save_model", "--master_port", "1", "--master_addr", "x")
    assert (found.splits.train, found.batch_size, found.epochs, found.workers) == ("train[:50%]", 64, 6, 5)
    assert (found.optimizer.lr, found.optimizer.momentum) == (0.005, 0.9)
    assert found.evaluate_on == ["train", "test"]
    delay = found.delay
    assert (delay.name, delay.level, delay.slow_factor, delay.only_slow) == ("constant", "long", 2.0, False)
    assert found.delay.build().seconds(2, 1, None, 0).tolist() == [[0.18, 0.09]]
    assert (found.partition.name, found.partition.truncate) == ("label", True)
    assert (found.staleness_rule.name, found.staleness_rule.lam) == ("compensation", 2.0)
    alone = cell("async", "--slow_worker_1").delay
    assert (alone.name, alone.level, alone.only_slow) == ("gaussian", "small", True)
    assert not cell("async", "--split_labels_unscaled").partition.truncate
    assert cell("sync", "--split_dataset").partition.name == "sample"
    adam = cell("nn_train", "--alr", "--momentum", "0.5", "--val")
    assert adam.optimizer.betas == (0.99, 0.999) and adam.evaluate_on == ["validation", "test"]
    assert native("sync", [*BASE, "--subfolder", "a/b"]).out == Path("out/a/b/compat-sync")
    cosine = cell("nn_train", "--lrs", "cosine_annealing", "--epochs", "2").schedule
    assert (cosine.name, cosine.steps) == ("cosine", 2 * (60_000 // 32))
    step = cell("sync", "--lrs", "exponential").schedule
    assert (step.every, step.factor) == (60_000 // 32, 0.9)  # each worker passes over everything, one update a batch
    assert cell("sync", "--lrs", "exponential", "--split_dataset").schedule.every == (60_000 // 32) // 2
    assert cell("async", "--lrs", "exponential").schedule.every == 2 * (60_000 // 32)
    assert cell("async", "--lrs", "exponential", "--split_labels").schedule.every == 2 * ((60_000 // 32) // 2)
    assert cell("async", "--saves_per_epoch", "3").observe.snapshots_every == 2 * (60_000 // 32) // 3
    assert cell("sync", "--set", "delay=gamma").delay.name == "gamma"


@pytest.mark.parametrize(
    ("program", "words", "says"),
    [
        ("async", "--world_size 1", "--world_size = 1: expected at least 2"),
        (
            "async",
            "--split_dataset --split_labels",
            "--split_labels = '': expected only one partition; --split_dataset",
        ),
        ("async", "--split_labels --split_labels_unscaled", "--split_labels_unscaled"),
        ("sync", "--val --split_dataset", "--val = '': expected no partition beside it; --split_dataset is given"),
        ("sync", "--delay_intensity small", "--delay_intensity = 'small': expected --delay or --slow_worker_1"),
        ("sync", "--delay_type gaussian", "--delay_type = 'gaussian': expected --delay or --slow_worker_1"),
        ("sync", "--compensation", "--compensation"),
        ("sync", "--split_labels_unscaled", "--split_labels_unscaled"),
        ("nn_train", "--world_size 3", "--world_size"),
        ("nn_train", "--saves_per_epoch 0", "--saves_per_epoch = 0: expected at least 1"),
        ("nn_train", "--train_split 1.5", "--train_split = 1.5: expected a share above 0 and up to 1"),
        ("nn_train", "--lrs linear", "--lrs"),
        ("nn_train", "--epochs two", "--epochs = 'two': expected a whole number"),
    ],
)
def test_what_cannot_be_is_refused_by_name(program: str, words: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        native(program, [*BASE, *words.split()])
    assert says in str(raised.value)


def test_it_prints_the_native_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Dry: the command, notes on what differs, runs and cost; nothing is written."""
    words = [*BASE, "--compensation", "-n", "--out", str(tmp_path / "out"), "--set", "dataset=mnist5k"]
    assert compat_workers.run("async", words) == 0
    said = capsys.readouterr().out
    assert "descentlab run asynchrony preset=bare timeline=asynchronous" in said and "in the published program" in said
    assert not (tmp_path / "out").exists()
