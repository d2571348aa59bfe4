"""Targets given by a fixed random network, the teacher: a student of the same shape can reach the noise floor."""

from __future__ import annotations

import numpy as np
import torch

from ...core.streams import Streams
from ..base import Data


def teacher(inputs: int, hidden: int, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``[hidden, inputs]`` and ``[outputs, hidden]``, N(0, 1 / fan-in)."""
    streams = Streams(seed)
    first = streams.normal("teacher", hidden * inputs, replicate=0).reshape(hidden, inputs)
    last = streams.normal("teacher", outputs * hidden, replicate=0, step=1).reshape(outputs, hidden)
    return first / np.sqrt(inputs), last / np.sqrt(hidden)


def load(
    inputs: int, hidden: int, outputs: int, noise: float, task: str, sizes: tuple[int, int, int], seed: int
) -> Data:
    """Inputs ``[n, inputs]`` float64, N(0, 1). The teacher's answer is V tanh(W x) + ``noise`` N(0, 1).

    ``task``: ``regression`` = targets are the answer ``[n, outputs]``; ``classification`` = the largest of it ``[n]``.
    """
    streams, n = Streams(seed), sum(sizes)
    x = streams.normal("inputs", n * inputs, replicate=0).reshape(n, inputs)
    first, last = teacher(inputs, hidden, outputs, seed)
    answer = np.tanh(x @ first.T) @ last.T
    answer += noise * streams.normal("noise", n * outputs, replicate=0).reshape(n, outputs)
    y = torch.from_numpy(answer if task == "regression" else answer.argmax(1))
    t = torch.from_numpy(x)
    a, b = sizes[0], sizes[0] + sizes[1]
    return Data(
        "teacher_student", t[:a], y[:a], t[a:b], y[a:b], t[b:], y[b:],
        classes=0 if task == "regression" else outputs, source="generated", licence="none needed",
    )  # fmt: skip
