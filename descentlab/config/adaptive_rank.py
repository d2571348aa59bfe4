"""Settings files of the adaptive-rank PowerSGD program as files of the compression study (docs/howto-compression.md).

Keys that program never reads are errors here, by name: a file that sets them says something that never happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import UserError, nearest, raise_all

DEAD = (
    "accordion.ema_beta",
    "accordion.critical_factor",
    "accordion.relaxed_factor",
    "accordion.update_interval",
    "compression.enable_stage_adjust",
)
SILENT = (  # read by that program, without a meaning here
    *("save_dir", "results_csv", "benchmark_save_dir", "powerSGD.orthogonalization_epsilon", "powerSGD.random_seed"),
    *("powerSGD.compression_stats_logging_frequency", "powerSGD.batch_tensors_with_same_shape"),
    *("compression.calibration.save_dir", "compression.calibration.csv_name", "compression.calibration.max_batches"),
    *("compression.calibration.force_start_iter", "network_limits.auto_cleanup", "network_limits.interface"),
    "network_limits.target_ip",
)
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys((*DEAD, *SILENT)),
    "seed": 42,
    "model.name": None,
    "model.num_classes": None,
    "model.pretrained": False,
    "dataset.name": None,
    "dataset.batch_size": None,
    "training.epochs": None,
    "training.learning_rate": None,
    "training.momentum": 0.9,
    "training.weight_decay": 1e-4,
    "training.nesterov": False,
    "training.scheduler": "none",
    "training.step_size": 30,
    "training.gamma": 0.1,
    "training.milestones": [150, 250],
    "training.warmup_epochs": 0,
    "training.warmup_start_lr": 0.0,
    "training.warmup_min_factor": 1e-8,
    "powerSGD.use_error_feedback": True,
    "powerSGD.warm_start": True,
    "powerSGD.min_compression_rate": 2,
    "powerSGD.matrix_approximation_rank": 1,
    "powerSGD.start_power_iterations": 100,
    "compression.enable_powerSGD": True,
    "compression.start_power_iterations": None,
    "compression.min_rank": 1,
    "compression.max_rank": None,
    "compression.base_rank": None,
    "compression.use_fixed_rank": False,
    "compression.fixed_rank_value": None,
    "compression.rank_schedule.default_rank": 1,
    "compression.rank_schedule.ranges": None,
    "compression.enable_adaptive_sync": False,
    "compression.calibration.enable": False,
    "compression.calibration.warmup_iters": 5,
    "compression.calibration.measure_iters": 20,
    "compression.calibration.ranks": list(range(1, 11)),
    "compression.calibration.comm_ratio_threshold": 0.3,
    "compression.calibration.use_fixed_rank_after_calibration": True,
    "accordion.enable": False,
    "adaptive_training.enable": False,
    "adaptive_training.stages": [],
    "network_limits.enable": False,
    "network_limits.bandwidth_mbps": 0,
    "network_limits.egress_mbps": None,
    "network_limits.ingress_mbps": None,
    "network_limits.latency_ms": 0,
    "network_limits.jitter_ms": 0,
    "network_limits.loss_pct": 0,
}
SAMPLES = {"mnist": 60_000, "cifar": 50_000, "cifar100": 50_000}  # of the training sets
NAMES = {"mnist": "mnist", "cifar": "cifar10", "cifar100": "cifar100"}
WORKERS = 2  # that program is started once on each of two hosts


def is_adaptive_rank(document: Any) -> bool:
    """Whether a file is one of that program's."""
    return isinstance(document, Mapping) and bool({"powerSGD", "compression"} & set(document))


