"""The job the store's tests run: one block of two runs whose every value depends on all earlier steps."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch

from descentlab.store import BlockWriter, RunDirectory, refresh

RUNS = [
    {
        "id": "a0",
        "cell": 0,
        "replicate": 0,
        "role": "twin",
        "labels": {"case": 0},
        "settings": {"optimizer": {"name": "sgd", "lr": 0.1}, "batch_size": 64},
    },
    {
        "id": "a1",
        "cell": 1,
        "replicate": 0,
        "role": "fault",
        "labels": {"case": 0},
        "settings": {"optimizer": {"name": "adam", "lr": 0.01}, "batch_size": 64},
    },
]
CAMPAIGN = [{"case": 0, "replicate": 0, "step": 3, "layer": "conv1", "rule": {"kind": "value", "value": math.inf}}]
STEPS, EVERY = 7, 2


def new_directory(path: Path) -> RunDirectory:
    directory = RunDirectory.create(path, "recovery", "study: recovery\n")
    directory.replace_jsonl("resolved.jsonl", RUNS)
    directory.replace_jsonl("campaign.jsonl", CAMPAIGN)
    return directory


def train(directory: RunDirectory, key: str = "b0", stop: int = STEPS) -> None:
    """A block whose every value depends on all earlier steps, so that a wrong resume shows in the table."""
    block = BlockWriter(directory, key, runs=["a0", "a1"], steps=STEPS)
    if block.is_done:
        return
    found = block.resume()
    state, start = found or ({"w": torch.zeros(2, dtype=torch.float64)}, 0)
    for step in range(start, stop):
        state["w"] = state["w"] * 0.9 + (step + 1)
        loss = state["w"].numpy() + np.array([0.0, math.nan if step == 3 else 1.0])
        bn = [None, float(step)]
        block.rows(
            {
                "run": ["a0", "a1"],
                "step": [step, step],
                "attempt": [0, 0],
                "train_loss": loss,
                "bn": bn,
                "wall_s": [os.times().elapsed] * 2,
            }
        )
        if step == 3:
            block.hits(
                [
                    {
                        "case": 0,
                        "run": "a1",
                        "optimizer": "adam",
                        "step": 3,
                        "index": [5],
                        "old": [0.5],
                        "new": [-math.inf],
                    }
                ]
            )
        if (step + 1) % EVERY == 0:
            block.checkpoint(state, step + 1)
    if stop == STEPS:
        block.finish(
            [
                {"run": "a0", "status": "done", "steps": STEPS},
                {"run": "a1", "status": "diverged", "steps": STEPS, "diverged_step": 3},
            ]
        )


def whole_job(path: Path) -> None:
    train(new_directory(path))
    refresh(RunDirectory.open(path))
