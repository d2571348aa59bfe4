"""Which published claims hold, from finished runs: python results/asynchrony/claims.py mlp=DIR lenet5=DIR [--out DIR]

Each claim is one paired difference per replicate with its 95 % interval and Holm's correction over the claims of a
model. ``held``: the difference has the claimed sign and stands out; ``not``: it stands out with the other sign;
``within noise``: it does not stand out. For claims of no difference: ``held`` where the interval lies within 2 points.
Writes claims.csv, and one figure.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from descentlab.analysis.contrasts import HIGHER, LOWER, Contrast, analyse
from descentlab.report.figures import Dot, interval_plot
from descentlab.store import load
from descentlab.studies.asynchrony.outcomes import Cell, Outcomes, outcomes

EQUAL = 2.0  # points within which two accuracies count as the same


def cell(found: Outcomes, **wanted: object) -> Cell | None:
    """The cell with these settings (timeline, partition, workers, momentum, lam; lam None: no rule)."""
    for candidate in found.cells:
        s = candidate.settings
        own = {
            "timeline": s["timeline"]["name"],
            "partition": s["partition"]["name"],
            "workers": s["workers"],
            "momentum": s["optimizer"]["momentum"],
            "lam": s["staleness_rule"].get("lam"),
        }
        if all(own[key] == value for key, value in wanted.items()) and found.ended(candidate):
            return candidate
    return None


def difference(found: Outcomes, *signed: tuple[float, Cell | None]) -> np.ndarray | None:
    """Sum of sign x accuracy in points over the replicates that ended in all cells; None without one of them."""
    cells = [c for _, c in signed if c is not None]
    if len(cells) < len(signed):
        return None
    replicates = found.ended(*cells)
    if len(replicates) < 2:
        return None
    return np.sum([100 * sign * found.accuracy(c, replicates) for sign, c in signed if c is not None], axis=0)


def claims(found: Outcomes) -> list[tuple[str, str, np.ndarray | None]]:
    """(claim, claimed sign: + - or 0, differences in points)."""
    sync2 = cell(found, timeline="barrier", workers=2, partition="sample", momentum=0.9)
    async2 = cell(found, timeline="asynchronous", workers=2, partition="sample", momentum=0.9)
    fast2 = cell(found, timeline="asynchronous", workers=2, partition="sample", momentum=0.99)
    fast5 = cell(found, timeline="asynchronous", workers=5, partition="sample", momentum=0.99)
    labels10 = cell(found, timeline="asynchronous", workers=10, partition="label", momentum=0.9)
    samples10 = cell(found, timeline="asynchronous", workers=10, partition="sample", momentum=0.9)
    wait_labels10 = cell(found, timeline="barrier", workers=10, partition="label", momentum=0.9)
    wait_samples10 = cell(found, timeline="barrier", workers=10, partition="sample", momentum=0.9)
    slow = cell(found, timeline="asynchronous", workers=5, partition="label", momentum=0.9, lam=None)
    two = cell(found, timeline="asynchronous", workers=5, partition="label", momentum=0.9, lam=2.0)
    usual = cell(found, timeline="asynchronous", workers=5, partition="label", momentum=0.9, lam=0.04)
    single = cell(found, workers=1, momentum=0.9)
    return [
        (
            "1: 2 workers, split by sample: asynchronous as synchronous",
            "0",
            difference(found, (1, async2), (-1, sync2)),
        ),
        ("1: 2 asynchronous workers as a single process", "0", difference(found, (1, async2), (-1, single))),
        (
            "2: 10 workers: labels cost nothing behind a barrier",
            "0",
            difference(found, (1, wait_labels10), (-1, wait_samples10)),
        ),
        ("2: 10 workers: labels cost accuracy without waiting", "-", difference(found, (1, labels10), (-1, samples10))),
        (
            "2: 10 workers: labels cost more without waiting",
            "-",
            difference(found, (1, labels10), (-1, samples10), (-1, wait_labels10), (1, wait_samples10)),
        ),
        (
            "2: 10 workers, labels: asynchronous below synchronous",
            "-",
            difference(found, (1, labels10), (-1, wait_labels10)),
        ),
        ("3: momentum .99 fails at 2 workers (against .9)", "-", difference(found, (1, fast2), (-1, async2))),
        ("3: momentum .99 is worse at 5 workers than at 2", "-", difference(found, (1, fast5), (-1, fast2))),
        ("Table IV: compensation, lambda 2: +7 points", "+", difference(found, (1, two), (-1, slow))),
        ("Table IV: compensation, lambda .04", "+", difference(found, (1, usual), (-1, slow))),
    ]


def verdict(claimed: str, found: str, low: float | None, high: float | None) -> str:
    """The word of the issue."""
    if claimed == "0":
        inside = low is not None and high is not None and low > -EQUAL and high < EQUAL
        return "held" if inside else "not" if found in (LOWER, HIGHER) else "within noise"
    if found not in (LOWER, HIGHER):
        return "within noise"
    return "held" if (found == HIGHER) == (claimed == "+") else "not"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+", metavar="MODEL=DIR")
    options.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = options.parse_args()
    rows, dots = [], []
    for word in given.runs:
        model, _, folder = word.partition("=")
        made = [c for c in claims(outcomes(load(folder))) if c[2] is not None]
        tested = analyse([Contrast(name, values, "points") for name, _, values in made])
        for (name, claimed, _), r in zip(made, tested, strict=True):
            e = r.estimate
            word = verdict(claimed, r.verdict, e.low, e.high)
            rows.append([model, name, claimed, e.n, f"{e.value:.2f}", f"{e.low:.2f}", f"{e.high:.2f}", r.p_holm, word])
            dots.append(Dot(f"{name} [{word}]", e.value, e.low, e.high, model))
    head = ["model", "claim", "claimed", "n", "points", "low", "high", "holm_p", "verdict"]
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "claims.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    figure = interval_plot(dots, "difference of test accuracy (points)")
    figure.savefig(given.out / "claims.png", dpi=150)
    for row in rows:
        print(*row, sep=" | ")


if __name__ == "__main__":
    main()
