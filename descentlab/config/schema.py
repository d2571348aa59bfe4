"""Reading the classes of settings: which field holds an option, a block or one value, and what is in it by default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from ..core.specs import Option, Registry, Spec


def plain(value: Any) -> Any:
    """Blocks as dicts and tuples as lists, all the way down: what YAML and JSON can hold."""
    if isinstance(value, Spec):
        return {key: plain(getattr(value, key)) for key in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _parts(annotation: Any) -> Iterator[Any]:
    """The members of unions and the metadata of ``Annotated`` inside an annotation; not the items of containers."""
    yield annotation
    if get_origin(annotation) not in (list, tuple, dict, set):
        for part in get_args(annotation):
            yield from _parts(part)


def field_parts(field: FieldInfo) -> list[Any]:
    """Everything a field's annotation is made of."""
    return [*_parts(field.annotation), *field.metadata]


def registry_of(field: FieldInfo) -> Registry | None:
    """The registry whose options a field holds; None for any other field."""
    for part in field_parts(field):
        owner = getattr(part.func, "__self__", None) if isinstance(part, BeforeValidator) else None
        if isinstance(owner, Registry):
            return owner
    return None


def block_of(field: FieldInfo) -> type[Spec] | None:
    """The class of a plain block of settings (one that is no choice of an option); None for any other field."""
    if registry_of(field):
        return None
    return next((p for p in field_parts(field) if isinstance(p, type) and issubclass(p, Spec)), None)


def is_mapping(field: FieldInfo) -> bool:
    """Whether a field holds free key: value pairs, such as the further arguments of a third party's class."""
    return any(get_origin(part) is dict or part is dict for part in field_parts(field))


def is_extent(field: FieldInfo) -> bool:
    """Whether a field says how much is run or where, and so is no part of a run's identity."""
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and bool(extra.get("extent"))


def settings_of(cls: type[Spec]) -> list[str]:
    """The names a block's settings can have, without the ``name`` that chooses the option."""
    return [key for key in cls.model_fields if not (key == "name" and issubclass(cls, Option))]


def default_of(field: FieldInfo) -> Any:
    """A field's default as plain data; None where it has none."""
    return None if field.is_required() else plain(field.get_default(call_default_factory=True))


def option_block(option: Option) -> dict[str, Any]:
    """An option as a block: its name and the settings that differ from its class."""
    fields = type(option).model_fields
    changed = {k: plain(getattr(option, k)) for k in settings_of(type(option))}
    return {"name": option.name, **{k: v for k, v in changed.items() if v != default_of(fields[k])}}


def default_block(field: FieldInfo) -> dict[str, Any]:
    """The block a field holds when nothing is set: empty for a plain block, name and settings for an option."""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    return option_block(default) if isinstance(default, Option) else {}


def name_in(field: FieldInfo, value: Any) -> str:
    """The option that ``value`` names in a field that holds options; by default the field's own."""
    if isinstance(value, str):
        return value
    block = value if isinstance(value, Mapping) and "name" in value else default_block(field)
    return str(block.get("name", ""))


def class_of(field: FieldInfo, value: Any) -> type[Spec] | None:
    """The class of the block that ``value`` is in ``field``; None when the field holds no block."""
    registry = registry_of(field)
    if registry is None:
        return block_of(field)
    name = name_in(field, value)
    return registry.lookup(name) if name else None


@dataclass(frozen=True)
class Stop:
    """One word of a key path: the block it stands in, what to call that block, and the field it names, if any."""

    key: str
    owner: type[Spec]
    called: str
    field: FieldInfo | None


def walk(spec: type[Spec], values: Any, path: Sequence[str]) -> list[Stop]:
    """The words of a key path through nested settings ``values`` of class ``spec``, as far as they lead.

    The last stop has no field when its word names no setting; the list is shorter than ``path`` when a word before
    the last names a single value.
    """
    stops: list[Stop] = []
    cls: type[Spec] | None = spec
    called = "the study"
    for i, key in enumerate(path):
        if cls is None:
            break
        named = key in cls.model_fields and not (key == "name" and issubclass(cls, Option))
        field = cls.model_fields[key] if named else None
        stops.append(Stop(key, cls, called, field))
        if field is None:
            break
        values = values.get(key) if isinstance(values, Mapping) else None
        called = f"'{name_in(field, values)}'" if registry_of(field) else ".".join(path[: i + 1])
        cls = class_of(field, values)
    return stops


def key_paths(spec: type[Spec], values: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key path that exists in settings of class ``spec`` with the options ``values`` names."""
    for key in settings_of(spec):
        field = spec.model_fields[key]
        value = values.get(key) if isinstance(values, Mapping) else None
        yield (*at, key)
        inner = class_of(field, value)
        if inner is not None:
            yield from key_paths(inner, value, (*at, key))


def flatten(spec: Spec, prefix: str = "") -> dict[str, Any]:
    """Every setting of a block by key path, as plain data; an option's own path holds its name.

    ``{"optimizer": "adam", "optimizer.lr": 0.01, "optimizer.betas": [0.9, 0.999], "batch_size": 64, …}``
    """
    out: dict[str, Any] = {}
    for key in type(spec).model_fields:
        value = getattr(spec, key)
        path = f"{prefix}{key}"
        if isinstance(value, Option):
            out[path] = value.name
        if isinstance(value, Spec):
            inner = flatten(value, path + ".")
            inner.pop(path + ".name", None) if isinstance(value, Option) else None
            out.update(inner)
        elif isinstance(value, Mapping):
            out.update(_flatten_mapping(value, path))
        else:
            out[path] = plain(value)
    return out


def _flatten_mapping(value: Mapping[str, Any], path: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        inner = f"{path}.{key}"
        out.update(_flatten_mapping(item, inner) if isinstance(item, Mapping) else {inner: plain(item)})
    return out
