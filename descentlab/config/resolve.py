"""From a study's name or file and ``key=value`` arguments to validated cells and runs; mistakes come before any run."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..core.errors import UserError, nearest, raise_all
from . import schema
from .draft import Draft, Op, axis_ops, ops_of, takes
from .explain import bad_names, explain
from .grid import LIMIT, alternatives, product, shared, too_many, written
from .identity import cell_key, run_id
from .overrides import Override, parse_overrides
from .tree import Run, StudyDef, StudySpec
from .yaml12 import load_file

_META = ("study", "preset", "size", "grid")


@dataclass(frozen=True)
class Setting:
    """One line of the effective settings; ``axis`` marks the values of a grid axis."""

    key: str
    value: Any
    is_default: bool
    axis: bool = False

    def __iter__(self) -> Any:  # unpacks as (key, value, is_default)
        return iter((self.key, self.value, self.is_default))


@dataclass(frozen=True)
class Resolved:
    """A study with all its settings decided.

    ``document`` is what study.yaml gets: given back as a file, it resolves to the same run ids. ``cells`` are the
    points of the grid in stable order, ``runs`` the study's plan for them, ``notes`` what the user should know,
    ``axes`` the values of each key path that the grid is over, in any of its sub-grids.
    """

    study: StudyDef
    document: dict[str, Any]
    cells: list[StudySpec]
    runs: list[Run]
    notes: list[str] = field(default_factory=list)
    axes: dict[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def varying(self) -> list[str]:
        """Key paths whose values differ between cells that have them, in the order of the settings."""
        return [key for key, values in self._values().items() if not _all_equal(values)]

    def effective(self) -> list[Setting]:
        """The settings all cells share, then the grid axes, each with whether the study has it by default."""
        own, usual = self._table(), _default_table(self.study)
        options = _option_defaults(self.study, self.cells)
        rows = []
        for key, (value, axis) in own.items():
            default = usual.get(key, (options.get(key), False))
            rows.append(Setting(key, value, default == (value, axis), axis))
        return sorted(rows, key=lambda row: row.axis)

    def _values(self) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {}
        for cell in self.cells:
            for key, value in schema.flatten(cell).items():
                out.setdefault(key, []).append(value)
        return out

    def _table(self) -> dict[str, tuple[Any, bool]]:
        axes = self.axes
        common = {
            key: (values[0], False)
            for key, values in self._values().items()
            if key not in axes and key != "study" and len(values) == len(self.cells) and _all_equal(values)
        }
        preset = {"preset": (self.document["preset"], False)} if self.study.presets else {}
        return preset | common | {key: (values, True) for key, values in axes.items()}


def resolve(
    study: str | Path, overrides: Sequence[str] = (), *, limit: int | None = LIMIT, most_runs: int | None = None
) -> Resolved:
    """Decide every setting of a study.

    ``study`` is a shipped name, ``module:Name`` or a YAML file with a ``study:`` key; ``overrides`` are ``key=value``
    arguments; ``limit`` is the largest number of cells, ``most_runs`` of runs (None: any).

    Raises:
        UserError: for one mistake; UserErrors, one line each, for several.
    """
    reference, layer = _open(study)
    definition: StudyDef = _studies().find(reference)
    return _resolve(reference, definition, layer, parse_overrides(overrides), limit, most_runs)


def resolve_settings(settings: Mapping[str, Any], *, limit: int | None = LIMIT) -> Resolved:
    """As :func:`resolve`, for what a study's file would hold."""
    layer = dict(settings)
    reference = str(layer.pop("study"))
    return _resolve(reference, _studies().find(reference), layer, [], limit)


def _studies() -> Any:
    # By name, as for third parties' studies: studies are written on top of these settings, not the other way round.
    return importlib.import_module("descentlab.studies.registry")


def _open(study: str | Path) -> tuple[str, dict[str, Any]]:
    """The name of the study and the settings of its file, if it is one."""
    path = Path(study)
    name = str(study)
    if isinstance(study, str) and path.suffix.lower() not in (".yaml", ".yml") and not path.is_file():
        return name, {}
    layer = load_file(path)
    if not isinstance(layer, dict) or not isinstance(layer.get("study"), str):
        raise UserError("file", name, "settings with a 'study:' key, such as study: recovery")
    return layer.pop("study"), layer


def _rising(cell: StudySpec) -> str:
    """A note where the rate of a schedule that is meant to fall rises."""
    schedule, lr = getattr(cell, "schedule", None), getattr(getattr(cell, "optimizer", None), "lr", None)
    end = getattr(schedule, "end", None)
    if not isinstance(end, float) or not isinstance(lr, float) or end <= lr:
        return ""
    return f"schedule.end = {end:g} is above optimizer.lr = {lr:g}: the learning rate rises"


