"""Does the interaction of a fault with staleness or compression remain where the fault left training alive?

``python results/crossed/ceiling.py DIR``: per optimizer, the mean difference of differences of final test loss with a
95 % normal interval over replicates, of all and of those in which no faulted run is at chance (below 0.2 accuracy).
The second is chosen after looking and corrected for nothing: it explains, it does not test.
"""

from __future__ import annotations

import sys

import numpy as np
import polars as pl

import descentlab as dl

LATE, PACKED = "timeline", "compressor"


def main(path: str) -> None:
    frame = dl.load(path).frame
    last = frame.filter(pl.col("step") == frame["step"].max())
    for optimizer in ("sgd", "adam"):
        rows = last.filter(pl.col("optimizer") == optimizer).to_dicts()
        cell = {(r["replicate"], r["fault"] != "none", r[LATE] != "barrier", r[PACKED] != "none"): r for r in rows}
        replicates = sorted({key[0] for key in cell})
        corners = [(late, packed) for late in (False, True) for packed in (False, True)]
        alive = [q for q in replicates if all(cell[q, True, *c]["test_accuracy"] > 0.2 for c in corners)]
        for name, chosen in (("all", replicates), ("alive", alive)):
            loss = np.array([[[[cell[q, f, s, c]["test_loss"] for c in (False, True)] for s in (False, True)]
                              for f in (False, True)] for q in chosen])  # fmt: skip
            excess = loss[:, 1] - loss[:, 0]  # [replicate, staleness, compression]
            for what, found in (
                ("staleness", (excess[:, 1] - excess[:, 0]).mean(1)),
                ("compression", (excess[:, :, 1] - excess[:, :, 0]).mean(1)),
            ):
                half = 1.96 * found.std(ddof=1) / len(found) ** 0.5
                print(f"{optimizer:5} {name:5} fault x {what:11} n={len(found)} {found.mean():+.4f} +- {half:.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
