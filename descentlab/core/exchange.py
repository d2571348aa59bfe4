"""Runs the coroutine in which a compressor sends things, with whatever answers its collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .protocols import Collective, Exchange, Gather, Mean, Means
from .tree import Tree


def drive(exchange: Exchange, answer: Callable[[Collective], Any]) -> tuple[Tree, Tree, Tree]:
    """Run a compressor's coroutine to its end; ``answer`` gives every collective its result."""
    reply: Any = None
    while True:
        try:
            request = exchange.send(reply)
        except StopIteration as stop:
            return stop.value
        reply = answer(request)


def over_workers(request: Collective) -> Any:
    """The answer to a collective whose tensors hold all workers on their second axis."""
    if isinstance(request, Gather):
        return request.tensor
    if isinstance(request, Means):
        return tuple(map(_mean, request.tensors))
    assert isinstance(request, Mean), request
    return _mean(request.tensor)


def _mean(tensor: Tensor) -> Tensor:
    return tensor.mean(1) if tensor.shape[1] > 1 else tensor.squeeze(1)  # of one worker a view, no copy
