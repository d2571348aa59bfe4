"""``descentlab``: every command. Rooms are imported inside commands, so that help and mistakes answer at once."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ..core.errors import StudyError, UserError

USER_MISTAKE, FAILED, INTERRUPTED = 2, 1, 130
RESUMABLE = ("run", "batch", "rerun")


class Commands(TyperGroup):
    """Turns a user's mistake, a failed study and Ctrl-C into lines on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            code = _fail(str(error), USER_MISTAKE)
        except StudyError as error:
            code = _fail(str(error), FAILED)
        except BrokenPipeError:  # `descentlab table DIR | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except KeyboardInterrupt:
            resume = ctx.invoked_subcommand in RESUMABLE
            again = f"; to resume: {shlex.join(['descentlab', *sys.argv[1:]])}" if resume else ""
            typer.echo(f"stopped{again}", err=True)
            code = INTERRUPTED
        raise typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    help="What does an optimizer do when training is not ideal?",
    no_args_is_help=True,
    add_completion="_DESCENTLAB_COMPLETE" in os.environ,  # set by the shell that asks; no options for it in the help
    rich_markup_mode=None,  # plain help: starts faster and looks the same in a file
    pretty_exceptions_enable=False,
)

Study = Annotated[str, typer.Argument(metavar="STUDY", help="a study's name, its YAML file, or module:Name")]


def _complete(ctx: typer.Context, incomplete: str) -> list[str]:
    from ..config.complete import completions

    return completions(ctx.params.get("study") or "", ctx.params.get("settings") or [], incomplete)


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value",
        help="optimizer.lr=1e-3 edits, optimizer=adam,sgd widens",
        autocompletion=_complete,
    ),
]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="a directory that run has made")]
Launcher = Literal["local", "pool", "slurm"]
KINDS = "workloads, datasets, models, optimizers, schedules, faults, compressors, timelines, observables or studies"


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    return code


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"descentlab {version('descentlab')}")
        except PackageNotFoundError:
            typer.echo("descentlab (version unknown: not installed)")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What does an optimizer do when training is not ideal?"""


@app.command()
def run(
    study: Study,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Where results go.", show_default="out/STUDY")] = None,
    dry_run: Annotated[bool, typer.Option("-n", "--dry-run", help="Print runs and cost; touch nothing.")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    launcher: Annotated[Launcher, typer.Option(help="Where blocks of runs are executed.")] = "pool",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete earlier results in --out first.")] = False,
) -> None:
    """Run a study, or what is missing of it."""
    from ..config.resolve import LIMIT, resolve
    from . import show

    own, profile = _profile(settings or [], launcher)
    most = None if yes else LIMIT
    resolved = resolve(study, own, limit=most, most_runs=most)
    target = out or Path("out") / default_name(study, resolved.study.name)
    show.settings(resolved)
    show.notes(resolved)
    if dry_run:
        from ..launch.api import check_launcher, estimate

        check_launcher(resolved, launcher)
        show.runs(resolved)
        for line in estimate(resolved, None if overwrite else target):
            typer.echo(line)
        return
    from ..launch import api

    raise typer.Exit(api.run(resolved, target, yes=yes, launcher=launcher, overwrite=overwrite, **profile))


@app.command()
def batch(
    studies: Annotated[
        list[str], typer.Argument(metavar="STUDY... key=value...", help="as for run; FILE.txt lists one study a line")
    ],
    out: Annotated[Path, typer.Option(help="Each study gets a directory in it.")] = Path("out"),
    start: Annotated[str, typer.Option(metavar="N|NAME", help="The first study to run, counted from 0.")] = "0",
    dry_run: Annotated[bool, typer.Option("-n", "--dry-run", help="Print the studies; touch nothing.")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    launcher: Annotated[Launcher, typer.Option(help="Where blocks of runs are executed.")] = "pool",
) -> None:
    """Run several studies one after the other, or what is missing of them."""
    from .batch import batch as run_all

    own, profile = _profile(studies, launcher)
    raise typer.Exit(run_all(own, out, start, yes=yes, dry_run=dry_run, launcher=launcher, **profile))


def _profile(settings: list[str], launcher: str) -> tuple[list[str], dict[str, Any]]:
    """(the study's settings, what the ``launcher.`` ones ask for as keywords of the launcher)."""
    asked = [s for s in settings if s.startswith("launcher.")]
    if asked and launcher != "slurm":
        raise UserError(asked[0].partition("=")[0], asked[0].partition("=")[2], "--launcher slurm beside it")
    if launcher != "slurm":
        return settings, {}
    from ..launch.profile import read_profile

    return [s for s in settings if s not in asked], {"profile": read_profile(asked)}


def default_name(study: str, name: str) -> str:
    """The directory below ``out`` for a study: the name of its file, if it has one, else its own."""
    path = Path(study)
    return path.stem if path.suffix.lower() in (".yaml", ".yml") or path.is_file() else name


@app.command()
def show(
    study: Study,
    settings: Settings = None,
    runs: Annotated[bool, typer.Option("--runs", help="One line per run, its id first, and nothing else.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="The layers a fault can hit, for fault.layer=.")] = False,
) -> None:
    """Print a study's settings, runs or layers."""
    from ..config.resolve import resolve
    from . import show as printer

    resolved = resolve(study, settings or [])
    if runs:
        printer.runs(resolved)
        return
    if layers:
        printer.layers(resolved)
        return
    typer.echo(f"{resolved.study.name}: {resolved.study.question}")
    printer.settings(resolved)
    printer.notes(resolved)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=KINDS)],
) -> None:
    """Print what there is to choose from."""
    from . import show as printer

    printer.choices(kind)


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="datasets, as list datasets has them")],
) -> None:
    """Download datasets, or check the files that are there."""
    from . import fetch as fetcher

    fetcher.fetch(names)


