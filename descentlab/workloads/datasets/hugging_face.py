"""Datasets of the Hugging Face hub, or saved by its library (the ``hf`` extra): labelled images, and text."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UserError
from ..base import Data
from .tinyshakespeare import encode, windows

Kind = Literal["image", "text"]
LICENCE = "as its card on the hub says"


def load(
    path: str, config: str | None, kind: Kind, parts: Sequence[str | None], keys: Sequence[str], text: Sequence[int]
) -> Data:
    """``parts``: names of the training, validation and test split (None: none); ``keys``: columns of inputs and labels;
    ``text``: symbols and window length.

    Images become ``[n, C, H, W]`` in [0, 1], labels classes. Texts are joined by line breaks, read as characters: the
    next one of each is to be predicted, as for ``tinyshakespeare``.
    """
    found = _opened(path, config)
    splits = [
        _split(found, path, name, part) for name, part in zip(("train", "validation", "test"), parts, strict=True)
    ]
    for key in keys if kind == "image" else keys[:1]:
        for rows in splits:
            if rows is not None and key not in rows.column_names:
                raise UserError("dataset.input", key, f"a column of {path} ({', '.join(rows.column_names)})")
    make = _images if kind == "image" else _text
    arrays, classes, vocabulary = make(splits, keys, text)
    (a, b), (c, d), (e, f) = arrays
    return Data(f"hf:{path}", a, b, c, d, e, f, classes, source=path, licence=LICENCE, vocabulary=vocabulary)


def _opened(path: str, config: str | None) -> Any:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError("dataset", "hf", f"the hf extra: pip install 'descentlab[hf]' ({error})") from None
    try:
        saved = (Path(path) / "dataset_dict.json").is_file()
        return library.load_from_disk(path) if saved else library.load_dataset(path, config)
    except (OSError, ValueError) as error:  # no such dataset, no network, a configuration is missing
        raise UserError("dataset.path", path, f"a dataset that can be opened ({str(error).splitlines()[0]})") from None


def _split(found: Any, path: str, name: str, part: str | None) -> Any:
    if part is None:
        return None
    if part not in found:
        raise UserError(f"dataset.{name}", part, f"a split of {path} ({', '.join(found)})")
    return found[part]


Arrays = list[tuple[Tensor, Tensor]]


def _images(splits: Sequence[Any], keys: Sequence[str], text: Sequence[int]) -> tuple[Arrays, int, str]:
    made: Arrays = []
    for rows in splits:
        if rows is None:
            made.append((made[0][0][:0], made[0][1][:0]))
            continue
        pictures = [np.asarray(picture) for picture in rows[keys[0]]]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) != 1:
            raise UserError("dataset.input", keys[0], f"images of one size, not {sorted(shapes)[:3]}")
        x = torch.from_numpy(np.stack(pictures).astype(np.float32)) / 255.0
        x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
        made.append((x, torch.as_tensor(np.asarray(rows[keys[1]]), dtype=torch.int64)))
    return made, 1 + max(int(y.max()) for _, y in made if len(y)), ""


def _text(splits: Sequence[Any], keys: Sequence[str], text: Sequence[int]) -> tuple[Arrays, int, str]:
    symbols, block = text
    joined = ["" if rows is None else "\n".join(rows[keys[0]]) for rows in splits]
    vocabulary, ids = encode("".join(joined), "all", symbols)
    made: Arrays = []
    for own in ids.split([len(part) for part in joined]):
        if 0 < len(own) <= block:
            raise UserError("dataset.block", block, f"less than {len(own)}, the characters of the shortest split")
        made.append(windows(own, block) if len(own) else (ids[:0].view(0, 1).expand(0, block),) * 2)
    return made, len(vocabulary), vocabulary
