"""What the analysis needs of a finished study, and how its frame is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import polars as pl

CORRUPT = "corrupt_"  # first letters of the columns of observable corruption; the name core/corrupt.py has too
MEASURES = frozenset(
    {
        *(
            "step",
            "attempt",
            "epoch",
            "samples",
            "virtual_s",
            "bytes_sent",
            "wall_s",
            "lr",
            "train_loss",
            "train_accuracy",
        ),
        *("grad_norm", "update_norm", "slot_max", "bn_var_max", "nonfinite_grads", "nonfinite_params", "test_loss"),
        *("test_accuracy", "timestamp", "cpu_percent", "rss_mb"),
        *(
            "rank",
            "gradient_change",
            "messages",
            "gathered",
            "link_s",
            "compute_s",
            "compress_s",
            "collective_s",
            "decompress_s",
        ),
        *("staleness", "weight_gap", "worker", "exposed_s", "alarm", "alarm_value", "alarm_bound", "action", "rewound"),
    }
)
IDENTITY = frozenset({"run", "cell", "replicate", "role", "case", "hit_step", "layer", "value", "optimizer"})


class ResultsLike(Protocol):
    """The part of ``store.Results`` that reports read: plain records and one polars frame."""

    @property
    def path(self) -> Path | str: ...
    @property
    def spec(self) -> Mapping[str, Any]: ...
    @property
    def runs(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def status(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def campaign(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def hits(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    @property
    def frame(self) -> pl.DataFrame: ...


def last_attempts(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per (run, step): the last attempt, sorted; earlier attempts were rewound and do not count."""
    return frame.sort("run", "step", "attempt").unique(["run", "step"], keep="last", maintain_order=True)


def setting_columns(frame: pl.DataFrame) -> list[str]:
    """Settings that vary across cells, ``optimizer`` apart; constant within a cell, unlike an observable."""
    names = [name for name in frame.columns if name not in MEASURES | IDENTITY and not name.startswith(CORRUPT)]
    if not names:
        return []
    spread = frame.group_by("cell").agg(pl.col(name).n_unique() for name in names).select(pl.col(names).max())
    return [name for name in names if spread[name][0] == 1]


def cell_settings(frame: pl.DataFrame) -> dict[int, dict[str, Any]]:
    """Cell index -> its optimizer and the other settings that vary across cells, sorted by cell."""
    columns = ["cell", "optimizer", *setting_columns(frame)]
    rows = frame.select(columns).unique(["cell"], keep="first", maintain_order=True).sort("cell")
    return {int(row.pop("cell")): row for row in rows.to_dicts()}


def value_text(value: Any) -> str:
    """A setting as it would be typed, at its shortest: true, 1e12, 0.01."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return min(repr(value), f"{value:.17g}", *(t for t in _short_forms(value) if float(t) == value), key=len)
    return str(value)


def _short_forms(value: float) -> list[str]:
    shown = f"{value:g}"
    mantissa, e, exponent = shown.partition("e")
    return [shown, f"{mantissa}e{int(exponent)}"] if e else [shown, shown]


def condition_labels(cells: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """A short unique name per cell: its optimizer, plus whatever tells cells of one optimizer apart.

    A setting goes by the last part of its key where that says which one it is: ``batch_norm=false``.
    """
    keys = {key for settings in cells.values() for key in settings}
    lasts = [key.rsplit(".", 1)[-1] for key in keys]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}
    labels: dict[int, str] = {}
    for cell, settings in cells.items():
        rivals = [other for other in cells.values() if other["optimizer"] == settings["optimizer"]]
        differing = [key for key in settings if _tells_apart(key, settings, rivals)]
        labels[cell] = ",".join(
            [str(settings["optimizer"]), *(f"{short[key]}={value_text(settings[key])}" for key in differing)]
        )
    return labels


def _tells_apart(key: str, settings: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ``key`` differs, and not only since another option of its block (``arm`` of ``arm.steps``) was chosen."""
    room = key.split(".")[0]
    alike = [other for other in rivals if room == key or other.get(room) == settings.get(room)]
    return len({str(other[key]) for other in alike}) > 1


def planned_pairs(cells: Mapping[int, Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Pairs of cells that differ in the optimizer and agree in every setting that is not the optimizer's own."""

    def surroundings(cell: int) -> tuple[str, ...]:
        return tuple(f"{k}={v}" for k, v in cells[cell].items() if k.split(".")[0] != "optimizer")

    order = list(cells)
    return [
        (first, second)
        for index, first in enumerate(order)
        for second in order[index + 1 :]
        if cells[first]["optimizer"] != cells[second]["optimizer"] and surroundings(first) == surroundings(second)
    ]


def class_count(spec: Mapping[str, Any]) -> int:
    """Number of classes of the data set: ``classes`` of spec or data set, else 10 as in every shipped set."""
    dataset = spec.get("dataset")
    nested = dataset.get("classes") if isinstance(dataset, Mapping) else None
    return int(spec.get("classes") or nested or 10)
