"""The published set-ups as data: files with the keys of the published ``config.sh``, translated into settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.yaml12 import load_file
from ...core.errors import UserError, nearest

FOLDER = Path(__file__).with_name("setups")
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp"},
    "cnn": {"name": "flexible_cnn"},
    "nanogpt": {"name": "nanogpt"},
}
REQUIRED = (
    *("DATASET_TRAIN", "DATASET_VAL", "MODEL", "BATCH_SIZE", "LR", "EPOCHS_SGD", "EPOCHS_GD", "SEED", "DATALOADER"),
    *("HESSIAN_STEPS", "MANY_RUNS_SAMPLES", "MANY_RUNS_STEPS", "LRS_LIST", "GD_SCALING", "DTYPE", "DEVICE"),
)
OPTIONAL = ("SAMPLE_SIZE", "NOTE")


def settings(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings a published set-up stands for.

    Raises:
        UserError: for a key that is missing, unknown or has an impossible value; ``where`` names the file.
    """
    image = document.get("DATASET_TRAIN") != "shakespeare"
    required = (*REQUIRED, *(("SAMPLE_SIZE",) if image else ()))
    for key in required:
        if key not in document:
            raise UserError(where, key, f"a set-up with all of {', '.join(required)}; this key is missing")
    for key in document:
        if key not in (*required, *OPTIONAL):
            raise UserError(where, key, "only keys of a set-up", hint=nearest(key, required))
    rate = float(_value(document, where, "LR", (int, float)))
    loader = _one_of(document, where, "DATALOADER", {"default": "shuffle", "replacement": "replacement"})
    first = loader if not image else "shuffle"  # the image pipeline ignored DATALOADER in its first stage
    return {
        "seed": document["SEED"],
        "device": document["DEVICE"],
        "dtype": _one_of(document, where, "DTYPE", {"float32": "float32", "float64": "float64"}),
        "dataset": _dataset(document, where),
        "model": _one_of(document, where, "MODEL", MODELS),
        "batch_size": document["BATCH_SIZE"],
        "sampler": loader,
        "reference": {
            "sgd": {"lr": rate, "epochs": document["EPOCHS_SGD"], "sampler": first},
            "gd": {"lr": rate, "steps": document["EPOCHS_GD"]},
        },
        "hessians": {"steps": document["HESSIAN_STEPS"], "every": 1},
        # weights were stored before each update: 1111 stored states are 1110 updates
        "cloud": {"steps": document["MANY_RUNS_STEPS"] - 1},
        "control": {"scaling": _one_of(document, where, "GD_SCALING", {"default": "default", "N/B": "B/N"})},
        "theory": {"closure": "gaussian" if document["MODEL"] == "mlp" else "linear"},
        "runs": document["MANY_RUNS_SAMPLES"],
        "observe": {"reduce": "moments", "every": 10},
        "grid": {"optimizer.lr": list(document["LRS_LIST"])},
    }


def _dataset(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    name = document["DATASET_TRAIN"]
    if name == "shakespeare":
        return {"name": "tinyshakespeare"}
    known = {"mnist": "mnist", "mnist_similar": "mnist_similar"}
    if _one_of(document, where, "DATASET_TRAIN", known) == "mnist":
        return {"name": "mnist", "train": document["SAMPLE_SIZE"], "validation": 0, "test": document["SAMPLE_SIZE"]}
    return {"name": "mnist_similar", "n": document["SAMPLE_SIZE"]}


def _value(document: Mapping[str, Any], where: str, key: str, types: tuple[type, ...]) -> Any:
    value = document[key]
    if not isinstance(value, types) or isinstance(value, bool):
        raise UserError(f"{where}: {key}", value, "a number")
    return value


def _one_of(document: Mapping[str, Any], where: str, key: str, known: Mapping[str, Any]) -> Any:
    value = document[key]
    if value not in known:
        raise UserError(f"{where}: {key}", value, f"one of {', '.join(known)}", hint=nearest(str(value), known))
    return known[value]


def presets() -> dict[str, dict[str, Any]]:
    """Every shipped set-up by name (``exp1-1`` …), validated."""
    return {path.stem: settings(load_file(path), path.name) for path in sorted(FOLDER.glob("*.yaml"))}
