"""The time of an update as a line in the bytes it sends, and what that predicts elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LinearCost:
    """T = ``fixed_s`` + ``per_byte_s`` bytes, for one update."""

    fixed_s: float
    per_byte_s: float

    @classmethod
    def fit(cls, sent: Sequence[float], seconds: Sequence[float]) -> LinearCost:
        """Least squares through two or more (bytes, seconds) points of different bytes."""
        if len(sent) < 2 or len(set(sent)) < 2:
            raise ValueError(f"sent = {list(sent)}: expected at least two different sizes")
        slope, offset = np.polyfit(np.asarray(sent, dtype=float), np.asarray(seconds, dtype=float), 1)
        return cls(float(offset), float(slope))

    def __call__(self, sent: float) -> float:
        return self.fixed_s + self.per_byte_s * sent

    def mixture(self, updates: Mapping[float, int]) -> float:
        """Seconds of an update on average, where ``updates`` says how many send how many bytes."""
        return sum(n * self(sent) for sent, n in updates.items()) / sum(updates.values())

    @property
    def bandwidth_mbps(self) -> float:
        """The rate the slope stands for, of two workers in a ring, in 10^6 bits a second."""
        return 8e-6 / self.per_byte_s
