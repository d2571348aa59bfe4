"""What packing and the one table save: python benchmarks/harness.py [--quick]

``packed_vs_process_per_run``: wall time of R training runs of about one second each, as one Python process per run
(two at a time, the loop of examples/minimal_loop.py: import, data, 2,000 steps of the 386-parameter MLP, test loss),
over that of ``descentlab run training replicates=R`` as a whole command (start, planning, training, table, report). The
processes are a sample of runs, scaled to R. ``packed_vs_process_per_run_training`` leaves start and imports out of the
processes' time.

``table_vs_pandas_csv``: reading R runs x S steps x 8 observables from one CSV file per run into one pandas frame, over
``dl.load`` of the same rows with their settings, both from a warm file cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import ONE_THREAD, alternate, cores, emit, median_ratio, spread

ROOT = Path(__file__).parent.parent
STEPS = 2000
OBSERVED = ["step", "train_loss", "train_accuracy", "lr", "grad_norm", "update_norm", "samples", "nonfinite_params"]
ONE_RUN = """
import sys, time
sys.path.insert(0, {examples!r})
import torch
torch.set_num_threads(1)
from minimal_loop import batch_indices, load_digits, make_model, test_loss, train
x, y, x_test, y_test = load_digits()
begin = time.perf_counter()
model = make_model({seed})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
train(model, optimizer, x, y, batch_indices(len(x), {steps}, seed={seed}))
test_loss(model, x_test, y_test)
print(time.perf_counter() - begin)
"""


def environment() -> dict[str, str]:
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}


def one_process_per_run(sample: int, runs: int) -> tuple[float, float]:
    """Seconds for ``runs`` runs, measured on ``sample`` of them: (wall, training alone)."""
    begin, training = time.perf_counter(), 0.0
    for first in range(0, sample, cores()):
        texts = [
            ONE_RUN.format(examples=str(ROOT / "examples"), seed=seed, steps=STEPS)
            for seed in range(first, min(first + cores(), sample))
        ]
        together = [
            subprocess.Popen([sys.executable, "-c", text], env=environment(), stdout=subprocess.PIPE, text=True)
            for text in texts
        ]
        training += sum(float(process.communicate()[0]) for process in together) / len(together)
    return (time.perf_counter() - begin) * runs / sample, training * runs / sample


def packed(runs: int, out: Path) -> float:
    """Seconds of the whole command for ``runs`` replicates."""
    settings = ["model=mlp", "dataset=digits", "batch_size=64", "optimizer=sgd", "optimizer.lr=0.1"]
    command = [sys.executable, "-m", "descentlab.cli", "run", "training", *settings, f"steps={STEPS}"]
    command += [f"replicates={runs}", "observe.every=20", "observe.evaluate_every=0", "-y", "--overwrite"]
    begin = time.perf_counter()
    subprocess.run([*command, "--out", str(out)], env=environment(), check=True, capture_output=True)
    return time.perf_counter() - begin


def tables(runs: int, steps: int, work: Path) -> dict[str, Callable[[], float]]:
    """Both readers, on the same rows: a finished study, and its rows as one CSV file per run."""
    import pandas as pd

    import descentlab as dl

    out = work / "table"
    small = ["model=mlp", "dataset=digits", "optimizer=sgd", f"steps={steps}", f"replicates={runs}"]
    dl.run("training", *small, "observe.evaluate_every=0", out=out)
    files = []
    for (run,), rows in dl.load(out).frame.group_by("run"):
        file = work / f"{run}.csv"
        rows.select(OBSERVED).write_csv(file)
        files.append((str(run), file))

    def table() -> float:
        begin = time.perf_counter()
        assert len(dl.load(out).frame) == runs * steps
        return time.perf_counter() - begin

    def pandas() -> float:
        begin = time.perf_counter()
        frame = pd.concat([pd.read_csv(file).assign(run=run) for run, file in files])
        assert len(frame) == runs * steps
        return time.perf_counter() - begin

    return {"table": table, "pandas": pandas}


def main() -> None:
    parser = argparse.ArgumentParser(description="What packing and the one table save.")
    parser.add_argument("--quick", action="store_true", help="fewer runs and repeats: within a minute")
    quick = parser.parse_args().quick
    runs, sample, repeats = (100, 2, 1) if quick else (200, 10, 3)
    training: list[float] = []

    def processes() -> float:
        wall, alone = one_process_per_run(sample, runs)
        training.append(alone)
        return wall

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        timed = alternate({"processes": processes, "packed": lambda: packed(runs, work / "packed")}, repeats)
        read = alternate(tables(*((120, 250) if quick else (400, 500)), work), 3 if quick else 7)
    ratios = {
        "packed_vs_process_per_run": median_ratio(timed["processes"], timed["packed"]),
        "packed_vs_process_per_run_training": median_ratio(training, timed["packed"]),
        "table_vs_pandas_csv": median_ratio(read["pandas"], read["table"]),
    }
    seconds = {name: spread(values) for name, values in {**timed, "training": training, **read}.items()}
    emit("harness", ratios, repeats, seconds=seconds, runs=runs, steps=STEPS, store_share="benchmarks/ensemble.py")


if __name__ == "__main__":
    main()
