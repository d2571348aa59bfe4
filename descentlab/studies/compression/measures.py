"""What the compression report measures: one row per run, and means with intervals per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from ...analysis.failures import Scores
from ...analysis.paired import estimate
from ...analysis.results import ResultsLike, last_attempts
from ...report import SummaryItem
from ..common import bounded, item

MEASURES = ("accuracy", "time_s", "bytes_sent", "iterations_per_s", "link_share")
GATHERED = frozenset({"topk", "sign"})  # compressors whose messages were gathered when tables did not yet say so
PARTS = {  # column -> what the bar says
    "compute_s": "gradient and update",
    "compress_s": "compress",
    "collective_s": "send and wait",
    "decompress_s": "decompress",
}


@dataclass(frozen=True)
class Run:
    """What one run came to: accuracy (0..1), seconds, bytes and messages of all ``workers``; ``parts``: seconds of an
    update; ``gathers``: its messages are gathered, not summed on the way. Of processes: ``measured_s`` and ``busy_s``,
    medians of an update's seconds, of the whole and of what is no sending."""

    id: str
    method: str
    replicate: int
    steps: int
    accuracy: float
    time_s: float
    bytes_sent: float
    messages: float
    parts: Mapping[str, float]
    workers: int = 2
    gathers: bool = False
    cut: bool = False  # failed before its time: its seconds and bytes are not those of a whole run
    bandwidth_mbps: float = 0.0
    latency_s: float = 0.0  # as set, of a simulated link
    measured_s: float | None = None
    busy_s: float | None = None
    link: Mapping[str, Any] = field(default_factory=dict)  # all of its settings

    @property
    def base(self) -> str:
        """The method without what tells apart cells of one method."""
        return self.method.partition(",")[0]


def runs_of(results: ResultsLike, scores: Scores, methods: Mapping[str, str]) -> list[Run]:
    """One entry per run that ended, in the order of the methods. ``methods``: run -> method."""
    frame = last_attempts(results.frame)
    by_run = {str(key[0]): part for key, part in frame.partition_by("run", as_dict=True).items()}
    planned = {str(run["id"]): run for run in results.runs}
    found = []
    for run, method in methods.items():
        score = scores.by_run[run]
        if score.state == "pending" or run not in by_run:
            continue
        rows = by_run[run]
        last = rows.row(-1, named=True)
        steps = int(last["step"]) + 1  # there are fewer rows with observe.every above 1
        settings = planned[run]["settings"]
        compute_s = float(settings["compute_ms"]) / 1e3
        found.append(
            Run(
                run,
                method,
                int(planned[run]["replicate"]),
                steps,
                score.test_accuracy,
                float(last["virtual_s"]),
                float(last["bytes_sent"]),
                float(last.get("messages") or 0.0),
                _parts(rows, steps, compute_s),
                int(settings["workers"]),
                _gathers(last, settings["compressor"]["name"]),
                score.state == "failed",
                float(settings["link"].get("bandwidth_mbps") or 0.0),
                float(settings["link"].get("latency_ms") or 0.0) / 1e3,
                *_medians(rows),
                settings["link"],
            )
        )
    order = list(dict.fromkeys(methods.values()))
    return sorted(found, key=lambda run: (order.index(run.method), run.replicate))


def _gathers(last: Mapping[str, Any], compressor: str) -> bool:
    gathered = last.get("gathered")
    return compressor in GATHERED if gathered is None else gathered > 0


def _measured(rows: pl.DataFrame) -> bool:
    return "collective_s" in rows.columns and rows["collective_s"].null_count() < rows.height


def _medians(rows: pl.DataFrame) -> tuple[float | None, float | None]:
    """Seconds of an update of real processes and, of these, of computing, compressing and decompressing."""
    if not _measured(rows):
        return None, None
    later = rows.slice(min(5, rows.height - 1))
    whole, busy = (later["compute_s"] + later["exposed_s"], later["compress_s"] + later["decompress_s"])
    return float(whole.median()), float((later["compute_s"] + busy).median())  # type: ignore[arg-type]