@app.command("import-spec")
def import_spec(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a configuration or job file of the starter, in YAML")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write here instead of standard output.")] = None,
) -> None:
    """Print the study that a file of the starter stands for."""
    from .import_spec import write

    write(file, out)


@app.command()
def status(directory: Directory) -> None:
    """Print how far the runs of a directory are."""
    from .. import store
    from ..launch.queue import with_queue
    from . import show as printer

    printer.status(with_queue(store.status(directory), store.RunDirectory.open(directory)))


@app.command()
def pull(
    source: Annotated[str, typer.Argument(metavar="HOST:DIR", help="a directory that run has made, as for rsync")],
    out: Annotated[Path | None, typer.Option(help="Where to copy it.", show_default="out/NAME")] = None,
    dry_run: Annotated[bool, typer.Option("-n", "--dry-run", help="Print the rsync command; touch nothing.")] = False,
) -> None:
    """Copy what is needed to read and report a directory, without checkpoints; again for what is new."""
    from .pull import pull as copy

    typer.echo(copy(source, out, dry_run))


@app.command()
def report(directory: Directory) -> None:
    """Write a directory's report again."""
    from ..launch import api

    typer.echo(api.report(directory))


@app.command()
def table(
    directory: Directory,
    format_: Annotated[
        Literal["csv", "parquet"] | None, typer.Option("--format", help="csv, or what FILE ends in.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write here instead of standard output.")] = None,
    where: Annotated[str | None, typer.Option(metavar="SQL", help="Rows to keep: step < 10 AND role = 'twin'")] = None,
    columns: Annotated[str, typer.Option(metavar="A,B", help="Columns to keep.", show_default="all")] = "",
) -> None:
    """Print or write a directory's table."""
    from .tables import write

    write(directory, format_, out, where, columns)


Metric = Annotated[str, typer.Option(help="A column of the table; its last value counts.")]
Better = Annotated[Literal["min", "max"] | None, typer.Option(help="Which is better.", show_default="by its name")]


@app.command()
def best(
    directory: Directory,
    metric: Metric = "test_loss",
    by: Annotated[list[str] | None, typer.Option(help="A key for whose values to compare; may be repeated.")] = None,
    direction: Better = None,
) -> None:
    """The best settings of a grid, with intervals over replicates."""
    from ..report.grids import best as found

    typer.echo(found(directory, metric, by or [], direction))


