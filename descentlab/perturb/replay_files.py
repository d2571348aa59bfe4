"""Reads exact faults from the published CSV, from campaign.jsonl and from hits.jsonl. Mistakes name file, row, column.

The CSV has a header and the columns of :data:`COLUMNS`. An element of ``inj_pos`` is written with slashes between its
coordinates (``3/0/5/2``), elements and values are separated by commas. Coordinates are in the published order, which
:mod:`descentlab.perturb.replay` translates.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError, nearest
from .catalogue import OPERAND, TYPES
from .replay_specs import is_case, source

COLUMNS = (
    "model",
    "stage",
    "fmodel",
    "target_worker",
    "target_layer",
    "target_epoch",
    "target_step",
    "inj_pos",
    "inj_values",
    "learning_rate",
    "seed",
)
STAGES = ("fwrd_inject", "bkwd_inject")
SUFFIXES = {"_grad_in": "grad_input", "_grad_wt": "grad_weight"}


@dataclass(frozen=True)
class Place:
    """Where a fault was read, for the errors about it: ``file row 3``, rows counted from 0 after the header."""

    file: str
    row: int

    def error(self, column: str, value: object, expected: str, hint: str = "") -> UserError:
        return UserError(f"{self.file} row {self.row}, {column}", value, expected, hint=hint)


@dataclass(frozen=True)
class PublishedFault:
    """A row of the published CSV: coordinates are still in its own order, the layer still has its own name."""

    place: Place
    layer: str
    direction: str
    operand: str
    epoch: int
    step: int
    positions: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class StoredFault:
    """A line of campaign.jsonl or hits.jsonl: torch's layer names and flat indices. ``shape`` None: hits have none."""

    place: Place
    layer: str
    call: int
    direction: str
    operand: str
    step: int
    index: tuple[int, ...]
    rule: Mapping[str, Any]
    shape: tuple[int, ...] | None


Fault = PublishedFault | StoredFault


def read(path: Path, row: int) -> Fault:
    """Row ``row`` of a CSV or JSON-lines file. Raises :class:`UserError` for whatever is wrong with it."""
    text = _text(path)
    if path.suffix == ".jsonl" or text.lstrip()[:1] == "{":
        return stored(_json_line(path, text, row), Place(str(path), row))
    return _published(path, text, row)


def find_hit(reference: str) -> StoredFault:
    """``DIR#CASE``: the planned fault of that case. ``DIR#RUN``: the values that this run met, by its id."""
    folder, _, wanted = reference.rpartition("#")
    key = "case" if is_case(wanted) else "run"
    path = Path(folder) / source(wanted)
    lines = [_object(path, line, row) for row, line in enumerate(_lines(_text(path, "fault.hit")))]
    for row, line in enumerate(lines):
        if str(line.get(key)) == wanted:
            return stored(line, Place(str(path), row))
    known = list(dict.fromkeys(str(line.get(key)) for line in lines))
    shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
    raise UserError("fault.hit", reference, f"a {key} in {path} ({shown})", hint=nearest(wanted, known))


def stored(line: Mapping[str, Any], place: Place) -> StoredFault:
    """A planned or realised fault as our own files have it; realised values are replayed as they were."""
    for key in ("layer", "site", "step", "index", "rule"):
        if key not in line:
            raise place.error(key, "", f"a line with '{key}', as campaign.jsonl and hits.jsonl have it")
    direction, _, operand = str(line["site"]).partition("/")
    index, rule = line["index"], line["rule"]
    if not isinstance(index, list) or not all(type(i) is int for i in index) or not index:
        raise place.error("index", index, "a list of flat indices")
    if not isinstance(rule, dict) or "kind" not in rule:
        raise place.error("rule", rule, "a rule with a 'kind'")
    if "new" in line:  # a hit: what was written, whatever the rule had made of it
        rule = {"kind": "values", "values": _numbers(line["new"], len(index), "new", place)} | (
            {"lanes": rule["lanes"]} if "lanes" in rule else {}
        )
    elif rule["kind"] == "values":
        rule = {**rule, "values": _numbers(rule.get("values"), len(index), "rule", place)}
    elif rule["kind"] == "value":
        rule = {**rule, "value": _numbers([rule.get("value")], 1, "rule", place)[0]}
    shape = tuple(line["shape"]) if "shape" in line else None
    step, call = line["step"], line.get("call", 0)
    if type(step) is not int or step < 0:
        raise place.error("step", step, "a whole number of at least 0")
    return StoredFault(place, str(line["layer"]), call, direction, operand, step, tuple(index), rule, shape)


