"""How many members one block may hold, and what to say when memory runs out all the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ..core.errors import StudyError
from ..engine.program import MEMBERS_PER_BLOCK, Route
from .pool import KEPT, KNOBS

SHARE = 0.8  # of the accelerator's free memory; the rest is for its kernels and for fragments
COPIES = 6  # of every weight: itself, its gradient, before the update, and up to three optimizer slots (amsgrad)


def bytes_per_member(
    params: Mapping[str, tuple[int, ...]],
    buffers: Mapping[str, tuple[int, ...]],
    *,
    kept: int,
    batch_size: int,
    workers: int,
    element_size: int,
) -> int:
    """The stated estimate: (COPIES x weights + workers x (2 buffers + weights) + batch x kept) x element size.

    ``kept``: what autograd keeps of one sample (:mod:`descentlab.core.footprint`). The workers' weights stand for
    residuals and older versions; with one worker there are none.
    """
    weights, held = (sum(math.prod(shape) for shape in shapes.values()) for shapes in (params, buffers))
    replicas = workers * weights if workers > 1 else 0
    return (COPIES * weights + 2 * workers * held + replicas + batch_size * kept) * element_size


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device; None for a device that shares the machine's memory."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def members_at_most(
    route: Route, asked: int, per_member: int, device_bytes: int | None
) -> tuple[int, dict[str, int] | None]:
    """(members per block, the decision as plan.json stores it; None where no accelerator had a say).

    ``asked``: the setting ``members_per_block``, 0 = the stated rule.

    Raises:
        StudyError: when not even one member fits.
    """
    most = asked or MEMBERS_PER_BLOCK[route]
    if device_bytes is None:
        return most, None
    fit = int(SHARE * device_bytes) // per_member
    if fit < 1:
        raise StudyError(
            f"one member needs about {per_member / 1e6:.0f} MB and the device has {device_bytes / 1e6:.0f} MB free; "
            "lower batch_size, or use device=cpu"
        )
    decision = {"bytes_per_member": per_member, "device_bytes": device_bytes, "members_at_most": min(most, fit)}
    return min(most, fit), decision


@contextmanager
def naming_the_knob(what: str) -> Iterator[None]:
    """Turn an allocation that fails in ``what`` into one :class:`StudyError` line that names the settings to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise StudyError(f"out of memory in {what}; {KEPT}; {KNOBS}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Of Python, numpy, an accelerator, or the CPU allocator of torch, which has no class of its own for it."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "DefaultCPUAllocator" in said or "can't allocate memory" in said or "not enough memory" in said
    )