def study_of(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(settings of the compression study, notes on what was left out or is done otherwise).

    Raises:
        UserError, UserErrors: unknown and dead keys, values that have no counterpart here; one line each.
    """
    given = _flat(document)
    raise_all(_key_errors(given))
    v = DEFAULTS | {key: value for key, value in given.items() if value is not None}
    raise_all(_value_errors(v))
    notes = [f"left out, it does not change results here: {key}" for key in SILENT if given.get(key) is not None]
    per_epoch = SAMPLES[v["dataset.name"]] // v["dataset.batch_size"] // WORKERS
    settings = {
        "study": "compression",
        "seed": v["seed"],
        "engine": "process",
        "workers": WORKERS,
        "replicates": 1,
        "dataset": NAMES[v["dataset.name"]],
        "model": v["model.name"],
        "batch_size": v["dataset.batch_size"],
        "steps": v["training.epochs"] * per_epoch,
        "optimizer": {
            "name": "sgd",
            "lr": v["training.learning_rate"],
            **{key: v[f"training.{key}"] for key in ("momentum", "weight_decay", "nesterov")},
        },
        "schedule": _schedule(v, per_epoch, notes),
        "compressor": _compressor(v, notes),
        "link": _link(v),
        "observe": {"evaluate_every": per_epoch},
    }
    return settings, notes


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= _flat(value, f"{path}.")
        else:
            out[path] = value
    return out


def _key_errors(given: Mapping[str, Any]) -> list[UserError]:
    errors = []
    for key, value in given.items():
        if key in DEAD:
            errors.append(UserError(key, value, "no such key: the program never read it, so it never did anything"))
        elif key not in DEFAULTS:
            errors.append(UserError(key, value, "a key of that program", hint=nearest(key, list(DEFAULTS))))
    return errors


def _value_errors(v: Mapping[str, Any]) -> list[UserError]:
    errors = []
    needed = ("model.name", "dataset.name", "dataset.batch_size", "training.epochs", "training.learning_rate")
    errors += [UserError(key, None, "a value; the program has no default") for key in needed if v[key] is None]
    allowed = {
        "model.name": ("resnet18", "resnet34", "resnet50"),
        "dataset.name": tuple(SAMPLES),
        "training.scheduler": ("step", "multistep", "cosine", "none"),
    }
    errors += [
        UserError(key, v[key], f"one of {', '.join(values)}")
        for key, values in allowed.items()
        if v[key] is not None and v[key] not in values
    ]
    for key in ("model.pretrained", "compression.enable_adaptive_sync"):
        if v[key]:
            errors.append(UserError(key, True, "false: there is no such thing here"))
    return errors


def _schedule(v: Mapping[str, Any], per_epoch: int, notes: list[str]) -> dict[str, Any]:
    """Its milestones count from the end of the warm-up, so they come that much later."""
    warm = v["training.warmup_epochs"]
    own: dict[str, Any] = {"warmup_steps": warm * per_epoch} if warm else {}
    if warm and v["training.warmup_start_lr"]:
        notes.append("the warm-up starts at one step's share of the rate, not at training.warmup_start_lr")
    kind, epochs = v["training.scheduler"], v["training.epochs"]
    if kind == "none":
        return {"name": "constant", **own}
    if kind == "cosine":
        return {"name": "cosine", "steps": epochs * per_epoch, **own}
    step = v["training.step_size"]
    at = v["training.milestones"] if kind == "multistep" else list(range(step, epochs, step))
    if warm:
        notes.append(f"drops come {warm} epochs after training.milestones: that program counts from the warm-up's end")
    milestones = [(epoch + warm) * per_epoch for epoch in at]
    return {"name": "multistep", "milestones": milestones, "factor": v["training.gamma"], **own}


def _compressor(v: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    if not v["compression.enable_powerSGD"]:
        return {"name": "none"}
    start = v["compression.start_power_iterations"]
    out = {
        "name": "powersgd",
        "min_compression_rate": v["powerSGD.min_compression_rate"],
        "start_iteration": v["powerSGD.start_power_iterations"] if start is None else start,
        "error_feedback": v["powerSGD.use_error_feedback"],
        "warm_start": v["powerSGD.warm_start"],
    }
    base = v["compression.base_rank"] or v["powerSGD.matrix_approximation_rank"]
    low, high = v["compression.min_rank"], v["compression.max_rank"] or max(8, base)
    if v["compression.use_fixed_rank"]:
        return {**out, "rank": max(low, min(high, v["compression.fixed_rank_value"] or base))}
    if v["compression.rank_schedule.ranges"]:
        notes.append("ranks change where compression.rank_schedule says, not one epoch later")
        return {
            **out,
            "policy": _ranges(v["compression.rank_schedule.ranges"], v["compression.rank_schedule.default_rank"]),
        }
    accordion = {"name": "accordion", "low": low, "high": high}
    if v["accordion.enable"]:
        notes.append("accordion acts on the real drop of the learning rate, not on training.milestones")
    if v["compression.calibration.enable"]:
        keep = v["compression.calibration.use_fixed_rank_after_calibration"] or not v["accordion.enable"]
        calibration = {
            "name": "calibration",
            "candidates": sorted(set(v["compression.calibration.ranks"])),
            **{k: v[f"compression.calibration.{k}"] for k in ("comm_ratio_threshold", "warmup_iters", "measure_iters")},
            "then": "fixed" if keep else "accordion",
        }
        return {**out, "policy": calibration if keep else {**calibration, "accordion": accordion}}
    return {**out, "policy": accordion} if v["accordion.enable"] else {**out, "rank": base}


def _ranges(ranges: list[Mapping[str, int]], default: int) -> dict[str, Any]:
    """Ranges of epochs, both ends included, as a schedule; the default before, between and after them."""
    ranks: list[int] = [default]
    steps: list[int] = []
    for one in sorted(ranges, key=lambda r: r["start_epoch"]):
        if steps and steps[-1] == one["start_epoch"]:
            ranks[-1] = one["rank"]
        elif one["start_epoch"] == 0:
            ranks[0] = one["rank"]
        else:
            steps.append(one["start_epoch"])
            ranks.append(one["rank"])
        steps.append(one["end_epoch"] + 1)
        ranks.append(default)
    return {"name": "schedule", "unit": "epoch", "ranks": ranks, "steps": steps}


def _link(v: Mapping[str, Any]) -> dict[str, Any]:
    if not v["network_limits.enable"]:
        return {"name": "none"}
    egress = v["network_limits.egress_mbps"]
    egress = v["network_limits.bandwidth_mbps"] if egress is None else egress
    ingress = v["network_limits.ingress_mbps"]
    rest = {key: v[f"network_limits.{key}"] for key in ("latency_ms", "jitter_ms", "loss_pct")}
    return {"name": "real", "bandwidth_mbps": egress, "ingress_mbps": egress if ingress is None else ingress, **rest}
