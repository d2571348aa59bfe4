"""CLIP's image towers (Radford et al. 2021) by open_clip (``vision`` extra), with a linear or a zero-shot head."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import UserError
from ..base import Data, ModelFactory
from .fit import images

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's images


def _library() -> Any:
    try:
        return importlib.import_module("open_clip")
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise UserError("model", "clip", f"the vision extra: pip install 'descentlab[vision]' ({error})") from None


class Classifier(nn.Module):
    """``[B, 3, S, S]`` in [0, 1] -> ``[B, classes]``: the image's embedding of length 1, then a linear head."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, tower: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.tower, self.head = tower, head
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.normalize(self.tower((x - self.mean) / self.deviation), dim=-1))


def factory(architecture: str, weights: str | None, names: Sequence[str], template: str, side: int) -> ModelFactory:
    """``weights``: open_clip's name of trained ones, None: random. ``names``: of the classes in their order; with them
    the head is zero-shot, the scaled embeddings of ``template`` filled with each name. ``side``: of the images."""
    library = _library()

    def make(data: Data) -> nn.Module:
        if names and len(names) != data.classes:
            raise UserError("model.class_names", list(names), f"a name for each of the {data.classes} classes")
        if images("clip", data)[0] not in (1, 3):
            raise UserError("model", "clip", f"grey or coloured images, not those of '{data.name}'")
        try:
            model = library.create_model(architecture, pretrained=weights)
        except (RuntimeError, KeyError, ValueError) as error:
            known = f"names open_clip has, with their weights ({str(error).splitlines()[0]})"
            raise UserError("model.architecture", f"{architecture}, {weights}", known) from None
        model = model.float().eval()
        width = model.encode_image(torch.zeros(1, 3, side, side)).shape[-1]
        head = nn.Linear(width, data.classes)
        if names:
            head = _zero_shot(model, library.get_tokenizer(architecture), head, [template.format(n) for n in names])
        return Classifier(model.visual, head)

    def fitted(x: Tensor) -> Tensor:
        if x.dim() != 4:
            return x
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        return F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)

    return ModelFactory(make, fitted)


def _zero_shot(model: Any, tokenizer: Any, head: nn.Linear, texts: Sequence[str]) -> nn.Linear:
    with torch.no_grad():
        embedded = F.normalize(model.encode_text(tokenizer(list(texts))), dim=-1)
        head.weight.copy_(model.logit_scale.exp() * embedded)
        head.bias.zero_()
    return head
