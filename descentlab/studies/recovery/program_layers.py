"""The layers that ``fault.layer=each`` stands for."""

from __future__ import annotations

from typing import Any

import torch

from ...core.errors import UserError
from ...core.opmode import trace
from ...core.streams import Streams
from ...perturb.hardware import layers_with
from ...workloads.base import Workload
from ...workloads.loading import load_data


def layers_of(cell: Any) -> list[str]:
    """Layers that make the operation which the cell's fault strikes, the first one first.

    Raises:
        UserError: for a model that does not take the data set's inputs, or makes no such operation.
    """
    data, dtype = load_data(cell.dataset), getattr(torch, cell.dtype)
    work = Workload.of(data, cell.model.build(), dtype=dtype, device=torch.device("cpu"))
    sample = work.data.x_train[:2]
    try:
        operations = trace(work.module(Streams(cell.seed), 0), sample)
    except RuntimeError as error:
        shape = tuple(sample.shape[1:])
        raise UserError("model", cell.model.name, f"a model that accepts inputs of shape {shape} ({error})") from None
    found = layers_with(operations, cell.fault.direction)
    if not found:
        raise UserError("fault.direction", cell.fault.direction, "an operation the model makes in training")
    return found
