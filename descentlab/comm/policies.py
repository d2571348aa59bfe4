"""Rank policies: the rank of a low-rank compressor at each update."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import final

from ..core.protocols import RankMoment


@final
@dataclass(frozen=True)
class RankSchedule:
    """``ranks[i]`` from update ``steps[i - 1]`` on (``ranks[0]`` from the start); ``steps`` ascend.

    ``by_epoch``: ``steps`` count epochs.
    """

    ranks: tuple[int, ...]
    steps: tuple[int, ...]
    by_epoch: bool = False

    def rank(self, moment: RankMoment) -> int:
        """See :class:`~descentlab.core.protocols.RankPolicy`."""
        return self.ranks[bisect_right(self.steps, moment.epoch if self.by_epoch else moment.step)]
