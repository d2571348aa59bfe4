"""Command lines of the published recovery programs, turned into this one's.

``descentlab compat v3 …`` accepts what the published program accepted, prints the native command, runs that and exports
the published files. Nothing happens that the printed command (and ``descentlab export``) would not do.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import typer

from ..core.errors import UserError, nearest

PROGRAMS = ("v3",)
DEFAULT_OPTIMIZERS = ("adam", "sgd", "rmsprop", "adamw")
MODELS = {  # the published program's networks, spelled out
    "resnet18": "{name: resnet18, stem: 7x7, bias: true, dropout: 0.15}",
    "resnet18_nobn": "{name: resnet18, stem: 7x7, batch_norm: false, dropout: 0.15}",
    "resnet18_sgd": "{name: resnet18, stem: 7x7, bias: true}",
    "effnet": "efficientnet_b0",
    "densenet": "densenet121",
    "nfnet": "nf_resnet26",
}
STAGES = {"fwrd_inject": "forward", "bkwd_inject": "grad_input"}  # the published draw hits input gradients only
NUMBERS = {"int": "a whole number", "float": "a number"}
RENAMED = {"--base-seed": "--seed", "--num-exp": "--num-experiments", "--lr": "--learning-rate"}


@dataclass(frozen=True)
class Native:
    """The command that does the same: settings of ``run recovery``, where results go, and what to do about them."""

    settings: list[str]
    out: Path
    launcher: str
    dry_run: bool
    overwrite: bool
    notes: list[str]

    @property
    def command(self) -> str:
        flags = ["--launcher", self.launcher] if self.launcher != "pool" else []
        flags += ["-n"] if self.dry_run else []
        flags += ["--overwrite"] if self.overwrite else []
        words = ["descentlab", "run", "recovery", *self.settings, "--out", str(self.out), "-y", *flags]
        return shlex.join(words)


class Parser(argparse.ArgumentParser):
    """Mistakes as the one error that the command line shows."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument (?:-n/)?(--[\w-]+): (?:invalid (\w+) value: '(.*)'|(.*))$", message)
        if found is None:
            raise UserError(self.prog, message, f"arguments as {self.prog} --help has them")
        flag, kind, value, other = found.groups()
        raise UserError(flag, value if kind else "", NUMBERS.get(kind or "", (other or "").removeprefix("expected ")))


