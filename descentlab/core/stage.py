"""A study is a DAG of stages; a stage's key says exactly what its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Stage:
    """One node. ``inputs`` are names of earlier stages; ``fork`` > 1 means that many continuations of one state.

    ``spec`` holds the settings this stage reads and no others, so that a changed setting reruns what depends on it and
    nothing else. ``semantics`` is raised when the same settings would compute something else.
    """

    name: str
    kind: Literal["train", "evaluate", "choose", "derive"]
    spec: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    fork: int = 1
    semantics: int = 1


def stage_keys(stages: Sequence[Stage]) -> dict[str, str]:
    """Name -> 12 hexadecimal digits of a hash of (stage, keys of its inputs); stages come after their inputs.

    ValueError for a name that occurs twice or an input that is not an earlier stage.
    """
    keys: dict[str, str] = {}
    for stage in stages:
        if stage.name in keys:
            raise ValueError(f"stage '{stage.name}' occurs twice")
        missing = [name for name in stage.inputs if name not in keys]
        if missing:
            raise ValueError(f"stage '{stage.name}': '{missing[0]}' is no earlier stage")
        content = [stage.name, stage.kind, stage.spec, [keys[n] for n in stage.inputs], stage.fork, stage.semantics]
        text = json.dumps(content, sort_keys=True, default=str)
        keys[stage.name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return keys