@app.command()
def sensitivity(
    directory: Directory,
    rows: Annotated[str, typer.Option(metavar="KEY", help="A setting that varies.")],
    columns: Annotated[str, typer.Option(metavar="KEY", help="Another.")],
    metric: Metric = "test_loss",
    direction: Better = None,
) -> None:
    """How a metric depends on two settings, everything else at its best."""
    from ..report.grids import sensitivities

    typer.echo(sensitivities(directory, metric, rows, columns, direction))


@app.command()
def plot(
    directory: Directory,
    y: Annotated[str, typer.Option(help="A column of the table.")] = "test_loss",
    x: Annotated[str, typer.Option(help="A column of the table.")] = "step",
    rows: Annotated[str | None, typer.Option(metavar="KEY", help="A panel below for each value.")] = None,
    columns: Annotated[str | None, typer.Option(metavar="KEY", help="A panel beside for each value.")] = None,
    hue: Annotated[str | None, typer.Option(metavar="KEY", help="A line for each value.")] = None,
    log: Annotated[bool, typer.Option("--log", help="Logarithmic y.")] = False,
    suboptimality: Annotated[bool, typer.Option("--suboptimality", help="Distance from the best of all runs.")] = False,
    out: Annotated[Path, typer.Option(metavar="FILE", help="png, pdf or svg.")] = Path("plot.png"),
) -> None:
    """Draw a grid of panels from a directory's table, with bands over replicates."""
    from ..report.curves import Layout
    from ..report.grids import plot as draw

    typer.echo(draw(directory, Layout(y, x, rows, columns, hue, log), out, suboptimality))


@app.command()
def landscape(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="run directories, or folders of them")],
    directions: Annotated[
        Literal["pca", "random", "filter", "hessian"], typer.Option(help="What spans the plane.")
    ] = "pca",
    runs: Annotated[
        str, typer.Option(metavar="ID,ID", help="Runs to show; ids may be cut short.", show_default="all")
    ] = "",
    part: Annotated[Literal["train", "validation", "test"], typer.Option(help="The data the loss is of.")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="How many samples of it.")] = 1000,
    resolution: Annotated[int, typer.Option(min=3, help="Points along an axis.")] = 31,
    span: Annotated[
        float | None, typer.Option(help="Half the width of the plane.", show_default="by the paths")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random directions.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="DIR/landscape")] = None,
) -> None:
    """Draw the loss around runs whose weights were stored (observe.snapshots_every)."""
    from ..launch.landscape import of_directories
    from ..report.landscape import write

    chosen = [name.strip() for name in runs.split(",") if name.strip()]
    surface = of_directories(
        directories,
        directions=directions,
        runs=chosen,
        part=part,
        samples=samples,
        span=span,
        resolution=resolution,
        seed=seed,
    )
    typer.echo(write(surface, out or directories[0] / "landscape"))


@app.command()
def export(
    format_: Annotated[str, typer.Argument(metavar="FORMAT", help="v3: the published recovery experiments' files")],
    directory: Directory,
    out: Annotated[Path | None, typer.Option(help="Where to write.", show_default="DIR/export/FORMAT")] = None,
) -> None:
    """Write a directory's results in another program's files."""
    from .export import export as write

    typer.echo(write(format_, directory, out))


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def compat(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="v3: the published recovery program")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGUMENTS", help="its own command line")] = None,
) -> None:
    """Run a published program's command line: v3, nn_train, sync or async; compat v3 --help lists the flags."""
    from .compat import compat as translate

    raise typer.Exit(translate(program, arguments or []))


@app.command()
def rerun(
    directory: Directory,
    settings: Annotated[list[str] | None, typer.Argument(metavar="launcher.key=value", help="as for run")] = None,
    launcher: Annotated[Launcher, typer.Option(help="Where blocks of runs are executed.")] = "pool",
) -> None:
    """Run what failed, was interrupted or never began, and is neither running nor in a queue."""
    from ..launch import api

    own, profile = _profile(settings or [], launcher)
    if own:
        raise UserError("rerun", own[0], "launcher.key=value; other settings are those of the directory")
    elsewhere: dict[str, Any] = {} if launcher == "pool" else {"launcher": launcher, **profile}
    raise typer.Exit(api.rerun(directory, **elsewhere))


def main() -> None:
    """The console script."""
    sys.path.append(os.getcwd())  # module:Name may lie beside the user's study, as with python -m
    app(prog_name="descentlab")
