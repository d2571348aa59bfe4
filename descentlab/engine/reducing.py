"""Moments over members in the place of rows: what a cloud of 10,000 runs is asked for, without a row per run and step.

For every recorded step, group (one cell, perturbed or not) and observable: how many values are finite, how many are
not, mean, sum of squared deviations (M2), smallest and largest of the finite ones. For chosen steps, of the flattened
weights: mean and M2, elementwise or as a matrix. Blocks are merged by the reader (:mod:`descentlab.store.moments`)
with Chan's formula, so nothing is ever held for all members and all steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.protocols import Measured
from ..core.tree import Tree
from .program import Slot
from .recorder import Recorder, Scheduled

CLOCK = frozenset({"step", "attempt", "epoch", "samples", "virtual_s", "bytes_sent"})
Weights = Literal["none", "variance", "covariance"]


@dataclass(frozen=True)
class Groups:
    """The rows of one set of members: ``member`` of each row, sorted by group; ``first`` row of each group."""

    slots: Sequence[Slot]
    group: np.ndarray  # the groups there are
    member: np.ndarray
    first: np.ndarray
    runs: tuple[str, ...]
    run_groups: np.ndarray
    stops: frozenset[int]  # of the runs

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> Groups:
        found = [(run.group, m, run.id) for m, slot in enumerate(slots) for run in slot.runs]
        numbers = np.array([g for g, _, _ in found], dtype=np.int64)
        order = np.argsort(numbers, kind="stable")
        group, first = np.unique(numbers[order], return_index=True)
        member = np.array([m for _, m, _ in found], dtype=np.int64)[order]
        stops = frozenset(run.stop for slot in slots for run in slot.runs)
        return cls(slots, group, member, first, tuple(run for _, _, run in found), numbers, stops)

    def reduce(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """``values`` ``[K, M]``, where a masked array leaves members out: the five numbers, ``[groups, K]`` each."""
        rows = np.asarray(np.ma.getdata(values), dtype=np.float64)[:, self.member]
        asked = ~np.ma.getmaskarray(values)[:, self.member]
        finite = np.isfinite(rows) & asked
        size = np.diff([*self.first, len(self.member)])
        n = np.add.reduceat(finite, self.first, axis=1, dtype=np.int64)
        kept = np.where(finite, rows, 0.0)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            mean = np.add.reduceat(kept, self.first, axis=1) / n
            apart = np.where(finite, rows - np.repeat(mean, size, axis=1), 0.0)
            m2 = np.add.reduceat(apart**2, self.first, axis=1)
        low = np.minimum.reduceat(np.where(finite, rows, np.inf), self.first, axis=1)
        high = np.maximum.reduceat(np.where(finite, rows, -np.inf), self.first, axis=1)
        nonfinite = np.add.reduceat(asked & ~finite, self.first, axis=1, dtype=np.int64)
        found = {"n": n, "nonfinite": nonfinite, "mean": mean, "m2": m2, "low": low, "high": high}
        return {name: array.T for name, array in found.items()}

    def spread(self, theta: np.ndarray, matrix: bool) -> dict[str, np.ndarray]:
        """Moments of weights ``theta`` ``[M, C]`` of the members whose weights are all finite: n ``[groups]``, mean
        ``[groups, C]``, M2 ``[groups, C]`` or ``[groups, C, C]``."""
        ends = [*self.first[1:], len(self.member)]
        n, means, squares = [], [], []
        for a, b in zip(self.first, ends, strict=True):
            rows = theta[self.member[a:b]].astype(np.float64)
            rows = rows[np.isfinite(rows).all(axis=1)]
            mean = rows.mean(axis=0) if len(rows) else np.full(theta.shape[1], np.nan)
            apart = rows - mean
            n.append(len(rows))
            means.append(mean)
            squares.append(apart.T @ apart if matrix else (apart**2).sum(axis=0))
        return {"n": np.array(n), "mean": np.stack(means), "m2": np.stack(squares)}


def flattened(params: Tree, coordinates: Sequence[int]) -> np.ndarray:
    """Weights ``[M, C]``: all parameters of a member in their order, or the chosen ones of them."""
    flat = torch.cat([p.detach().flatten(1) for p in params.values()], dim=1)
    return (flat[:, list(coordinates)] if coordinates else flat).cpu().numpy()


@dataclass
class ReducingRecorder(Recorder):
    """A recorder that keeps moments, of rows only each run's last (``keep_rows``: all of them).

    It is an observable too, the only thing here that sees the weights; as such it measures nothing.
    """

    keep_rows: bool = False
    weights: Weights = "none"
    weights_every: int = 1
    coordinates: tuple[int, ...] = ()
    name: str = "moments"
    needs: frozenset[str] = frozenset()
    _groups: Groups = field(default_factory=lambda: Groups.of(()))
    _params: Tree = field(default_factory=dict)
    _kept: list[dict[str, Any]] = field(default_factory=list)
    _spreads: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, m: Measured) -> dict[str, Tensor]:
        """Only remembers where the weights are."""
        self._params = m.state.params
        return {}

    def rows(self, slots: Sequence[Slot], measured: Mapping[str, np.ndarray], scheduled: Scheduled) -> None:
        """As :meth:`Recorder.rows`."""
        if slots is not self._groups.slots:
            self._groups = Groups.of(slots)
        step = int(measured["step"][0])
        if not self.keep_rows:
            self._keep(step, measured, scheduled)
            self._note(step, measured)
        if self.weights != "none" and step % self.weights_every == 0:
            theta = flattened(self._params, self.coordinates)
            found = self._groups.spread(theta, self.weights == "covariance")
            self._spreads.append({"step": step, "groups": self._groups.group, **found})
        if self.keep_rows:
            super().rows(slots, measured, scheduled)
        elif step + 1 in self._groups.stops:
            self._last_rows(step, slots, measured, scheduled)

    def _keep(self, step: int, measured: Mapping[str, np.ndarray], scheduled: Scheduled) -> None:
        columns = {name: values for name, values in measured.items() if name not in CLOCK}
        members = len(self._groups.slots)
        for name, (who, values) in scheduled.items():
            held = np.ma.masked_all((members, *values.shape[1:]), dtype=np.float64)
            held[list(who)] = values
            columns[name] = held
        flat = {key: column for name, values in columns.items() for key, column in _columns(name, values)}
        found = self._groups.reduce(np.ma.stack(list(flat.values())))
        self._kept.append({"step": step, "groups": self._groups.group, "columns": list(flat), **found})

    def _note(self, step: int, measured: Mapping[str, np.ndarray]) -> None:
        """A run's first step with a non-finite loss or weight: there may be no row of it."""
        bad = np.zeros(len(self._groups.slots), bool)
        if "train_loss" in measured:
            bad |= ~np.isfinite(measured["train_loss"])
        if "nonfinite_params" in measured:
            bad |= measured["nonfinite_params"] > 0
        for m in np.flatnonzero(bad).tolist():
            for run in self._groups.slots[m].runs:
                self.diverged.setdefault(run.id, step)

    def _last_rows(
        self, step: int, slots: Sequence[Slot], measured: Mapping[str, np.ndarray], scheduled: Scheduled
    ) -> None:
        ending = {m: tuple(run for run in slot.runs if run.stop == step + 1) for m, slot in enumerate(slots)}
        chosen = [m for m, runs in ending.items() if runs]
        place = {m: i for i, m in enumerate(chosen)}
        parts = {}
        for name, (who, values) in scheduled.items():
            here = [i for i, m in enumerate(who) if m in place]
            parts[name] = ([place[who[i]] for i in here], values[here])
        last = tuple(Slot(ending[m]) for m in chosen)
        super().rows(last, {name: values[chosen] for name, values in measured.items()}, parts)

    def take(self) -> dict[str, np.ndarray]:
        """What was kept since the last call, as arrays for one .npz; empty when there was nothing."""
        kept, self._kept = self._kept, []
        spreads, self._spreads = self._spreads, []
        if not kept and not spreads:
            return {}
        out = {"runs": np.array(self._groups.runs), "run_groups": self._groups.run_groups}
        return out | _joined(kept) | {f"weights_{k}": v for k, v in _joined(spreads).items()}


def _columns(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """A column ``[M]``, or those of a list-valued observable ``[M, C]``, named as in the table's CSV."""
    if values.ndim == 1:
        return [(name, values)]
    return [(f"{name}_{i}", values[:, i]) for i in range(values.shape[1])]


def _joined(steps: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """One array per entry, ``[lines, …]``; a line is a (step, group), or a (step, group, column) where there are
    columns."""
    if not steps:
        return {}
    out: dict[str, list[np.ndarray]] = {}
    for one in steps:
        columns = one.get("columns")
        shape = (len(one["groups"]), *([len(columns)] if columns else []))
        index = {"step": np.full(shape, one["step"]), "group": np.broadcast_to(_last(one["groups"], shape), shape)}
        if columns:
            index["column"] = np.broadcast_to(np.array(columns), shape)
        values = {k: v for k, v in one.items() if k not in ("step", "groups", "columns")}
        for name, array in {**index, **values}.items():
            out.setdefault(name, []).append(array.reshape(-1, *array.shape[len(shape) :]))
    return {name: np.concatenate(arrays) for name, arrays in out.items()}


def _last(groups: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return groups.reshape(-1, *[1] * (len(shape) - 1))
