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
    """As long as PAUSE_S says per update, and to the bit what SGD computes."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)

    def step(self, closure=None):
        if sum(p.numel() for g in self.param_groups for p in g["params"]) > 1000:  # not in the start-up check
            time.sleep(float(os.environ.get("PAUSE_S", 0)))
        return super().step(closure)
'''
STUDY = ["training", "dataset=digits", "model={name: mlp, pool: 0, hidden: [16]}", "optimizer=slow_sgd:SlowSGD"]
GRID = [*STUDY, "optimizer.lr=0.1,0.05,0.02", "replicates=1", "members_per_block=1", "steps=200", "checkpoint_s=600"]
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

    def trains(self, job: str) -> bool:
        """Whether the job's start-up is over, so that signals find their handlers."""
        return holder(self.path / "cluster", self.block(job).name) is not None

    def local(self) -> store.Results:
        """The same grid on this machine, undisturbed and at full speed."""
        done = self.descentlab("run", *GRID, "--out", "local", "--launcher", "local")
        assert done.returncode == 0, done.stderr
        return store.load(self.path / "local")


def wait_for(ready: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not ready():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.2)


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


@pytest.mark.skipif("DESCENTLAB_SLURM_SLOW" not in os.environ, reason="several minutes: set DESCENTLAB_SLURM_SLOW=1")
def test_preempted_timed_out_and_killed_jobs_end_equal(place: Place) -> None:
    """Job 0 is preempted twice, job 1 is warned of its time limit, job 2 is killed and then rerun.

    Fails when a signal does not make a checkpoint (checkpoint_s is longer than the test) or does not requeue.
    """
    number = place.submit("launcher.time_min=1", "launcher.signal_s=10", PAUSE_S="0.25")  # Slurm may be 20 s early
    preempted, limited, killed = (f"{number}_{i}" for i in range(3))
    wait_for(lambda: place.trains(killed), "the third job")
    owner = holder(place.path / "cluster", place.block(killed).name)
    assert owner is not None
    os.kill(owner["pid"], signal.SIGKILL)
    for times in (1, 2):
        wait_for(lambda: place.trains(preempted), "the first job")
        place.ask("scancel", "--signal=USR2", preempted)
        wait_for(lambda n=times: place.restarts(preempted) >= n, "its return to the queue")
        assert (place.block(preempted) / "checkpoint.pt").exists()
    wait_for(lambda: killed not in place.in_queue(), "the end of the killed job")
    shown = place.descentlab("status", "cluster").stdout
    assert f"{place.block(killed).name} interrupted" in shown and f"job {killed} has ended" in shown
    rerun = place.descentlab("rerun", "cluster", "--launcher", "slurm", PAUSE_S="0")
    assert "submitted 1 blocks in 1 job" in rerun.stdout, rerun.stderr
    wait_for(lambda: place.restarts(limited) >= 1, "the warning before the time limit")
    wait_for(lambda: (place.path / "cluster/report/index.html").exists(), "the last job's report")
    assert store.status(place.path / "cluster").counts() == {"done": 3}
    assert store.equal_tables(store.load(place.path / "cluster").frame, place.local().frame) == []


def test_a_slurm_that_refuses_is_one_line(place: Place) -> None:
    """And nothing is noted as submitted, so that the same command works once the profile is right."""
    done = place.descentlab("run", *GRID, "--out", "cluster", "--launcher", "slurm", "launcher.partition=nowhere")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert line.startswith("error: Slurm refused the jobs: ") and "invalid partition" in line
    assert not (place.path / "cluster/slurm/jobs.jsonl").exists()
    with contextlib.suppress(FileNotFoundError):
        assert not any((place.path / "cluster" / "blocks").iterdir())
