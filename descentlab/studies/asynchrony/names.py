"""Short names of cells: what tells them apart, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = ("size", "device", "processes", "members_per_block", "checkpoint_s", "replicates", "observe", "study")
SHORT = {"momentum": "m", "workers": "W", "batch_size": "B"}
ORDER = ("", "workers", "timeline", "delay", "partition", "optimizer.momentum", "staleness_rule")
CLUSTER = ("timeline", "delay", "cost", "partition", "staleness_rule", "workers")  # no matter where nobody else works


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by key path; the ``name`` of a block stands at the block's own path."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        if not prefix and key in HIDDEN:
            continue
        if isinstance(value, Mapping):
            out.update(flat(value, f"{prefix}{key}."))
        elif key == "name":
            out[prefix.rstrip(".")] = value
        else:
            out[f"{prefix}{key}"] = value
    return out


def conditions(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """One name per cell: the settings in which it differs from others, shortest form, separated by commas."""
    flats = [flat(cell) for cell in cells]
    many = [f for f in flats if f.get("workers") != 1]
    names = [_name(f, many if f.get("workers") != 1 else flats, bool(many)) for f in flats]
    return [name if names.count(name) == 1 else f"{name},#{i}" for i, name in enumerate(names)]


def _name(own: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], some_have_many: bool) -> str:
    alone = own.get("workers") == 1 and some_have_many
    found: dict[str, str] = {"": "single"} if alone else {}
    alike = [f for f in rivals if f.get("timeline") == own.get("timeline")]
    if not alone and len({delay_text(f) for f in alike}) > 1:
        found["delay"] = delay_text(own)
    for key, value in own.items():
        room = key.split(".")[0]
        if key.startswith("timeline.delay") or room == "delay" or (alone and room in CLUSTER) or value is None:
            continue
        alike = [f for f in rivals if room == key or f.get(room) == own.get(room)]
        if len({str(f.get(key)) for f in alike}) > 1:
            found[key] = _shown(key, value)
    keys = sorted(found, key=lambda key: ORDER.index(key) if key in ORDER else len(ORDER))
    return ",".join(found[key] for key in keys) or str(own.get("timeline", "all"))


def delay_text(own: Mapping[str, Any]) -> str:
    """``small``, ``gaussian:0.06s``, ``small:slow2`` (worker 0 twice as slow), ``small:only_slow2`` (no others)."""
    name = own.get("delay")
    mean = own.get("delay.level") or (f"{name}:{own['delay.mean_s']:g}s" if "delay.mean_s" in own else str(name))
    factor = own.get("delay.slow_factor", 1.0)
    if own.get("delay.only_slow"):
        return f"{mean}:only_slow{factor:g}"
    return mean if factor == 1.0 else f"{mean}:slow{factor:g}"


def _shown(key: str, value: Any) -> str:
    """``label`` for a chosen option, ``slow_factor=2`` for a number."""
    if isinstance(value, bool):
        value = str(value).lower()
    last = key.split(".")[-1]
    if isinstance(value, str) and key in ("timeline", "partition", "staleness_rule", "model", "optimizer", "dataset"):
        return f"rule={value}" if key == "staleness_rule" else value
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{SHORT.get(last, last)}={text}"
