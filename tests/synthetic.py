"""Made-up results with the shape of real ones: frames as the store writes them, for tests of analysis and report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

LAYERS = ("conv1", "conv2", "conv3")
STEPS_PER_EPOCH = 60


@dataclass
class FakeResults:
    """The fields of ``store.Results`` that reports read."""

    path: Path = Path("out/recovery")
    study: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    status: list[dict[str, Any]] = field(default_factory=list)
    campaign: list[dict[str, Any]] = field(default_factory=list)
    hits: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    frame: pl.DataFrame = field(default_factory=pl.DataFrame)


PROVENANCE = {
    "command": ["descentlab", "run", "recovery"],
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "numpy": "2.4.0"},
    "cpu": "two cores",
    "git": {"commit": "0123abcd", "diff": "x" * 5000},
}


def _trajectory(rng: np.random.Generator, steps: int, speed: float) -> dict[str, np.ndarray]:
    t = np.arange(steps)
    clean = 0.12 + 2.2 * np.exp(-t * speed)
    noisy = clean * np.exp(0.12 * rng.standard_normal(steps))
    return {
        "train_loss": noisy,
        "train_accuracy": np.clip(np.round(64 * (1 - 0.85 * np.minimum(1, noisy / 2.3))) / 64, 0, 1),
        "grad_norm": 1.5 * clean + 0.1,
        "update_norm": 0.05 * np.ones(steps),
        "slot_max": 0.05 + 0.02 * rng.random(steps),
        "bn_var_max": 1.0 + 0.3 * (1 - np.exp(-t / 30)),
    }


def _hurt(base: dict[str, np.ndarray], hit: int, size: float, memory: float) -> dict[str, np.ndarray]:
    """The same run after a hit of ``size`` nats that fades over ``memory`` steps; identical to the bit before it."""
    out = {name: values.copy() for name, values in base.items()}
    if size == 0:
        return out
    since = np.arange(len(base["train_loss"]) - hit)
    out["train_loss"][hit:] += size * np.exp(-since / memory) + 0.02 * size * (since > 0)
    out["train_accuracy"][hit:] = np.clip(out["train_accuracy"][hit:] - 0.3 * size * np.exp(-since / memory), 0.05, 1)
    out["slot_max"][hit:] *= 1 + 1e5 * size * np.exp(-since / (3 * memory))
    out["bn_var_max"][hit:] *= 1 + 1e9 * size * 0.9**since
    return out


def _rows(run: str, series: dict[str, np.ndarray], config: dict[str, Any], every: int, end: int) -> pl.DataFrame:
    steps = np.arange(end)
    evaluated = (steps % every == every - 1) | (steps == end - 1)
    test = series["train_loss"][:end] * 1.1 + 0.02
    accuracy = np.clip(series["train_accuracy"][:end] - 0.02, 0, 1)
    fixed: dict[str, Any] = {
        "attempt": 0,
        "lr": 0.01,
        "nonfinite_grads": 0,
        "nonfinite_params": 0,
        "wall_s": 0.01,
        **config,
    }
    return pl.DataFrame(
        {
            "run": [run] * end,
            "step": steps,
            "epoch": steps // STEPS_PER_EPOCH,
            "samples": (steps + 1) * 64,
            "virtual_s": steps * 1.0,
            "bytes_sent": steps * 1000,
            **{name: values[:end] for name, values in series.items()},
            "test_loss": [float(v) if e else None for v, e in zip(test, evaluated, strict=True)],
            "test_accuracy": [float(v) if e else None for v, e in zip(accuracy, evaluated, strict=True)],
        }
    ).with_columns(pl.lit(value).alias(name) for name, value in fixed.items())


def recovery_results(
    cases: int = 10,
    optimizers: tuple[str, ...] = ("sgd", "adam", "rmsprop", "adamw"),
    recovery_steps: int = 100,
    diverge: tuple[tuple[str, int], ...] = (("sgd", 4),),
    masked: tuple[int, ...] = (2,),
    seed: int = 7,
    faults: tuple[str, ...] = ("N16_RD",),
) -> FakeResults:
    """A recovery study; ``diverge`` names (optimizer, case) that blow up, ``masked`` cases whose fault does nothing.

    With several ``faults`` a grid over them: cell = place of the fault x optimizers + place of the optimizer. All hit
    at the same step; the second is ten times as large and in another layer.
    """
    if len(faults) > 1:
        return _fault_grid(cases, optimizers, recovery_steps, diverge, masked, seed, faults)
    rng = np.random.default_rng(seed)
    out = FakeResults(spec={"study": "recovery", "dataset": {"name": "mnist5k"}}, provenance=dict(PROVENANCE))
    frames = []
    for case in range(cases):
        epoch = int(rng.integers(0, 4))
        hit = epoch * STEPS_PER_EPOCH + int(rng.integers(2 if epoch == 0 else 0, STEPS_PER_EPOCH))
        layer, value = str(rng.choice(LAYERS)), float(10 ** rng.uniform(2.6, 12))
        planned = {
            "case": case,
            "replicate": case,
            "step": hit,
            "epoch": epoch,
            "site": "forward/out",
            "layer": layer,
            "rule": {"kind": "value", "value": value},
            "index": list(range(16)),
            "shape": [64, 16, 14, 14],
            "fault": faults[0],
            "cells": list(range(len(optimizers))),
        }
        out.campaign.append(planned)
        severity = 0.0 if case in masked else float(rng.lognormal(-0.5, 0.8))
        for number, name in enumerate(optimizers):
            speed = (0.02, 0.03, 0.025, 0.03)[number % 4]
            base = _trajectory(np.random.default_rng([seed, case, number]), hit + recovery_steps + 1, speed)
            hurt = _hurt(base, hit, severity * (0.5, 1.0, 0.7, 1.1)[number % 4], (8, 40, 20, 40)[number % 4])
            for role, series in (("twin", base), ("fault", hurt)):
                run = f"{name}-{case}-{role}"
                end = hit + recovery_steps + 1
                status: dict[str, Any] = {"run": run, "status": "done", "steps": end, "message": ""}
                if role == "fault" and (name, case) in diverge:
                    end = hit + 4
                    series["train_loss"][end - 1] = math.nan
                    status = {**status, "status": "diverged", "steps": end, "diverged_step": end - 1}
                config = {
                    "cell": number,
                    "replicate": case,
                    "role": role,
                    "optimizer": name,
                    "optimizer.lr": 0.1 / (1 + number),
                    "case": case,
                    "hit_step": hit,
                    "layer": layer,
                    "value": value,
                }
                frames.append(_rows(run, series, config, 10, end))
                out.runs.append(
                    {
                        "id": run,
                        "cell": number,
                        "replicate": case,
                        "role": role,
                        "labels": {"case": case},
                        "settings": {},
                    }
                )
                out.status.append(status)
            out.hits.append(
                {
                    "case": case,
                    "run": f"{name}-{case}-fault",
                    "optimizer": name,
                    "replicate": case,
                    "step": hit,
                    "site": "forward/out",
                    "layer": layer,
                    "rule": planned["rule"],
                    "index": planned["index"],
                    "old": [0.1] * 16,
                    "new": [value] * 16,
                }
            )
    out.frame = pl.concat(frames)
    return out


def _fault_grid(
    cases: int,
    optimizers: tuple[str, ...],
    recovery_steps: int,
    diverge: tuple[tuple[str, int], ...],
    masked: tuple[int, ...],
    seed: int,
    faults: tuple[str, ...],
) -> FakeResults:
    whole = FakeResults(spec={"study": "recovery", "dataset": {"name": "mnist5k"}}, provenance=dict(PROVENANCE))
    frames = []
    for place, fault in enumerate(faults):
        part = recovery_results(cases, optimizers, recovery_steps, diverge if place == 0 else (), masked, seed)
        first = place * len(optimizers)
        name = {run["id"]: f"{fault}-{run['id']}" for run in part.runs}
        scale, layer = 10.0**place, LAYERS[place % len(LAYERS)]
        whole.runs += [{**run, "id": name[run["id"]], "cell": run["cell"] + first} for run in part.runs]
        whole.status += [{**line, "run": name[line["run"]]} for line in part.status]
        for line in part.campaign:
            rule = {"kind": "value", "value": line["rule"]["value"] * scale}
            cells = [cell + first for cell in line["cells"]]
            whole.campaign.append({**line, "rule": rule, "layer": layer, "fault": fault, "cells": cells})
        whole.hits += [{**hit, "run": name[hit["run"]], "layer": layer} for hit in part.hits]
        frames.append(
            part.frame.with_columns(
                pl.col("run").replace_strict(name),
                pl.col("cell") + first,
                pl.lit(fault).alias("fault"),
                pl.lit(layer).alias("layer"),
                pl.col("value") * scale,
            )
        )
    whole.frame = pl.concat(frames)
    return whole


def crossed_results(replicates: int = 10, diverge: bool = True, interaction: float = 0.3, seed: int = 3) -> FakeResults:
    """A crossed study whose fault x staleness interaction is ``interaction`` nats for adam and 0 for sgd."""
    out = FakeResults(path=Path("out/crossed"), spec={"study": "crossed"}, provenance=dict(PROVENANCE))
    frames = []
    cells = [
        (f, t, c, o)
        for o in ("sgd", "adam")
        for c in ("none", "powersgd")
        for t in ("barrier", "constant")
        for f in ("none", "N16_RD")
    ]
    for cell, (fault, timeline, compressor, optimizer) in enumerate(cells):
        for replicate in range(replicates):
            rng = np.random.default_rng([seed, cell, replicate])
            shared = np.random.default_rng([seed, replicate]).normal(0, 0.1)
            effect = 0.2 * (fault != "none") + 0.1 * (timeline != "barrier") + 0.05 * (compressor != "none")
            if optimizer == "adam" and fault != "none" and timeline != "barrier":
                effect += interaction
            run, end = f"c{cell}-{replicate}", 60
            series = _trajectory(rng, end, 0.05)
            series["train_loss"] = series["train_loss"] * 0 + 0.8 + effect + shared + 0.03 * rng.standard_normal(end)
            role = "twin" if fault == "none" else "fault"
            status: dict[str, Any] = {"run": run, "status": "done", "steps": end, "message": ""}
            if diverge and cell == 3 and replicate == 1:
                end = 20
                status = {**status, "status": "diverged", "steps": end, "diverged_step": end - 1}
            config = {
                "cell": cell,
                "replicate": replicate,
                "role": role,
                "optimizer": optimizer,
                "fault": fault,
                "timeline": timeline,
                "timeline.staleness": 2 if timeline == "constant" else None,
                "compressor": compressor,
                "compressor.rank": 1 if compressor == "powersgd" else None,
                "optimizer.lr": 0.5,
            }
            rows = _rows(run, series, config, 10, end)
            frames.append(rows.with_columns(pl.col("timeline.staleness", "compressor.rank").cast(pl.Int64)))
            out.runs.append(
                {"id": run, "cell": cell, "replicate": replicate, "role": role, "labels": {}, "settings": {}}
            )
            out.status.append(status)
    out.frame = pl.concat(frames)
    return out
