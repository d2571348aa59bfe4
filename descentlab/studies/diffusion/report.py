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
from ...theory.intervals import over_replicates
from ..common import command_text, is_brief, plain_item, shown_provenance
from . import contrasts, control, figures, language_figures, process_figures, reference_figures
from .clouds import Cloud, Stages, clouds_of, merged_hessians, pull_of
from .directions import without_pull
from .reference_figures import whole_runs
from .score import Bridge, Score, bridge, items, score, trace_item
from .spec import STUDY
from .verdicts import Point, bridge_verdict, cloud_verdict, point_of, point_verdict, prediction_table

MODES = 6  # shown over time
CLOUDS = 4  # shown in one figure
Described = Mapping[str, tuple[Mapping[str, np.ndarray], Mapping[str, SummaryItem]]]  # of a cloud: arrays and summary


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
    processes = _processes(clouds, stages)
    summary = _summary(arrays, scores, point, found_bridge, _losses(clouds, stages))
    texts, controls = _texts(clouds, stages), _controls(clouds, stages)
    described = [(name, own) for kind in (processes, texts) for name, (_, own) in kind.items()]
    for name, own in [*described, *controls.items()]:
        summary |= {f"diffusion/{name}/{key}": value for key, value in own.items()}
    answers = contrasts.answers([contrasts.measure(results, stages, c) for c in clouds])
    summary |= contrasts.items(answers)
    verdicts = [cloud_verdict(c, scores[c.name], summary) for c in clouds if c.name in scores]
    verdicts += [bridge_verdict(found_bridge)] if found_bridge else []
    verdicts += [point_verdict(point)] if point else []
    verdicts += [process_figures.verdict(name, *held) for name, held in list(processes.items())[:CLOUDS]]
    verdicts += contrasts.verdicts(answers)
    failed = _failures(results)
    ended = sum(row["status"] in ("done", "diverged") for row in results.status)
    waiting = len(results.runs) - ended
    return Report(
        title="Clouds of SGD runs",
        question=STUDY.question,
        verdicts=verdicts
        or [Verdict("Finished: " + ", ".join(dict.fromkeys(b["stage"] for b in stages.blocks)) + ".")],
        sections=_sections(results, stages, clouds, arrays, scores, point, processes, texts, controls),
        summary=summary,
        failures=failed,
        provenance=shown_provenance(results.provenance),
        command=command_text(results, "diffusion"),
        contrasts=contrasts.table(answers),
        runs=ended,
        notes=_notes(results, stages, clouds, waiting),
        pdf=not is_brief(results),
    )


def _notes(results: ResultsLike, stages: Stages, clouds: Sequence[Cloud], waiting: int) -> list[str]:
    """What a reader must know first."""
    notes = [f"{waiting} of {len(results.runs)} runs have not ended; they are left out."] if waiting else []
    if any("running_mean" in name for block in stages.named("gd") for name in stages.arrays(block)):
        notes.append(
            "The model has BatchNorm: its runs mix the samples of a batch, theory takes them one by one in evaluation "
            "mode. Measured and predicted spread are not those of the same dynamics."
        )
    pulls = {c.name: pull_of({"settings": c.settings}) for c in clouds}
    for pull in sorted(set(pulls.values()) - {0.0}):
        of = "" if len(set(pulls.values())) == 1 else f" of {', '.join(n for n, g in pulls.items() if g == pull)}"
        notes.append(
            f"Runs, control and prediction{of} are those of the loss with a pull of {pull:g} towards where descent "
            "ended (reference.gd.localise), and so are eigenvalues; losses, contrasts, and noise against curvature are "
            "without it."
        )
    return notes + _hidden(stages, clouds)


