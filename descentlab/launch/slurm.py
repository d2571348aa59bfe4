"""Blocks as the jobs of one Slurm array, submitted through submitit.

A job never asks sacct for anything and talks to Slurm only to be requeued. It is warned ``signal_s`` before its time
limit and on preemption by submitit's signal (USR2 unless ``SUBMITIT_PREEMPT_SIGNAL`` says otherwise): it then ends the
update it is in, writes a checkpoint and goes back into the queue. SIGTERM alone (``scancel``, or a preemption after
which Slurm requeues by itself) does the same without the queue. The preemption signal, not SIGTERM, is held back while
Python starts.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import submitit
from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import FailedJobError

from ..core.errors import StudyError, UserError
from ..store import RunDirectory, status
from ..store.claim import LEASE_S
from ..store.directory import LOCK_WAIT_S
from .execute import execute, worker
from .notify import tell
from .pool import Pool
from .profile import Profile, read_script
from .queue import JOBS, queued
from .snapshot import snapshot

BUSY = (  # what Slurm says when the same submission may well be accepted a little later
    "unable to contact slurm controller",
    "socket timed out",
    "temporarily",
    "connection refused",
    "connection timed out",
    "zero bytes were transmitted",
    "slow down",
    "maxsubmitjob",
)
TAKE_OVER_S = 2 * LEASE_S  # a job waits as long for a block that a host which died seems to hold
BOTH_SIGNALS_S = 2.0  # SIGTERM and the preemption signal may come one after the other
HOLD = (  # a program for ``python … -P -S -c``: itself again with what follows, and one signal held back
    "import os,signal,sys;signal.pthread_sigmask(signal.SIG_BLOCK,[signal.{}]);o=sys.orig_argv;"
    "os.execv(sys.executable,[sys.executable,*o[1:o.index('-P')],*sys.argv[1:]])"
)
T = TypeVar("T")


class BlockJob:
    """What a job does: its blocks, then, if they were the last of the study, table and report."""

    def __init__(self, path: Path, keys: Sequence[str], runs: Sequence[str], cpus: int) -> None:
        self.path, self.keys, self.runs, self.cpus = path, list(keys), list(runs), cpus

    def __call__(self) -> str:
        directory = RunDirectory.open(self.path)
        size = min(self.cpus, len(self.keys))
        failures = []
        with _noted_signals() as signals, directory.running():
            try:
                with Pool(size) if size > 1 else nullcontext() as pool:
                    work = worker(directory, pool, signals.any)
                    outcomes = execute(directory, self.runs, work, signals.any, wait_s=TAKE_OVER_S)
                failures = [f"block {o.key}: {o.message}" for o in outcomes if o.state == "failed"]
            except (UserError, StudyError) as error:  # the block has noted it; the others may be done all the same
                failures = [str(error)]
            if signals.seen:
                signals.requeue_or_exit()
            _finish(directory)
        if failures:
            raise StudyError(failures[0])
        return "done"

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit submits again: the same job, which finds its checkpoints in the run directory."""
        return submitit.helpers.DelayedSubmission(self)


class _Signals:
    """Which signals came, and submitit's own answer to them, to be given once a checkpoint is written."""

    def __init__(self) -> None:
        self.preempted = _preemption()
        self.seen: list[int] = []
        self.answers = {n: signal.signal(n, self._note) for n in (self.preempted, signal.SIGTERM)}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [self.preempted])  # held back since Python started (_python)

    def _note(self, number: int, frame: Any) -> None:
        self.seen.append(number)

    def any(self) -> bool:
        return bool(self.seen)

    def requeue_or_exit(self) -> None:
        deadline = time.monotonic() + BOTH_SIGNALS_S
        while self.preempted not in self.seen and time.monotonic() < deadline:
            time.sleep(0.05)
        answer = self.answers[self.preempted]
        if self.preempted in self.seen and callable(answer):
            answer(self.preempted, None)
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def _noted_signals() -> Iterator[_Signals]:
    signals = _Signals()
    try:
        yield signals
    finally:
        for number, answer in signals.answers.items():
            signal.signal(number, answer)


def _finish(directory: RunDirectory) -> None:
    """Table and report, once nothing is left to run and nobody else has written them since."""
    from .api import REPORT_WAIT_S, conclude, report

    if not all(run.state in ("done", "diverged", "failed") for run in status(directory.path).runs):
        return
    conclude(directory, [], interrupted=False)
    with directory.lock(REPORT_WAIT_S):
        page = directory.path / "report" / "index.html"
        newest = max((p.stat().st_mtime for p in directory.path.glob("blocks/*/done.json")), default=None)
        if newest is not None and not (page.is_file() and page.stat().st_mtime > newest):
            report(directory.path)
    tell(directory)


