"""The file tree and JSON keys of the published recovery experiments, from a directory of the recovery study.

A superset: every published key is there with its meaning; README.txt lists where a definition was wrong and is now
another. Everything is read from the run directory; nothing is computed anew.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...analysis.results import ResultsLike
from . import v3_figures
from .strict import dumps
from .v3_measures import NOTES, Campaign, Experiment, Outcome, gather
from .v3_summary import report, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
LOG_SHOWN = 4000  # characters of a crashed run's log kept in its error file
DPI = 150


def export(results: ResultsLike, out: Path) -> None:
    """Write the tree into the empty directory ``out``. Raises :class:`UserError` for another study's directory."""
    campaign = gather(results)
    versioned = [{"format_version": FORMAT_VERSION, **config} for config in campaign.configs]
    _write(out / "all_injection_configs.json", dumps(versioned))
    for experiment in campaign.experiments:
        _experiment(experiment, results, out)
    _write(out / "intermediate_summary.json", dumps(summary(campaign, FORMAT_VERSION)))
    _write(out / "final_report.md", report(campaign, _date(results), _watched(campaign)))
    if campaign.experiments:
        _figure(v3_figures.overview(campaign), out / "summary_visualizations.png")
    _write(out / "README.txt", _readme())


def _experiment(experiment: Experiment, results: ResultsLike, out: Path) -> None:
    if experiment.crashed:
        document = _error(experiment, Path(results.path))
        _write(out / f"error_exp_{experiment.number:03d}.json", dumps(document))
    folder = out / f"experiment_{experiment.number:03d}"
    folder.mkdir()
    config = {"format_version": FORMAT_VERSION, **experiment.config}
    _write(folder / "injection_config.json", dumps(config))
    results_document = {
        "format_version": FORMAT_VERSION,
        "experiment_id": experiment.number,
        "injection_config": experiment.config,
        "injection_results": {name: outcome.injection() for name, outcome in experiment.outcomes.items()},
        "optimizer_results": {name: outcome.result() for name, outcome in experiment.outcomes.items()},
        "notes": list(NOTES),
    }
    _write(folder / "results.json", dumps(results_document))
    for name, outcome in experiment.outcomes.items():
        _write(folder / f"history_{name}.csv", _csv(outcome))
    _batch(experiment, Path(results.path), folder / "injection_batch.npz")
    _figure(v3_figures.comparison(experiment), folder / "comparison_plots.png")
    _figure(v3_figures.zoom(experiment), folder / "recovery_zoom.png")


def _csv(outcome: Outcome) -> str:
    """step, accuracy, loss; nan and inf as Python and C read them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "accuracy", "loss"])
    for row in zip(*outcome.history().values(), strict=True):
        writer.writerow(row)
    return text.getvalue()


def _batch(experiment: Experiment, path: Path, target: Path) -> None:
    """The batch all optimizers were hit on, images channels last, where the run kept it (observe.hit_artifacts)."""
    for run in experiment.runs:
        for file in sorted(path.glob(f"blocks/*/artifacts/hit-{run}.npz")):
            with np.load(file) as held:
                images, labels = held["x"], held["y"]
            if images.ndim == 4:
                images = images.transpose(0, 2, 3, 1)
            np.savez_compressed(target, images=images, labels=labels)
            return


def _error(experiment: Experiment, path: Path) -> dict[str, Any]:
    first = experiment.crashed[0]
    return {
        "format_version": FORMAT_VERSION,
        "experiment_id": experiment.number,
        "error": first["message"],
        "traceback": "\n".join(dict.fromkeys(_log(path, one) for one in experiment.crashed)),
        "failed_runs": experiment.crashed,
    }


def _log(path: Path, crashed: Mapping[str, Any]) -> str:
    log = path / "logs" / f"{crashed.get('block', '')}.log"
    return log.read_text(errors="replace")[-LOG_SHOWN:] if log.is_file() else ""


def _date(results: ResultsLike) -> str:
    provenance = results.provenance
    return str(provenance.get("started") or provenance.get("time") or "not recorded")


def _watched(campaign: Campaign) -> int | None:
    steps = [o.recovery_steps for e in campaign.experiments for o in e.outcomes.values() if not o.failed]
    return max(steps, default=None)


def _readme() -> str:
    lines = [f"Export of a descentlab recovery run, format_version {FORMAT_VERSION}.", "", "Definitions:"]
    return "\n".join([*lines, *(f"- {note}" for note in NOTES)]) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _figure(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=2 * DPI)  # drawn at half the published inches with readable text: as many pixels