def _hidden(stages: Stages, clouds: Sequence[Cloud]) -> list[str]:
    """Which finished controls and Hessians no cloud is shown with."""
    shown = [c.control for c in clouds if c.control is not None] + [b for c in clouds for b in c.hessians]
    keys, found = {b["key"] for b in shown}, []
    for stage, block in (("gd_control", "control"), ("hessians", "hessians")):
        beside = [b["settings"][block] for b in shown if b["stage"] == stage]
        for b in stages.named(stage) if beside else ():
            if b["key"] in keys:
                continue
            held, other = b["settings"], {**beside[0], "runs": b["settings"][block].get("runs")}
            where = [f"{block}.{k} = {v}" for k, v in held[block].items() if v != other.get(k)]
            where += [f"lr = {held['optimizer']['lr']:g}"]
            where += [held["sampler"]["name"]] if stage == "hessians" else []
            found.append(
                f"The {stage} with {', '.join(where)} is not shown: its cloud is that of another cell, which is shown "
                "with its own. A directory of its own (--out) shows it."
            )
    return list(dict.fromkeys(found))


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
        out[f"diffusion/{name}/cloud_trace"] = trace_item(held)
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
    processes: Described,
    texts: Described,
    controls: Mapping[str, Mapping[str, SummaryItem]],
) -> list[Section]:
    brief = is_brief(results)
    made = [
        _prediction(clouds, arrays, scores, _curvatures(clouds, stages), brief),
        *([] if brief else [_time(stages, clouds, arrays), _shape(stages, clouds, arrays)]),
        _kind(clouds, processes, brief),
        Section("Beside gradient descent", [control.table(controls)] if controls else []),
        _attention(texts, brief),
        *([] if brief else [_validation(_losses(clouds, stages))]),
        _reference(results, stages, clouds, point, brief),
        *([] if brief else [_curvature(stages, clouds, arrays)]),
        Section("How the numbers are made", [Paragraph(text) for text in METHOD]),
    ]
    return [section for section in made if section.blocks]


