"""YAML 1.2 (core schema) on top of PyYAML, which reads YAML 1.1.

The difference matters for settings: ``1e-3`` is a number, ``no`` and ``on`` are words, ``010`` is ten and ``1:30`` is
text. Duplicate keys are errors instead of the last one winning. See https://yaml.org/spec/1.2.2/#103-core-schema.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..core.errors import UserError

# tag -> (pattern, first characters), in the order they are tried
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_BREAKS = re.compile("[\n\r\x85\u2028\u2029]")


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 scalars and no duplicate keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes whatever a reader of either YAML version would not take for text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True  # write every value out: a study file is read and edited by people


for _class in (_Loader, _Dumper):
    for _tag, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
for _char, _pairs in yaml.SafeDumper.yaml_implicit_resolvers.items():  # YAML 1.1 after 1.2: only decides on quotes
    _Dumper.yaml_implicit_resolvers.setdefault(_char, []).extend(_pairs)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", node.value.lower()))


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
        key = loader.construct_object(key_node)
        if key in out:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
        out[key] = loader.construct_object(value_node, deep=True)
    return out


def _construct_list(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(item, deep=True) for item in node.value]  # refuses a list that contains itself


_Loader.add_constructor("tag:yaml.org,2002:seq", _construct_list)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if _BREAKS.search(text) else None  # the other styles would fold these away
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(tuple, lambda dumper, data: dumper.represent_list(list(data)))


def load(text: str, source: str = "YAML") -> Any:
    """The value of one YAML 1.2 document; ``source`` names it in errors.

    Raises:
        UserError: on a syntax error, a duplicate key, an unknown tag or more than one document.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "text"
        raise UserError(source, where, f"valid YAML 1.2 ({error.problem or error.context})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "nested too deeply"
        raise UserError(source, _shorten(text), f"valid YAML 1.2 ({reason})") from None


def load_file(path: Path) -> Any:
    """The value of a YAML file; a missing or unreadable file is a UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError("file", str(path), "text in UTF-8") from None
    except OSError as error:
        raise UserError("file", str(path), f"a readable file ({error.strerror or error})") from None
    return load(text, str(path))


def dump(value: Any) -> str:
    """Text in the order given, innermost lists and blocks on one line; :func:`load` gives an equal value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def inline(value: Any) -> str:
    """``value`` on one line, as it would be typed after ``key=``."""
    options: dict[str, Any] = {"sort_keys": False, "default_flow_style": True, "allow_unicode": True, "width": 1 << 20}
    if isinstance(value, str):  # inside a list a comma needs quotes, and so it does on a command line
        return yaml.dump([value], Dumper=_Dumper, **options).removesuffix("\n")[1:-1]
    text = yaml.dump(value, Dumper=_Dumper, **options)
    return text.removesuffix("\n").removesuffix("\n...")


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
