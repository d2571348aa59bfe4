"""Settings of a fault that is not drawn but read: from a file of faults, or from an earlier run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from ..core.specs import Option

RUN_ID_LENGTH = 12  # a run's id may consist of digits only; a shorter number is a case


def is_case(wanted: str) -> bool:
    """Whether what follows the # is the number of a case, and not a run's id."""
    return wanted.isdecimal() and len(wanted) < RUN_ID_LENGTH


def source(wanted: str) -> str:
    """Which file of a run holds that case (what was planned) or that run (what it met)."""
    return "campaign.jsonl" if is_case(wanted) else "hits.jsonl"


class Replay(Option):
    """One exact fault again, with its positions and values, from a CSV or JSON-lines file or from an earlier run."""

    name: Literal["replay"] = "replay"
    path: str | None = Field(None, description="published CSV file, or campaign.jsonl or hits.jsonl of a run")
    row: NonNegativeInt | None = Field(0, description="row of the file, 0 = the first; none = case i replays row i")
    hit: str | None = Field(None, description="DIR#CASE or DIR#RUN: what was planned, or what that run met, in DIR")
    step: NonNegativeInt | None = Field(None, description="step to hit; none = the one in the file")

    @model_validator(mode="after")
    def _one_source(self) -> Replay:
        if (self.path is None) == (self.hit is None):
            raise ValueError(f"path = {self.path}: expected either path or hit")
        if self.hit is not None and not all(self.hit.rpartition("#")[::2]):
            raise ValueError(f"hit = {self.hit}: expected DIR#CASE or DIR#RUN")
        return self

    def identity(self) -> dict[str, Any]:
        """As for any block, with a digest of the file: another fault under the same name is another run."""
        out = super().identity()
        if self.hit is not None:
            folder, _, wanted = self.hit.rpartition("#")
            file = Path(folder) / source(wanted)
        else:
            file = Path(self.path or "")
        if file.is_file():
            out["content"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        return out

    def build(self) -> Any:
        from .replay import ReplayedFault

        return ReplayedFault(self)
