"""Image datasets of torchvision and timm, read whole (the ``vision`` extra)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UserError, nearest
from ..base import Data
from .split import Sizes, cut

LICENCE = "as its publisher says"
TORCHVISION, TIMM = "torchvision", "timm"


@dataclass(frozen=True)
class Wanted:
    """Where the files lie, whether they may be downloaded, the side images are resized to (0: as they are), and how
    many of the last training samples are for validation."""

    root: str
    download: bool
    side: int
    validation: int


def of_torchvision(dataset: str, splits: tuple[str, str], wanted: Wanted) -> Data:
    """The class ``dataset`` of torchvision.datasets, its training and test part.

    Raises:
        UserError: without the library, for a name it lacks, a class that has no such parts, files that are absent.
    """
    library = _library(TORCHVISION, "torchvision.datasets")
    known = sorted(library.__all__)
    if dataset not in known:
        hint = nearest(dataset, known)
        raise UserError("dataset.dataset", dataset, f"one of torchvision's {len(known)} datasets", hint=hint)
    make = getattr(library, dataset)
    takes = _parameters(make)
    may = {"download": wanted.download} if "download" in takes else {}
    if wanted.download and not may:
        raise UserError("dataset.download", True, f"false: torchvision has no download of {dataset}")
    if "train" not in takes:
        _check_parts(splits)
    opened = []
    for part, split in zip((True, False), splits, strict=True):
        if "train" in takes:
            own = {"root": wanted.root, "train": part}
            if "split" in takes:  # of EMNIST: both parts have several
                own["split"] = split
        elif "split" in takes:
            own = {"root": wanted.root, "split": split}
        elif dataset == "ImageFolder":
            own = {"root": str(Path(wanted.root) / split)}
        else:
            raise UserError("dataset.dataset", dataset, "a dataset with a training and a test part, or ImageFolder")
        opened.append(_opened(lambda own=own: make(**own, **may), dataset, wanted))
    return _data(f"torchvision:{dataset}", opened, wanted)


def of_timm(dataset: str, splits: tuple[str, str], wanted: Wanted) -> Data:
    """What ``timm.data.create_dataset`` opens under that name.

    Raises:
        UserError: without the library, for a name it lacks, for files that are absent.
    """
    library = _library(TIMM, "timm.data")
    _check_parts(splits)

    def make(split: str) -> Any:
        try:
            return library.create_dataset(dataset, root=wanted.root, split=split, download=wanted.download)
        except AssertionError as error:  # how timm says that it does not know a name
            expected = f"a name of timm.data.create_dataset ({_first_line(error)})"
            raise UserError("dataset.dataset", dataset, expected) from None

    opened = [_opened(lambda split=split: make(split), dataset, wanted) for split in splits]
    return _data(f"timm:{dataset}", opened, wanted)


def _library(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise UserError("dataset", name, f"the vision extra: pip install 'descentlab[vision]' ({error})") from None


def _parameters(make: Any) -> set[str]:
    """What a class takes, also what it hands on to its bases as keywords."""
    found: set[str] = set()
    for base in inspect.getmro(make) if inspect.isclass(make) else (make,):
        if base is object or (inspect.isclass(base) and "__init__" not in vars(base)):
            continue
        own = inspect.signature(base.__init__ if inspect.isclass(base) else base).parameters
        found |= set(own)
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return found


def _check_parts(splits: tuple[str, str]) -> None:
    if splits[0] == splits[1]:
        raise UserError("dataset.test", splits[1], "another part than dataset.train")


def _opened(make: Any, dataset: str, wanted: Wanted) -> Any:
    try:
        return make()
    except TypeError as error:
        expected = f"a dataset that needs a folder and a part only ({_first_line(error)})"
        raise UserError("dataset.dataset", dataset, expected) from None
    except (OSError, RuntimeError, ValueError) as error:
        said = _first_line(error)
        hint = "" if wanted.download else "dataset.download=true lets the library download it"
        raise UserError(
            "dataset.root", wanted.root, f"a folder with the files of the dataset ({said})", hint=hint
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _data(name: str, parts: Iterable[Any], wanted: Wanted) -> Data:
    pairs = [_arrays(part, wanted.side) for part in parts]
    shapes = {tuple(x.shape[1:]) for x, _ in pairs}
    if len(shapes) > 1:
        raise UserError(
            "dataset.side", wanted.side, f"a side that all images are resized to; they have {sorted(shapes)}"
        )
    x, y = cut(name, pairs, Sizes(None, wanted.validation, None))
    classes = 1 + max(int(part.max()) for part in y if len(part))
    return Data(name, x[0], y[0], x[1], y[1], x[2], y[2], classes, source=name, licence=LICENCE).checked()


def _arrays(items: Any, side: int) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, C, H, W]`` in [0, 1] and classes ``[n]`` of pairs (PIL image, class)."""
    pictures, labels = [], []
    for i in range(len(items)):
        picture, label = items[i]
        if not isinstance(label, int | np.integer):
            raise UserError(
                "dataset.dataset", type(items).__name__, f"a dataset with one class per image, not {label!r}"
            )
        if side:
            picture = picture.resize((side, side), 2)  # bilinear
        pictures.append(np.asarray(picture))
        labels.append(int(label))
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1:
        raise UserError("dataset.side", side, f"a side that all images are resized to; they have {sorted(shapes)[:3]}")
    x = torch.from_numpy(np.stack(pictures).astype(np.float32)) / 255.0
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor(labels)
