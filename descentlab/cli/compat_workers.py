"""Command lines of the published programs for distributed training, turned into this one's.

``descentlab compat nn_train|sync|async …`` takes the published flags, prints the native ``run asynchrony`` command and
runs it. Flags that exclude each other are refused by name; where a flag means something else here, a note says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError, nearest
from .compat import Parser

PROGRAMS = ("nn_train", "sync", "async")
SAMPLES = {"mnist": 60_000, "fashion_mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000}
MODELS = {"mnist": "lenet5", "fashion_mnist": "lenet5", "cifar10": "resnet18", "cifar100": "resnet18"}
OTHER_MODELS = {"mnist": "cnn1", "fashion_mnist": "cnn1", "cifar10": "cnn2", "cifar100": "cnn2"}
PARTITIONS = {"split_dataset": "sample", "split_labels": "label", "split_labels_unscaled": "label"}


@dataclass(frozen=True)
class Native:
    """The command that does the same, and what differs."""

    settings: list[str]
    out: Path
    dry_run: bool
    notes: list[str]

    @property
    def command(self) -> str:
        """As one would type it."""
        flags = ["--out", str(self.out), "-y", *(["-n"] if self.dry_run else [])]
        return shlex.join(["descentlab", "run", "asynchrony", *self.settings, *flags])


def parser(program: str) -> Parser:
    """The published flags of one program."""
    made = Parser(
        prog=f"descentlab compat {program}",
        allow_abbrev=False,
        description="Accepts the published program's command line, prints the native one and runs it.",
    )
    old = made.add_argument_group("published flags")
    old.add_argument("--dataset", required=True, choices=tuple(SAMPLES))
    old.add_argument("--train_split", type=float, default=1.0, metavar="X", help="share of the training set (1)")
    old.add_argument("--lr", type=float, default=0.01)
    old.add_argument("--momentum", type=float, default=0.0)
    old.add_argument("--batch_size", type=int, default=32)
    old.add_argument("--epochs", type=int, default=1)
    old.add_argument("--lrs", choices=("exponential", "cosine_annealing"), help="learning-rate schedule")
    old.add_argument("--saves_per_epoch", type=int, metavar="N", help="store the weights so often")
    old.add_argument("--subfolder", default="", metavar="DIR", help="below out/")
    for flag, text in _SWITCHES.items():
        old.add_argument(f"--{flag}", action="store_true", help=text)
    if program != "nn_train":
        old.add_argument("--world_size", type=int, default=3, metavar="N", help="the server and N - 1 workers (3)")
        old.add_argument("--master_port", default="29500", help="nothing is opened on a virtual clock")
        old.add_argument("--master_addr", default="localhost", help="likewise")
        old.add_argument("--delay_intensity", choices=("small", "medium", "long"), help="30, 60, 90 ms (small)")
        old.add_argument(
            "--delay_type", choices=("constant", "gaussian"), help="gaussian has 5 ms of spread (gaussian)"
        )
        for flag in ("delay", "slow_worker_1", "split_dataset", "split_labels"):
            old.add_argument(f"--{flag}", action="store_true")
    if program == "async":
        for flag in ("split_labels_unscaled", "compensation"):
            old.add_argument(f"--{flag}", action="store_true")
    more = made.add_argument_group("further flags")
    more.add_argument("--set", nargs="+", default=[], metavar="key=value", help="any native setting")
    more.add_argument("--out", type=Path, metavar="DIR", help="directory of the run")
    more.add_argument("-n", "--dry-run", action="store_true", help="print runs and cost; touch nothing")
    return made


_SWITCHES = {
    "model_accuracy": "accuracy on the training set too",
    "no_save_model": "nothing to turn off: weights are kept as checkpoints only",
    "seed": "runs are always seeded; --set seed=N for another one",
    "alr": "Adam, with the published beta1 = max(momentum, 0.99)",
    "alt_model": "CNN1 or CNN2",
    "val": "losses and accuracies on the validation set",
}


def native(program: str, arguments: Sequence[str]) -> Native:
    """The native command for a published command line. Raises :class:`UserError` for a mistake in it."""
    made = parser(program)
    given, unknown = made.parse_known_args(list(arguments))
    if unknown:
        flags = [action.option_strings[-1] for action in made._actions if action.option_strings]
        raise UserError(f"compat {program}", unknown[0], "a flag of --help", hint=nearest(unknown[0], flags))
    _check(given, program)
    workers = 1 if program == "nn_train" else given.world_size - 1
    parts = [flag for flag in PARTITIONS if getattr(given, flag, False)]
    n = int(SAMPLES[given.dataset] * given.train_split)
    updates = _updates_per_epoch(n // given.batch_size, workers, program, bool(parts))
    passes = given.epochs if parts or program == "nn_train" else given.epochs * workers
    evaluated = [*(["train"] if given.model_accuracy else []), *(["validation"] if given.val else []), "test"]
    settings = [
        "preset=bare",
        f"timeline={'asynchronous' if program == 'async' else 'barrier'}",
        f"workers={workers}",
        f"dataset={given.dataset}",
        f"model={(OTHER_MODELS if given.alt_model else MODELS)[given.dataset]}",
        *_optimizer(given),
        f"batch_size={given.batch_size}",
        f"epochs={passes}",
        f"evaluate_on=[{','.join(evaluated)}]",
        "replicates=1",
        "observe.evaluate_every=500",
        *([f"splits.train=train[:{100 * given.train_split:g}%]"] if given.train_split < 1 else []),
        *([f"partition={PARTITIONS[parts[0]]}"] if parts else []),
        *(["partition.truncate=false"] if parts == ["split_labels_unscaled"] else []),
        *_delay(given),
        *_schedule(given, updates),
        *([f"observe.snapshots_every={max(1, updates // given.saves_per_epoch)}"] if given.saves_per_epoch else []),
        *(["staleness_rule=compensation", "staleness_rule.lam=2"] if getattr(given, "compensation", False) else []),
    ]
    own = {word.split("=")[0] for word in given.set}
    kept = [s for s in settings if not any(s.split("=")[0] == key or s.startswith(f"{key}.") for key in own)]
    out = given.out or Path("out") / given.subfolder / f"compat-{program}"
    return Native([*kept, *given.set], out, given.dry_run, _notes(given, program, bool(parts)))


def _updates_per_epoch(batches: int, workers: int, program: str, split: bool) -> int:
    """Server updates while every worker makes a pass over what it has: all ``batches``, or its part of them."""
    own = batches // workers if split else batches
    return max(1, own * (workers if program == "async" else 1))


def _check(given: Any, program: str) -> None:
    """Flags that exclude each other, and numbers that cannot be."""
    if not 0 < given.train_split <= 1:
        raise UserError("--train_split", given.train_split, "a share above 0 and up to 1")
    if given.saves_per_epoch is not None and given.saves_per_epoch < 1:
        raise UserError("--saves_per_epoch", given.saves_per_epoch, "at least 1")
    if program == "nn_train":
        return
    if given.world_size < 2:
        raise UserError("--world_size", given.world_size, "at least 2: the server and one worker")
    splits = [f"--{flag}" for flag in PARTITIONS if getattr(given, flag, False)]
    if len(splits) > 1:
        raise UserError(splits[1], "", f"only one partition; {splits[0]} is given")
    if given.val and splits:
        raise UserError("--val", "", f"no partition beside it; {splits[0]} is given")
    for flag in ("delay_intensity", "delay_type"):
        if getattr(given, flag) is not None and not (given.delay or given.slow_worker_1):
            raise UserError(f"--{flag}", getattr(given, flag), "--delay or --slow_worker_1 beside it")


def _optimizer(given: Any) -> list[str]:
    if given.alr:
        return [
            "optimizer=adam",
            f"optimizer.lr={given.lr!r}",
            f"optimizer.betas=[{max(given.momentum, 0.99)!r},0.999]",
        ]
    return ["optimizer=sgd", f"optimizer.lr={given.lr!r}", f"optimizer.momentum={given.momentum!r}"]


def _delay(given: Any) -> list[str]:
    if not (getattr(given, "delay", False) or getattr(given, "slow_worker_1", False)):
        return ["delay=constant", "delay.mean_s=0"]
    law, level = given.delay_type or "gaussian", given.delay_intensity or "small"
    slow = ["delay.slow_factor=2"] if given.slow_worker_1 else []
    return [f"delay={law}", f"delay.level={level}", *slow, *([] if given.delay else ["delay.only_slow=true"])]


def _schedule(given: Any, updates: int) -> list[str]:
    """Per update, as everything is here; an epoch has so many."""
    if given.lrs == "exponential":
        return ["schedule=step", "schedule.factor=0.9", f"schedule.every={updates}"]
    if given.lrs == "cosine_annealing":
        return ["schedule=cosine", f"schedule.steps={updates * given.epochs}"]
    return []


def _notes(given: Any, program: str, split: bool) -> list[str]:
    """What is not as it was although the flags are."""
    notes = []
    if program != "nn_train" and not split:
        notes.append(
            "without a partition every worker makes --epochs passes of its own, as published: N times the work"
        )
    if getattr(given, "compensation", False):
        notes.append("compensation is active here (lambda 2); in the published program it never was")
    if given.lrs == "cosine_annealing":
        notes.append("the cosine spans the whole run; the published one barely moved, it was stepped once an epoch")
    if given.alr:
        notes.append("beta1 of at least 0.99 is the published program's; --set optimizer.betas=[0.9,0.999] is usual")
    return notes


def run(program: str, arguments: Sequence[str]) -> int:
    """Run ``program``'s command line; the exit code of ``run``."""
    import typer

    from .main import run as run_study

    if set(arguments) & {"-h", "--help"}:
        typer.echo(parser(program).format_help())
        return 0
    wanted = native(program, arguments)
    typer.echo(wanted.command)
    for note in wanted.notes:
        typer.echo(f"note: {note}")
    try:
        run_study("asynchrony", wanted.settings, out=wanted.out, dry_run=wanted.dry_run, yes=True)
    except typer.Exit as done:
        return done.exit_code
    return 0