def parser() -> argparse.ArgumentParser:
    """The published flags, those of the program before it, and more."""
    made = Parser(
        prog="descentlab compat v3",
        allow_abbrev=False,
        description="Accepts the published program's command line, prints the native one, runs it and exports.",
    )
    old = made.add_argument_group("published flags")
    old.add_argument("--optimizers", nargs="+", metavar="NAME", help="default: " + " ".join(DEFAULT_OPTIMIZERS))
    old.add_argument("--num-experiments", type=int, default=10, metavar="N", help="planned faults (10)")
    old.add_argument("--steps-after-injection", type=int, default=100, metavar="N", help="updates watched (100)")
    old.add_argument("--seed", type=int, default=42, metavar="N", help="seed of everything (42)")
    old.add_argument("--learning-rate", type=float, default=1e-3, metavar="X", help="of every optimizer (1e-3)")
    before = made.add_argument_group("flags of the version before it: one baseline, others continue after its fault")
    before.add_argument("--baseline", metavar="NAME", help="optimizer that trains up to the fault")
    before.add_argument("--test-optimizers", nargs="+", metavar="NAME", help="optimizers that continue")
    more = made.add_argument_group("further flags")
    more.add_argument("--model", metavar="NAME", help=f"any of list models, or a published name: {', '.join(MODELS)}")
    more.add_argument("--dataset", metavar="NAME", help="any of list datasets; the published one is cifar10")
    more.add_argument("--batch-size", type=int, metavar="N", help="the published one is 1024")
    more.add_argument("--fault", metavar="NAME", help="any of list faults (N16_RD)")
    more.add_argument("--stage", choices=STAGES, help="forward, or gradient of the input (fwrd_inject)")
    more.add_argument("--layer", metavar="NAME", help="layer to hit; default: drawn")
    more.add_argument("--value-range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="default: 3.6e2 1.2e8")
    more.add_argument("--max-target-epoch", type=int, metavar="N", help="last epoch that can be hit (3)")
    more.add_argument("--eval-interval", type=int, metavar="N", help="updates between evaluations on the test set")
    more.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N, mps")
    more.add_argument("--processes", type=int, metavar="N", help="worker processes; 0 = one per core")
    more.add_argument("--set", nargs="+", default=[], metavar="key=value", help="any native setting")
    more.add_argument("--out", type=Path, default=Path("out/compat-v3"), help="directory of the run (out/compat-v3)")
    more.add_argument("--launcher", choices=("local", "pool"), default="pool")
    more.add_argument("-n", "--dry-run", action="store_true", help="print runs and cost; touch nothing")
    more.add_argument("--overwrite", action="store_true", help="delete earlier results in --out first")
    return made


def native(arguments: Sequence[str]) -> Native:
    """The native command for a published command line. Raises :class:`UserError` for a mistake in it."""
    made = parser()
    _refuse_renamed(arguments)
    given, unknown = made.parse_known_args(list(arguments))
    if unknown:
        flags = re.findall(r"--[\w-]+", made.format_usage())
        raise UserError("compat v3", unknown[0], "a flag of compat v3 --help", hint=nearest(unknown[0], flags))
    names = _names(given)
    settings = ["preset=published", *_protocol(given), f"optimizer={','.join(names)}"]
    settings += [f"optimizer.lr={given.learning_rate!r}", f"seed={given.seed}", f"cases={given.num_experiments}"]
    settings += [f"recovery_steps={given.steps_after_injection}"]
    if given.model is not None:
        settings.append(f"model={MODELS.get(given.model, given.model)}")
    low, high = given.value_range or (None, None)
    mapped = {
        "dataset": given.dataset,
        "batch_size": given.batch_size,
        "fault": given.fault,
        "fault.value_mode": "log_uniform" if given.fault and given.fault.isupper() else None,
        "fault.direction": STAGES.get(given.stage),
        "fault.layer": given.layer,
        "fault.value_low": low,
        "fault.value_high": high,
        "fault.last_epoch": given.max_target_epoch,
        "observe.evaluate_every": given.eval_interval,
        "device": given.device,
        "processes": given.processes,
    }
    settings += [f"{key}={value}" for key, value in mapped.items() if value is not None]
    settings += given.set
    return Native(settings, given.out, given.launcher, given.dry_run, given.overwrite, _notes(given))


def _refuse_renamed(arguments: Sequence[str]) -> None:
    """Flags that its documentation has and the published program never had."""
    for place, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in RENAMED:
            value = value or "".join(arguments[place + 1 : place + 2])
            raise UserError(flag, value, f"{RENAMED[flag]}, the flag that the published program has")


def _names(given: Any) -> list[str]:
    if given.optimizers and given.test_optimizers:
        raise UserError("--test-optimizers", given.test_optimizers, "either --optimizers or --test-optimizers")
    names = given.optimizers or given.test_optimizers or list(DEFAULT_OPTIMIZERS)
    return [part for name in names for part in name.split(",") if part]


def _protocol(given: Any) -> list[str]:
    if given.baseline is None:
        if given.test_optimizers:
            raise UserError("--test-optimizers", given.test_optimizers, "a --baseline that trains up to the fault")
        return []
    return ["protocol=baseline", f"baseline={given.baseline}", f"baseline.lr={given.learning_rate!r}"]


def _notes(given: Any) -> list[str]:
    """What differs from the published program although its flags are the same."""
    notes = []
    if given.model is None or given.dataset is None or given.batch_size is None:
        notes.append(
            "workload: this program's default where not given; the published one is "
            "--model resnet18 --dataset cifar10 --batch-size 1024"
        )
    notes.append("every optimizer gets the same network, batches and fault, and a twin without it")
    if given.baseline is not None:
        notes.append(
            "the baseline's optimizer state is handed over; the published program dropped it: --set carry_state=false"
        )
    return notes


def compat(program: str, arguments: Sequence[str]) -> int:
    """Run ``program``'s command line; the exit code of ``run``, 0 or 1 after the export too."""
    from . import compat_workers

    if program in compat_workers.PROGRAMS:
        return compat_workers.run(program, arguments)
    if program in ("-h", "--help") or set(arguments) & {"-h", "--help"}:
        typer.echo(parser().format_help())
        return 0
    if program not in PROGRAMS:
        known = (*PROGRAMS, *compat_workers.PROGRAMS)
        raise UserError("compat", program, f"one of {', '.join(known)}", hint=nearest(program, known))
    wanted = native(arguments)
    typer.echo(wanted.command)
    for note in wanted.notes:
        typer.echo(f"note: {note}")
    code = _run(wanted)
    if wanted.dry_run or code not in (0, 1):
        return code
    from .export import export

    typer.echo(f"export: {export('v3', wanted.out, None)}")
    return code


def _run(wanted: Native) -> int:
    from .main import run

    try:
        run(
            "recovery",
            wanted.settings,
            out=wanted.out,
            dry_run=wanted.dry_run,
            yes=True,
            launcher=wanted.launcher,  # type: ignore[arg-type]
            overwrite=wanted.overwrite,
        )
    except typer.Exit as done:
        return done.exit_code
    return 0
