"""Calls torch's own optimizers without the parts that exist for ``torch.compile``.

Constructing or stepping any ``torch.optim`` class imports ``torch._dynamo`` (about two seconds per process), only to
tell a compiler that is not there where to break its graph. The update itself is the undecorated ``step``; it is called
under ``no_grad``, which is what the decorator does. Classes from elsewhere are called as they are.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch


def construct(cls: type[torch.optim.Optimizer], tensors: list[torch.Tensor], settings: dict[str, Any]) -> Any:
    """``cls(tensors, **settings)``."""
    wrapped = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", None)
    if wrapped is not None and "torch._dynamo" not in sys.modules and not hasattr(wrapped, "__dynamo_disable"):
        wrapped.__dynamo_disable = wrapped  # what torch caches here is the same function, marked for its compiler
    return cls(tensors, **settings)


def step(optimizer: torch.optim.Optimizer) -> None:
    """One update; gradients are in ``.grad``."""
    cls = type(optimizer)
    if cls.__module__.startswith("torch.optim."):
        with torch.no_grad():
            inspect.unwrap(cls.step)(optimizer)
    else:
        optimizer.step()
