"""Replays one planned fault of a finished recovery run in plain PyTorch and compares the loss of the hit batch.

    descentlab run recovery --out DIR && python examples/replay_fault.py DIR [CASE] [--without-fault]

Reads the plan (campaign.jsonl), which runs met it (hits.jsonl) and, per run, the weights, buffers and batch stored
just before the hit; knows the default CNN and nothing else of descentlab. Prints per optimizer: its name, the stored
loss, the replayed loss, their relative difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor


def forward(w: dict[str, Tensor], x: Tensor, layer: str, index: list[int], value: float) -> Tensor:
    """The CNN in training mode; elements ``index`` (flat, NCHW) of what ``layer`` computes, before the bias, set."""

    def faulty(name: str, out: Tensor) -> Tensor:
        return out.flatten().index_fill(0, torch.tensor(index), value).view_as(out) if name == layer else out

    for i in (1, 2, 3):
        x = faulty(f"conv{i}", F.conv2d(x, w[f"conv{i}.weight"], stride=2, padding=1))
        x = F.batch_norm(x, None, None, w[f"norm{i}.weight"], w[f"norm{i}.bias"], training=True).relu()
    return faulty("head", F.linear(x.mean((2, 3)), w["head.weight"])) + w["head.bias"]


def replay(path: Path, run: str, plan: dict, with_fault: bool) -> float:
    """Loss of the hit batch, in nats, from the weights before the hit."""
    (file,) = path.glob(f"blocks/*/artifacts/hit-{run}.npz")
    stored = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    weights = {name.removeprefix("params/"): t for name, t in stored.items() if name.startswith("params/")}
    layer = plan["layer"] if with_fault else "none"
    output = forward(weights, stored["x"], layer, plan["index"], plan["rule"]["value"])
    return float(F.cross_entropy(output, stored["y"]))


def lines(path: Path) -> list[dict]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(path: Path, case: int = 0, with_fault: bool = True) -> None:
    """All optimizers of one case."""
    table = pl.read_parquet(path / "table.parquet", columns=["run", "step", "train_loss"])
    plans = {plan["case"]: plan for plan in lines(path / "campaign.jsonl")}
    for hit in lines(path / "hits.jsonl"):
        if hit["case"] == case:
            loss = table.filter(run=hit["run"], step=hit["step"])["train_loss"].item()
            again = replay(path, hit["run"], plans[case], with_fault)
            print(f"{hit['optimizer']:8} {loss:.9e} {again:.9e} {abs(again - loss) / abs(loss):.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = [word for word in sys.argv[1:] if word != "--without-fault"]
    main(Path(words[0]), int(words[1]) if len(words) > 1 else 0, len(words) == len(sys.argv) - 1)
