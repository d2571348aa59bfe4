"""Staleness rules: what the server makes of a gradient that was taken at older weights. One file per paper."""

from __future__ import annotations

from .barkai2020_gap_aware import GapAware
from .zhang2016_staleness import InverseStaleness
from .zheng2017_dcasgd import AdaptiveCompensation, ConstantCompensation

__all__ = ["AdaptiveCompensation", "ConstantCompensation", "GapAware", "InverseStaleness"]
