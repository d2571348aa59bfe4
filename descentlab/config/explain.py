"""Turning validation errors into lines a user can act on: key path = value: expected …, and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..core.errors import UserError, closest
from ..core.specs import Option, Spec
from .schema import block_of, field_parts, plain, registry_of, settings_of, walk

_KINDS = {
    "int": "an integer",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list, such as [1, 2]",
    "tuple": "a list, such as [1, 2]",
    "dict": "a block of settings, such as {key: value}",
    "none_required": "null",
}
_OWN = re.compile(r"^(?P<key>[\w.]+) = (?P<value>.+?): expected (?P<expected>.+)$")


def _names(text: str) -> str:
    return ", ".join(re.findall(r"'([^']*)'", text)) or text


def settings_text(cls: type[Spec]) -> str:
    """The settings a block takes, for an error line."""
    names = [name for name in settings_of(cls) if name != "study"]
    return ", ".join(names) if names else "no settings"


def _dotted(loc: tuple[Any, ...]) -> str:
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else ("." if out else "") + str(part)
    return out


def _field_at(cls: type[Spec], values: Any, loc: tuple[Any, ...]) -> tuple[FieldInfo | None, tuple[Any, ...]]:
    """The field an error location names, and the location without what pydantic adds for members of unions."""
    stops = walk(cls, values, loc)
    known = [stop for stop in stops if stop.field is not None]
    if not known:
        return None, loc
    indices = tuple(part for part in loc[len(known) :] if isinstance(part, int))
    return known[-1].field, loc[: len(known)] + indices


def _expected(error: Mapping[str, Any], field: FieldInfo | None) -> tuple[str, str]:
    """What would have been valid, and a hint."""
    kind, message, context = error["type"], error["msg"], error.get("ctx", {})
    if kind in ("literal_error", "enum"):
        names = _names(context["expected"])
        close = closest(str(error["input"]), names.split(", "))
        return f"one of {names}", f"did you mean '{close}'?" if close else ""
    if kind == "missing":
        return "a value", ""
    if kind == "string_pattern_mismatch":
        return (field.description if field and field.description else f"text matching {context['pattern']}"), ""
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        block = block_of(field) if field else None
        return f"a block of settings ({settings_text(block)})" if block else "a block of settings", ""
    if kind == "int_from_float":
        return "a whole number", ""
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length") if kind == "too_short" else context.get("max_length")
        return f"at {'least' if kind == 'too_short' else 'most'} {bound} items, not {context['actual_length']}", ""
    for start in (kind, kind.split("_")[0]):
        if start in _KINDS and ("type" in kind or "parsing" in kind or start == kind):
            return _KINDS[start], ""
    text = re.sub(r"^(Value error, |Assertion failed, )?(Input should be |Input should )?", "", message)
    return re.sub(r"^(greater|less|a multiple)", r"a value \1", text).replace("a value a ", "a "), ""


def _own_error(message: str, where: str, value: Any) -> UserError:
    """An error raised by a block's own cross-field check, under its full key path."""
    match = _OWN.match(message)
    if match:
        key = f"{where}.{match['key']}" if where else match["key"]
        return UserError(key, _Shown(match["value"]), match["expected"])
    return UserError(where or "settings", plain(value), message)


class _Shown:
    """A value already written out."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def explain(error: ValidationError, cls: type[Spec], values: Mapping[str, Any]) -> list[UserError]:
    """One line per mistake in ``values``, which failed to validate as ``cls``."""
    out: dict[str, UserError] = {}
    for item in error.errors(include_url=False):
        loc = item["loc"]
        if item["type"] == "extra_forbidden":
            out.setdefault(_dotted(loc), _unknown(cls, values, loc, item["input"]))
            continue
        field, loc = _field_at(cls, values, loc)
        short = item["type"] == "missing" and isinstance(loc[-1], int)  # an item of a list: the list is at fault
        where = _dotted(loc[:-1] if short else loc)
        if item["type"] == "value_error":
            found = _own_error(item["msg"].removeprefix("Value error, "), where, item["input"])
        else:
            expected, hint = ("a longer list", "") if short else _expected(item, field)
            value = "nothing" if item["type"] == "missing" and not short else plain(item["input"])
            if where in out:  # members of a union: any of them would have done
                expected = f"{out[where].expected} or {expected}"
            found = UserError(where, value, expected, hint=hint)
        out[where + (found.key if item["type"] == "value_error" else "")] = found
    return list(out.values())


def _unknown(cls: type[Spec], values: Any, loc: tuple[Any, ...], value: Any) -> UserError:
    """The error for a key that names no setting of the block it stands in."""
    last = walk(cls, values, loc)[-1]
    close = closest(str(loc[-1]), settings_of(last.owner))
    hint = f"did you mean '{_dotted((*loc[:-1], close))}'?" if close else ""
    expected = f"a setting of {last.called} ({settings_text(last.owner)})"
    return UserError(_dotted(loc), plain(value), expected, hint=hint)


def bad_names(cls: type[Spec], values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[UserError]:
    """Take blocks that name no known option out of ``values`` (in place) and return one error for each.

    Looked for before validation, which would stop at the first of them.
    """
    errors: list[UserError] = []
    for key, field in cls.model_fields.items():
        if key not in values:
            continue
        registry, block, value = registry_of(field), block_of(field), values[key]
        inner: type[Spec] | None = block
        if registry and not (value is None and type(None) in field_parts(field)):
            try:
                inner = registry.lookup(option_name(registry, value))
            except UserError as error:
                errors.append(UserError(_dotted((*prefix, key)), value, error.expected, hint=error.hint))
                del values[key]
                continue
        if inner is not None and isinstance(value, dict):
            errors += bad_names(inner, value, (*prefix, key))
    return errors


def option_name(registry: Any, value: Any) -> str:
    name = value.get("name") if isinstance(value, Mapping) else value.name if isinstance(value, Option) else value
    if isinstance(name, str):
        return name
    names = ", ".join(registry.names())
    if isinstance(value, list) and value:
        written = ",".join(str(v) for v in value)
        hint = f"to compare several, write {written} without brackets (in a file: under grid)"
        raise UserError(registry.room, value, f"one option of {names}", hint=hint)
    raise UserError(registry.room, value, f"a name ({names}) or a block with a 'name'")
