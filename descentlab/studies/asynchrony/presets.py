"""Presets of the asynchrony study: its own default, the published scripts, and the published recommendations."""

from __future__ import annotations

from typing import Any

TUNED: dict[str, dict[str, Any]] = {"sgd": {"lr": 0.05, "momentum": 0.9}, "adam": {"lr": 1e-3}}
SLOW = {"name": "gaussian", "level": "small", "slow_factor": 2.0, "only_slow": True}

DEFAULT: dict[str, Any] = {
    "optimizer": {"name": "sgd", "lr": 0.05},
    "model": {"name": "mlp", "hidden": [32], "pool": 14},
    "cost": {"compute_s": 0.005},
    "observe": {"every": 5, "evaluate_every": 50},
    "grid": {
        "optimizer.momentum": [0.0, 0.9],
        "list": [
            {"workers": [1], "timeline": ["barrier"]},
            {"timeline": ["barrier", "asynchronous"], "partition": ["sample", "label"]},
            {"delay": [SLOW], "partition": ["sample", "label"]},
        ],
    },
}

PRESETS: dict[str, dict[str, Any]] = {"default": DEFAULT}

SIZES: dict[str, dict[str, Any]] = {
    "quick": {"replicates": 3, "steps": 100, "observe": {"every": 5, "evaluate_every": 25}},
    "default": {},
    "full": {"replicates": 40},
}
