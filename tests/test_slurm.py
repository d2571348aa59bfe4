"""The Slurm launcher on a real Slurm of one node (tests/slurm_node.py); skipped where its programs are missing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_node import missing, one_node

from descentlab import store
from descentlab.store.claim import holder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=f"Slurm cannot be started here: {missing()}"),
    pytest.mark.xdist_group("slurm"),
]
ROOT = Path(__file__).parent.parent
SLOW = '''
import os, time, torch

class SlowSGD(torch.optim.SGD):
    """To the bit what SGD computes; it lingers over every update until the file that GATE names exists."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)

    def step(self, closure=None):
        trained = sum(p.numel() for g in self.param_groups for p in g["params"]) > 1000  # not in the start-up check
        if trained and "GATE" in os.environ and not os.path.exists(os.environ["GATE"]):
            open(f"{os.environ['GATE']}.{os.getpid()}", "w").close()  # it has begun to train
            time.sleep(0.5)
        return super().step(closure)
'''
STUDY = ["training", "dataset=digits", "model={name: mlp, pool: 0, hidden: [16]}", "optimizer=slow_sgd:SlowSGD"]
GRID = [*STUDY, "optimizer.lr=0.1,0.05,0.02", "replicates=1", "members_per_block=1", "steps=300", "checkpoint_s=600"]
GRID += ["observe.evaluate_every=50"]
WAIT_S = 100.0


@pytest.fixture(scope="module")
def node() -> Iterator[Path]:
    """A running Slurm and, beside it, a user's own module."""
    folder = Path(tempfile.mkdtemp(prefix="dl-slurm-"))
    try:
        with one_node(folder) as configuration:
            yield configuration
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Place:
    """A working directory with the user's module, and commands given in it."""

    def __init__(self, path: Path, configuration: Path) -> None:
        self.path = path
        self.slurm = {**os.environ, "SLURM_CONF": str(configuration)}
        (path / "slow_sgd.py").write_text(SLOW)

    def descentlab(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join([str(ROOT), *(p for p in sys.path if "site-packages" in p)])
        return subprocess.run(
            [sys.executable, "-m", "descentlab.cli", *arguments],
            cwd=self.path,
            env={**self.slurm, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )

    def submit(self, *settings: str, **environment: str) -> str:
        """Submit the grid to ``cluster``; the job's number."""
        done = self.descentlab("run", *GRID, *settings, "--out", "cluster", "--launcher", "slurm", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("Slurm job ")[2].split()[0]

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.slurm, capture_output=True, text=True, timeout=30).stdout

    def restarts(self, job: str) -> int:
        fields = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return next((int(f.partition("=")[2]) for f in fields if f.startswith("Restarts=")), -1)

    def in_queue(self) -> str:
        return self.ask("squeue", "--noheader", "--array", "--format=%i %T")

    def block(self, job: str) -> Path:
        """The folder of the one block of a job."""
        rows = [json.loads(line) for line in (self.path / "cluster/slurm/jobs.jsonl").read_text().splitlines()]
        (key,) = next(row["blocks"] for row in rows if row["job"] == job)
        return self.path / "cluster" / "blocks" / key

    def owner(self, job: str) -> int | None:
        """Process that trains the one block of a job; its start-up is over, so that signals find their handlers."""
        found = holder(self.path / "cluster", self.block(job).name)
        return None if found is None else int(found["pid"])

    def local(self) -> store.Results:
        """The same grid on this machine, undisturbed and at full speed."""
        done = self.descentlab("run", *GRID, "--out", "local", "--launcher", "local")
        assert done.returncode == 0, done.stderr
        return store.load(self.path / "local")


def wait_for(ready: Callable[[], Any], what: str) -> Any:
    """What ``ready`` gives, once that is true."""
    deadline = time.monotonic() + WAIT_S
    while not (found := ready()):
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.2)
    return found


@pytest.fixture
def place(tmp_path: Path, node: Path) -> Place:
    return Place(tmp_path, node)


def test_a_grid_gives_the_table_of_a_local_run_and_runs_the_code_that_was_submitted(place: Place) -> None:
    """While the jobs wait, the user's module is broken, a rerun finds nothing lost, and status says that they wait.

    Fails when the job imports the working directory's code, and when the last job does not write table and report.
    """
    number = place.submit("launcher.options={hold: true}", "launcher.parallel=2")
    (place.path / "slow_sgd.py").write_text("raise RuntimeError('edited after the jobs were submitted')\n")
    shown = place.descentlab("status", "cluster").stdout
    assert shown.startswith("training: 3 queued") and f"job {number}_0 pending (JobHeldUser)" in shown
    place.ask("scontrol", "release", number)
    wait_for(lambda: (place.path / "cluster/report/index.html").exists(), "the last job's report")
    (place.path / "slow_sgd.py").write_text(SLOW)
    wait_for(lambda: not place.in_queue().strip(), "an empty queue")
    assert store.equal_tables(store.load(place.path / "cluster").frame, place.local().frame) == []
    again = place.descentlab("rerun", "cluster", "--launcher", "slurm")
    assert (again.returncode, "nothing left to run" in again.stderr) == (0, True)


def test_preempted_timed_out_and_killed_jobs_end_equal(place: Place) -> None:
    """Job 0 is preempted twice, job 1 is warned of its time limit, job 2 is killed and then rerun.

    Fails when a signal does not make a checkpoint (checkpoint_s is longer than the test) or does not requeue. Jobs
    cannot end before the gate opens. Slurm looks at time limits every 30 s: here 15 to 45 s after the start.
    """
    gate = place.path / "open"
    number = place.submit("launcher.time_min=1", "launcher.signal_s=45", GATE=str(gate))
    preempted, limited, killed = (f"{number}_{i}" for i in range(3))
    victim = wait_for(lambda: place.owner(killed), "the third job")
    os.kill(victim, signal.SIGKILL)
    met: set[int | None] = {None}
    for _ in range(2):
        owner = wait_for(lambda: {place.owner(preempted)} - met, "the first job").pop()
        met.add(owner)
        wait_for(Path(f"{gate}.{owner}").exists, "its first update")
        before = place.restarts(preempted)  # on a busy machine Slurm may have put it back once by itself
        place.ask("scancel", "--signal=USR2", preempted)
        wait_for(lambda n=before: place.restarts(preempted) > n, "its return to the queue")
        assert (place.block(preempted) / "checkpoint.pt").exists()
    wait_for(lambda: killed not in place.in_queue(), "the end of the killed job")
    shown = place.descentlab("status", "cluster").stdout
    assert f"{place.block(killed).name} interrupted" in shown and f"job {killed} has ended" in shown
    rerun = place.descentlab("rerun", "cluster", "--launcher", "slurm")
    assert "submitted 1 blocks in 1 job" in rerun.stdout, rerun.stderr
    local = place.local()
    wait_for(lambda: place.restarts(limited) >= 1, "the warning before the time limit")
    assert store.status(place.path / "cluster").counts()["done"] == 1  # the one that was rerun
    gate.touch()
    wait_for(lambda: (place.path / "cluster/report/index.html").exists(), "the last job's report")
    assert store.status(place.path / "cluster").counts() == {"done": 3}
    assert store.equal_tables(store.load(place.path / "cluster").frame, local.frame) == []


LATE_START = """
import os, pathlib, time

if "SLOW_START" in os.environ and "SLURM_JOB_ID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    pathlib.Path(os.environ["SLOW_START"]).touch()
    time.sleep(3)
"""


def test_a_signal_that_comes_while_python_starts_requeues_the_job(place: Place) -> None:
    """Nobody could answer it yet. Fails when it is not held back: it then kills Python, and the block is lost."""
    (place.path / "site").mkdir()
    (place.path / "site" / "sitecustomize.py").write_text(LATE_START)
    starts = place.path / "starts"
    path = os.pathsep.join([str(ROOT), str(place.path / "site"), *(p for p in sys.path if "site-packages" in p)])
    run = ["run", *STUDY, "replicates=1", "steps=20", "checkpoint_s=600", "--out", "cluster", "--launcher", "slurm"]
    done = place.descentlab(*run, PYTHONPATH=path, SLOW_START=str(starts))
    assert done.returncode == 0, done.stderr
    job = done.stdout.partition("Slurm job ")[2].split()[0]
    wait_for(starts.exists, "the start of Python")
    place.ask("scancel", "--signal=USR2", job)
    wait_for(lambda: place.restarts(job) >= 1, "its return to the queue")
    wait_for(lambda: (place.path / "cluster/report/index.html").exists(), "the report")
    assert store.status(place.path / "cluster").counts() == {"done": 1}


def test_the_grid_of_108_runs_gives_the_table_of_a_local_run(place: Place) -> None:
    """The shipped linear grid, its data and length replaced by ones for a test: packed blocks in an array of two jobs.

    Fails when packing differs between launchers, or a job leaves out one of several blocks it was given.
    """
    small = ["dataset=digits", "epochs=1", "samples_per_epoch=2560"]
    study = ["run", str(ROOT / "examples/studies/linear_grid.yaml"), *small]
    shown = place.descentlab("show", *study[1:], "--runs").stdout
    assert len(shown.splitlines()) == len({line.split()[0] for line in shown.splitlines()}) == 108
    done = place.descentlab(*study, "--out", "cluster", "--launcher", "slurm", "launcher.jobs=2")
    assert "in 2 jobs" in done.stdout, done.stderr
    assert place.descentlab(*study, "--out", "local").returncode == 0
    wait_for(lambda: (place.path / "cluster/report/index.html").exists(), "the last job's report")
    frames = [store.load(place.path / name).frame for name in ("cluster", "local")]
    assert frames[0]["run"].n_unique() == 108
    assert store.equal_tables(*frames) == []


def test_a_slurm_that_refuses_is_one_line(place: Place) -> None:
    """And nothing is noted as submitted, so that the same command works once the profile is right."""
    done = place.descentlab("run", *GRID, "--out", "cluster", "--launcher", "slurm", "launcher.partition=nowhere")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert line.startswith("error: Slurm refused the jobs: ") and "invalid partition" in line
    assert not (place.path / "cluster/slurm/jobs.jsonl").exists()
    with contextlib.suppress(FileNotFoundError):
        assert not any((place.path / "cluster" / "blocks").iterdir())


KILLED = """
import sys, tempfile, time
from pathlib import Path
from slurm_node import one_node

with one_node(Path(sys.argv[1])):
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_nothing_of_the_node_outlives_tests_that_are_killed(number: int) -> None:
    """Daemons and a job that runs. Fails without the watcher: slurmstepd and its job survive a killed test run."""
    folder = tempfile.mkdtemp(prefix="dl-kill-")
    paths = os.pathsep.join([str(ROOT / "tests"), *(p for p in sys.path if "site-packages" in p)])
    command, environment = [sys.executable, "-c", KILLED, folder], {**os.environ, "PYTHONPATH": paths}
    try:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as tests:
            assert tests.stdout is not None and tests.stdout.readline() == b"up\n"
            slurm = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
            submit = ["sbatch", "--wrap", "sleep 600", "-D", folder, "-o", f"{folder}/job.out"]
            subprocess.run(submit, env=slurm, check=True, capture_output=True)
            wait_for(lambda: "sleep 600" in naming(folder), "the job to run")
            os.kill(tests.pid, number)
        wait_for(lambda: not naming(folder), "the processes to end")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def naming(folder: str) -> list[str]:
    """Command lines of the processes that name the folder, in their command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes()
            if folder.encode() in line + (process / "environ").read_bytes():
                found.append(line.replace(b"\0", b" ").decode().strip())
    return found
