"""The switch ``deterministic``: operations that can give different bits in two executions raise instead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def settled(asked: bool) -> Iterator[None]:
    """With ``asked``, torch refuses operations that have no deterministic form (an accelerator's; a CPU's all have)
    and cuDNN chooses its algorithms without measuring; as before afterwards."""
    if not asked:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
