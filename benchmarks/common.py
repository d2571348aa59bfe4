"""What every benchmark shares: several contestants measured in turns, medians, and one JSON line at the end."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"), "1")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> str:
    """Processor and number of usable cores, for instance ``"AMD EPYC 7B13, 2 cores, Linux x86_64"``."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {cores()} cores, {platform.system()} {platform.machine()}"


def alternate(contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every contestant once per repeat, in turns and every other time in reverse order, so that drift hits all alike.

    A contestant returns what it measured; so does this function, a list per name.
    """
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            measured[name].append(contestants[name]())
    return measured


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over repeats of the ratio within a repeat."""
    return round(statistics.median(s / f for s, f in zip(slow, fast, strict=True)), 2)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest value, to three digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: float(f"{value:.3g}") for key, value in found.items()}


def slopes(seconds: Mapping[int, Sequence[float]]) -> list[float]:
    """Of every turn, the least-squares slope of log(seconds) against log(size); ``seconds``: size -> one per turn.

    A slope is of one turn because the machine's speed drifts from one turn to the next.
    """
    x = [math.log(size) for size in seconds]
    off = [a - statistics.mean(x) for a in x]
    turns = zip(*seconds.values(), strict=True)
    return [sum(a * math.log(s) for a, s in zip(off, turn, strict=True)) / sum(a * a for a in off) for turn in turns]


def emit(benchmark: str, ratios: Mapping[str, float | None], n: int, **details: Any) -> None:
    """Print the one line of JSON."""
    line = {"benchmark": benchmark, "ratios": dict(ratios), "n": n, **details, "hardware": hardware()}
    print(json.dumps(line))
