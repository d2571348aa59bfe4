"""Names of the starter's settings, their defaults, and what its datasets, models and optimizers are called here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..core.errors import UserError
from ..core.slices import check_splits
from .expression import Unreadable, evaluate

BIASES = "weight_decay_biases"
DEFAULTS: dict[str, Any] = {
    "log_interval": 10,
    "log_interval_eval": None,
    "save_freq": 0,
    "save_best_checkpoint": False,
    "best_checkpoint_metric": "test/.*/accuracy",
    "output_dir": None,
    "log_to_stdout": False,
    "device": None,
    "host_name": None,
    "multi_gpu": True,
    "num_workers": 2,
    "eval_batch_size": None,
    "max_allowed_loss": 1e6,
    "early_stopping_patience": None,
    "wandb": False,
    "wandb_project_name": None,
    "wandb_run_name": None,
    "wandb_tags": [],
    "seed_model": None,
    "seed_training": None,
    "dataset": "libsvm/a9a",
    "data_dir": "data",
    "data_download": True,
    "data_n_examples": None,
    "data_n_classes": None,
    "data_splits_map": None,
    "model": "linear/no_bias",
    "model_pretrained": False,
    "model_head_init": None,
    "model_output_dim": None,
    "model_input_shape": None,
    "loss": "log",
    "batch_size": 100,
    "train_length": 100,
    "train_length_unit": "epoch",
    "steps_per_epoch": None,
    "samples_per_epoch": None,
    "grad_accum_steps": 1,
    "batch_size_accum": None,
    "optim_alg": "sgd",
    "lr_schedule": "constant",
    "base_lr": 1.0,
    "weight_decay": 0.0,
    BIASES: 0.0,
    "momentum": 0.9,
    "ada_eps": 1e-8,
    "warmup_steps": 0,
    "averaging": None,
}

# Where results go, how they are logged, what is inferred: settings that change no result here.
SILENT = (
    "log_interval",
    "log_interval_eval",
    "save_freq",
    "output_dir",
    "log_to_stdout",
    "host_name",
    "multi_gpu",
    "num_workers",
    "eval_batch_size",
    "wandb",
    "wandb_project_name",
    "wandb_run_name",
    "wandb_tags",
    "data_download",
    "data_n_examples",
    "data_n_classes",
    "model_output_dim",
    "model_input_shape",
    "batch_size_accum",
)

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "adam": ("adam", {}),
    "adamw": ("adamw", {}),
    "amsgrad": ("amsgrad", {}),
    "amsgradw": ("adamw", {"amsgrad": True}),
}
AVERAGES = {"poly": "eta", "ema": "decay"}

# Columns of the starter's statistics -> columns of the table.
METRICS = {
    "test/last/accuracy": "test_accuracy",
    "test/last/loss": "test_loss",
    "val/last/accuracy": "validation_accuracy",
    "val/last/loss": "validation_loss",
    "train/accuracy": "train_accuracy",
    "train/loss": "train_loss",
    "test/av/accuracy": "test_accuracy_average",
    "test/av/loss": "test_loss_average",
}

LIBSVM = ("a9a", "covtype")
IMAGES = {
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "mnist": "mnist",
    "fashion_mnist": "fashion_mnist",
    "fashionmnist": "fashion_mnist",
}
MODELS: dict[str, dict[str, Any]] = {
    "linear": {"model": "linear"},
    "linear/no_bias": {"model": "linear", "model.bias": False},
    "tiny/lenet": {"model": "lenet5"},
    "tiny/resnet_18": {"model": "resnet18"},
    "tiny/resnet_34": {"model": "resnet34"},
    "tiny/resnet_50": {"model": "resnet50"},
    "tiny/resnet_101": {"model": "resnet101"},
    "tiny/resnet_152": {"model": "resnet152"},
    **{f"tiny/vgg_{depth}": {"model": f"vgg{depth}"} for depth in (11, 13, 16, 19)},
}
WRN = re.compile(r"tiny/wrn_(\d+)_(\d+)(?:_(0?\.\d+))?")  # depth, widening, dropout


def dataset(name: Any, folder: Any) -> dict[str, Any]:
    """The dataset ``libsvm/NAME`` or ``timm/…/NAME``; names without a counterpart here are files below ``data_dir``, or
    opened by timm there."""
    kind, _, rest = str(name).partition("/")
    if kind == "libsvm" and rest:
        known = rest.removesuffix(".binary")
        return {"dataset": known} if known in LIBSVM else {"dataset": "libsvm", "dataset.path": f"{folder}/{rest}"}
    last = rest.rpartition("/")[2].lower()
    if kind == "timm" and last in IMAGES:
        return {"dataset": IMAGES[last], "dataset.validation": 0}
    if kind == "timm" and rest.startswith("torch/"):
        return {"dataset": "timm", "dataset.dataset": rest, "dataset.root": str(folder)}
    expected = "libsvm/NAME or timm/torch/NAME"
    raise UserError("dataset", name, expected)


def model(name: Any, pretrained: bool) -> dict[str, Any]:
    """The model by the starter's name; ``timm/ARCHITECTURE`` needs the vision extra when it runs, not here."""
    kind, _, rest = str(name).partition("/")
    if kind == "timm" and rest:
        return {"model": "timm", "model.architecture": rest, "model.pretrained": pretrained}
    wide = WRN.fullmatch(str(name))
    if name not in MODELS and wide is None:
        raise UserError("model", name, f"one of {', '.join(MODELS)}, tiny/wrn_DEPTH_WIDEN or timm/ARCHITECTURE")
    if pretrained:
        raise UserError("model_pretrained", True, f"false for {name}, of which there are no trained weights")
    if wide is None:
        return dict(MODELS[str(name)])
    depth, widen, dropout = wide.groups()
    found: dict[str, Any] = {"model": "wrn", "model.depth": int(depth), "model.widen": int(widen)}
    return {**found, **({"model.dropout": float(dropout)} if dropout else {})}


def splits(value: Any) -> dict[str, Any]:
    """``data_splits_map`` as slices; a text is read as the dictionary it spells."""
    if isinstance(value, str):
        try:
            value = evaluate(value)
        except Unreadable as reason:
            raise UserError("data_splits_map", value, f"a dictionary ({reason})") from None
    if value is None:
        return {}
    names = {"train": "train", "test": "test", "val": "validation", "validation": "validation"}
    if not isinstance(value, Mapping) or set(value) - set(names) or "train" not in value:
        raise UserError("data_splits_map", value, "train: SLICE and test or val: SLICE")
    out = {f"splits.{names[str(k)]}": str(v) for k, v in value.items() if v is not None and v != k}
    try:
        check_splits(v for v in out.values())
    except ValueError as reason:
        raise UserError("data_splits_map", value, str(reason)) from None
    return out