def _parts(rows: pl.DataFrame, steps: int, compute_s: float) -> dict[str, float]:
    """Seconds of an update by part: measured by real processes (means over updates), else those of the clock."""
    if _measured(rows):
        later = rows.slice(min(5, rows.height - 1))  # the first updates allocate
        means = {name: float(later[name].mean()) for name in (*PARTS, "exposed_s")}  # type: ignore[arg-type]
        busy = sum(means[name] for name in PARTS) - means["compute_s"]
        shown = min(1.0, means["exposed_s"] / busy) if busy else 0.0  # the rest is hidden behind the backward pass
        return {name: means[name] * (1.0 if name == "compute_s" else shown) for name in PARTS}
    sending = float(rows["link_s"][-1]) / steps if "link_s" in rows.columns else 0.0
    return {"compute_s": compute_s, "compress_s": 0.0, "collective_s": sending, "decompress_s": 0.0}


def summarise(runs: list[Run]) -> dict[str, dict[str, SummaryItem]]:
    """Method -> measure -> mean over replicates with its interval."""
    found: dict[str, dict[str, SummaryItem]] = {}
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        whole = [run for run in own if not run.cut] or own
        values: dict[str, list[float]] = {
            "accuracy": [run.accuracy for run in own],
            "time_s": [run.time_s for run in whole],
            "bytes_sent": [run.bytes_sent for run in whole],
            "iterations_per_s": [run.steps / run.time_s if run.time_s else np.nan for run in whole],
            "link_share": [_share(run) for run in whole],
        }
        found[method] = {
            name: item(estimate(column)) for name, column in values.items() if np.isfinite(np.array(column)).all()
        }
        found[method]["accuracy"] = bounded(found[method]["accuracy"])
    return found


def _share(run: Run) -> float:
    total = sum(run.parts.values())
    return run.parts["collective_s"] / total if total else 0.0


def by_epoch(results: ResultsLike, methods: Mapping[str, str], column: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Method -> (epochs, mean of ``column`` over the epoch's updates and the replicates); methods without it are
    left out."""
    frame = last_attempts(results.frame)
    if column not in frame.columns:
        return {}
    named = frame.with_columns(method=pl.col("run").replace_strict(methods, default=None)).drop_nulls("method")
    found = {}
    for method in dict.fromkeys(methods.values()):
        part = named.filter(pl.col("method") == method, pl.col(column).is_finite())
        if part.is_empty():
            continue
        rows = part.group_by("epoch").agg(pl.col(column).mean()).sort("epoch")
        found[method] = (rows["epoch"].to_numpy(), rows[column].to_numpy())
    return found


def curves(results: ResultsLike, methods: Mapping[str, str], x: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Method -> (mean of ``x``, mean test accuracy) over replicates, at every evaluation."""
    frame = last_attempts(results.frame).drop_nulls("test_accuracy")
    named = frame.with_columns(method=pl.col("run").replace_strict(methods, default=None)).drop_nulls("method")
    found = {}
    for method in dict.fromkeys(methods.values()):
        rows = named.filter(pl.col("method") == method).group_by("step").agg(pl.col(x).mean(), pl.mean("test_accuracy"))
        rows = rows.sort("step")
        found[method] = (rows[x].to_numpy().astype(float), rows["test_accuracy"].to_numpy())
    return found


def by_link(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by their link, named by what differs where there are several; slowest last."""
    links: list[Run] = []  # a run of each
    for run in runs:
        if not any(_link_of(run) == _link_of(other) for other in links):
            links.append(run)
    links.sort(key=lambda run: (-(run.bandwidth_mbps or np.inf), run.latency_s))
    others = [{k: v for k, v in _link_of(run).items() if k not in ("bandwidth_mbps", "latency_ms")} for run in links]
    keys = [
        key
        for key in dict.fromkeys(k for own in others for k in own)
        if any(own.get(key) != others[0].get(key) for own in others)
    ]
    named = [
        ", ".join([_link_name(run), *(f"{key} {own[key]}" for key in keys if own.get(key) is not None)])
        for run, own in zip(links, others, strict=True)
    ]
    return {
        name if len(links) > 1 else "": [run for run in runs if _link_of(run) == _link_of(first)]
        for name, first in zip(named, links, strict=True)
    }


def _link_of(run: Run) -> dict[str, Any]:
    return {**run.link, "bandwidth_mbps": run.bandwidth_mbps, "latency_ms": 1e3 * run.latency_s}


def _link_name(run: Run) -> str:
    rate = f"{run.bandwidth_mbps:g} Mbit/s" if run.bandwidth_mbps else "no limit"
    return f"{rate}, {1e3 * run.latency_s:g} ms a hop" if run.latency_s else rate
