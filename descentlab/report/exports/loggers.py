"""Finished runs written for tensorboard, wandb, mlflow and trackio: offline and after the fact (the ``track`` extra).

Nothing is sent anywhere: the files lie in the export's directory, from where each tool's own command shows or uploads
them (named in README.txt there).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...analysis.results import ResultsLike
from ...core.errors import StudyError, UserError
from .series import Series, series

_ENDED = {"done": "FINISHED", "diverged": "FAILED", "failed": "FAILED"}


def _package(kind: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError("export", kind, f"the track extra: pip install 'descentlab[track]' ({error})") from None


def _project(results: ResultsLike) -> str:
    return f"descentlab-{results.spec.get('study', 'study')}"


def _began(results: ResultsLike) -> float:
    """Seconds since 1970 at which the study was started; 0 where that is not recorded."""
    text = str(results.provenance.get("started", results.provenance.get("time", "")))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _readme(out: Path, text: str) -> None:
    (out / "README.txt").write_text(text + "\n", encoding="utf-8")


def tensorboard(results: ResultsLike, out: Path) -> None:
    """One event file per run; settings as a text."""
    writer = _package("tensorboard", "tensorboard.summary.writer.event_file_writer")
    event = _package("tensorboard", "tensorboard.compat.proto.event_pb2").Event
    proto = _package("tensorboard", "tensorboard.compat.proto.summary_pb2").Summary
    began = _began(results)
    for run in series(results):
        file = writer.EventFileWriter(str(out / _file_name(run)))
        for step, wall, metrics in run.rows:
            values = [proto.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            file.add_event(event(wall_time=began + wall, step=step, summary=proto(value=values)))
        file.close()
    _readme(out, "tensorboard --logdir . shows these runs.")


def _file_name(run: Series) -> str:
    """At most 200 characters, none of which a file system minds; the id makes it unique."""
    plain = "".join(c if c.isalnum() or c in "=,.+-" else "_" for c in run.name)
    return plain if len(plain) <= 200 else f"{plain[:180]}+{run.id}"


def wandb(results: ResultsLike, out: Path) -> None:
    """One offline run each."""
    package = _package("wandb", "wandb")
    quiet = package.Settings(silent=True, console="off", disable_git=True, save_code=False)
    for run in series(results):
        written = package.init(
            project=_project(results),
            name=run.name[:128],
            id=run.id,
            group=run.group,
            dir=str(out),
            mode="offline",
            config={**run.settings, "status": run.status},
            settings=quiet,
        )
        for step, wall, metrics in run.rows:
            written.log({**metrics, "wall_s": wall}, step=step)
        written.finish(exit_code=0 if run.status == "done" else 1)
    _readme(out, "wandb sync wandb/offline-run-* uploads these runs.")


def mlflow(results: ResultsLike, out: Path) -> None:
    """One experiment in an SQLite file."""
    client = _package("mlflow", "mlflow.tracking").MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    entities = _package("mlflow", "mlflow.entities")
    experiment, began = client.create_experiment(_project(results)), _began(results)
    for run in series(results):
        made = client.create_run(experiment, run_name=run.name, tags={"group": run.group, "status": run.status})
        params = [entities.Param(key, str(value)[:6000]) for key, value in run.settings.items()]
        metrics = [
            entities.Metric(name, value, int(1000 * (began + wall)), step)
            for step, wall, row in run.rows
            for name, value in row.items()
        ]
        client.log_batch(made.info.run_id, params=params)
        for first in range(0, len(metrics), 1000):  # the most that one call takes
            client.log_batch(made.info.run_id, metrics=metrics[first : first + 1000])
        client.set_terminated(made.info.run_id, _ENDED.get(run.status, "KILLED"))
    _readme(out, "mlflow ui --backend-store-uri sqlite:///mlflow.db shows these runs.")


def trackio(results: ResultsLike, out: Path) -> None:
    """One local project. The package reads its directory when it is imported, so it is used in a process of its own."""
    _package("trackio", "trackio")
    child = multiprocessing.get_context("spawn").Process(
        target=_trackio, args=(list(series(results)), _project(results), out)
    )
    child.start()
    child.join()
    if child.exitcode != 0:
        raise StudyError(f"trackio failed; its messages are in {out / 'messages.txt'}")
    _readme(out, "TRACKIO_DIR=. trackio show shows these runs.")


def _trackio(runs: Sequence[Series], project: str, out: Path) -> None:
    os.environ["TRACKIO_DIR"] = str(out)
    with (out / "messages.txt").open("w") as messages, redirect_stdout(messages), redirect_stderr(messages):
        package = importlib.import_module("trackio")
        for run in runs:
            config = {**run.settings, "status": run.status}
            package.init(project=project, name=run.name, group=run.group, config=config, embed=False)
            for step, _, metrics in run.rows:
                package.log(metrics, step=step)
            package.finish()
