"""``python replay_fault.py DIR [CASE]`` replays a planned fault of a recovery run (default CNN) in plain PyTorch."""

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F


def forward(w, x, layer, index, value):
    """The network in training mode; flat NCHW elements ``index`` of what ``layer`` computes, before the bias, set."""

    def faulty(name, out):
        return out.flatten().index_fill(0, torch.tensor(index), value).view_as(out) if name == layer else out

    for i in (1, 2, 3):
        x = faulty(f"conv{i}", F.conv2d(x, w[f"conv{i}.weight"], stride=2, padding=1))
        x = F.batch_norm(x, None, None, w[f"norm{i}.weight"], w[f"norm{i}.bias"], training=True).relu()
    return faulty("head", F.linear(x.mean((2, 3)), w["head.weight"])) + w["head.bias"]


def main(path, case=0, with_fault=True):
    """Per optimizer: stored loss of the hit batch, replayed loss, relative difference."""
    table = pl.read_parquet(path / "table.parquet", columns=["run", "step", "train_loss"])
    plan = json.loads((path / "campaign.jsonl").read_text().splitlines()[case])
    for hit in map(json.loads, (path / "hits.jsonl").read_text().splitlines()):
        if hit["case"] == case:
            (file,) = path.glob(f"blocks/*/artifacts/hit-{hit['run']}.npz")  # weights and batch just before the hit
            held = {k.removeprefix("params/"): torch.from_numpy(v) for k, v in np.load(file).items()}
            faulty = plan["layer"] if with_fault else "none", plan["index"], plan["rule"]["value"]
            loss = F.cross_entropy(forward(held, held["x"], *faulty), held["y"])
            stored = table.filter(run=hit["run"], step=hit["step"])["train_loss"].item()
            print(f"{hit['optimizer']:8} {stored:.9e} {loss:.9e} {abs(float(loss) / stored - 1):.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
