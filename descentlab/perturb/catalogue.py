"""The 18 types of hardware fault, as data.

He et al., "Understanding and Mitigating Hardware Failures in Deep Learning Training Systems", ISCA 2023, doi
10.1145/3579371.3589105: what a flipped flip-flop of an accelerator does to one operation, seen from the tensors. A
flip-flop in the datapath flips a bit of an operand or a result; one in local control makes one result random, stale or
zero; one in global control makes 16 results wrong at once or over many cycles, or a 64-wide fetch of an operand. The
names are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OPERAND = {"input": "a", "weight": "b", "output": "out"}
LANES = 16  # multiply lanes that share one operand


@dataclass(frozen=True)
class FaultType:
    """``number``: the published enumeration. ``target``: which operand of the operation. ``run``: consecutive elements
    along channels. ``span``: a number of consecutive runs instead of one. ``native``: how the wrong values come about.
    ``lanes``: the wrong operand reaches only the lanes of 16 results.
    """

    number: int
    target: Literal["input", "weight", "output"]
    run: int
    native: Literal["flip", "pattern", "copy", "zero"]
    span: bool = False
    lanes: bool = False


TYPES: dict[str, FaultType] = {
    "INPUT": FaultType(1, "input", 1, "flip"),
    "INPUT_16": FaultType(2, "input", 1, "flip", lanes=True),
    "WT": FaultType(3, "weight", 1, "flip"),
    "WT_16": FaultType(4, "weight", 1, "flip", lanes=True),
    "RBFLIP": FaultType(5, "output", 1, "flip"),
    "RD": FaultType(6, "output", 1, "pattern"),
    "RD_CORRECT": FaultType(7, "output", 1, "copy"),
    "ZERO": FaultType(8, "output", 1, "zero"),
    "N16_RD": FaultType(9, "output", 16, "pattern"),
    "N16_RD_CORRECT": FaultType(10, "output", 16, "copy"),
    "RD_GLB": FaultType(11, "output", 16, "pattern", span=True),
    "RD_CORRECT_GLB": FaultType(12, "output", 16, "copy", span=True),
    "N64_INPUT": FaultType(13, "input", 64, "copy"),
    "N64_WT": FaultType(14, "weight", 64, "copy"),
    "N64_INPUT_16": FaultType(15, "input", 64, "copy", lanes=True),
    "N64_WT_16": FaultType(16, "weight", 64, "copy", lanes=True),
    "N64_INPUT_GLB": FaultType(17, "input", 64, "copy", span=True),
    "N64_WT_GLB": FaultType(18, "weight", 64, "copy", span=True),
}
