"""The study's questions as presets: one grid each, whose report pairs what differs, over seeds.

Each is small enough for two cores (200 runs of 600 steps around each of five theta*); ``runs=``, ``seed=`` and
``reference.sgd.epochs=`` enlarge it.
"""

from __future__ import annotations

from typing import Any

SEEDS = [0, 1, 2, 3, 4]
BASE: dict[str, Any] = {
    "runs": 200,
    "optimizer": {"name": "sgd", "lr": 0.05},
    "sampler": "replacement",
    "reference": {"sgd": {"epochs": 200}, "gd": {"steps": 1000}},
    "hessians": {"steps": 200, "every": 100},
    "cloud": {"steps": 600, "looks": 30},
    "theory": {"closure": "linear"},
    "observe": {"reduce": "moments", "every": 10},
}
TEXT: dict[str, Any] = {
    "dataset": "tinyshakespeare",
    "reference": {"sgd": {"lr": 0.5, "epochs": 100}, "gd": {"lr": 0.1, "steps": 300}},
    "hessians": {"steps": 100, "every": 100},
}
CNN: dict[str, Any] = {  # a convolution's step takes a hundred times that of the small network
    "runs": 60,
    "reference": {"sgd": {"epochs": 30}, "gd": {"steps": 100}},
    "cloud": {"steps": 120, "looks": 12},
    "hessians": {"steps": 1, "every": 1},
}


def _question(grid: Any, **more: Any) -> dict[str, Any]:
    return {**BASE, **more, "grid": grid}


QUESTIONS: dict[str, dict[str, Any]] = {
    "question-loader": _question({"seed": SEEDS, "sampler": ["replacement", "shuffle"]}),
    "question-precision": _question({"seed": SEEDS, "dtype": ["float64", "float32"]}),
    "question-data": _question({"seed": SEEDS, "dataset": ["mnist5k", "mnist_similar"]}),
    "question-model": _question({"seed": SEEDS, "model": ["mlp", "flexible_cnn"]}, **CNN),
    "question-batch": _question({"seed": SEEDS, "batch_size": [64, 32, 128]}),
    "question-language": _question(
        [
            {"seed": SEEDS, "dataset": "mnist5k", "model": "mlp"},
            {
                **{"seed": SEEDS, "dataset": "tinyshakespeare", "model": "nanogpt"},
                **{"reference.sgd.lr": 0.5, "reference.sgd.epochs": 100, "reference.gd.steps": 300},
            },
        ]
    ),
    "question-text-size": _question(
        {"seed": SEEDS, "model.width": [8, 4, 16]},
        **TEXT,
        model={"name": "nanogpt", "hidden": 0},
        runs=100,
    ),
}
