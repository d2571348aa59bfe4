"""A study's settings while layers are laid over each other: nested values, grid axes, and what was dropped.

Class defaults < preset < size < study file < command line. Within one layer the order does not matter: whole blocks
go first, then what lies inside them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from ..core.errors import UserError, closest
from ..core.specs import Option, Registry, Spec
from . import schema
from .explain import option_name, settings_text
from .grid import Axis, Path
from .yaml12 import inline


@dataclass(frozen=True)
class Op:
    """One setting of one layer: a key path and its value, or the values of a grid axis."""

    path: Path
    values: tuple[Any, ...]
    axis: bool = False
    group: str = ""  # axes of one group vary together

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def shown(self) -> Any:
        return list(self.values) if self.axis else self.values[0]


def ops_of(layer: Mapping[str, Any], at: Path = ()) -> list[Op]:
    """The operations nested settings stand for: a block with a ``name`` replaces, one without edits what is there."""
    out: list[Op] = []
    for key, value in layer.items():
        path = (*at, str(key))
        if isinstance(value, Mapping) and "name" not in value:
            out += ops_of(value, path)
        else:
            out.append(Op(path, (schema.plain(value),)))
    return out


def axis_ops(axes: Iterable[Axis]) -> list[Op]:
    """The operations of one sub-grid."""
    return [Op(tuple(a.key.split(".")), tuple(schema.plain(a.values)), axis=True, group=a.group) for a in axes]


class Draft:
    """Settings of a study under construction.

    ``base`` holds the nested values, ``axes`` the grid (key path -> values), ``groups`` which axes vary together (key
    path -> group), ``notes`` what the user should know.
    ``options[key path][name]`` are the defaults that an option has in this study.
    """

    def __init__(self, spec: type[Spec], options: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        self.spec, self.options = spec, options
        self.base: dict[str, Any] = {}
        self.axes: dict[Path, list[Any]] = {}
        self.groups: dict[Path, str] = {}
        self._layers = 0
        self.notes: list[str] = []

    def apply(self, ops: Iterable[Op], *, say: bool = False, reorder: bool = False) -> list[UserError]:
        """Lay one layer over what is there; returns its mistakes, each of which leaves the draft as it was.

        ``say`` adds notes on what is dropped. ``reorder`` puts the layer's axes in its own order, after all others.
        """
        ops = list(ops)
        self._layers += 1
        before = {op.path: self._blocks(op.path) for op in ops if self._registry(op.path)}
        dropped_axes: dict[Path, list[Path]] = {}
        errors: list[UserError] = []
        done: list[Op] = []
        for op in sorted(ops, key=lambda op: len(op.path)):
            try:
                dropped_axes[op.path] = self._apply(op)
                done.append(op)
            except UserError as error:
                errors.append(error)
        if reorder:
            for op in ops:
                if op.path in self.axes:
                    self.axes[op.path] = self.axes.pop(op.path)
        if say:
            self._note_drops(done, before, dropped_axes)
        return errors

    # one operation

    def _apply(self, op: Op) -> list[Path]:
        """Apply one operation; returns the axes inside the block it replaced."""
        field = self._check_path(op)
        registry = schema.registry_of(field)
        values = [self.option(op.path, registry, v) if registry else _leaf(op, field, v) for v in op.values]
        inside = [axis for axis in self.axes if registry and _inside(axis, op.path)]
        self.groups.pop(op.path, None)
        for axis in inside:
            del self.axes[axis]
            self.groups.pop(axis, None)
        if op.axis:
            if schema.is_extent(field) or op.path == ("study",):
                raise UserError(op.key, list(op.values), "one value: it says how much or where to run, not what")
            self.axes[op.path] = values if op.group else self._distinct(op, values)
            if op.group:
                self.groups[op.path] = f"{self._layers}:{op.group}"  # a group is one layer's
            _remove(self.base, op.path)
            return inside
        self.axes.pop(op.path, None)
        block_axes = [axis for axis in self.axes if _inside(op.path, axis)]
        if not block_axes:
            self.assign(self.base, op.path, values[0])
        for axis in block_axes:
            for i, block in enumerate(self.axes[axis]):
                holder = _nested(axis, copy.deepcopy(block))
                if takes(self.spec, holder, op.path):
                    self.assign(holder, op.path, values[0])
                    self.axes[axis][i] = _get(holder, axis)
        return inside

    def assign(self, doc: dict[str, Any], path: Path, value: Any) -> None:
        """Set the value at ``path`` in nested settings, filling in the default blocks on the way."""
        cls: type[Spec] | None = self.spec
        for key in path[:-1]:
            field = cls.model_fields[key] if cls is not None else None
            if field is not None and not isinstance(doc.get(key), dict):
                name = doc.get(key)
                doc[key] = {"name": name} if isinstance(name, str) else schema.default_block(field)
            doc = doc.setdefault(key, {})
            cls = schema.class_of(field, doc) if field is not None else None
        doc[path[-1]] = copy.deepcopy(value)

    def option(self, path: Path, registry: Registry, value: Any) -> Any:
        """A name or named block as a full block: the study's defaults for that option under what was given."""
        if value is None:
            return None
        try:
            name = option_name(registry, value)
            registry.lookup(name)
        except UserError as error:
            raise UserError(".".join(path), value, error.expected, hint=error.hint) from None
        given = dict(value) if isinstance(value, Mapping) else {}
        defaults = schema.plain(self.options.get(".".join(path), {}).get(name, {}))
        return {"name": name, **defaults, **given}

    def filled(self, path: Path, value: Any) -> Any:
        """``value`` as it would be read back at ``path``: an option with the study's defaults for it."""
        registry = self._registry(path)
        return self.option(path, registry, value) if registry else value

    def _distinct(self, op: Op, values: Sequence[Any]) -> list[Any]:
        out: list[Any] = []
        twice: list[Any] = []
        for value in values:
            if not any(_same(value, other) for other in out):
                out.append(value)
            elif not any(_same(value, other) for other in twice):
                twice.append(value)
        for value in twice:
            self.notes.append(f"{op.key}: {_brief(value)} is given more than once and run once")
        return out

    # where a key path leads

    def _check_path(self, op: Op) -> FieldInfo:
        """The field at the operation's path, which must exist in every option of the grid that has settings at all."""
        docs = self._examples(op.path)
        able = [doc for doc in docs if takes(self.spec, doc, op.path)]
        fields = [self._field(doc, op, several=len(able) > 1) for doc in able or docs]
        for doc in docs:
            if doc not in able and able:
                called = schema.walk(self.spec, doc, op.path)[-1].called
                self.notes.append(f"{op.key} does not apply to {called}, which has no settings")
        return fields[0]

    def _examples(self, path: Path) -> list[dict[str, Any]]:
        """The base settings or, with an axis above ``path``, those of each of its values."""
        above = [axis for axis in self.axes if _inside(path, axis)]
        if not above:
            return [self.base]
        axis = max(above, key=len)
        return [_nested(axis, value) for value in self.axes[axis]]

    def _field(self, doc: Mapping[str, Any], op: Op, several: bool) -> FieldInfo:
        stops = schema.walk(self.spec, doc, op.path)
        last = stops[-1]
        if last.field is None:
            raise self._unknown(op, last, several)
        if len(stops) < len(op.path) and not schema.is_mapping(last.field):
            single = ".".join(op.path[: len(stops)])
            raise UserError(op.key, op.shown, f"no key below {single}, which is a single value")
        return last.field

    def _unknown(self, op: Op, stop: schema.Stop, several: bool) -> UserError:
        suggestion = self.suggest(op.path)
        hint = f"did you mean '{suggestion}'?" if suggestion and suggestion != op.key else ""
        if stop.key == "name":
            block = ".".join(op.path[:-1])
            return UserError(op.key, op.shown, "no .name", hint=f"to choose an option write {block}={op.values[0]}")
        dotted = next((part for part in op.path if "." in part), None)
        if dotted:  # a file's key written as on the command line
            outer, _, inner = dotted.partition(".")
            return UserError(op.key, op.shown, f"a block in a file, {outer}: {{{inner}: {op.shown}}}")
        if several:
            expected = f"a setting of every option in the grid; {stop.called} has {settings_text(stop.owner)}"
        elif hint and stop.owner is self.spec:
            expected = "a setting of the study"  # the near name says more than the long list
        else:
            expected = f"a setting of {stop.called} ({settings_text(stop.owner)})"
        return UserError(op.key, op.shown, expected, hint=hint)

    def suggest(self, path: Path) -> str | None:
        """The existing key path most like ``path``: corrected word by word, else the one that ends in its last word."""
        known = {p for doc in self._all_docs() for p in schema.key_paths(self.spec, doc)}
        fixed: Path = ()
        for key in path:
            children = {p[len(fixed)] for p in known if len(p) > len(fixed) and p[: len(fixed)] == fixed}
            best = key if key in children else closest(key, children)
            if best is None:
                break
            fixed = (*fixed, best)
        else:
            return ".".join(fixed)
        tails = sorted((p for p in known if p[-1] == path[-1]), key=lambda p: (len(p), p))
        return ".".join(tails[0]) if tails else None

    def _all_docs(self) -> list[dict[str, Any]]:
        return [self.base, *(_nested(axis, value) for axis, values in self.axes.items() for value in values)]

    def _registry(self, path: Path) -> Registry | None:
        """The registry of the option at ``path``; None when there is no such option."""
        stops = schema.walk(self.spec, self._examples(path)[0], path)
        field = stops[-1].field if len(stops) == len(path) else None
        return schema.registry_of(field) if field is not None else None

    # what was dropped

    def _blocks(self, path: Path) -> list[dict[str, Any]]:
        """The option blocks now at ``path``: of the grid, of the base, or by default."""
        if path in self.axes:
            found = self.axes[path]
        else:
            doc = self._examples(path)[0]
            field = schema.walk(self.spec, doc, path)[-1].field
            found = [_get(doc, path) or (schema.default_block(field) if field else {})]
        return [copy.deepcopy(b) for b in found if isinstance(b, dict) and b]

    def _note_drops(self, ops: Sequence[Op], before: Mapping[Path, list[Any]], axes: Mapping[Path, list[Path]]) -> None:
        for op in ops:
            for axis in axes[op.path]:
                self.notes.append(f"{op.key}={_brief(op.shown)} drops the grid over {'.'.join(axis)}")
            if op.path not in before:
                continue
            said = {o.path[len(op.path)] for o in ops if _inside(o.path, op.path)}
            for value in op.values:
                said |= set(value) if isinstance(value, Mapping) else set()
            for old in before[op.path]:
                lost = self._lost(op.path, old, said)
                if lost:
                    what = ", ".join(f"{k} = {inline(v)}" for k, v in lost.items())
                    new = ",".join(_brief(v) for v in op.values)
                    whose = "the study sets" if self._by_default(op.path, lost) else "was set"
                    self.notes.append(f"{op.key}={new} drops what {whose} for '{old['name']}': {what}")

    def _by_default(self, path: Path, lost: Mapping[str, Any]) -> bool:
        """Whether these settings are the study's own, not a file's or the user's."""
        field = schema.walk(self.spec, self._examples(path)[0], path)[-1].field
        block = schema.default_block(field) if field else {}
        return all(k in block and block[k] == v for k, v in lost.items())

    def _lost(self, path: Path, old: dict[str, Any], said: set[str]) -> dict[str, Any]:
        """Settings of a replaced block that were not its option's defaults and no new block holds."""
        registry = self._registry(path)
        if registry is None:
            return {}
        fields = registry.lookup(old["name"]).model_fields
        defaults = {k: schema.default_of(f) for k, f in fields.items()} | self.option(path, registry, old["name"])
        new = [b for b in self._blocks(path) if b.get("name") == old["name"]]
        return {
            k: v
            for k, v in old.items()
            if k not in said and k in fields and v != defaults.get(k) and not any(b.get(k, None) == v for b in new)
        }


