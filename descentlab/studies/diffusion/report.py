"""The report of the diffusion study: how well theory predicts each cloud, and what the point they start from is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from ...analysis.results import ResultsLike
from ...core.errors import StudyError
from ...report import Column, FigureBlock, Paragraph, Report, Section, SummaryItem, TableBlock, Verdict
from ...store.moments import load_moments
from ..common import command_text, is_brief, plain_item, shown_provenance
from . import figures, reference_figures
from .clouds import Cloud, Stages, clouds_of
from .score import Bridge, Score, bridge, items, score
from .spec import STUDY
from .verdicts import Point, bridge_verdict, cloud_verdict, point_of, point_verdict, prediction_table

MODES = 6  # shown over time
CLOUDS = 4  # shown in one figure


def build(results: ResultsLike) -> Report:
    """The report of what is finished. Raises :class:`StudyError` while nothing is."""
    stages = Stages.of(results)
    if not stages.blocks:
        raise StudyError(f"{results.path}: nothing to report yet, no stage has ended; run the study again to go on")
    clouds = clouds_of(results, stages)
    arrays = {c.name: stages.arrays(c.score) for c in clouds if c.score is not None}
    scores = {name: found for name, held in arrays.items() if (found := score(held)) is not None}
    point = point_of(stages, results)
    found_bridge = next((b for name, held in arrays.items() if (b := bridge(held)) is not None), None)
    summary = _summary(arrays, scores, point, found_bridge, _losses(clouds, stages))
    verdicts = [cloud_verdict(c, scores[c.name], summary) for c in clouds if c.name in scores]
    verdicts += [bridge_verdict(found_bridge)] if found_bridge else []
    verdicts += [point_verdict(point)] if point else []
    failed = _failures(results)
    ended = sum(row["status"] in ("done", "diverged") for row in results.status)
    waiting = len(results.runs) - ended
    return Report(
        title="Clouds of SGD runs",
        question=STUDY.question,
        verdicts=verdicts
        or [Verdict("Finished: " + ", ".join(dict.fromkeys(b["stage"] for b in stages.blocks)) + ".")],
        sections=_sections(results, stages, clouds, arrays, scores, point),
        summary=summary,
        failures=failed,
        provenance=shown_provenance(results.provenance),
        command=command_text(results, "diffusion"),
        runs=ended,
        notes=_notes(results, stages, waiting),
        pdf=not is_brief(results),
    )


def _notes(results: ResultsLike, stages: Stages, waiting: int) -> list[str]:
    """What a reader must know first."""
    notes = [f"{waiting} of {len(results.runs)} runs have not ended; they are left out."] if waiting else []
    if any("running_mean" in name for block in stages.named("gd") for name in stages.arrays(block)):
        notes.append(
            "The model has BatchNorm: its runs mix the samples of a batch, theory takes them one by one in evaluation "
            "mode. Measured and predicted spread are not those of the same dynamics."
        )
    return notes


def _losses(clouds: Sequence[Cloud], stages: Stages) -> dict[str, Mapping[str, np.ndarray]]:
    return {c.name: stages.arrays(c.losses) for c in clouds if c.losses is not None}


def _summary(
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    scores: Mapping[str, Score],
    point: Point | None,
    found: Bridge | None,
    losses: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, SummaryItem]:
    out: dict[str, SummaryItem] = {}
    for name, one in scores.items():
        held = arrays[name]
        out |= {f"diffusion/{name}/{k}": v for k, v in items(one, held["eigenvectors"], held["Vhat"]).items()}
        linear = score(held, "linear_Vhat") if "linear_Vhat" in held else None
        if linear is not None:
            text = "relative error of linear theory, with curvature and noise at theta* only"
            out[f"diffusion/{name}/relative_error_linear"] = plain_item(linear.relative_error, one.n, text)
        out[f"diffusion/{name}/cloud_trace"] = plain_item(float(np.trace(held["V"])), one.n, "trace of V")
        out[f"diffusion/{name}/predicted_trace"] = plain_item(float(np.trace(held["Vhat"])), one.n, "trace of Vhat")
    if found is not None:
        out["diffusion/bridge/mid_epoch_ratio"] = found.ratio
        out["diffusion/bridge/mid_epoch_law"] = plain_item(found.expected, found.ratio.n, "the bridge's law, same mean")
    for name, held in losses.items():
        values = held["loss"][np.isfinite(held["loss"])]
        if len(values) > 1:
            half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
            mean = float(values.mean())
            text = "mean over runs at the end, normal interval"
            out[f"diffusion/{name}/test_loss"] = SummaryItem(mean, len(values), mean - half, mean + half, text)
            spread = plain_item(float(values.std(ddof=1)), len(values), "standard deviation over runs at the end")
            out[f"diffusion/{name}/test_loss_deviation"] = spread
        mean_model = float(held["mean_model_loss"][0])
        out[f"diffusion/{name}/mean_model_test_loss"] = plain_item(
            mean_model, len(values), "at the mean of the weights"
        )
    return out | (point.items() if point else {})


def _failures(results: ResultsLike) -> TableBlock:
    by_id = {str(run["id"]): run for run in results.runs}
    bad = [row for row in results.status if row["status"] in ("diverged", "failed") and row["run"] in by_id]
    rows = [[by_id[r["run"]]["role"], by_id[r["run"]]["replicate"], r["message"], r["run"]] for r in bad]
    caption = "They are out of every mean and covariance; their number stands beside it." if rows else ""
    return TableBlock([Column(n) for n in ("stage", "replicate", "reason", "run")], rows, caption)


def _sections(
    results: ResultsLike,
    stages: Stages,
    clouds: Sequence[Cloud],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    scores: Mapping[str, Score],
    point: Point | None,
) -> list[Section]:
    brief = is_brief(results)
    made = [
        _prediction(clouds, arrays, scores),
        *([] if brief else [_time(stages, clouds, arrays), _shape(stages, clouds, arrays)]),
        _validation(_losses(clouds, stages)),
        _reference(results, stages, clouds, point),
        *([] if brief else [_curvature(stages, clouds, arrays)]),
        Section("How the numbers are made", [Paragraph(text) for text in METHOD]),
    ]
    return [section for section in made if section.blocks]


def _prediction(
    clouds: Sequence[Cloud], arrays: Mapping[str, Mapping[str, np.ndarray]], scores: Mapping[str, Score]
) -> Section:
    blocks: list[Any] = []
    shown = {c.name: scores[c.name] for c in clouds if c.name in scores and c.sampler == "replacement"}
    shown = dict(list((shown or scores).items())[:CLOUDS])
    if shown:
        n = max(s.n for s in shown.values())
        caption = (
            f"Variance over {n} runs along every live eigenvector of the Hessian at theta*, against the prediction "
            "without any fitted constant; below, their ratio with the range of a perfect prediction."
        )
        alt = "Measured against predicted variance, points on the diagonal"
        blocks.append(FigureBlock("agreement", figures.agreement(shown), caption, alt))
        caption = "All directions at once: eigenvalues of the measured covariance in units of the predicted one."
        blocks.append(FigureBlock("whitened", figures.whitened(shown), caption, "Histogram and Marchenko-Pastur law"))
    if scores:
        blocks.append(prediction_table(clouds, arrays, scores))
    return Section("Measured and predicted spread", blocks)


def _time(stages: Stages, clouds: Sequence[Cloud], arrays: Mapping[str, Mapping[str, np.ndarray]]) -> Section:
    blocks: list[Any] = []
    for lr in dict.fromkeys(c.lr for c in clouds):
        own = [c for c in clouds if c.lr == lr and c.name in arrays and c.members]
        held = {c.name: (arrays[c.name], [stages.arrays(b) for b in c.members]) for c in own}
        if not held:
            continue
        first = stages.arrays(own[0].members[0])
        chosen = first["directions"][np.linspace(0, len(first["directions"]) - 1, MODES).round().astype(int)]
        epoch = int(first["steps_per_epoch"])
        figure = figures.over_time(held, [int(i) for i in dict.fromkeys(chosen)], epoch)
        caption = (
            f"Variance along single modes, measured (points) and predicted (lines), learning rate {lr:g}. "
            f"The dotted line is the end of the first epoch, {epoch} batches. Without replacement the variance falls "
            "back at the end of every epoch: any such number has to say where in the epoch it was taken."
        )
        blocks.append(FigureBlock(f"modes-lr-{lr:g}", figure, caption, "Variance against step for several modes"))
    return Section("Spread over time", blocks)


def _shape(stages: Stages, clouds: Sequence[Cloud], arrays: Mapping[str, Mapping[str, np.ndarray]]) -> Section:
    own = [c for c in clouds if c.name in arrays and c.members]
    if not own:
        return Section("Shape of a cloud", [])
    chosen = max((c for c in own if c.sampler == "replacement"), key=lambda c: c.lr, default=own[-1])
    members = [stages.arrays(b) for b in chosen.members]
    score_of = arrays[chosen.name]
    control = stages.arrays(chosen.control) if chosen.control is not None else None
    ends = np.concatenate([m["snapshots"][-1] for m in members])
    ends = ends[np.isfinite(ends).all(axis=1)]
    at = stages.arrays(stages.before(chosen.members[0], "gd")[0])["theta"]
    path = None if control is None else control["mean"] @ score_of["eigenvectors"].T
    n = len(ends)
    blocks: list[Any] = []
    if n > 4:
        caption = (
            f"Ends of {min(n, figures.POINTS)} of {n} runs, {chosen.name}, in the cloud's own principal components."
        )
        blocks.append(
            FigureBlock(
                "components",
                figures.components(ends, at, path, score_of.get("Vhat")),
                caption,
                "Scatter of component pairs",
            )
        )
    caption = f"{n} runs, {chosen.name}, along single modes: bands hold half and 95 % of the runs."
    blocks.append(
        FigureBlock("fans", figures.fans(score_of, members, control), caption, "Fan charts with a control line")
    )
    return Section("Shape of a cloud", blocks)


def _validation(losses: Mapping[str, Mapping[str, np.ndarray]]) -> Section:
    shown = {name: held for name, held in list(losses.items())[:CLOUDS] if np.isfinite(held["loss"]).any()}
    if not shown:
        return Section("Test loss of the runs", [])
    n = max(len(held["loss"]) for held in shown.values())
    caption = f"Test loss of {n} runs at their end; above each panel mean and standard deviation."
    picture = FigureBlock("test-losses", figures.test_losses(shown), caption, "Histograms of test losses")
    return Section("Test loss of the runs", [picture])


def _reference(results: ResultsLike, stages: Stages, clouds: Sequence[Cloud], point: Point | None) -> Section:
    frame = results.frame
    rows = {role: frame.filter(pl.col("role") == role).sort("step") for role in ("sgd", "gd")}
    rows = {role: part.filter(pl.col("train_loss").is_not_null()) for role, part in rows.items() if part.height}
    if "gd" not in rows or "sgd" not in rows:
        return Section("The point they start from", [])
    moments = load_moments(results.path)
    held: dict[str, pl.DataFrame] = {}
    if moments is not None:
        cells = {str(run["id"]): int(run["cell"]) for run in results.runs if run["role"] == "sgd_cloud"}
        for cloud in clouds[:CLOUDS]:
            cell = next((cells[r] for b in cloud.members for r in b["runs"] if r in cells), None)
            part = moments.filter(pl.col("cell") == cell, pl.col("observable") == "train_loss")
            if part.height:
                held[cloud.name] = part.sort("step")
    caption = "Loss through the stages; of the clouds the mean over runs with its 95 % interval."
    blocks: list[Any] = [Paragraph(point.text())] if point else []
    blocks.append(
        FigureBlock("loss", reference_figures.stitched(rows["sgd"], rows["gd"], held), caption, "Loss curves")
    )
    gd = rows["gd"].filter(pl.col("grad_norm") > 0)
    if gd.height:
        polish = point.polish if point else ()
        caption = "How the gradient's norm falls on the way to theta*."
        picture = reference_figures.gradient_norms(gd, polish)
        blocks.append(FigureBlock("gradient-norm", picture, caption, "Gradient norm against step, log-log"))
    return Section("The point they start from", blocks)


def _curvature(stages: Stages, clouds: Sequence[Cloud], arrays: Mapping[str, Mapping[str, np.ndarray]]) -> Section:
    held = {c.name: stages.arrays(c.hessians) for c in clouds if c.hessians is not None}
    dense = {name: found for name, found in list(held.items())[:CLOUDS] if "mean_eigenvalues" in found}
    blocks: list[Any] = []
    if dense:
        n = len(next(iter(dense.values()))["steps"])
        caption = f"{n} Hessians of the batch about to be used, along one run from theta* per learning rate and loader."
        blocks.append(FigureBlock("eigenvalues", reference_figures.tubes(dense), caption, "Eigenvalue tubes"))
    curvature = stages.named("curvature")
    if curvature:
        found = stages.arrays(curvature[0])
        values, vectors, c, h = (found[k] for k in ("eigenvalues", "eigenvectors", "covariance", "hessian"))
        scale = float((h * c).sum() / (h * h).sum())
        cosine = float((h * c).sum() / np.sqrt((h * h).sum() * (c * c).sum()))
        noise = ((vectors.T @ c) * vectors.T).sum(1)
        picture = reference_figures.alignment(values, noise, cosine, scale)
        caption = "Exact covariance of single-sample gradients along the Hessian's eigenvectors, all training data."
        blocks.append(FigureBlock("alignment", picture, caption, "Gradient noise against curvature"))
    own = [c for c in clouds if c.name in arrays and c.sampler == "replacement" and "Vhat" in arrays[c.name]]
    if dense and len(own) > 1:
        traces = np.array([np.trace(arrays[c.name]["V"]) for c in own])
        predicted = np.array([np.trace(arrays[c.name]["Vhat"]) for c in own])
        picture = reference_figures.across_rates(np.array([c.lr for c in own]), traces, predicted, dense)
        caption = "What a learning rate changes: size of the cloud, mean Hessian of the batches, and its trace."
        blocks.append(FigureBlock("rates", picture, caption, "Comparison across learning rates"))
    return Section("Curvature and noise", blocks)


METHOD = (
    "All runs of a cloud start at the same weights theta* and differ in their batches only. V is their covariance "
    "after the last step, divided by n - 1. Vhat is computed from the data, not from the runs: exact Hessian H and "
    "exact covariance C of single-sample gradients on all training data, carried through the discrete recursion of "
    "SGD for the same number of steps. No constant is fitted.",
    "Gaussian closure: gradient, H and C are averaged over the predicted cloud as it grows, which covers "
    "multiplicative noise and the change of curvature; linear: as they are at theta*; bridge: linear, with the "
    "batches of an epoch drawn without replacement.",
    "Directions are the eigenvectors of H at theta*. One predicted below 1e-12 of the largest variance is flat: it is "
    "counted, not scored. Intervals: jackknife over 20 groups of runs. The floor is the relative error of a perfect "
    "prediction with this number of runs, and its range that of clouds drawn from the prediction.",
    "theta* is called critical only where its gradient is below reference.gd.tolerance and descent did not end in an "
    "orbit of period two.",
)
