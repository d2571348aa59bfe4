"""A fault campaign through ``descentlab run`` against the minimal loop, and shared prefixes against none.

    python benchmarks/campaign.py [--quick]

The campaign: 18 types of hardware fault x 4 optimizers x 20 replicates on mnist5k, as a grid of the recovery study. All
types of one replicate hit at the same step, so the 18 faulted runs and their twin fork from one prefix, in one block.

- ``vs_loop_mlp``: MLP-386, time of every update from the plan on the disk to the table on the disk, two worker
  processes, against ``run_case`` of the minimal loop for every planned fault: train to the fault, fork a twin, train
  both (alone.py; one process, its start not counted, a sample scaled to all updates). ``vs_loop_mlp_same_steps``:
  against a loop that shares prefixes and twins as descentlab does, so that only the speed of an update counts.
- ``shared_prefix_vs_scratch``: the BatchNorm network with faults late in training (``settings``) and the four
  optimizers, with ``--quick`` one: 18 types from one prefix, over the same with every run trained from its first step
  and one twin. From scratch three of the types are trained, in full for a quarter of the replicates, and the time is
  scaled to all member-steps. Both keep two processes busy, with ``--quick`` one.
- ``slope``: of the logarithm of processor seconds (planning, training, table; one process) against the logarithm of
  the number of runs, MLP-386, in blocks of 108 runs (three replicates). All numbers are taken in turn, nine times
  (``--quick``: once), small campaigns so often that all numbers take about as long and are disturbed as much.
  A turn gives a slope, and the median of those counts, since the machine's speed drifts from minute to minute.

``--quick``: one optimizer, fewer replicates, the slope over three numbers of runs; once.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path

from alone import Baseline, from_scratch, member_steps, study, train
from common import ONE_THREAD, alternate, emit, median_ratio, slopes, spread

FAULTS = (
    "INPUT,INPUT_16,WT,WT_16,RBFLIP,RD,RD_CORRECT,ZERO,N16_RD,N16_RD_CORRECT,RD_GLB,RD_CORRECT_GLB,"
    "N64_INPUT,N64_WT,N64_INPUT_16,N64_WT_16,N64_INPUT_GLB,N64_WT_GLB"
)
REPLICATES = (12, 24, 48, 96)  # for the slope: 4 to 32 blocks; of fewer, planning is a good part of the cost
FULL_LATE = ["fault.step=600", "recovery_steps=20"]
QUICK_LATE = ["optimizer=adam", "fault.step=600", "recovery_steps=10", "processes=1"]
SHORT = ["model=mlp", "optimizer=adam", f"fault={FAULTS}", "fault.step=10", "recovery_steps=20"]


def studies(quick: bool) -> dict[str, list[str]]:
    """Name -> settings of every study that is timed."""
    late, cases = (QUICK_LATE, (4, 4)) if quick else (FULL_LATE, (12, 3))  # two blocks each in full
    types = f"fault={FAULTS}"
    return {
        "mlp": ["model=mlp", types, *(["optimizer=adam", "cases=12"] if quick else ["cases=20"])],
        "shared": [*late, types, f"cases={cases[0]}"],
        "scratch": [*late, "fault=INPUT,WT,RD", "share_prefix=false", f"cases={cases[1]}"],
    }


def cost(replicates: int, folder: Path, times: int = 1) -> float:
    """Processor seconds of a short campaign in this process, the mean of several."""
    total = 0.0
    for _ in range(times):
        gc.collect()  # what the one before has left is not this one's cost
        started = time.process_time()
        words = [*SHORT, f"cases={replicates}", "members_per_block=108"]
        study(words, folder / f"slope-{replicates}", launcher="local")
        total += time.process_time() - started
    return total / times


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="one optimizer, fewer replicates, once; under a minute")
    quick = parser.parse_args().quick
    os.environ.update(ONE_THREAD)
    settings, repeats = studies(quick), 1 if quick else 3
    loops: list[Baseline] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def looped() -> float:
            loops.append(Baseline.of(folder / "mlp", 8 if quick else 40, folder))
            return loops[-1].training

        turns = {name: lambda name=name: train(settings[name], folder / name) for name in settings}
        measured = alternate({**turns, "loop": looped}, repeats)
        same = [b.second_per_update * member_steps(folder / "mlp") for b in loops]
        scale = from_scratch(folder / "shared") / member_steps(folder / "scratch")
        ratios: dict[str, float | None] = {
            "vs_loop_mlp": median_ratio(measured["loop"], measured["mlp"]),
            "vs_loop_mlp_same_steps": median_ratio(same, measured["mlp"]),
            "shared_prefix_vs_scratch": median_ratio([scale * s for s in measured["scratch"]], measured["shared"]),
        }
        steps = {n: round(from_scratch(folder / n) / member_steps(folder / n), 2) for n in ("mlp", "shared")}
        cost(1, folder)  # imports, data
        sizes = REPLICATES[:3] if quick else REPLICATES
        turns_of_cost = {str(n): lambda n=n: cost(n, folder, max(sizes) // n) for n in sizes}
        costs = {int(n): values for n, values in alternate(turns_of_cost, 1 if quick else 9).items()}
    each = slopes(costs)
    ratios["slope"] = round(statistics.median(each), 3)
    emit(
        "campaign",
        ratios,
        repeats,
        seconds={name: spread(values) for name, values in measured.items()},
        cpu_seconds={f"{2 * 18 * n} runs": spread(values) for n, values in costs.items()},
        slopes=[round(s, 3) for s in each],
        settings={name: " ".join(values) for name, values in settings.items()},
        scratch_over_shared_steps=steps,
        loop_updates=[loops[0].measured, loops[0].updates],
        loop_milliseconds_per_update=round(1e3 * loops[0].second_per_update, 3),
    )


if __name__ == "__main__":
    main()
