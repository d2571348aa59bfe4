"""The clouds of the diffusion study: python benchmarks/cloud.py [--quick]

MLP-386 on mnist5k, float32, batch 64 with replacement, plain SGD from theta*. descentlab: stage ``sgd_cloud`` as
``run`` does it, one process with one thread: drawing, gathering, gradients, updates, mean loss every 10 steps, moments
in all 386 eigendirections and coordinates at 60 looks, snapshots, files. Ratios are time per run-step of the other over
that of descentlab:

- ``vs_loop``: plain models one after the other (examples/minimal_loop.py), nothing recorded, batches drawn before;
- ``vs_jax``: ``jit(vmap(scan))`` in one process that may use all cores, gathering included, drawing and compilation
  not, loss alone; null without JAX.

``slope``: of the logarithm of a stage's processor time, start included, against the logarithm of runs (1 is linear): of
four numbers of runs in turn, three times; the median over turns (``--quick``: null, the start counts too much).
``memory_runs`` and ``memory_steps``: peak memory of a stage with 8 times the runs (``--quick``: 4) and 4 times
the steps over that of one without (1 is flat).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ONE_THREAD, emit, median_ratio, slopes, spread

ROOT = Path(__file__).parent.parent
WORDS = (
    "dtype=float32",
    "sampler=replacement",
    "optimizer.lr=0.05",
    "reference.sgd.epochs=20",
    "reference.gd.steps=50",
)


def point(out: Path) -> None:
    """theta* and its curvature, once."""
    from descentlab.config.resolve import resolve
    from descentlab.launch import api

    api.run(resolve("diffusion", [*WORDS, "stage=curvature"]), out, launcher="local", with_report=False)


def cloud(out: Path, runs: int, steps: int) -> dict[str, float]:
    """Run the stage here; seconds of processor time, peak memory in MB, and what was made."""
    from descentlab.config.resolve import resolve
    from descentlab.launch import api

    resolved = resolve("diffusion", [*WORDS, "stage=sgd_cloud", f"runs={runs}", f"cloud.steps={steps}"])
    started, wall = time.process_time(), time.perf_counter()
    code = api.run(resolved, out, launcher="local", with_report=False, yes=True)
    assert code == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_s": time.process_time() - started, "wall_s": time.perf_counter() - wall, "peak_mb": peak}


def in_process(out: Path, name: str, runs: int, steps: int) -> dict[str, float]:
    """:func:`cloud`, or another contestant, in a process of its own with one thread (JAX: as many as it likes)."""
    limits = {} if name == "jax" else ONE_THREAD
    command = [
        sys.executable,
        __file__,
        "--worker",
        name,
        "--out",
        str(out),
        "--runs",
        str(runs),
        "--steps",
        str(steps),
    ]
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env={**os.environ, **limits, **path}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def contestant(name: str, out: Path, runs: int, steps: int) -> dict[str, float]:
    """What a worker process does."""
    import torch

    torch.set_num_threads(1)
    if name == "cloud":
        return cloud(out, runs, steps)
    from contestants import cell, jax_ensemble, loop

    plain = cell(observed=False)
    advance = loop(plain, evaluate=False) if name == "loop" else jax_ensemble(list(range(runs)), observed=False)
    advance(60)
    started, wall = time.process_time(), time.perf_counter()
    made = advance(steps)
    return {"cpu_s": time.process_time() - started, "wall_s": time.perf_counter() - wall, "made": made}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs, steps and repeats: within a minute")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1111)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(contestant(given.worker, given.out, given.runs, given.steps)))
        return
    runs, steps, repeats = (500, 240, 1) if given.quick else (given.runs, given.steps, 3)
    with_jax = importlib.util.find_spec("jax") is not None
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "point"
        point(base)
        found: dict[str, list[float]] = {name: [] for name in ("cloud", "loop", "jax")}
        for repeat in range(repeats):
            whole = in_process(_copy(base, folder, f"a{repeat}"), "cloud", runs, steps)
            found["cloud"].append(1e6 * whole["wall_s"] / (runs * steps))
            for name in ("loop", *(("jax",) if with_jax else ())):
                other = in_process(base, name, runs, 240)
                found[name].append(1e6 * other["wall_s"] / other["made"])
        sizes = (runs // 4, runs) if given.quick else (runs // 2, runs, 2 * runs, 4 * runs)
        sized: dict[int, list[dict[str, float]]] = {n: [] for n in sizes}
        for repeat in range(repeats):
            for n in sizes if repeat % 2 == 0 else reversed(sizes):
                sized[n].append(in_process(_copy(base, folder, f"s{n}-{repeat}"), "cloud", n, steps))
        long = in_process(_copy(base, folder, "long"), "cloud", sizes[0], 4 * steps)
    least, most = (sized[n][0]["peak_mb"] for n in (sizes[0], sizes[-1]))
    each = [round(s, 3) for s in slopes({n: [one["cpu_s"] for one in turns] for n, turns in sized.items()})]
    ratios = {
        "vs_loop": median_ratio(found["loop"], found["cloud"]),
        "vs_jax": median_ratio(found["jax"], found["cloud"]) if with_jax else None,
        "slope": None if given.quick else round(statistics.median(each), 3),
        "memory_runs": round(most / least, 3),
        "memory_steps": round(long["peak_mb"] / least, 3),
    }
    micro = {name: spread(values) for name, values in found.items() if values}
    cpu = {f"{n} runs": spread([one["cpu_s"] for one in turns]) for n, turns in sized.items()}
    emit(
        "cloud",
        ratios,
        repeats,
        microseconds=micro,
        cpu_seconds=cpu,
        slopes=each,
        runs=runs,
        steps=steps,
        peak_mb=round(most),
    )


def _copy(base: Path, folder: str, name: str) -> Path:
    import shutil

    target = Path(folder) / name
    shutil.copytree(base, target)
    return target


if __name__ == "__main__":
    main()
