"""Presets of the asynchrony study: its own, the published scripts, and the published recommendations.

The published programs count a server among the processes: their world size is one more than ``workers`` here. Without a
partition each of their workers makes ``epochs`` passes over everything; here ``epochs`` are passes all workers make
together, so that conditions are compared at equal numbers of samples.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

TUNED: dict[str, Settings] = {"sgd": {"lr": 0.05, "momentum": 0.9}, "adam": {"lr": 1e-3}}


def only_slow(law: str, level: str) -> Settings:
    """Worker 0 has twice the delay, the others have none."""
    return {"name": law, "level": level, "slow_factor": 2.0, "only_slow": True}


LEVELS = ("small", "medium", "long")
PUBLISHED: Settings = {
    "dataset": "fashion_mnist",
    "model": "lenet5",
    "optimizer": {"name": "sgd", "lr": 0.005, "momentum": 0.9},
    "batch_size": 32,
    "epochs": 6,
    "cost": {"compute_s": 0.005},
    "observe": {"every": 25, "evaluate_every": 500},
    "evaluate_on": ["validation", "test"],
}
CONSTANT_ALL = [{"name": "constant", "level": level} for level in LEVELS]
CONSTANT_SLOW = [only_slow("constant", level) for level in LEVELS]
GAUSSIAN_ALL = [{"name": "gaussian", "level": level} for level in LEVELS]
NO_DELAY: Settings = {"name": "gaussian", "mean_s": 0.0, "std_s": 0.001}  # a millisecond of jitter
BOTH_SPLITS = ["sample", "label"]
SOME_WORKERS = [2, 5, 10]
MOMENTA = [0.0, 0.5, 0.9, 0.99]

DEFAULT: Settings = {
    "optimizer": {"name": "sgd", "lr": 0.05},
    "model": {"name": "mlp", "hidden": [32], "pool": 14},
    "cost": {"compute_s": 0.005},
    "observe": {"every": 5, "evaluate_every": 50},
    "grid": {
        "optimizer.momentum": [0.0, 0.9],
        "list": [
            {"workers": [1], "timeline": ["barrier"]},
            {"timeline": ["barrier", "asynchronous"], "partition": BOTH_SPLITS},
            {"delay": [only_slow("gaussian", "small")], "partition": BOTH_SPLITS},
        ],
    },
}


SGD: Settings = PUBLISHED["optimizer"]
ADAM: Settings = {"name": "adam", "lr": 0.001}
SCRIPTS: dict[str, Settings] = {  # one preset per published script
    "speed": {
        **PUBLISHED,
        "delay": NO_DELAY,
        "grid": {
            "model": ["lenet5", "cnn1"],
            "list": [
                {"workers": [1], "timeline": ["barrier"]},
                {
                    "timeline": ["barrier", "asynchronous"],
                    "partition": ["shared", *BOTH_SPLITS],
                    "workers": SOME_WORKERS,
                },
            ],
        },
    },
    "delay": {
        **PUBLISHED,
        "grid": {"delay": [*CONSTANT_ALL, *CONSTANT_SLOW], "partition": BOTH_SPLITS, "workers": SOME_WORKERS},
    },
    "momentum": {
        **PUBLISHED,
        "partition": "label",
        "grid": {"delay": CONSTANT_SLOW, "optimizer.momentum": MOMENTA, "workers": SOME_WORKERS},
    },
    "compensation": {
        **PUBLISHED,
        "partition": "label",
        "grid": {
            "delay": CONSTANT_SLOW,
            "staleness_rule": ["none", *({"name": "compensation", "lam": lam} for lam in (2.0, 5.0))],
            "workers": SOME_WORKERS,
        },
    },
    "gaussian": {
        **PUBLISHED,
        "grid": {
            "delay": GAUSSIAN_ALL,
            "staleness_rule": ["none", {"name": "compensation", "lam": 2.0}],
            "partition": BOTH_SPLITS,
            "optimizer.momentum": MOMENTA,
            "workers": SOME_WORKERS,
        },
    },
    "optimizers": {
        **{k: v for k, v in PUBLISHED.items() if k != "optimizer"},
        "workers": 5,
        "delay": NO_DELAY,
        "grid": {
            "partition": ["shared", *BOTH_SPLITS],
            "list": [
                {
                    "optimizer": [
                        {**SGD, "momentum": 0.0},
                        SGD,
                        {"name": "adam", "lr": 0.01, "betas": [0.99, 0.999]},
                        ADAM,
                    ]
                },
                {
                    "model": ["cnn1"],
                    "optimizer": [
                        {**SGD, "lr": 0.001, "momentum": 0.0},
                        {**SGD, "lr": 0.001},
                        {**ADAM, "lr": 0.0005},
                    ],
                },
            ],
        },
    },
}


# data set, model, optimizer, rate, batch size, epochs
RECOMMENDED = (
    ("mnist", "lenet5", "sgd", 0.01, 64, 6),
    ("mnist", "lenet5", "adam", 0.001, 64, 6),
    ("fashion_mnist", "lenet5", "sgd", 0.005, 32, 6),
    ("fashion_mnist", "lenet5", "adam", 0.001, 32, 6),
    ("fashion_mnist", "cnn1", "sgd", 0.01, 64, 4),
    ("fashion_mnist", "cnn1", "adam", 0.0005, 32, 4),
    ("cifar10", "resnet18", "sgd", 0.005, 32, 3),
    ("cifar10", "resnet18", "adam", 0.0005, 64, 3),
    ("cifar10", "cnn2", "sgd", 0.01, 64, 6),
    ("cifar100", "resnet18", "sgd", 0.005, 64, 3),
    ("cifar100", "resnet18", "adam", 0.0005, 128, 3),
)


def recommended() -> dict[str, Settings]:
    """The eleven settings the published document recommends; ``recommended_fashion_mnist_lenet5_sgd`` and so on."""
    out = {}
    for data, model, name, lr, batch_size, epochs in RECOMMENDED:
        optimizer = {"name": name, "lr": lr, **({"momentum": 0.9} if name == "sgd" else {})}
        out[f"recommended_{data}_{model}_{name}"] = {
            "dataset": data,
            "model": model,
            "optimizer": optimizer,
            "batch_size": batch_size,
            "epochs": epochs,
            "observe": {"every": 25, "evaluate_every": 500},
            "evaluate_on": ["validation", "test"],
            "grid": {"timeline": ["barrier", "asynchronous"]},
        }
    return out


CLAIMS: Settings = {  # what of the published claims holds at equal numbers of updates: docs/findings/asynchrony.md
    **{k: v for k, v in PUBLISHED.items() if k != "epochs"},
    "dataset": "mnist5k",
    "steps": 720,
    "observe": {"every": 20, "evaluate_every": 240},
    "evaluate_on": ["test"],
    "grid": {
        "list": [
            {"workers": [1], "timeline": ["barrier"]},
            {"workers": [2], "timeline": ["barrier", "asynchronous"], "partition": ["sample"], "delay": [NO_DELAY]},
            {"workers": [10], "timeline": ["barrier"], "partition": BOTH_SPLITS, "delay": [NO_DELAY]},
            {"workers": [10], "partition": BOTH_SPLITS, "delay": [NO_DELAY]},
            {"workers": [2, 5], "optimizer.momentum": [0.99], "partition": ["sample"], "delay": [NO_DELAY]},
            {
                "workers": [5],
                "partition": ["label"],
                "delay": [only_slow("constant", "small")],
                "staleness_rule": ["none", *({"name": "compensation", "lam": lam} for lam in (0.04, 2.0))],
            },
        ]
    },
}

BARE: Settings = {k: v for k, v in DEFAULT.items() if k != "grid"}  # one condition, to build a grid of one's own on

PRESETS: dict[str, Settings] = {"default": DEFAULT, "bare": BARE, **SCRIPTS, **recommended(), "claims": CLAIMS}

SIZES: dict[str, Settings] = {
    "quick": {"replicates": 3, "steps": 60, "observe": {"every": 5, "evaluate_every": 20}},
    "default": {},
    "full": {"replicates": 40},
}
