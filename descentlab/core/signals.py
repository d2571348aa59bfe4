"""Signals that a process answers for the processes it has started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of a time limit or a preemption


@contextmanager
def warnings_held_back() -> Iterator[None]:
    """Processes started inside never see a warning, which would end them: Slurm sends it to every process of a job, and
    the one that asked for them answers. To this process nothing is lost: at the latest it hears at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
