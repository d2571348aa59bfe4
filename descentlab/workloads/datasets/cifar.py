"""The two published forms of CIFAR, a tar of Python pickles and a tar of plain bytes."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch

from ...core.errors import StudyError
from ..base import Data
from .files import paths
from .sources import Source
from .split import Sizes, assemble, cut

Scale = Literal["unit", "scalar", "channel"]
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """What distinguishes the archives: the pickles' key and the records' bytes for a label (the last one counts)."""

    classes: int
    label: str
    label_bytes: int
    train: tuple[str, ...]
    test: tuple[str, ...]


class _ArraysOnly(pickle.Unpickler):
    """Refuses every name but the four that numpy arrays and Python 2 strings need: a pickle can run any code."""

    NAMES = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self.NAMES and module.partition(".")[0] in ("numpy", "_codecs"):
            # pickles of numpy 1 name a module that numpy 2 has moved
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"a dataset has no use for {module}.{name}")


def read(path: Path, layout: Layout, members: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[n, 3, 32, 32]`` and classes int64 ``[n]`` of some members of the archive, one after the other.

    Raises:
        StudyError: for an archive that is damaged or lacks a member.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            held = {PurePosixPath(info.name).name: info for info in archive.getmembers() if info.isfile()}
            parts = [_part(archive, held, name, layout) for name in members]
    except (OSError, EOFError, tarfile.TarError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise StudyError(f"{path}: not the archive it should be ({error})") from None
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def _part(
    archive: tarfile.TarFile, held: dict[str, tarfile.TarInfo], name: str, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
    binary = f"{name}.bin" in held
    file = archive.extractfile(held[f"{name}.bin" if binary else name])
    assert file is not None  # every entry of ``held`` is a file
    if binary:
        records = np.frombuffer(file.read(), np.uint8).reshape(-1, layout.label_bytes + PIXELS)
        images, labels = records[:, layout.label_bytes :], records[:, layout.label_bytes - 1]
    else:
        content = _ArraysOnly(file, encoding="bytes").load()
        images, labels = content[b"data"], np.asarray(content[layout.label.encode()])
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels in {name}")
    return images.reshape(-1, *SHAPE), labels.astype(np.int64)


def load(source: Source, layout: Layout, sizes: Sizes, scale: Scale) -> Data:
    """Images ``[n, 3, 32, 32]``; validation is the end of the published training part.

    ``scale``: ``unit`` = pixels in [0, 1]; ``scalar`` = less one mean, over one standard deviation, of all pixels of
    the published training part; ``channel`` = the same for each colour.
    """
    (path,) = paths(source)
    pairs, moments = [], None
    for members in (layout.train, layout.test):
        images, labels = read(path, layout, members)
        x = torch.from_numpy(images.astype(np.float32)) / 255.0
        moments = moments or _moments(x, scale)
        pairs.append(((x - moments[0]) / moments[1], torch.from_numpy(labels)))
    x_parts, y_parts = cut(source.name, pairs, sizes)
    return assemble(source, x_parts, y_parts, layout.classes).checked()


def _moments(x: torch.Tensor, scale: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (population) standard deviation that broadcast over ``x``."""
    if scale == "unit":
        return torch.zeros(()), torch.ones(())
    over = (0, 1, 2, 3) if scale == "scalar" else (0, 2, 3)
    return x.mean(over, keepdim=True), x.std(over, correction=0, keepdim=True)
