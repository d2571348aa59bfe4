"""What the shell may offer after ``descentlab run STUDY …``: key paths, then names where a key has any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from ..core.errors import UserError
from . import schema
from .resolve import Resolved, resolve


def completions(study: str, typed: Sequence[str], incomplete: str) -> list[str]:
    """The arguments that ``incomplete`` may become, after the arguments ``typed``; none for a study nobody knows.

    Keys are those of the options chosen so far: ``optimizer=sgd`` is followed by ``optimizer.momentum=``. A shell that
    cuts words at ``=`` (bash) is offered what follows it.
    """
    *typed, whole = _rejoined([*typed, incomplete])
    if whole != incomplete:
        return [offer.partition("=")[2] for offer in completions(study, typed, whole)]
    resolved = _resolved(study, [word for word in typed if "=" in word])
    if resolved is None:
        return []
    key, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{path}=" for path in _keys(resolved) if path.startswith(key)]
    before, comma, last = value.rpartition(",")
    return [f"{key}={before}{comma}{name}" for name in _values(resolved, key) if name.startswith(last)]


def _rejoined(words: Sequence[str]) -> list[str]:
    """``optimizer``, ``=``, ``sgd`` as the one word it was."""
    out: list[str] = []
    open_ = False
    for word in words:
        if out and (open_ or word == "="):
            out[-1] += word
        else:
            out.append(word)
        open_ = word == "="
    return out


def _resolved(study: str, typed: Sequence[str]) -> Resolved | None:
    for settings in (typed, ()):  # a mistake in an earlier argument is said when the command runs
        try:
            return resolve(study, settings)
        except UserError:
            continue
    return None


def _documents(resolved: Resolved) -> list[dict[str, Any]]:
    distinct = {str(document): document for document in map(schema.plain, resolved.cells)}
    return list(distinct.values())


def _keys(resolved: Resolved) -> list[str]:
    spec = resolved.study.spec
    found = {".".join(p) for document in _documents(resolved) for p in schema.key_paths(spec, document)}
    return sorted((found | {"preset", "size"}) - {"study"})


def _values(resolved: Resolved, key: str) -> list[str]:
    study, path = resolved.study, key.split(".")
    if key == "preset":
        return sorted({"default", *study.presets})
    for document in _documents(resolved):
        stops = schema.walk(study.spec, document, path)
        field = stops[-1].field if len(stops) == len(path) else None
        if field is not None:
            return sorted(_names(field))
    return []


def _names(field: FieldInfo) -> Iterable[str]:
    registry = schema.registry_of(field)
    if registry:
        return registry.names()
    parts = schema.field_parts(field)
    words = [str(word) for part in parts if get_origin(part) is Literal for word in get_args(part)]
    return words + (["true", "false"] if bool in parts else [])
