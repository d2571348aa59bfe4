"""Image classifiers of timm (the ``vision`` extra), built without a download."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import UserError, nearest
from ..base import Data, ModelFactory
from .fit import images, misfit


def _timm(model: str) -> Any:
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise UserError("model", model, f"the vision extra: pip install 'descentlab[vision]' ({error})") from None


def factory(
    model: str,
    architecture: str,
    dropout: float,
    resize: int = 0,
    pretrained: bool = False,
    weights: str | None = None,
) -> ModelFactory:
    """``architecture`` with as many channels and classes as the dataset has; a name timm lacks is an error.

    ``resize``: side of the square the images are brought to first; 0 = as they are. ``pretrained``: timm's published
    weights, or those of the file ``weights``; a head of another width is drawn.
    """
    if weights is not None and not Path(weights).is_file():
        raise UserError("model.weights", weights, "an existing file")
    held = {} if weights is None else {"pretrained_cfg_overlay": {"file": weights}}
    timm = _timm(model)
    if not timm.is_model(architecture):
        known = timm.list_models()
        hint = nearest(architecture, known)
        raise UserError("model.architecture", architecture, f"one of timm's {len(known)} models", hint=hint)

    def make(data: Data) -> nn.Module:
        channels, _, _ = images(model, data)
        try:
            return timm.create_model(
                architecture, pretrained, num_classes=data.classes, in_chans=channels, drop_rate=dropout, **held
            )
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise misfit(model, data, str(error)) from None

    def resized(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(resize, resize), mode="bilinear", align_corners=False) if x.dim() == 4 else x

    return ModelFactory(make, resized if resize else None)
