"""What a hardware fault writes: flipped bits, random finite patterns, copies of other elements, zeros, given values.

A rule is planned without weights and realised on the tensor found there: ``{"kind": "flip", "bit": 12, "word":
"float32"}``, ``{"kind": "value", "value": v}`` for one value everywhere, ``{"kind": "values", "values": [v, …]}`` for
one per element, ``{"kind": "copy", "from": [flat, …]}``, ``{"kind": "zero"}``. Words are big-endian: bit 0 is the sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.streams import Streams

BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def pattern(words: np.ndarray, word: str) -> np.ndarray:
    """uint32 random ``words`` read as numbers of the format ``word``: their 32, or their upper 16 bits; float64."""
    if word == "float32":
        return words.astype(np.uint32).view(np.float32).astype(np.float64)
    upper = (words >> np.uint32(16)).astype(np.uint16)
    if word == "float16":
        return upper.view(np.float16).astype(np.float64)
    return (upper.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)  # bfloat16: half a float32


def finite_patterns(streams: Streams, n: int, word: str, *, replicate: int) -> list[float]:
    """``n`` numbers whose bits are uniform, each redrawn until it is finite."""
    with np.errstate(invalid="ignore"):  # a signalling NaN among the draws
        values = pattern(streams.draw("fault/pattern", n, replicate=replicate), word)
        attempt = 0
        while not np.isfinite(values).all():
            attempt += 1
            again = pattern(streams.draw("fault/pattern", n, replicate=replicate, step=attempt), word)
            values = np.where(np.isfinite(values), values, again)
    return values.tolist()


def flipped(values: Tensor, bit: int, word: str) -> Tensor:
    """``values`` rounded to the format ``word``, bit ``bit`` of each inverted (0 = sign), in their own dtype again."""
    bits = BITS[word]
    integer = torch.int32 if bits == 32 else torch.int16
    mask = 1 << (bits - 1 - bit)
    signed = mask - (1 << bits) if bit == 0 else mask
    held = values.to(getattr(torch, word)).view(integer)
    return (
        (held ^ torch.tensor(signed, dtype=integer, device=values.device)).view(getattr(torch, word)).to(values.dtype)
    )


def realised(rule: Mapping[str, Any], x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(old, new) values of the flat elements ``index`` of ``x`` under ``rule``, in the dtype of ``x``."""
    flat = x.detach().flatten()
    old = flat[index]
    kind = rule["kind"]
    if kind == "flip":
        return old, flipped(old, rule["bit"], rule["word"])
    if kind == "copy":
        return old, flat[torch.tensor(rule["from"], device=x.device)]
    if kind == "zero":
        return old, torch.zeros_like(old)
    if kind == "values":
        return old, torch.tensor(rule["values"], dtype=torch.float64).to(dtype=x.dtype, device=x.device)
    if kind == "value":
        return old, torch.full_like(old, rule["value"])
    raise ValueError(f"rule {kind!r}: expected flip, copy, zero, value or values")