def _prediction(
    clouds: Sequence[Cloud],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    scores: Mapping[str, Score],
    curvatures: Mapping[str, Mapping[str, np.ndarray]],
    brief: bool,
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
    if shown and not brief:
        caption = "All directions at once: eigenvalues of the measured covariance in units of the predicted one."
        blocks.append(FigureBlock("whitened", figures.whitened(shown), caption, "Histogram and Marchenko-Pastur law"))
    if scores:
        blocks.append(prediction_table(clouds, arrays, scores, curvatures))
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


def _curvatures(clouds: Sequence[Cloud], stages: Stages) -> dict[str, Mapping[str, np.ndarray]]:
    """Name of a cloud with a score -> the ``curvature.npz`` of its theta*."""
    scored = [c for c in clouds if c.score is not None]
    return {c.name: stages.arrays(stages.before(c.members[0], "curvature")[0]) for c in scored}


def _controls(clouds: Sequence[Cloud], stages: Stages) -> dict[str, Mapping[str, SummaryItem]]:
    """Name of a cloud -> its mean beside its control."""
    found: dict[str, Mapping[str, SummaryItem]] = {}
    for c in clouds:
        if c.score is not None and c.control is not None and "mean" in (held := stages.arrays(c.score)):
            found[c.name] = control.items(held, stages.arrays(c.control), _curvatures([c], stages)[c.name])
    return found


def _texts(clouds: Sequence[Cloud], stages: Stages) -> Described:
    """Name of a cloud of a transformer -> its ``language.npz`` and the summary of it, where runs are left for one."""
    held = {c.name: stages.arrays(c.language) for c in clouds if c.language is not None}
    return {name: (found, language_figures.items(found)) for name, found in held.items() if "quantities" in found}


def _attention(texts: Described, brief: bool) -> Section:
    blocks: list[Any] = []
    if texts:
        name, (found, _) = next(iter(texts.items()))
        if not brief:
            caption = (
                f"{name}. Above: mean attention weights of the first head at four moments of training. Below: "
                f"quantities along training, with the ends of {len(found['run_values'])} runs from theta*, and how "
                "parameters, spread and curvature share out over the model."
            )
            shown = language_figures.picture(found)
            blocks.append(FigureBlock("language", shown, caption, "Attention maps and embeddings over time"))
        blocks.append(language_figures.table(texts))
    return Section("Attention and embeddings", blocks)


def _processes(clouds: Sequence[Cloud], stages: Stages) -> Described:
    """Name of a cloud -> its ``statistics.npz`` and the summary of it."""
    held = {c.name: stages.arrays(c.statistics) for c in clouds if c.statistics is not None}
    return {name: (found, process_figures.items(found)) for name, found in held.items() if "directions" in found}


def _kind(
    clouds: Sequence[Cloud],
    processes: Described,
    brief: bool,
) -> Section:
    blocks: list[Any] = []
    own = [c for c in clouds if c.name in processes]
    if own:
        chosen = max((c for c in own if c.sampler == "replacement"), key=lambda c: c.lr, default=own[-1])
        found = processes[chosen.name][0]
        if not brief:
            steps = found.get("series_steps", np.zeros(1))
            caption = (
                f"{chosen.name}: {int(found['runs'])} runs along {len(found['directions'])} kept eigenvectors; memory, "
                f"rotation and roughness over steps {int(steps[0])} to {int(steps[-1])}, the rest at the end. Bars: 95 "
                "% intervals (Student's t over runs; chi-square for temperatures; influence function for tails)."
            )
            picture = process_figures.process(found)
            blocks.append(FigureBlock("process", picture, caption, "Six properties against linear theory"))
        for same in (True, False):  # short tables stay open
            of_kind = {c.name: processes[c.name] for c in own if (c.sampler == "replacement") == same}
            if of_kind:
                blocks.append(process_figures.table(of_kind))
    return Section("What kind of process a cloud is", blocks)


def _validation(losses: Mapping[str, Mapping[str, np.ndarray]]) -> Section:
    shown = {name: held for name, held in list(losses.items())[:CLOUDS] if np.isfinite(held["loss"]).any()}
    if not shown:
        return Section("Test loss of the runs", [])
    n = max(len(held["loss"]) for held in shown.values())
    caption = f"Test loss of {n} runs at their end; above each panel mean and standard deviation."
    picture = FigureBlock("test-losses", figures.test_losses(shown), caption, "Histograms of test losses")
    return Section("Test loss of the runs", [picture])


def _reference(
    results: ResultsLike, stages: Stages, clouds: Sequence[Cloud], point: Point | None, brief: bool
) -> Section:
    frame = results.frame
    rows = {role: frame.filter(pl.col("role") == role).sort("step") for role in ("sgd", "gd")}
    rows = {role: part for role, part in rows.items() if part.height}
    if "gd" not in rows or "sgd" not in rows:
        return Section("The point they start from", [])
    moments = load_moments(results.path)
    held: dict[str, pl.DataFrame] = {}
    if moments is not None:
        cells = {str(run["id"]): int(run["cell"]) for run in results.runs if run["role"] == "sgd_cloud"}
        for cloud in clouds[:CLOUDS]:
            cell = next((cells[r] for b in cloud.members for r in b["runs"] if r in cells), None)
            part = moments.filter(pl.col("cell").eq_missing(cell), pl.col("observable") == "train_loss")
            if part.height:
                held[cloud.name] = part.sort("step")
    caption = "Loss through the stages; of the clouds the mean over runs with its 95 % interval."
    blocks: list[Any] = [Paragraph(point.text())] if point else []
    blocks.append(
        FigureBlock("loss", reference_figures.stitched(rows["sgd"], rows["gd"], held), caption, "Loss curves")
    )
    gd = rows["gd"].filter(pl.col("grad_norm") > 0)
    if (gd.height or (point is not None and point.polish)) and not brief:
        polish, tolerance = (point.polish, point.tolerance) if point else ((), 0.0)
        caption = "How the gradient's norm falls on the way to theta*" + (
            "; right: the polish in float64 (L-BFGS: every 20 iterations; Newton: every step taken), of the loss "
            "with the pull where there is one."
            if polish
            else "."
        )
        picture = reference_figures.gradient_norms(gd, polish, tolerance)
        blocks.append(FigureBlock("gradient-norm", picture, caption, "Gradient norm against step, log-log"))
    return Section("The point they start from", blocks)


def _curvature(stages: Stages, clouds: Sequence[Cloud], arrays: Mapping[str, Mapping[str, np.ndarray]]) -> Section:
    held = {c.name: merged_hessians([stages.arrays(b) for b in c.hessians]) for c in clouds if c.hessians}
    dense = {name: found for name, found in list(held.items())[:CLOUDS] if "mean_hessian" in found}
    blocks: list[Any] = []
    if dense:
        shape = next(iter(dense.values()))["eigenvalues"].shape
        caption = (
            f"{shape[1]} Hessians of the batch about to be used along each of {shape[0]} runs from theta* per learning "
            "rate and loader. Left: over runs and steps; right: mean over runs with Student's 95 % interval."
        )
        blocks.append(FigureBlock("eigenvalues", reference_figures.tubes(dense), caption, "Eigenvalue tubes"))
    curvature = stages.named("curvature")
    if curvature:
        found = without_pull(stages.arrays(curvature[0]), pull_of(curvature[0]))
        values, vectors, c, h = (found[k] for k in ("eigenvalues", "eigenvectors", "covariance", "hessian"))
        scale = float((h * c).sum() / (h * h).sum())
        cosine = float((h * c).sum() / np.sqrt((h * h).sum() * (c * c).sum()))
        noise = ((vectors.T @ c) * vectors.T).sum(1)
        picture = reference_figures.alignment(values, noise, cosine, scale)
        caption = "Exact covariance of single-sample gradients along the Hessian's eigenvectors, all training data."
        blocks.append(FigureBlock("alignment", picture, caption, "Gradient noise against curvature"))
    own = [c for c in clouds if c.name in arrays and c.sampler == "replacement" and "Vhat" in arrays[c.name]]
    if dense and len({c.lr for c in own}) > 1 and curvature:
        traces = [trace_item(arrays[c.name]) for c in own]
        ends = np.array(
            [[t.value, t.value if t.low is None else t.low, t.high or t.value] for t in traces], dtype=float
        )
        predicted = np.array([np.trace(arrays[c.name]["Vhat"]) for c in own])
        dense = {c.name: dense[c.name] for c in clouds if c.name in dense and c.members}
        shares = {c.name: _trace_share(c, stages, dense[c.name]) for c in clouds if c.name in dense}
        picture = reference_figures.across_rates(np.array([c.lr for c in own]), ends, predicted, dense, shares)
        runs = ", ".join(f"{len(whole_runs(found))} of {len(found['mean_hessian'])}" for found in dense.values())
        caption = (
            f"What a learning rate changes. Size of the cloud: jackknife over groups of runs. Averaged Hessian: over "
            f"the runs that did not diverge ({runs}) and their steps; trace: mean over these runs with Student's 95 % "
            "interval."
        )
        blocks.append(FigureBlock("rates", picture, caption, "Comparison across learning rates"))
    return Section("Curvature and noise", blocks)


def _trace_share(cloud: Cloud, stages: Stages, found: Mapping[str, np.ndarray]) -> tuple[float, float, float]:
    """Trace of the averaged Hessian over that of all data at theta*: mean over the runs that did not diverge and its
    95 % interval; NaN without any."""
    before = stages.before(cloud.members[0], "curvature")
    whole = float(np.trace(stages.arrays(before[0])["hessian"]))
    each = np.trace(whole_runs(found), axis1=1, axis2=2) / whole
    if len(each) < 2:
        only = float(each[0]) if len(each) else float("nan")
        return only, only, only
    value, low, high = over_replicates(each)
    return float(value), float(low), float(high)


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
    "orbit of period two. Where a polish in float64 has come below the tolerance, rounding its weights to the study's "
    "dtype may give twice the gradient that is to be expected of it.",
)
