"""The commands behind the command line: run, estimate, rerun, report."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config.resolve import Resolved, resolve
from ..config.yaml12 import dump
from ..core.errors import StudyError, UserError
from ..engine.support import DISTRIBUTED
from ..store import RunDirectory, status
from ..store import load as load_results
from ..store.directory import LOCK_WAIT_S, MARKER
from ..store.provenance import gather, record
from ..workloads.datasets.specs import Downloaded
from . import tuning
from .execute import execute, pending, worker
from .notify import tell
from .pool import Outcome, Pool
from .prepare import prepare, resolved_rows
from .profile import Profile, check_slurm
from .queue import queued

LAUNCHERS = ("pool", "local", "slurm")
REPORT_WAIT_S = 3600.0  # for another command that is writing its report
RUNS_WITHOUT_ASKING = 10_000


def run(
    resolved: Resolved,
    out: Path,
    *,
    yes: bool = False,
    launcher: str = "pool",
    overwrite: bool = False,
    with_report: bool = True,
    profile: Profile | None = None,
    missing_only: bool = False,
) -> int:
    """Run what of the study is not done yet, then write table and report; 0, 1 if a block failed, 130 if interrupted.

    ``launcher``: ``pool`` (worker processes on this machine), ``local`` (in this process) or ``slurm`` (submit jobs
    that ask for what ``profile`` says, and return). Another command on the same directory shares the work; with
    ``missing_only`` what others run or hold in a queue is left to them and not waited for.
    """
    check_launcher(resolved, launcher)
    if launcher == "slurm":
        check_slurm(profile or Profile())
    if len(resolved.runs) > RUNS_WITHOUT_ASKING and not yes:
        raise UserError("runs", len(resolved.runs), f"at most {RUNS_WITHOUT_ASKING} without -y")
    _check_device(resolved)
    RunDirectory.check(out, resolved.study.name, overwrite=overwrite)
    choice = None
    if tuning.asked(resolved):
        search = partial(run, yes=True, launcher=launcher, overwrite=overwrite, with_report=False)
        code, resolved, choice = tuning.tuned(resolved, out, search, anew=overwrite)
        if choice is None:
            return code
    document = dump(resolved.document)
    with _stop_on_signals() as stop:
        size = _processes(resolved) if launcher == "pool" else 0
        with Pool(size) if size else nullcontext() as pool, _importing(resolved if with_report else None) as imported:
            found = gather(sys.argv)  # while the workers import torch
            known = _planned(out)
            prepared = pool.prepare(document, out, overwrite) if pool else prepare(resolved, out, overwrite)
            with RunDirectory.join(out, resolved.study.name, document, overwrite=overwrite) as directory:
                _write_plan(resolved, directory, prepared, None if overwrite else known, found)
                if choice is not None:
                    directory.replace_json(tuning.FILE, choice)
                if launcher == "slurm":
                    return _submit(resolved, directory, profile or Profile())
                outcomes = _execute(resolved, directory, pool, stop, missing_only)
                imported.join()  # the report must not import matplotlib while another thread has it half imported
                code = conclude(directory, outcomes, interrupted=stop.is_set())
                if with_report and code != 130 and _any_finished(directory):
                    with directory.lock(REPORT_WAIT_S):
                        print(f"report: {report(directory.path)}")
                if with_report and outcomes and code != 130:
                    tell(directory)
        return code


def _planned(out: Path) -> str | None:
    """plan.json as it stands."""
    path = out / "plan.json"
    return path.read_text() if path.is_file() else None


def _write_plan(
    resolved: Resolved, directory: RunDirectory, prepared: dict[str, Any], known: str | None, found: dict[str, Any]
) -> None:
    """Write plan, runs and provenance (``found``); plan again if another command has changed the plan since ``known``
    was read."""
    with directory.lock(LOCK_WAIT_S):
        if _planned(directory.path) != known:
            prepared = prepare(resolved, directory.path, False)
        directory.replace_json("plan.json", prepared["plan"])
        directory.replace_jsonl("campaign.jsonl", prepared["campaign"])
        directory.replace_jsonl("resolved.jsonl", resolved_rows(resolved))
        record(directory, sys.argv, prepared["device"], prepared["data_order"], found)
    for notice in prepared["notices"]:
        print(f"note: {notice}", file=sys.stderr)


def _any_finished(directory: RunDirectory) -> bool:
    return any(row["status"] != "failed" for row in directory.read_jsonl("runs.jsonl"))


def _check_device(resolved: Resolved) -> None:
    for asked in dict.fromkeys(cell.device for cell in resolved.cells):
        if asked not in ("auto", "cpu"):  # only then is torch needed to answer
            from .build import resolve_device

            resolve_device(asked)


def _processes(resolved: Resolved) -> int:
    engines = [getattr(cell, "engine", None) for cell in resolved.cells]
    if any(getattr(engine, "name", engine) == "process" for engine in engines):
        return 1  # its workers are the processes; two servers side by side would share the cores
    asked = resolved.cells[0].processes
    return asked or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else asked or os.cpu_count() or 1


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks for a checkpoint and an orderly end; the second ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("stopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _execute(
    resolved: Resolved, directory: RunDirectory, pool: Pool | None, stop: threading.Event, missing_only: bool
) -> list[Outcome]:
    wanted = {run.id for run in resolved.runs}
    left = pending(directory, wanted)
    if not left:
        print(f"nothing left to run: all {len(wanted)} runs are done", file=sys.stderr)
        return []
    done = len(wanted) - len({r for b in left for r in b["runs"]} & wanted)
    if done:
        print(f"resuming: {done} of {len(wanted)} runs are done", file=sys.stderr)
    work = worker(directory, pool, stop.is_set)
    if not missing_only:
        return execute(directory, wanted, work, stop.is_set)
    waiting = queued(directory)
    if waiting:
        print(f"{len(waiting)} blocks wait or run in Slurm jobs and are left to them", file=sys.stderr)
    return execute(directory, wanted, work, stop.is_set, wait_s=0.0, skip=waiting)


@contextmanager
def _importing(resolved: Resolved | None) -> Iterator[threading.Thread]:
    """Import what table and report need while the workers import torch and train; without a report the table alone."""
    thread = threading.Thread(target=_warm_up, args=(resolved,))
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


def _warm_up(resolved: Resolved | None) -> None:
    """Import what table and report need; a failure shows when they are written."""
    with suppress(ImportError):
        importlib.import_module("descentlab.store.table")
        if resolved is None:
            return
        importlib.import_module(resolved.study.report.partition(":")[0])
        for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "jinja2"):
            importlib.import_module(name)


def _submit(resolved: Resolved, directory: RunDirectory, profile: Profile) -> int:
    from .slurm import submit

    blocks = pending(directory, {run.id for run in resolved.runs})
    if not blocks:
        print(f"nothing left to run: all {len(resolved.runs)} runs are done", file=sys.stderr)
        return 0
    for line in submit(directory, blocks, profile):
        print(line)
    return 0


def conclude(directory: RunDirectory, outcomes: Sequence[Outcome], *, interrupted: bool) -> int:
    """Say what failed or is left, write runs.jsonl; the exit code of :func:`run`."""
    from ..store import leftovers

    failed = [o for o in outcomes if o.state == "failed"]
    for outcome in failed:
        print(
            f"failed: block {outcome.key}: {outcome.message} (log: {directory.log_path(outcome.key)})", file=sys.stderr
        )
    rows = [s.to_row() for s in status(directory.path).runs]
    with directory.lock(REPORT_WAIT_S):
        directory.replace_jsonl("runs.jsonl", rows)
    if interrupted:
        directory.event("interrupted", "stopped by a signal")
        left = sum(row["status"] not in ("done", "diverged") for row in rows)
        print(f"interrupted: {left} of {len(rows)} runs left; the same command resumes", file=sys.stderr)
        return 130
    old = leftovers(directory.path)
    if old:
        print(
            f"{len(old)} runs of an earlier grid are kept in {directory.path} and left out of the report",
            file=sys.stderr,
        )
    return 1 if failed else 0


def report(path: Path) -> Path:
    """Write table.parquet and report/ from what is on disk; prints the answers; returns report/index.html."""
    results = load_results(path)
    if results.frame.is_empty():
        raise StudyError(f"{path} holds no finished step yet; run the study first")
    module, _, name = resolve(Path(path) / "study.yaml", limit=None).study.report.partition(":")
    made = getattr(importlib.import_module(module), name)(results)
    made.write(Path(path) / "report")
    for verdict in made.verdicts:
        print(verdict.text)
    return Path(path) / "report" / "index.html"


def rerun(path: Path, *, launcher: str = "pool", profile: Profile | None = None) -> int:
    """Run again what failed, was interrupted or never began, with the settings of the directory.

    What another command runs or a queue holds is neither run nor waited for.
    """
    directory = RunDirectory.open(path)
    resolved = resolve(directory.path / "study.yaml", limit=None)
    return run(resolved, Path(path), yes=True, launcher=launcher, profile=profile, missing_only=True)


def check_launcher(resolved: Resolved, launcher: str) -> None:
    """A UserError for a launcher that does not exist, or one that this study cannot use."""
    if launcher not in LAUNCHERS:
        raise UserError("--launcher", launcher, ", ".join(LAUNCHERS[:-1]) + f" or {LAUNCHERS[-1]}")
    if launcher == "slurm" and tuning.asked(resolved):
        raise UserError("tune", "grid", "none beside --launcher slurm: the comparison waits for the choice")
    if launcher == "slurm" and hasattr(importlib.import_module(resolved.study.module), "run_stage"):
        raise UserError("--launcher", "slurm", "pool or local: the stages of this study wait for each other")


def estimate(resolved: Resolved, out: Path | None = None) -> list[str]:
    """What ``run`` would cost: runs, blocks, member-steps, and a time measured on a few updates of the first block.

    Runs that are done in ``out`` cost nothing.
    """
    from .plan import make_plan

    _check_device(resolved)
    if tuning.asked(resolved):
        search = tuning.search(resolved)
        own = f"before them {len(search.runs)} runs of {search.cells[0].steps} updates choose the learning rates"  # type: ignore[attr-defined]
        return [*estimate(tuning.untuned(resolved)), own]
    if absent := _absent(resolved):
        return [
            f"{len(resolved.runs)} runs; not on this machine, and not downloaded by a dry run: {', '.join(absent)}",
            "not checked: blocks, cost, and whether model, batch size and faults fit the data; "
            f"descentlab fetch {absent[0]} gets the data",
        ]
    plan, _ = make_plan(resolved, {})
    if "program" in plan:
        from .staged import summary

        return [f"{len(resolved.runs)} runs in {len(resolved.cells)} cells", *summary(plan)]
    done = _done(out) & {run.id for run in resolved.runs}
    units = round(sum(b["member_steps"] * (1 - len(done & set(b["runs"])) / len(b["runs"])) for b in plan["blocks"]))
    cost = _seconds_per_unit(plan)
    processes = min(_processes(resolved), len(plan["blocks"]))
    seconds = units * cost / processes
    shown = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    kept = f", {len(done)} of them done in {out}" if done else ""
    return [
        f"{len(resolved.runs)} runs in {len(plan['blocks'])} blocks{kept}, {units} member-steps",
        f"about {shown} on {processes} processes ({1e6 * cost:.0f} us per member-step, measured now)",
    ]


def _done(out: Path | None) -> set[str]:
    """Runs that have ended in the directory ``out``, if it is one."""
    if out is None or not (out / MARKER).is_file():
        return set()
    return {run.run for run in status(out).runs if run.state in ("done", "diverged")}


def _absent(resolved: Resolved) -> list[str]:
    """Names of the datasets that ``run`` would have to download."""
    datasets = {cell.dataset.name: cell.dataset for cell in resolved.cells}
    return [name for name, d in datasets.items() if isinstance(d, Downloaded) and not d.present()]


def _seconds_per_unit(plan: dict[str, Any], updates: int = 12) -> float:
    import time

    import torch

    from ..engine.recorder import Recorder
    from .block import build_engine
    from .plan import read_block

    torch.set_num_threads(1)
    module, _, name = plan["spec"].partition(":")
    block = read_block(plan["blocks"][0])
    cell = getattr(importlib.import_module(module), name).model_validate(block.settings)
    if block.engine in (
        "process",
        DISTRIBUTED,
    ):  # the same gradients without processes
        block = replace(block, engine="lockstep")
    engine = build_engine(block, cell, None, 0, Recorder())
    units, started = 0, 0.0
    for i, progress in enumerate(engine.run()):
        if i == 2:
            units, started = 0, time.perf_counter()
        units += progress.member_steps
        if i >= updates:
            break
    return (time.perf_counter() - started) / max(units, 1)
