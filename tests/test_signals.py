"""Warnings of a time limit or a preemption: Slurm sends them to every process of a job, and one answers."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from descentlab.core.errors import UserError
from descentlab.launch.pool import Pool
from descentlab.launch.profile import Profile


def test_a_pools_workers_do_not_hear_a_warning() -> None:
    """It reaches them while they start. Fails when they are started as other processes are: the signal ends them."""
    with Pool(2) as pool:
        workers = [worker.process for worker in pool._workers]
        for process in workers:
            os.kill(process.pid, signal.SIGUSR2)
        with pytest.raises(subprocess.TimeoutExpired):
            workers[-1].wait(1.0)
        assert [process.poll() for process in workers] == [None, None]


ASKED = "import json,signal,sys; print(json.dumps([sys._xoptions, sys.argv, sorted(signal.pthread_sigmask(0, []))]))"


def test_a_jobs_python_starts_with_the_preemption_signal_held_back() -> None:
    """And with the options that the profile gives it."""
    pytest.importorskip("submitit")
    from descentlab.launch.slurm import _python

    command = _python(Profile(python=f"{shlex.quote(sys.executable)} -X mine=1"))
    said = subprocess.run(f"{command} -c {shlex.quote(ASKED)} a -P", shell=True, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    options, arguments, held = json.loads(said.stdout)
    assert (options, arguments, held) == ({"mine": "1"}, ["-c", "a", "-P"], [signal.SIGUSR2])


def test_a_preemption_signal_that_does_not_exist_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = pytest.importorskip("submitit.core.job_environment")
    from descentlab.launch.slurm import _python

    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR9")
    monkeypatch.setattr(environment.JobEnvironment, "USR_SIG", "USR9")
    with pytest.raises(UserError, match=r"SUBMITIT_PREEMPT_SIGNAL = 'USR9': expected the name of a signal"):
        _python(Profile())
