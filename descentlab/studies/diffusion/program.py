"""How the diffusion study runs: each stage, what it takes from those before it and what it leaves for those after it.

Artifacts (``blocks/<key>/artifacts``): ``theta.npz`` of ``sgd`` and ``gd`` (weights and buffers), ``curvature.npz``,
``hessians.npz``, ``cloud.npz``, ``path.npz`` of the control, ``losses.npz`` of ``val_loss``, ``score.npz``,
``statistics.npz`` and, of a transformer, ``language.npz``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import StudyError
from ...core.stage import Stage
from ...core.state import State
from ...core.streams import Streams
from ...core.tree import Tree, stack
from ...engine.reducing import ReducingRecorder
from ...observe.noise import gradient_covariance
from ...observe.training import BatchLoss, GradientNorm
from ...optim.specs import Constant, Sgd
from ...theory.orbit import period_two
from ...workloads.loading import load_data
from ...workloads.slices import sliced
from ...workloads.specs import Full, Replacement, Shuffle
from ..training.spec import Splits
from .directions import chosen_directions, group_variances, look_times, snapshot_times, without_pull
from .program_cloud import Looks, open_weights
from .program_curvature import CurvatureAlong, dense_hessian, pieces, set_weights
from .program_descent import Descent
from .program_language import language, marks
from .program_polish import Objective, polished
from .program_pull import Pull
from .program_theory import predict
from .spec import INPUTS, LANGUAGE, OF_ALL, READS, DiffusionSpec
from .statistics import measured

Bench = Any  # launch.staged.Bench, which this room may not import
ROWS = 20_000  # rows that the reference's descent leaves at most
KINDS: dict[str, Any] = {"curvature": "derive", "val_loss": "evaluate", "score": "derive"}
KINDS |= {"statistics": "derive", "language": "derive"}


def stages(cell: DiffusionSpec) -> list[Stage]:
    """Every stage with the settings it reads, inputs first."""
    whole, made = cell.identity(), []
    for name, inputs in INPUTS.items():
        own = {}
        for key in READS[name]:
            block, _, inner = key.partition(".")
            own[key] = whole.get(block, {}).get(inner, {}) if inner else whole.get(block)
        many = {"members": cell.members()} if name in OF_ALL else {}
        made.append(
            Stage(name, KINDS.get(name, "train"), {**own, **many}, inputs, semantics=cell.numbers().get(name, 1))
        )
    return made


def updates(cell: DiffusionSpec, stage: str) -> int:
    """Updates of one run of a stage; 1 where it makes none."""
    cell = at_scale(cell)
    counts = {"gd": cell.reference.gd.steps, "hessians": cell.hessians.steps}
    counts |= {"sgd_cloud": cell.cloud.steps, "gd_control": cell.cloud.steps}
    if stage == "sgd":
        n = len(sliced(load_data(cell.dataset), cell.splits.model_dump()).x_train)
        return cell.reference.sgd.epochs * (n // cell.batch_size)
    return max(1, counts.get(stage, 1))


def at_scale(cell: DiffusionSpec) -> DiffusionSpec:
    """The cell with every number that ``scale`` shrinks shrunk."""
    if cell.scale == 1:
        return cell
    sgd, gd = cell.reference.sgd, cell.reference.gd
    batches = max(2, round(100 * cell.scale))
    splits = Splits(train=f"train[:{batches * cell.batch_size}]", test=f"test[:{batches * cell.batch_size}]")
    smaller = {
        "splits": splits,
        "reference": cell.reference.model_copy(
            update={
                "sgd": sgd.model_copy(update={"epochs": cell.count(sgd.epochs)}),
                "gd": gd.model_copy(update={"steps": cell.count(gd.steps, 3)}),
            }
        ),
        "hessians": cell.hessians.model_copy(update={"steps": cell.count(cell.hessians.steps, 2)}),
        "cloud": cell.cloud.model_copy(update={"steps": cell.count(cell.cloud.steps, 4)}),
    }
    return cell.model_copy(update=smaller)


def run_stage(bench: Bench) -> Mapping[str, int] | None:
    """Do one stage; run id -> step from which it is not finite, beside what the recorder has noticed."""
    return STAGES[bench.stage](bench, at_scale(bench.cell))


def flat(params: Mapping[str, Tensor]) -> np.ndarray:
    """Weights ``[M, D]`` in float64, all parameters in their order."""
    return torch.cat([p.detach().flatten(1) for p in params.values()], dim=1).double().cpu().numpy()


def packed(state: State) -> dict[str, np.ndarray]:
    """Weights ``[D]`` and buffers of the only member."""
    buffers = {f"buffer/{name}": b[0].cpu().numpy() for name, b in state.buffers.items()}
    return {"theta": flat(state.params)[0], **buffers}


def stored(parts: Any, at: Mapping[str, np.ndarray]) -> tuple[Tree, Tree]:
    """Parameters and buffers of one member from stored weights, as the model has them."""
    params, buffers = parts.fresh(0)
    pieces = np.split(at["theta"], np.cumsum([p.numel() for p in params.values()])[:-1])
    params = {k: torch.from_numpy(v.reshape(p.shape)).to(p) for (k, p), v in zip(params.items(), pieces, strict=True)}
    return params, {k: torch.from_numpy(np.asarray(at[f"buffer/{k}"])).to(b) for k, b in buffers.items()}


def starting_at(parts: Any, cell: DiffusionSpec, at: Mapping[str, np.ndarray]) -> Pull:
    """Let every member start from theta*, with the pull there is."""
    (params, buffers), pull = stored(parts, at), Pull.of(cell, at)
    parts.fresh = lambda replicate: (params, buffers)
    parts.many, parts.single = pull.on(parts.many), pull.on(parts.single)
    return pull


def descent(
    bench: Bench,
    parts: Any,
    lr: float,
    steps: int,
    evaluations: int,
    at: Mapping[str, np.ndarray] | None,
    pull: Pull | None = None,
) -> Descent:
    """One model's descent from stored weights, or from its initial ones; evaluated about so often."""
    params, buffers = parts.fresh(0) if at is None else stored(parts, at)
    start = {"params": stack([params]), "buffers": stack([buffers])}
    every, evaluate = max(1, steps // ROWS), max(1, steps // max(1, evaluations))
    return Descent(bench, parts, lr, steps, every=every, evaluate_every=evaluate, start=start, pull=pull)


def plain(cell: DiffusionSpec, lr: float, sampler: Any) -> DiffusionSpec:
    """The cell with plain SGD at a constant rate."""
    return cell.model_copy(update={"optimizer": Sgd(lr=lr), "schedule": Constant(), "sampler": sampler})


def _sgd(bench: Bench, cell: DiffusionSpec) -> Mapping[str, int]:
    own, steps = cell.reference.sgd, bench.block["steps"]
    sampler = Shuffle() if own.sampler == "shuffle" else Replacement()
    made = descent(bench, bench.parts(plain(cell, own.lr, sampler)), own.lr, steps, own.evaluations, None)
    path: dict[int, np.ndarray] = {int(k): v.numpy() for k, v in made.own.items()}
    due = frozenset(marks(steps) if cell.model.name in LANGUAGE else ())
    if 0 in due and not path:
        path[0] = flat(made.state.params)[0]

    def keep(step: int, state: State) -> None:
        if step in due:
            path[step] = flat(state.params)[0]

    made.run(keep, lambda: {str(step): torch.from_numpy(theta) for step, theta in path.items()})
    kept = {"path_steps": np.array(sorted(path)), "path": np.array([path[step] for step in sorted(path)])}
    bench.save("theta.npz", {**packed(made.state), **(kept if path else {})})
    return made.diverged()


def _gd(bench: Bench, cell: DiffusionSpec) -> Mapping[str, int]:
    own, start = cell.reference.gd, bench.input("sgd", "theta.npz")
    made = descent(bench, bench.parts(plain(cell, own.lr, Full())), own.lr, own.steps, own.evaluations, start)
    last = [v.numpy() for _, v in sorted(made.own.items())]

    def keep(step: int, state: State) -> None:
        last.append(flat(state.params)[0])
        del last[:-3]

    made.run(keep, lambda: {f"last{i}": torch.from_numpy(v) for i, v in enumerate(last)})
    if own.steps:
        start = packed(made.state)
    bench.save("theta.npz", _judged(bench, cell, start, last))
    return made.diverged()


def _judged(bench: Bench, cell: DiffusionSpec, start: dict[str, np.ndarray], last: list[np.ndarray]) -> dict[str, Any]:
    """theta*: where descent ended, polished if asked for, and whether descent ended in an orbit (``last`` points)."""
    own = cell.reference.gd
    orbit = period_two(np.stack(last)) if len(last) == 3 else None
    found = {"gd_theta": start["theta"], "orbit_ratio": np.array(np.nan), "orbit_step": np.array(np.nan)}
    found["period_two"] = np.array(False)
    if orbit is not None:
        found |= {"orbit_ratio": np.array(orbit.ratio), "orbit_step": np.array(orbit.step)}
        found["period_two"] = np.array(orbit.period_two)
    if own.polish != "none" and np.isfinite(start["theta"]).all():
        work = bench.workload(plain(cell, own.lr, Full()))
        asked = (own.polish_steps, own.tolerance, bench.advance, Pull.of(cell, found))
        theta, path = polished(own.polish, module_at(cell, work, start), work, start["theta"], *asked)
        start = {**start, "theta": theta.astype(cell.dtype).astype(np.float64)}  # as the runs will have it
        module = module_at(cell, work, start)
        found |= {
            "polish_gradients": np.array(path),
            "train_loss": np.array(Objective(module, work, Pull()).slope()[0]),
        }
    return {**start, **found}


def module_at(cell: DiffusionSpec, work: Any, at: Mapping[str, np.ndarray]) -> nn.Module:
    """The model with stored weights and buffers, in evaluation mode."""
    module = work.module(Streams(cell.seed), 0)
    set_weights(module, at["theta"])
    for name, buffer in module.named_buffers():
        buffer.copy_(torch.from_numpy(np.asarray(at[f"buffer/{name}"])))
    return module.eval()


def _curvature(bench: Bench, cell: DiffusionSpec) -> None:
    """Gradient, Hessian and covariance of single-sample gradients at theta*, of all training data, in float64."""
    work, at = bench.workload(cell), bench.input("gd", "theta.npz")
    if not np.isfinite(at["theta"]).all():
        raise StudyError("descent to theta* has diverged; lower reference.sgd.lr or reference.gd.lr")
    module, data = module_at(cell, work, at), (work.data.x_train, work.data.y_train)
    pull = Pull.of(cell, at)
    hessian = pull.added(dense_hessian(module, work.loss, pieces(module, data)))
    bench.advance(0)
    noise = gradient_covariance(module, work.loss, data)
    values, vectors = np.linalg.eigh(hessian)
    gradient = noise.mean.numpy(force=True) + pull.gradient(at["theta"])
    covariance = noise.covariance.numpy(force=True)
    arrays = {"hessian": hessian, "covariance": covariance, "gradient": gradient}
    bench.save("curvature.npz", {**arrays, "eigenvalues": values, "eigenvectors": vectors})
    row = {"grad_norm": np.linalg.norm(gradient), "lambda_max": values[-1], "lambda_min": values[0]}
    bench.rows({"step": [0], **{k: [float(v)] for k, v in row.items()}, "noise_trace": [float(np.trace(covariance))]})


def _hessians(bench: Bench, cell: DiffusionSpec) -> None:
    own, lr = cell.hessians, float(cell.optimizer.lr)
    parts = bench.parts(cell)
    parts.observables, parts.every, parts.evaluate_every = [BatchLoss(), GradientNorm()], 1, 0
    at, work = bench.input("gd", "theta.npz"), bench.workload(cell)
    pull = starting_at(parts, cell, at)
    engine = bench.engine(parts, lr, own.steps)
    along = CurvatureAlong(own, module_at(cell, work, at), work, pull, bench.held())
    each = np.zeros(len(bench.runs), dtype=np.int64)

    def look(state: State, step: int) -> None:
        if step % own.every == 0 and step < own.steps:
            index, theta = parts.sampler.indices(engine.replicates, each, each + step), flat(state.params)
            for m in np.flatnonzero(np.isfinite(theta).all(axis=1)):
                along.look(int(m), step, theta[m], {k: b[m] for k, b in state.buffers.items()}, index[m])

    if engine.step == 0:
        look(engine.state, 0)
    bench.train(engine, lambda progress: look(progress.state, progress.step), along.held)
    bench.save("hessians.npz", along.arrays())


def _cloud(bench: Bench, cell: DiffusionSpec) -> dict[str, int]:
    own, lr = cell.cloud, float(cell.optimizer.lr)
    at, curvature = bench.input("gd", "theta.npz"), bench.input("curvature", "curvature.npz")
    keep_rows = cell.observe.reduce == "none"
    bench.recorder = ReducingRecorder(keep_rows=True) if keep_rows else ReducingRecorder()
    parts = bench.parts(cell)
    parts.observables, parts.evaluate_every = [BatchLoss(), GradientNorm()], 0
    starting_at(parts, cell, at)
    engine = bench.engine(parts, lr, own.steps)
    epoch = parts.sampler.steps_per_epoch
    times = look_times(own.steps, own.looks, epoch, own.snapshots)
    picked = chosen_directions(curvature["eigenvalues"], own.projections)
    kept = snapshot_times(own.steps, epoch, own.snapshots)
    looks = Looks(times, kept, at["theta"], curvature["eigenvectors"], picked, bench.held(), own.series)
    weights = None
    if own.store == "weights":
        path = bench.path("weights.npy")
        weights = open_weights(path, own.steps, len(bench.runs), at["theta"], engine.step > 0)

    def after(progress: Any) -> None:
        if weights is not None:
            weights[:, progress.step] = flat(progress.state.params)
        if looks.wants(progress.step):
            looks.look(progress.step, flat(progress.state.params), progress.state.buffers)

    bench.train(engine, after, looks.held)
    if weights is not None:
        weights.flush()  # type: ignore[attr-defined]
    runs = np.array(bench.runs)
    bench.save("cloud.npz", {"runs": runs, "steps_per_epoch": np.array(epoch), **looks.arrays()})
    return looks.lost(bench.runs)


def _control(bench: Bench, cell: DiffusionSpec) -> Mapping[str, int]:
    """Full-batch gradient descent from theta* with the cloud's learning rate, or that times B / N."""
    steps, lr = cell.cloud.steps, float(cell.optimizer.lr)
    at, curvature = bench.input("gd", "theta.npz"), bench.input("curvature", "curvature.npz")
    n = len(sliced(load_data(cell.dataset), cell.splits.model_dump()).x_train)
    if cell.control.scaling == "B/N":
        lr *= cell.batch_size / n
    made = descent(bench, bench.parts(plain(cell, lr, Full())), lr, steps, 20, at, Pull.of(cell, at))
    times = look_times(steps, cell.cloud.looks, n // cell.batch_size, cell.cloud.snapshots)
    picked = chosen_directions(curvature["eigenvalues"], cell.cloud.projections)
    looks = Looks(times, (), at["theta"], curvature["eigenvectors"], picked, made.own)

    def after(step: int, state: State) -> None:
        if step in looks.due:
            looks.look(step, flat(state.params), {})

    made.run(after, looks.held)
    found = looks.arrays()
    kept = {"steps": found["steps"], "mean": found["mean"], "projections": found["projections"][:, 0]}
    bench.save("path.npz", {**kept, "lr": np.array(lr), "directions": found["directions"]})
    return made.diverged()


def gathered(bench: Bench) -> dict[str, Any]:
    """What the blocks of a cloud hold of the runs this cell asks for, one after the other."""
    wanted = bench.cell.members()
    blocks = bench.inputs("sgd_cloud", "cloud.npz")
    count, kept = 0, []
    for block in blocks:
        take = slice(0, min(len(block["runs"]), wanted - count))
        count += len(block["runs"][take])
        kept.append((block, take))
    steps = blocks[0]["snapshot_steps"]
    theta = {int(t): np.concatenate([b["snapshots"][i, take] for b, take in kept]) for i, t in enumerate(steps)}
    names = [k for k in blocks[0] if k.startswith("buffer/")]
    buffers = {k: np.concatenate([b[k][take] for b, take in kept]) for k in names}
    found = {"theta": theta, "buffers": buffers, "blocks": blocks, "epoch": int(blocks[0]["steps_per_epoch"])}
    if all("series" in b for b in blocks):
        found["series"] = np.concatenate([b["series"][:, take] for b, take in kept], axis=1).transpose(1, 0, 2)
    return found


def _val_loss(bench: Bench, cell: DiffusionSpec) -> None:
    """Test loss of every run where it started and where it ended, and of the mean of all weights."""
    cloud, at = gathered(bench), bench.of("sgd_cloud").input("gd", "theta.npz")
    parts = bench.parts(cell)
    end = cloud["theta"][max(cloud["theta"])]
    alive = np.isfinite(end).all(axis=1)
    buffers = {k.partition("/")[2]: v for k, v in cloud["buffers"].items()}
    own = {k.partition("/")[2]: v[None] for k, v in at.items() if k.startswith("buffer/")}
    loss, accuracy = _evaluated(parts, end, buffers)
    first = _evaluated(parts, at["theta"][None], own)
    mean = _evaluated(
        parts, end[alive].mean(0, keepdims=True), {k: v[alive].mean(0, keepdims=True) for k, v in buffers.items()}
    )
    arrays = {"loss": loss, "accuracy": accuracy, "start_loss": first[0], "start_accuracy": first[1]}
    bench.save("losses.npz", {**arrays, "mean_model_loss": mean[0], "mean_model_accuracy": mean[1]})
    bench.rows(
        {
            "step": [cell.cloud.steps - 1],
            "test_loss": [float(loss[alive].mean())],
            "test_accuracy": [float(accuracy[alive].mean())],
        }
    )


def _evaluated(parts: Any, theta: np.ndarray, buffers: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Loss and accuracy ``[M]`` on the test set at the weights ``[M, D]``."""
    params, empty = parts.fresh(0)
    cuts = np.cumsum([p.numel() for p in params.values()])[:-1]
    pieces = np.split(theta, cuts, axis=1)
    stacked = {
        k: torch.from_numpy(np.ascontiguousarray(v.reshape(len(theta), *p.shape))).to(p)
        for (k, p), v in zip(params.items(), pieces, strict=True)
    }
    held = {k: torch.from_numpy(np.asarray(buffers[k])).to(b) for k, b in empty.items()}
    loss, accuracy = parts.evaluator.evaluate(State.start(stacked, held), *parts.test)
    return loss.double().numpy(force=True), accuracy.double().numpy(force=True)


def _score(bench: Bench, cell: DiffusionSpec) -> None:
    """Measured covariance V and predicted Vhat after the last step and after half an epoch, and where they differ."""
    cloud, curvature = gathered(bench), bench.input("curvature", "curvature.npz")
    work = bench.workload(cell)
    module = module_at(cell, work, bench.of("curvature").input("gd", "theta.npz"))
    times = [int(t) for t in cloud["blocks"][0]["steps"]]
    pull = Pull.of(cell, bench.of("curvature").input("gd", "theta.npz"))
    found = predict(cell, curvature, module, work, pull, times, sorted(cloud["theta"]), bench.advance)
    for step, theta in cloud["theta"].items():
        alive = theta[np.isfinite(theta).all(axis=1)]
        ending = "" if step == max(cloud["theta"]) else f"_{step}"
        if len(alive) > 1:
            found[f"V{ending}"] = np.cov(alive.T)
            found[f"group_variances{ending}"] = group_variances(alive @ curvature["eigenvectors"])
            found[f"mean{ending}"] = alive.mean(0) - bench.of("curvature").input("gd", "theta.npz")["theta"]
        found[f"runs{ending}"] = np.array(len(alive))
    found["rounding"] = np.array(_rounding(cell, cloud))
    arrays = {"eigenvalues": curvature["eigenvalues"], "eigenvectors": curvature["eigenvectors"]}
    extra = {"lr": np.array(float(cell.optimizer.lr)), "steps_per_epoch": np.array(cloud["epoch"])}
    bench.save("score.npz", {**found, **arrays, **extra, "snapshot_steps": np.array(sorted(cloud["theta"]))})
    trace = float(np.trace(found["V"])) if "V" in found else float("nan")
    bench.rows({"step": [cell.cloud.steps - 1], "cloud_trace": [trace]})


def _rounding(cell: DiffusionSpec, cloud: Mapping[str, Any]) -> float:
    """The variance that rounding alone may give a direction."""
    unit = torch.finfo(getattr(torch, cell.dtype)).eps * float(np.abs(cloud["blocks"][0]["snapshots"][0, 0]).max())
    return cell.cloud.steps * unit**2


def _statistics(bench: Bench, cell: DiffusionSpec) -> None:
    """What kind of process the cloud is: see :mod:`.statistics`. Runs that are not finite at the end are left out."""
    cloud, curvature = gathered(bench), bench.input("curvature", "curvature.npz")
    last = max(cloud["theta"])
    ends = cloud["theta"][last] - bench.of("curvature").input("gd", "theta.npz")["theta"]
    alive, series, first = np.isfinite(ends).all(axis=1), cloud.get("series"), cloud["blocks"][0]
    o: Any = cell.optimizer
    plain_sgd = o.name == "sgd" and not (o.momentum or o.weight_decay or o.dampening)
    bench.rows({"step": [cell.cloud.steps - 1]})
    if alive.sum() < 3:
        bench.save("statistics.npz", {"runs": np.array(int(alive.sum()))})
        return
    found = measured(
        ends[alive] @ curvature["eigenvectors"],
        None if series is None else series[alive],
        first.get("series_steps", np.empty(0, dtype=np.int64)),
        first["directions"],
        curvature,
        float(o.lr),
        cell.batch_size,
        last,
        plain_sgd and cell.sampler.name == "replacement",
        _rounding(cell, cloud),
    )
    bench.save("statistics.npz", found)


def _language(bench: Bench, cell: DiffusionSpec) -> None:
    """See :mod:`.program_language`. Runs that are not finite at the end are left out; below three nothing is said."""
    cloud, work, before = gathered(bench), bench.workload(cell), bench.input("sgd", "theta.npz")
    if "path" not in before:
        raise StudyError(
            "stage sgd of this directory was computed by an earlier version, which kept no weights along the training; "
            "use --overwrite or another --out"
        )
    end = cloud["theta"][max(cloud["theta"])]
    alive = end[np.isfinite(end).all(axis=1)]
    bench.rows({"step": [cell.cloud.steps - 1]})
    if len(alive) < 3:
        bench.save("language.npz", {"runs": np.array(len(alive))})
        return
    at = bench.of("curvature").input("gd", "theta.npz")
    path, steps = [*before["path"], at["theta"]], [*before["path_steps"].tolist(), -1]
    module = module_at(cell, work, at)
    curvature = without_pull(bench.input("curvature", "curvature.npz"), cell.reference.gd.localise)
    found = language(module, work.data.x_test, path, steps, alive, curvature)
    bench.save("language.npz", found)


STAGES: dict[str, Callable[[Any, DiffusionSpec], Mapping[str, int] | None]] = {
    "sgd": _sgd,
    "gd": _gd,
    "curvature": _curvature,
    "hessians": _hessians,
    "sgd_cloud": _cloud,
    "gd_control": _control,
    "val_loss": _val_loss,
    "score": _score,
    "statistics": _statistics,
    "language": _language,
}