def submit(directory: RunDirectory, blocks: Sequence[dict[str, Any]], profile: Profile) -> list[str]:
    """Submit the blocks that no job has yet as one array; lines for the user.

    Raises :class:`StudyError` when Slurm refuses, with what it said.
    """
    waiting = queued(directory)
    left = [b for b in blocks if b["key"] not in waiting]
    said = [f"{len(waiting)} blocks are in jobs that wait or run, and are left to them"] if waiting else []
    if not left:
        return [*said, f"nothing to submit; follow: descentlab status {directory.path}"]
    path = directory.path.resolve()
    spec = directory.read_json("plan.json")["spec"]
    code = snapshot(path, [spec, [[b["settings"], b["variants"]] for b in left]])
    executor = make_executor(path, directory.study, profile, code)
    groups = _share(left, profile)
    work = [BlockJob(path, [b["key"] for b in g], [r for b in g for r in b["runs"]], profile.cpus) for g in groups]

    def send() -> list[Any]:
        with redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what it also raises
            return [executor.submit(job) for job in work]

    made = _patiently(send, profile)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [
        {"job": str(job.job_id), "blocks": w.keys, "submitted": now, "code": code.name}
        for job, w in zip(made, work, strict=True)
    ]
    with directory.lock(LOCK_WAIT_S):
        directory.replace_jsonl(JOBS, [*directory.read_jsonl(JOBS), *rows])
    number = str(made[0].job_id).partition("_")[0]
    return [
        *said,
        f"submitted {len(left)} blocks in {len(made)} {'job' if len(made) == 1 else 'jobs'}: Slurm job {number}",
        f"follow: descentlab status {directory.path}; cancel: scancel {number}",
    ]


def make_executor(path: Path, study: str, profile: Profile, code: Path) -> submitit.SlurmExecutor:
    """submitit's executor with everything that the profile asks for; its files go to ``path/slurm``."""
    options, commands = read_script(profile)
    (path / "slurm").mkdir(exist_ok=True)
    executor = submitit.SlurmExecutor(path / "slurm", max_num_timeout=profile.requeues, python=_python(profile))
    asked = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "gres": profile.gres,
        "mem": None if profile.memory_gb is None else f"{round(1024 * profile.memory_gb)}MB",
    }
    further = {**options, "requeue": True, **profile.options}
    executor.update_parameters(
        job_name=f"descentlab-{study}",
        time=profile.time_min,
        cpus_per_task=profile.cpus,
        signal_delay_s=profile.signal_s,
        array_parallelism=profile.parallel,
        setup=[*commands, *profile.setup, *_environment(code)],
        srun_args=["--cpus-per-task", str(profile.cpus)],  # since Slurm 22.05 srun does not ask what sbatch was given
        additional_parameters={key: value for key, value in further.items() if value is not False},
        **{key: value for key, value in asked.items() if value is not None},
    )
    return executor


def _python(profile: Profile) -> str:
    """The command that starts Python, with the preemption signal held back: before somebody answers it, it kills."""
    python = profile.python or shlex.quote(sys.executable)
    return f"{python} -P -S -c {shlex.quote(HOLD.format(_preemption().name))}"


def _preemption() -> signal.Signals:
    """The signal that submitit answers by putting the job back into the queue."""
    try:
        return signal.Signals(JobEnvironment._usr_sig())
    except RuntimeError:
        name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL")
        raise UserError("SUBMITIT_PREEMPT_SIGNAL", name, "the name of a signal without SIG, such as USR2") from None


def _environment(code: Path) -> list[str]:
    return [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",  # not the code that lies in the working directory by now
        "export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1",
    ]


def _share(blocks: Sequence[dict[str, Any]], profile: Profile) -> list[list[dict[str, Any]]]:
    """The blocks dealt out, largest first, to as many jobs as are allowed and have ``cpus`` blocks each."""
    count = min(-(-len(blocks) // profile.cpus), profile.jobs)
    return [list(blocks[i::count]) for i in range(count)]


def _patiently(send: Callable[[], T], profile: Profile) -> T:
    """Try again, with doubled pauses, what Slurm was too busy for; any other refusal is final."""
    for attempt in range(1, profile.attempts + 1):
        try:
            return send()
        except FailedJobError as error:
            said = " ".join(str(error).split()) or "no reason given"
            busy = any(word in said.lower() for word in BUSY)
            if not busy or attempt == profile.attempts:
                tries = f" (tried {attempt} times)" if attempt > 1 else ""
                raise StudyError(f"Slurm refused the jobs{tries}: {said}; nothing was submitted") from None
            pause = profile.retry_s * 2 ** (attempt - 1)
            print(f"Slurm is busy ({said}); trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
    raise AssertionError("attempts is positive")
