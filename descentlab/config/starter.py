"""Settings files of the starter, an earlier tool, as files of the training study (docs/howto-starter.md has the table).

One file is one configuration, or ``job_details`` with ``parameters`` that span a grid. Needs neither data nor models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import UserError, nearest, raise_all
from .expression import Unreadable, evaluate
from .identity import canonical
from .starter_grid import Point, expand, sub_grids, written
from .starter_names import AVERAGES, BIASES, DEFAULTS, METRICS, OPTIMIZERS, SILENT, dataset, model, splits

ROOMS = ("dataset", "model", "optimizer", "schedule", "averaging")


def study_of(document: Any) -> tuple[dict[str, Any], list[str]]:
    """(settings of the training study, notes on what was left out) for a file of the starter.

    Raises:
        UserError, UserErrors: unknown keys, values that have no counterpart here, impossible grids; one line each.
    """
    if not isinstance(document, Mapping) or not document:
        raise UserError("file", document, "a block of settings, or job_details and parameters")
    notes: list[str] = []
    if "parameters" in document or "job_details" in document:
        extra = [key for key in document if key not in ("parameters", "job_details")]
        raise_all(UserError(str(k), document[k], "only job_details and parameters at the top") for k in extra)
        points, twice = expand(document.get("parameters") or {})
        notes += [f"given more than once and run once: {_text(point)}" for point in twice]
    else:
        points = [dict(document)]
    errors: list[UserError] = []
    settings: list[Point] = []
    for point in points:
        try:
            settings.append(translated(point, notes))
        except UserError as error:
            errors.append(error)
    raise_all(errors)
    return _study(settings, notes), list(dict.fromkeys(notes))


def translated(config: Mapping[str, Any], notes: list[str]) -> Point:
    """One configuration as key paths of the training study; every setting that matters is written out."""
    errors = [_unknown(str(key), value) for key, value in config.items() if key not in DEFAULTS]
    given = DEFAULTS | {key: value for key, value in config.items() if value is not None or DEFAULTS.get(key) is None}
    silent = sorted(key for key in SILENT if config.get(key) is not None and config[key] != DEFAULTS[key])
    if silent:
        notes.append(f"left out, they do not change results here: {', '.join(silent)}")
    out: Point = {"replicates": 1}
    for part in (_data, _model, _optimizer, _schedule, _length, _rules):
        try:
            out |= part(given)
        except UserError as error:
            errors.append(error)
    raise_all(errors)
    if out.get("accumulation") and (out.get("schedule") != "constant" or out.get("schedule.warmup_steps")):
        notes.append("schedules and warm-up count optimizer steps here, not micro-batches")
    return out


def _unknown(key: str, value: Any) -> UserError:
    return UserError(key, value, "a setting of the starter", hint=nearest(key, DEFAULTS))


def _number(given: Mapping[str, Any], key: str) -> float:
    value = given[key]
    if isinstance(value, str):
        try:
            value = evaluate(value)
        except Unreadable as reason:
            hint = "a random value is {random: {low: …, high: …, n: 1}} here" if "random" in value else ""
            raise UserError(key, value, f"a number or an expression for one ({reason})", hint=hint) from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(key, given[key], "a number")
    return float(value)


def _whole(given: Mapping[str, Any], key: str) -> int:
    value = _number(given, key)
    if not value.is_integer():
        raise UserError(key, given[key], "a whole number")
    return int(value)


def _flag(given: Mapping[str, Any], key: str) -> bool:
    if not isinstance(given[key], bool):
        raise UserError(key, given[key], "true or false")
    return given[key]


def _data(given: Mapping[str, Any]) -> Point:
    out = dataset(given["dataset"], given["data_dir"]) | splits(given["data_splits_map"])
    out["batch_size"] = _whole(given, "batch_size")
    accumulation = _whole(given, "grad_accum_steps")
    if accumulation > 1:
        out["accumulation"] = accumulation
    return out


def _model(given: Mapping[str, Any]) -> Point:
    out = model(given["model"], _flag(given, "model_pretrained"))
    head = given["model_head_init"]
    if head not in (None, "rand", "zero"):
        raise UserError("model_head_init", head, "null, rand or zero")
    if head == "zero":
        out["head_init"] = "zero"
    losses = {"log": "auto", "xentropy": "auto", "square": "square", "mse": "square"}
    if given["loss"] not in losses:
        raise UserError("loss", given["loss"], "log, xentropy, square or mse")
    if losses[given["loss"]] != "auto":
        out["loss"] = losses[given["loss"]]
    return out


def _optimizer(given: Mapping[str, Any]) -> Point:
    if given["optim_alg"] not in OPTIMIZERS:
        raise UserError(
            "optim_alg",
            given["optim_alg"],
            f"one of {', '.join(OPTIMIZERS)}",
            hint=nearest(str(given["optim_alg"]), OPTIMIZERS),
        )
    name, fixed = OPTIMIZERS[given["optim_alg"]]
    own: Point = {"lr": _number(given, "base_lr"), "weight_decay": _number(given, "weight_decay"), **fixed}
    if name == "sgd":
        momentum = _number(given, "momentum")
        own |= {"momentum": momentum, "nesterov": momentum > 0}
    else:
        own |= {"betas": _betas(given), "eps": _number(given, "ada_eps")}
    out = {"optimizer": name} | {f"optimizer.{key}": value for key, value in own.items()}
    if _number(given, BIASES) != own["weight_decay"]:
        out["bias_decay"] = _number(given, BIASES)
    return out


def _betas(given: Mapping[str, Any]) -> list[float]:
    value = given["momentum"]
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    betas = [_number({"momentum": part}, "momentum") for part in parts]
    if len(betas) not in (1, 2):
        raise UserError("momentum", value, "one number or two for Adam")
    return betas if len(betas) == 2 else [*betas, 0.999]


_SCHEDULES: dict[str, Point] = {
    "constant": {},
    "cosine": {"steps": None},
    "poly": {"power": 0.5},
    "step": {"steps": None, "drops": 2},
}
_NUMBERED = re.compile(r"^(?:poly_(?P<power>[^_]+)|step_(?P<drops>\d+)_(?P<factor>[^_,]+)|"
                       r"step_(?P<parts>[^_]+,[^_]+)_(?P<by>[^_]+))$")  # fmt: skip


def _schedule(given: Mapping[str, Any]) -> Point:
    text = given["lr_schedule"]
    match = _NUMBERED.match(str(text))
    if match is None and text not in _SCHEDULES:
        raise UserError("lr_schedule", text, "constant, cosine, poly, poly_POWER, step_N_FACTOR or step_A,B,C_FACTOR")
    try:
        block: Point = dict(_SCHEDULES.get(str(text), {}))
        if match and match["power"]:
            block = {"power": float(match["power"])}
        elif match and match["drops"]:
            block = {"steps": None, "drops": int(match["drops"]), "factor": float(match["factor"])}
        elif match:
            block = {
                "steps": None,
                "parts": [float(p) for p in match["parts"].split(",")],
                "factor": float(match["by"]),
            }
    except ValueError:
        raise UserError("lr_schedule", text, "numbers after the name, such as step_3_0.1") from None
    if _whole(given, "warmup_steps"):
        block["warmup_steps"] = _whole(given, "warmup_steps")
    return {"schedule": str(text).partition("_")[0]} | {f"schedule.{key}": value for key, value in block.items()}


_UNITS = {"epoch": "epochs", "step": "steps", "sample": "samples"}


def _length(given: Mapping[str, Any]) -> Point:
    if given["train_length_unit"] not in _UNITS:
        raise UserError("train_length_unit", given["train_length_unit"], "epoch, step or sample")
    out: Point = {_UNITS[given["train_length_unit"]]: _whole(given, "train_length"), "evaluate_epochs": 1}
    for key in ("steps_per_epoch", "samples_per_epoch"):
        if given[key] is not None:
            out[key] = _whole(given, key)
    if {"steps_per_epoch", "samples_per_epoch"} <= out.keys():
        raise UserError("samples_per_epoch", given["samples_per_epoch"], "only one of it and steps_per_epoch")
    return out


def _rules(given: Mapping[str, Any]) -> Point:
    """When to stop, what to keep, averages and seeds."""
    out: Point = {"max_loss": _number(given, "max_allowed_loss")}
    if given["early_stopping_patience"] is not None:
        out["patience"] = _whole(given, "early_stopping_patience")
    if _flag(given, "save_best_checkpoint"):
        out["best_checkpoint"] = True
    if "patience" in out or "best_checkpoint" in out:
        out["watch"] = _metric(given["best_checkpoint_metric"], given["averaging"] is not None)
    for old, new in (("seed_model", "seed_model"), ("seed_training", "seed")):
        if given[old] is not None:
            out[new] = _whole(given, old)
    if given["averaging"] is not None:
        name, _, number = str(given["averaging"]).partition("_")
        if name not in AVERAGES or not number:
            raise UserError("averaging", given["averaging"], "null, poly_ETA or ema_DECAY")
        out |= {"averaging": name, f"averaging.{AVERAGES[name]}": _number({"averaging": number}, "averaging")}
    if given["device"] is not None:
        out["device"] = str(given["device"])
    return out


def _metric(pattern: Any, averaged: bool) -> str:
    found = [new for old, new in METRICS.items() if re.search(str(pattern), old) and (averaged or "/av/" not in old)]
    if not found:
        raise UserError("best_checkpoint_metric", pattern, f"a pattern that fits one of {', '.join(METRICS)}")
    return found[0]


def _study(points: Sequence[Point], notes: list[str]) -> dict[str, Any]:
    """Common settings outside, the rest as sub-grids; an option that varies takes its settings with it."""
    seen = {canonical(point): point for point in points}
    if len(seen) < len(points):
        notes.append(f"{len(points) - len(seen)} of {len(points)} configurations repeat another and are run once")
    points = list(seen.values())
    keys = list(dict.fromkeys(key for point in points for key in point))
    varying = {key for key in keys if len({canonical(p[key]) if key in p else "" for p in points}) > 1}
    rooms = [room for room in ROOMS if room in varying]
    for room in rooms:
        varying |= {key for key in keys if key.startswith(f"{room}.")}
    document: dict[str, Any] = {"study": "training"}
    for key in keys:
        if key not in varying:
            _put(document, key.split("."), points[0][key])
    if varying:
        blocks = sub_grids([{key: p[key] for key in keys if key in varying and key in p} for p in points])
        document["grid"] = written(blocks)
    return document


def _put(document: dict[str, Any], path: list[str], value: Any) -> None:
    head, *rest = path
    if rest:
        held = document.get(head)
        block = document[head] = {"name": held} if isinstance(held, str) else document.setdefault(head, {})
        block[rest[0]] = value
    else:
        document[head] = value


def _text(point: Point) -> str:
    return ", ".join(f"{key}={value}" for key, value in point.items())