def _numbers(values: Any, count: int, column: str, place: Place) -> list[float]:
    """Floats, with nan, inf and -inf as the words that JSON files hold."""
    if not isinstance(values, list) or len(values) != count:
        raise place.error(column, values, f"{count} numbers, one for each element")
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise place.error(column, values, "numbers") from None


def _text(path: Path, key: str = "fault.path") -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(key, str(path), f"a file that can be read ({reason})") from None


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _json_line(path: Path, text: str, row: int) -> dict[str, Any]:
    lines = _lines(text)
    if row >= len(lines):
        raise UserError(
            "fault.row", row, f"0 to {len(lines) - 1}, the rows of {path}" if lines else f"a row; {path} has none"
        )
    return _object(path, lines[row], row)


def _object(path: Path, line: str, row: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise Place(str(path), row).error("JSON", line[:60], f"one JSON object ({error})") from None
    if not isinstance(found, dict):
        raise Place(str(path), row).error("JSON", line[:60], "one JSON object")
    return found


def _published(path: Path, text: str, row: int) -> PublishedFault:
    rows = [line for line in csv.reader(text.splitlines(), skipinitialspace=True) if line]
    header = [name.strip() for name in rows[0]] if rows else []
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        expected = f"a header with the columns {', '.join(COLUMNS)}"
        raise UserError(f"{path} header", ",".join(header), expected, hint=f"missing: {', '.join(missing)}")
    if row >= len(rows) - 1:
        raise UserError(
            "fault.row", row, f"0 to {len(rows) - 2}, the rows of {path}" if rows[1:] else f"a row; {path} has none"
        )
    place, line = Place(str(path), row), rows[row + 1]
    if len(line) != len(header):
        hint = "inj_pos and inj_values of several elements need quotation marks" if len(line) > len(header) else ""
        raise place.error("columns", len(line), f"{len(header)}, as many as the header has", hint)
    return _fault(dict(zip(header, (cell.strip() for cell in line), strict=True)), place)


def _fault(cells: Mapping[str, str], place: Place) -> PublishedFault:
    if cells["stage"] not in STAGES:
        raise place.error("stage", cells["stage"], f"one of {', '.join(STAGES)}", nearest(cells["stage"], STAGES))
    if cells["fmodel"] not in TYPES:
        expected = f"one of {', '.join(TYPES)}"
        raise place.error("fmodel", cells["fmodel"], expected, nearest(cells["fmodel"], TYPES))
    layer, direction = _direction(cells["stage"], cells["target_layer"], place)
    positions = _positions(cells["inj_pos"], place)
    return PublishedFault(
        place,
        layer,
        direction,
        OPERAND[TYPES[cells["fmodel"]].target],
        _whole(cells, "target_epoch", place),
        _whole(cells, "target_step", place),
        positions,
        _values(cells["inj_values"], len(positions), place),
    )


def _direction(stage: str, layer: str, place: Place) -> tuple[str, str]:
    """(layer without its suffix, direction of the operation)."""
    for suffix, direction in SUFFIXES.items():
        if layer.endswith(suffix):
            if stage == "fwrd_inject":
                raise place.error("target_layer", layer, f"a layer without {suffix}: the stage is fwrd_inject")
            return layer.removesuffix(suffix), direction
    if stage == "bkwd_inject":
        raise place.error("target_layer", layer, f"a layer that ends in {' or '.join(SUFFIXES)}, for bkwd_inject")
    return layer, "forward"


def _whole(cells: Mapping[str, str], column: str, place: Place) -> int:
    if not cells[column].isdecimal():
        raise place.error(column, cells[column], "a whole number of at least 0")
    return int(cells[column])


def _positions(text: str, place: Place) -> tuple[tuple[int, ...], ...]:
    out: list[tuple[int, ...]] = []
    for part in (one.strip() for one in text.split(",") if one.strip()):
        numbers = part.split("/")
        if not all(n.strip().isdecimal() for n in numbers):
            raise place.error("inj_pos", part, "coordinates such as 3/0/5/2, elements separated by commas")
        out.append(tuple(int(n) for n in numbers))
    if not out:
        raise place.error("inj_pos", text, "at least one element")
    if len({len(position) for position in out}) > 1:
        raise place.error("inj_pos", text, "as many coordinates for every element")
    return tuple(out)


def _values(text: str, count: int, place: Place) -> tuple[float, ...]:
    parts = [one.strip() for one in text.replace("/", ",").split(",") if one.strip()]
    values = []
    for part in parts:
        try:
            values.append(float(part))
        except ValueError:
            raise place.error("inj_values", part, "a number") from None
    if len(values) not in (1, count):
        raise place.error("inj_values", f"{len(values)} numbers", f"1, or {count}: one for each element of inj_pos")
    return tuple(values) if len(values) == count else tuple(values * count)