def _resolve(
    reference: str,
    definition: StudyDef,
    layer: dict[str, Any],
    given: Sequence[Override],
    limit: int | None,
    most_runs: int | None = None,
) -> Resolved:
    drafts, preset, size = _lay(definition, layer, given, limit)
    points = [product(draft.axes, limit, draft.groups) for draft in drafts]
    count = sum(len(sub_grid) for sub_grid in points)
    if limit is not None and count > limit:
        raise too_many(count, limit, f"it has {len(points)} sub-grids")
    notes = list(dict.fromkeys(note for draft in drafts for note in draft.notes))
    cells = _cells(drafts, points, size, definition)
    notes += dict.fromkeys(note for cell in cells if (note := _rising(cell)))
    first: dict[str, StudySpec] = {}
    for cell in cells:
        first.setdefault(cell_key(cell), cell)
    distinct = list(first.values())
    key_of = functools.cache(lambda index, role: cell_key(distinct[index], role))
    if len(distinct) < len(cells):
        notes.append(f"{len(cells) - len(distinct)} of {len(cells)} cells repeat another and are run once")
    planned = definition.plan(distinct)
    if most_runs is not None and len(planned) > most_runs:  # before a million of them get their ids
        raise UserError("runs", len(planned), f"at most {most_runs} without -y")
    runs = [
        Run(run_id(key_of(index, role), replicate, role, labels), index, replicate, role, labels)
        for index, replicate, role, labels in planned
    ]
    assert len({run.id for run in runs}) == len(runs), f"the plan of study {definition.name} repeats a run"
    base, grid, axes = _grid_of(drafts)
    document = {"study": reference, "preset": preset, "size": size, **_ordered(definition.spec, base)}
    if grid:
        document["grid"] = grid
    return Resolved(definition, document, distinct, runs, notes, axes)


def _grid_of(drafts: Sequence[Draft]) -> tuple[dict[str, Any], Any, dict[str, list[Any]]]:
    """The settings all sub-grids share, the grid to write down, and the values of each of its key paths."""
    base, rest = shared([draft.base for draft in drafts])
    grids = []
    axes: dict[str, list[Any]] = {}
    for draft, own in zip(drafts, rest, strict=True):
        whole = draft.axes | {path: [draft.filled(path, value)] for path, value in own.items()}
        grids.append(written(whole, draft.groups))
        for path, values in whole.items():
            known = axes.setdefault(".".join(path), [])
            known += [v for i, v in enumerate(values) if v not in known and v not in values[:i]]
    return base, grids[0] if len(grids) == 1 else grids, axes


@dataclass
class _Layer:
    """One layer's settings outside its grid, and the operations of each of its sub-grids (one without lists)."""

    settings: list[Op]
    grids: list[list[Op]]

    def ops(self, index: int) -> list[Op]:
        return self.settings + self.grids[index if len(self.grids) > 1 else 0]


def _lay(
    definition: StudyDef, layer: dict[str, Any], given: Sequence[Override], limit: int | None
) -> tuple[list[Draft], str, str]:
    """Lay all layers over each other, once for each sub-grid; returns the drafts and the names of preset and size."""
    errors: list[UserError] = []
    meta = {o.key: o for o in given if o.path[0] in _META}
    errors += [_meta_error(override) for key, override in meta.items() if key not in ("preset", "size")]
    preset = _choice("preset", definition.presets, layer, meta, errors)
    size = _choice("size", definition.sizes, layer, meta, errors)
    chosen = definition.presets.get(preset, {})
    options = {**definition.options, **chosen.get("options", {})}
    layers = [_layer(source, errors) for source in (chosen, definition.sizes.get(size, {}), layer)]
    several = [one for one in layers if len(one.grids) > 1]
    for lower in several[:-1]:
        lower.grids = [[]]  # sub-grids are one value: those of the highest layer that has any
    own = layers[-1]
    if own not in several:  # a sub-grid may set for itself what is set outside
        twice = {op.key for op in own.grids[0]} & {op.key for op in own.settings}
        errors += [UserError(key, "a value and a grid", "one of the two") for key in sorted(twice)]
    typed = [op for o in given if o.path[0] not in _META for op in _override_ops(o)]
    errors += _repeated(typed)
    drafts = []
    for index in range(len(several[-1].grids) if several else 1):
        draft = Draft(definition.spec, options)
        errors += [e for one in layers for e in draft.apply(one.ops(index), reorder=one is own)]
        errors += draft.apply(typed, say=True)
        for key, one in zip(("preset", "size"), layers, strict=False):
            if key in meta:
                draft.notes += _kept(meta[key], one.ops(index), own.ops(index))
        drafts.append(draft)
    if errors:  # what is left may hold more of them, of other keys: say all at once
        said = {error.key for error in errors}
        more = [e for draft in drafts for e in _cell_errors(draft, size, definition, limit) if e.key not in said]
        raise_all([*errors, *more])
    return drafts, preset, size


def _layer(layer: Mapping[str, Any], errors: list[UserError]) -> _Layer:
    ops = ops_of({key: value for key, value in layer.items() if key not in (*_META, "options")})
    grid = layer.get("grid")
    try:
        return _Layer(ops, [axis_ops(axes) for axes in alternatives({} if grid is None else grid)])
    except UserError as error:
        errors.append(error)
        return _Layer(ops, [[]])


