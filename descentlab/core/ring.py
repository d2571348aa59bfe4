"""What a collective of workers in a ring carries, and how long that takes: T = a + b bytes."""

from __future__ import annotations


def all_reduce_s(payload: float, workers: int, bandwidth_mbps: float, latency_s: float) -> float:
    """Seconds of a ring all-reduce of ``payload`` bytes: 2 (W - 1) hops, each with one W-th of the payload.

    ``bandwidth_mbps``: 10^6 bits a second in each direction of every worker's link; 0 = no limit.
    """
    hops = 2 * (workers - 1)
    return hops * latency_s + _wire_s(hops / workers * payload, bandwidth_mbps)


def all_gather_s(payload: float, workers: int, bandwidth_mbps: float, latency_s: float) -> float:
    """Seconds of a ring all-gather in which every worker contributes ``payload`` bytes: W - 1 hops with all of it."""
    hops = workers - 1
    return hops * latency_s + _wire_s(hops * payload, bandwidth_mbps)


def _wire_s(carried: float, bandwidth_mbps: float) -> float:
    return 8 * carried / (1e6 * bandwidth_mbps) if bandwidth_mbps else 0.0
