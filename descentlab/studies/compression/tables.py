"""Tables of the compression report: every exchange, every epoch, and the time model against real links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from ...analysis.results import ResultsLike, last_attempts
from ...report import Column, FigureBlock, Paragraph, Section, TableBlock
from . import figures
from .measures import Run
from .prediction import Predicted, exchanges, order

EPOCHS = 25  # rows of a method at most; the export has every update


def exchange_tables(results: ResultsLike, runs: Sequence[Run]) -> list[TableBlock]:
    """What each exchange of an update took, of each method's first run of real processes."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.method, run)
    rows = []
    for method, run in first.items():
        for i, one in enumerate(exchanges(results, run.id)):
            sent = [f"{1e3 * s:.3g}" for s in one["collectives_s"]]
            times = [None if one[k] is None else 1e3 * one[k] for k in ("compress_s", "decompress_s", "hidden_s")]
            rows.append([method, i + 1, times[0], " + ".join(sent), times[1], times[2], one["bytes_sent"] / 1e3])
    columns = [
        Column("method"),
        Column("exchange", "d", "a bucket of DDP, or all of them together"),
        Column("compress (ms)", ".3g"),
        Column("collectives (ms)", "", "each, in order"),
        Column("decompress (ms)", ".3g"),
        Column("hidden (ms)", ".3g", "of all of these, while the backward pass went on"),
        Column("sent (kB)", ".4g", "by one process"),
    ]
    caption = "Process 0's clock; means over the updates of one run per method, without the first five."
    return [TableBlock(columns, rows, caption)] if rows else []


def epoch_section(results: ResultsLike, methods: Mapping[str, str]) -> list[Section]:
    """Rank, gradient norm and its change, loss, accuracy, time and bytes by epoch; means over replicates."""
    frame = last_attempts(results.frame)
    named = frame.with_columns(method=pl.col("run").replace_strict(methods, default=None)).drop_nulls("method")
    keys = {  # column -> (head, format, how an epoch's value is made, scale)
        "rank": ("rank", ".3g", "mean", 1.0),
        "grad_norm": ("gradient norm", ".4g", "mean", 1.0),
        "gradient_change": ("change seen by the policy", ".3g", "last", 1.0),
        "train_loss": ("training loss (nats)", ".4g", "mean", 1.0),
        "test_accuracy": ("test accuracy (%)", ".2f", "last", 100.0),
        "virtual_s": ("time (s)", ".4g", "max", 1.0),
        "bytes_sent": ("sent (MB)", ".4g", "max", 1e-6),
    }
    held = {key: value for key, value in keys.items() if key in frame.columns}
    made = []
    for key, (_, _, how, _) in held.items():
        column = pl.col(key)
        made.append({"mean": column.mean(), "last": column.drop_nulls().last(), "max": column.max()}[how])
    table = named.sort("run", "step").group_by("run", "method", "epoch", maintain_order=True).agg(made)
    table = table.group_by("method", "epoch", maintain_order=True).agg(pl.col(*held).mean()).sort("epoch")
    rows: list[list[Any]] = []
    for method in dict.fromkeys(methods.values()):
        own = table.filter(pl.col("method") == method)
        at = np.unique(np.linspace(0, own.height - 1, min(EPOCHS, own.height)).round().astype(int))
        for record in own[at.tolist()].iter_rows(named=True):
            values = [None if record[k] is None else scale * record[k] for k, (*_, scale) in held.items()]
            rows.append([method, record["epoch"], *values])
    columns = [Column("method"), Column("epoch", "d"), *(Column(head, form) for head, form, _, _ in held.values())]
    return [Section("Every epoch", [TableBlock(columns, rows, "Means over replicates; time and bytes at its end.")])]


def prediction_section(predicted: Sequence[Predicted]) -> list[Section]:
    """Whether T = a + b bytes says how long an update takes over real links, and which method is faster."""
    if not predicted:
        return []
    rates = sorted({one.bandwidth_mbps for one in predicted}, reverse=True)
    said, rows = [], []
    for rate in rates:
        own = [one for one in predicted if one.bandwidth_mbps == rate]
        right, all_, wrong = order(own)
        others = "; other order: " + ", ".join(f"{a} and {b}" for a, b in wrong) if wrong else ""
        said.append(f"{rate:g} Mbit/s: {right} of {all_} pairs of methods in the predicted order{others}.")
        rows += [
            [f"{rate:g}", p.method.partition(",")[0], p.n, 1e3 * p.measured_s, 1e3 * p.predicted_s, 100 * p.error]
            for p in own
        ]
    columns = [
        Column("link (Mbit/s)"),
        Column("method"),
        Column("n", "d", "replicates"),
        Column("measured (ms)", ".3g", "median time of an update"),
        Column("predicted (ms)", ".3g"),
        Column("error (%)", "+.0f"),
    ]
    how = (
        "Predicted: what computing, compressing and decompressing took in the run, the latency its processes measured "
        "before it for every message, and its bytes at the rate the link was limited to. Nothing is fitted."
    )
    picture = FigureBlock(
        "prediction",
        figures.prediction(predicted),
        "Every point is one method over one link; on the line, the model is right.",
        "Measured against predicted time of an update",
    )
    return [
        Section("The time model on real links", [Paragraph(" ".join(said)), picture, TableBlock(columns, rows, how)])
    ]
