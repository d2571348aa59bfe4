"""Which conditions an engine meets, and why it refuses the others. Nothing is ever ignored silently."""

from __future__ import annotations

from collections.abc import Iterable

ENGINES = ("lockstep", "virtual", "process")
DISTRIBUTED = "distributed"  # processes under torchrun that exchange gradients; all they do lockstep does, too
ROOMS = ("fault", "arm", "timeline", "staleness_rule", "compressor", "policy", "optimizer", "schedule")
_ABSENT = ("fault:none", "arm:none", "staleness_rule:none", "compressor:none", "policy:fixed", "schedule:constant")

_DISTRIBUTED = {
    "fault": "processes under torchrun run undisturbed; use engine lockstep",
    "arm": "processes under torchrun run undisturbed; use engine lockstep",
    "timeline": "processes under torchrun wait for each other at every update; use engine virtual",
    "staleness_rule": "processes under torchrun are never late; use engine virtual",
}
_LOCKSTEP = {"timeline": "lockstep reads the current weights; use engine virtual"}
_PROCESS = {
    "fault": "which update of the parameter server a worker's gradient becomes is known only afterwards; "
    "use engine virtual",
    "arm": "a parameter server does not stop the workers that go on computing on what an arm takes back; "
    "use engine virtual",
    "timeline": "staleness of real processes is whatever happens; use engine virtual, or timeline asynchronous, "
    "bounded, softsync or barrier",
    "compressor": "not supported by the parameter server yet; use engine virtual",
    "policy": "the parameter server sends gradients whole; use engine virtual",
}

_REAL_TIMELINES = ("timeline:asynchronous", "timeline:bounded", "timeline:softsync", "timeline:barrier")


def refusal(engine: str, conditions: Iterable[str]) -> str | None:
    """Why ``engine`` cannot run these conditions together, or None when it can.

    A condition is ``room:option``, such as ``fault:N16_RD``, ``timeline:constant``, ``compressor:powersgd``,
    ``policy:schedule`` (of a compressor's rank), ``optimizer:adam``, ``schedule:linear``; options that change nothing
    (``fault:none``) may be named. ValueError for an engine or a room this function does not know, so that a new one
    cannot slip through.
    """
    if engine not in (*ENGINES, DISTRIBUTED):
        raise ValueError(f"engine = {engine!r}: expected one of {', '.join(ENGINES)}")
    chosen: dict[str, str] = {}
    for condition in sorted(set(conditions) - set(_ABSENT)):
        room, _, option = condition.partition(":")
        if room not in ROOMS or not option:
            raise ValueError(f"condition = {condition!r}: expected room:option with a room of {', '.join(ROOMS)}")
        if room in chosen:
            return f"{chosen[room]} and {condition}: a run has one {room}"
        chosen[room] = condition
    for room, condition in chosen.items():
        if engine == "lockstep" and condition != "timeline:barrier" and room in _LOCKSTEP:
            return f"{condition}: {_LOCKSTEP[room]}"
        if engine == DISTRIBUTED and room in _DISTRIBUTED:
            return f"{condition}: {_DISTRIBUTED[room]}"
        if engine == "process" and room in _PROCESS and condition not in _REAL_TIMELINES:
            return f"{condition}: {_PROCESS[room]}"
    return None
