"""What every process of a distributed block writes for itself, and agrees on with the others."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..core.errors import StudyError
from ..store.atomic import write_bytes


def decide(word: int) -> int:
    """Process 0's word, told to all."""
    told = torch.tensor([word])
    dist.broadcast(told, 0)
    return int(told)


agreed_step = decide  # the step of process 0's checkpoint


def _path(folder: Path, rank: int, step: int) -> Path:
    return folder / f"process-{rank}-{step}.pt"


def save_own(folder: Path, rank: int, step: int, state: Any) -> None:
    """Write this process's state after ``step`` updates; it counts once process 0's checkpoint names the step."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(_path(folder, rank, step), buffer.getvalue())


def load_own(folder: Path, rank: int, step: int) -> Any:
    """Read it again; StudyError where it is missing or damaged."""
    path = _path(folder, rank, step)
    try:
        return torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError) as error:
        raise StudyError(f"{path} is damaged ({type(error).__name__}); remove {folder} to compute it again") from None


def drop_older(folder: Path, rank: int, step: int) -> None:
    """Remove what an earlier checkpoint, and one that never counted, have left."""
    for path in folder.glob(f"process-{rank}-*.pt"):
        if path != _path(folder, rank, step):
            path.unlink(missing_ok=True)
