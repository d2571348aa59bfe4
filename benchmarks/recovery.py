"""The recovery study through ``descentlab run`` against the same runs trained one at a time with the minimal loop.

    python benchmarks/recovery.py [--quick]

Two programs, both in processes of their own. descentlab: the command, with every standard observable at every step,
the test set every 10 steps, table and report. Loop: alone.py, which measures less and writes nothing. Like is compared
with like: ``training`` is the time of all updates (descentlab: from the plan on the disk to the table on the disk, two
worker processes, of which the default study with MLP-386, one block, uses one; loop: without its start), ``command``
the whole (descentlab with start and report, which the loop has not). Ratios are time of the other over time of
descentlab:

- ``vs_loop_mlp``, ``vs_loop_cnn``: ``training`` of the default study (4 optimizers, 10 cases), with MLP-386 and with
  its own network. ``…_command``: whole commands.
- ``vs_loop_mlp_many``, ``…_command``: MLP-386 with more cases (``settings``).
- ``vs_process_per_run_mlp``: every run, a twin too, as a process of its own that imports, loads and trains from the
  first step, one after the other, over descentlab's whole command.
- ``shared_prefix_vs_scratch``: ``training`` of six types of fault that hit at the same late step, with the fault-free
  prefix trained once for all and their twin, over the same with every run trained from its first step
  (``share_prefix=false``) and one twin, under the four optimizers of the default study. From scratch three of the
  types are trained, with ``--quick`` for a third of the cases, and the time is scaled to all member-steps. Reports are
  not written. Both keep two processes busy, with ``--quick`` one.
- ``default_prefix_vs_scratch``: the same for the default study, whose only fork is that of a run and its twin. It
  follows from counting steps; nothing is timed.

Times of the loop are measured on a sample of cases spread over all and scaled to all updates (``loop_updates``).
``--quick``: once, everything of descentlab in one process, one study after the other; the network and the shared prefix
in smaller studies (``settings``); no reports, so no whole commands (null).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from alone import Baseline, command, from_scratch, member_steps, train, train_together
from common import alternate, emit, median_ratio, spread

FAULTS = "RD,N16_RD,RBFLIP,WT,INPUT,ZERO"
LATE = ["fault.step=600", "recovery_steps=40"]
SCRATCH = "RD,N16_RD,RBFLIP"  # six runs and one twin would be 7 members per case; three types and their twins are 6


def studies(quick: bool) -> dict[str, list[str]]:
    """Name -> settings of every study that is timed."""
    small = ["cases=2", "optimizer=adam,sgd"] if quick else []
    cases = (3, 1) if quick else (6, 6)
    found = {"mlp": ["model=mlp"], "cnn": small}
    found["shared"] = [*LATE, f"fault={FAULTS}", f"cases={cases[0]}"]
    found["scratch"] = [*LATE, f"fault={SCRATCH}", "share_prefix=false", f"cases={cases[1]}"]
    return found if quick else {**found, "mlp_many": ["model=mlp", "cases=400"]}


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="smaller studies, once; under a minute")
    quick = parser.parse_args().quick
    settings = studies(quick)
    ours: dict[str, list[dict[str, float]]] = {}
    loops: dict[str, list[Baseline]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def told(study: str) -> float:
            if quick:
                return together[study]
            if study in ("shared", "scratch"):
                return train(settings[study], folder / study)
            ours.setdefault(study, []).append(command(settings[study], folder / study))
            return ours[study][-1]["training"]

        def looped(study: str) -> float:
            sample = {"mlp": 6, "cnn": 1}[study] if quick else 40
            loops.setdefault(study, []).append(Baseline.of(folder / study, sample, folder))
            return loops[study][-1].training

        together = train_together(settings, folder) if quick else {}
        turns: dict[str, Any] = {}
        for study in settings:
            told(study) if not quick else None  # warm: files in the cache
            turns[study] = lambda study=study: told(study)
            if study not in ("shared", "scratch"):
                turns[f"{study}_loop"] = lambda study=study: looped(study)
        ours.clear()
        measured = alternate(turns, 1 if quick else 5)
        ratios: dict[str, float | None] = {}
        for study in loops:
            ratios[f"vs_loop_{study}"] = median_ratio(measured[f"{study}_loop"], measured[study])
            commands = [o["command"] for o in ours.get(study, [])]
            whole = median_ratio([b.command for b in loops[study]], commands) if commands else None
            ratios[f"vs_loop_{study}_command"] = whole
        alone, whole = [b.processes for b in loops["mlp"]], [o["command"] for o in ours.get("mlp", [])]
        ratios["vs_process_per_run_mlp"] = median_ratio(alone, whole) if whole else None
        scale = from_scratch(folder / "shared") / member_steps(folder / "scratch")
        scratch = [scale * seconds for seconds in measured["scratch"]]
        ratios["shared_prefix_vs_scratch"] = median_ratio(scratch, measured["shared"])
        steps = {name: from_scratch(folder / name) / member_steps(folder / name) for name in ("mlp", "shared")}
        ratios["default_prefix_vs_scratch"] = round(steps["mlp"], 2)
    commands = {f"{study}_command": [o["command"] for o in found] for study, found in ours.items()}
    emit(
        "recovery",
        ratios,
        len(measured["mlp"]),
        seconds={name: spread(values) for name, values in {**measured, **commands}.items()},
        settings={name: " ".join(values) for name, values in settings.items()},
        shared_prefix_steps=round(steps["shared"], 2),
        loop_updates={name: [b[0].measured, b[0].updates] for name, b in loops.items()},
        loop_milliseconds_per_update={n: round(1e3 * b[0].second_per_update, 3) for n, b in loops.items()},
        measured="ratios: all updates, from launch to table; …_command: process start and report included",
    )


if __name__ == "__main__":
    main()