def _override_ops(override: Override) -> list[Op]:
    if override.widens:
        return [Op(override.path, tuple(schema.plain(override.values)), axis=True)]
    value = override.values[0]
    if isinstance(value, Mapping) and value and "name" not in value:
        return ops_of(value, override.path)
    return [Op(override.path, (schema.plain(value),))]


def _repeated(ops: Sequence[Op]) -> list[UserError]:
    """A key given on its own and inside a block without a name: ``observe={every: 2} observe.every=3``."""
    seen: dict[str, Op] = {}
    errors = []
    for op in ops:
        if op.key in seen:
            errors.append(UserError(op.key, [seen[op.key].shown, op.shown], "one value per key"))
        seen[op.key] = op
    return errors


def _meta_error(override: Override) -> UserError:
    if override.path[0] == "grid":
        return UserError(override.key, override.text, "no grid key here", hint="write key=value1,value2")
    if override.path[0] == "study":
        return UserError(override.key, override.text, "the study before the settings: descentlab run STUDY key=value")
    return UserError(override.key, override.text, f"no key below {override.path[0]}, which is a single value")


def _choice(
    key: str,
    known: Mapping[str, Any],
    layer: Mapping[str, Any],
    meta: Mapping[str, Override],
    errors: list[UserError],
) -> str:
    """The preset or size asked for, on the command line or in the file."""
    value = layer.get(key, "default")
    if key in meta:
        value = meta[key].values[0] if not meta[key].widens else list(meta[key].values)
    if value == "default" or (isinstance(value, str) and value in known):
        return value
    names = sorted({"default", *known})
    errors.append(UserError(key, value, f"one of {', '.join(names)}", hint=nearest(str(value), names)))
    return "default"


def _kept(asked: Override, ops: Iterable[Op], own: Iterable[Op]) -> list[str]:
    """Notes on what a preset or size asked for on the command line does not change, because the file sets it."""
    in_file = {op.path: op for op in own}
    held = [f"{op.key} = {in_file[op.path].shown}" for op in ops if op.path in in_file and in_file[op.path] != op]
    return [f"{asked.key}={asked.text} does not change what the file sets: {', '.join(held)}"] if held else []


def _documents(draft: Draft, points: Iterable[Mapping[tuple[str, ...], Any]], size: str) -> list[dict[str, Any]]:
    """The nested settings of each cell."""
    documents = []
    for point in points:
        document: dict[str, Any] = {"size": size, **copy.deepcopy(draft.base)}
        for path in sorted(point, key=len):  # blocks before what lies inside them
            if takes(draft.spec, document, path):
                draft.assign(document, path, point[path])
        documents.append(document)
    return documents


def _validated(document: dict[str, Any], definition: StudyDef) -> tuple[StudySpec | None, list[UserError]]:
    errors = bad_names(definition.spec, document)
    try:
        cell = definition.spec.model_validate(document)
        if not errors:
            cell.check_given()
            definition.check(cell)
    except ValidationError as error:
        return None, errors + explain(error, definition.spec, document)
    except UserError as error:
        return None, [*errors, error]
    return cell, errors


def _cells(
    drafts: Sequence[Draft],
    points: Sequence[Iterable[Mapping[tuple[str, ...], Any]]],
    size: str,
    definition: StudyDef,
) -> list[StudySpec]:
    documents = [d for draft, own in zip(drafts, points, strict=True) for d in _documents(draft, own, size)]
    checked = [_validated(document, definition) for document in documents]
    raise_all(error for _, errors in checked for error in errors)
    return [own for cell, _ in checked if cell is not None for own in definition.expand(cell)]


def _cell_errors(draft: Draft, size: str, definition: StudyDef, limit: int | None) -> list[UserError]:
    """Mistakes in the cells of a draft that already has some; a grid beyond the limit is not looked through."""
    try:
        points = product(draft.axes, LIMIT if limit is None else limit, draft.groups)
    except UserError as error:
        return [error] if limit is not None else []
    return [e for document in _documents(draft, points, size) for e in _validated(document, definition)[1]]


def _ordered(spec: type[StudySpec], base: Mapping[str, Any]) -> dict[str, Any]:
    return {key: base[key] for key in spec.model_fields if key in base}


def _all_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values[1:])


def _default_table(definition: StudyDef) -> dict[str, tuple[Any, bool]]:
    return _resolve(definition.name, definition, {}, [], None)._table()


def _option_defaults(definition: StudyDef, cells: Sequence[StudySpec]) -> dict[str, Any]:
    """What each option named in ``cells`` holds when only its name is given."""
    draft = Draft(definition.spec, definition.options)
    out: dict[str, Any] = {}
    for cell in cells:
        for key in definition.spec.model_fields:
            value = getattr(cell, key)
            spec_field = definition.spec.model_fields[key]
            registry = schema.registry_of(spec_field)
            if registry and ":" not in str(value.name):
                given = draft.option((key,), registry, value.name)
                try:
                    block = registry.parse(given)
                except ValidationError:  # an option that needs a setting (replay) still has defaults for the others
                    block = registry.lookup(value.name).model_construct(**given)
                out.update({f"{key}.{k}": v for k, v in schema.flatten(block).items()})
    return out
