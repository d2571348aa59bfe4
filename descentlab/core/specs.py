"""Base classes of every settings block: frozen, closed, torch-free, with a lazy ``build``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

from .errors import UserError, nearest


class Spec(BaseModel):
    """A block of settings. Unknown keys are errors; instances are immutable and hashable by value.

    ``semantics`` is raised whenever the same settings would give different results, so that old and new results
    never share a run id. Fields marked with :func:`extent` (how much is run, where, how it is shown) do not enter
    the identity of a single run.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )
    semantics: ClassVar[int] = 1

    def identity(self) -> dict[str, Any]:
        """Result-relevant settings that differ from their defaults, nested, plus ``semantics`` per block."""
        out: dict[str, Any] = {}
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if (field.json_schema_extra or {}).get("extent"):  # type: ignore[union-attr]
                continue
            if isinstance(value, Spec):
                out[key] = value.identity()
            elif value != field.get_default(call_default_factory=True) or key in ("name", "study"):
                out[key] = value.model_dump(mode="json") if isinstance(value, BaseModel) else _plain(value)
        if self.semantics != 1:
            out["semantics"] = self.semantics
        return out


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.identity()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def extent(default: Any, **kw: Any) -> Any:
    """A field that says how much to run or where, and so is no part of a run's identity."""
    return Field(default, json_schema_extra={"extent": True}, **kw)


class Option(Spec):
    """One named choice in a room (an optimizer, a model, a compressor …)."""

    name: str

    def build(self) -> Any:
        """Construct the object this block names; imports torch only here."""
        raise TypeError(f"{type(self).__name__} has no build()")  # a programmer's mistake, not a user's


class External(Option):
    """A third party's class, given as ``name: package.module:Class`` with its keyword arguments in ``options``."""

    options: dict[str, Any] = Field(default_factory=dict)

    def load(self) -> Any:
        """The named object, imported now."""
        module, _, attribute = self.name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise UserError("name", self.name, f"an importable module ({error})") from None
        except AttributeError:
            raise UserError("name", self.name, f"a name defined in module '{module}'") from None

    def build(self) -> Any:
        return self.load()(**self.options)


class Registry:
    """The named options of one room; ``field()`` is a pydantic type that accepts a name, a block or an instance."""

    def __init__(self, room: str, *options: type[Option], external: type[External] = External) -> None:
        self.room, self.external = room, external
        self.options: dict[str, type[Option]] = {str(o.model_fields["name"].default): o for o in options}

    def names(self) -> list[str]:
        return sorted(self.options)

    def lookup(self, name: str) -> type[Option]:
        """The class behind ``name``; a clear error with the nearest valid name otherwise."""
        if name in self.options:
            return self.options[name]
        if ":" in name:
            return self.external
        hint = nearest(name, self.options)
        raise UserError(self.room, name, f"one of {', '.join(self.names())} or module:Name", hint=hint)

    def parse(self, value: Any) -> Option:
        if isinstance(value, Option):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or "name" not in value:
            raise UserError(self.room, value, f"a name ({', '.join(self.names())}) or a block with a 'name'")
        return self.lookup(str(value["name"])).model_validate(dict(value))

    def field(self) -> Any:
        """Annotated type for a pydantic field that holds one option of this room."""
        return Annotated[SerializeAsAny[Option], BeforeValidator(self.parse)]
