"""What the time model says of updates over real links, beside what the processes measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...analysis.results import ResultsLike
from .figures import update_s
from .measures import Run


@dataclass(frozen=True)
class Predicted:
    """Seconds of an update of one method over one link: the median that was measured, and T = a + b bytes; means over
    ``n`` replicates."""

    method: str
    bandwidth_mbps: float
    measured_s: float
    predicted_s: float
    n: int

    @property
    def error(self) -> float:
        """Relative; above 0 where the model says too much."""
        return self.predicted_s / self.measured_s - 1


def predictions(results: ResultsLike, runs: Sequence[Run]) -> list[Predicted]:
    """Of every method whose processes talked over a link with a limit, in the order of ``runs``.

    a: the medians of what computing, compressing and decompressing took in that run, and the latency its processes
    measured before it, per message. b: the limit the link was given, the lower one of the two directions. Nothing is
    fitted. Runs whose link changed on the way have no single prediction and are left out.
    """
    latency = latencies(results)
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for run in runs:
        rate = min((r for r in (run.bandwidth_mbps, run.link.get("ingress_mbps")) if r), default=0.0)
        if run.measured_s is None or not rate or run.id not in latency or not run.messages or run.link.get("changes"):
            continue
        told = update_s(run, rate, latency[run.id], run.busy_s)
        found.setdefault((run.method, rate), []).append((run.measured_s, told))
    means = {key: np.mean(pairs, axis=0).tolist() for key, pairs in found.items()}
    return [Predicted(*key, means[key][0], means[key][1], len(pairs)) for key, pairs in found.items()]


def order(found: Sequence[Predicted]) -> tuple[int, int, list[tuple[str, str]]]:
    """(pairs of methods in the predicted order, all pairs, the pairs in the other order), of one link's methods."""
    pairs = list(itertools.combinations(found, 2))
    wrong = [
        (a.method, b.method) for a, b in pairs if (a.measured_s - b.measured_s) * (a.predicted_s - b.predicted_s) < 0
    ]
    return len(pairs) - len(wrong), len(pairs), wrong


def latencies(results: ResultsLike) -> dict[str, float]:
    """Run -> seconds of a hop, as its processes measured them before it began."""
    blocks = {folder: run for run, folder in folders(results).items()}
    found: dict[str, float] = {}
    for event in _lines(Path(results.path) / "events.jsonl"):
        run = blocks.get(str(event.get("block")))
        if event.get("kind") == "environment" and run is not None:
            found.setdefault(run, float(event["latency_s"]))
    return found


def folders(results: ResultsLike) -> dict[str, str]:
    """Run -> name of the folder of its block, of runs whose processes kept a log of their exchanges."""
    found = {}
    for path in sorted(Path(results.path).glob("blocks/*/buckets.jsonl")):
        first = next(iter(_lines(path)), None)
        if first is not None:
            found[str(first["run"])] = path.parent.name
    return found


def exchanges(results: ResultsLike, run: str, skip: int = 5) -> list[dict[str, Any]]:
    """Means over the updates of a run, without the first ones, of each of its exchanges in order: ``compress_s``,
    ``collectives_s`` (a list), ``decompress_s``, ``hidden_s``, ``bytes_sent``; empty without a log."""
    folder = folders(results).get(run)
    if folder is None:
        return []
    updates = [line["exchanges"] for line in _lines(Path(results.path) / "blocks" / folder / "buckets.jsonl")]
    shape = [[len(one["collectives_s"]) for one in update] for update in updates]
    alike = [update for update, own in zip(updates, shape, strict=True) if own == shape[-1]]  # DDP makes buckets anew
    alike = alike[skip:] or alike
    return [_mean([update[i] for update in alike]) for i in range(len(shape[-1]))]


def _mean(exchanged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"collectives_s": np.mean([one["collectives_s"] for one in exchanged], axis=0).tolist()}
    for key in ("compress_s", "decompress_s", "hidden_s", "bytes_sent"):
        values = [one[key] for one in exchanged]
        found[key] = None if None in values else float(np.mean(values))
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
