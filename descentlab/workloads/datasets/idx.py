"""The IDX format of MNIST and its relatives: big-endian sizes, then bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...core.errors import StudyError
from ..base import Data
from .files import paths
from .sources import Source
from .split import Sizes, assemble, cut

UNSIGNED_BYTE = 0x08


def read(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file.

    Raises:
        StudyError: for anything else.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise StudyError(f"{path}: not a readable gzip file ({error})") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != UNSIGNED_BYTE or len(raw) < 4 + 4 * raw[3]:
        raise StudyError(f"{path}: not an IDX file of unsigned bytes")
    dimensions = raw[3]
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if body.size != math.prod(shape):
        raise StudyError(f"{path}: its header promises {math.prod(shape)} bytes, {body.size} follow")
    return body.reshape(shape)


def load(source: Source, sizes: Sizes) -> Data:
    """Images ``[n, 1, H, W]`` in [0, 1] and classes 0 to 9; validation is the end of the published training part."""
    found = [read(path) for path in paths(source)]
    x, y = cut(source.name, _pairs(source, found), sizes)
    return assemble(source, x, y, classes=10)


def _pairs(source: Source, arrays: Sequence[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(images, classes) of the published training and test parts."""
    pairs = []
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise StudyError(f"dataset {source.name}: images {images.shape} and labels {labels.shape} do not match")
        x = torch.from_numpy(images.astype(np.float32)).unsqueeze(1) / 255.0
        pairs.append((x, torch.from_numpy(labels.astype(np.int64))))
    return pairs