def takes(spec: type[Spec], doc: Mapping[str, Any], path: Path) -> bool:
    """False when ``path`` leads into an option that has no settings at all, such as fault ``none``."""
    last = schema.walk(spec, doc, path)[-1]
    return not (last.field is None and issubclass(last.owner, Option) and not schema.settings_of(last.owner))


def _leaf(op: Op, field: FieldInfo, value: Any) -> Any:
    """A value that is no option; refused where pydantic would turn true into 1, and where a grid stands for a list."""
    parts = schema.field_parts(field)
    number = any(p is int or p is float for p in parts) and not any(p is bool or p is Any for p in parts)
    if isinstance(value, bool) and number:
        raise UserError(op.key, value, "a number")
    if op.axis and not isinstance(value, list) and any(get_origin(p) in (list, tuple) for p in parts):
        raise UserError(op.key, op.shown, "lists", hint=f"for one list write {op.key}={inline(op.shown)}")
    return value


def _inside(path: Path, block: Path) -> bool:
    """Whether ``path`` lies below ``block``."""
    return len(path) > len(block) and path[: len(block)] == block


def _nested(path: Path, value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value


def _get(doc: Any, path: Path) -> Any:
    for key in path:
        doc = doc.get(key) if isinstance(doc, Mapping) else None
    return doc


def _remove(doc: dict[str, Any], path: Path) -> None:
    holder = _get(doc, path[:-1]) if len(path) > 1 else doc
    if isinstance(holder, dict):
        holder.pop(path[-1], None)


def _same(a: Any, b: Any) -> bool:
    return (type(a) is type(b) or (_number(a) and _number(b))) and a == b


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    """A value for a note; an option by its name."""
    if isinstance(value, Mapping) and "name" in value:
        return str(value["name"])
    return inline(value)
