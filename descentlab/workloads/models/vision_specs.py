"""Settings of models from the ``vision`` extra (timm)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ...core.specs import Option

RESIZE = "side of the square that images are resized to first (bilinear); 0 = as they are"


class Timm(Option):
    """Any image classifier of timm by its name there; needs the vision extra, and a download if pretrained."""

    name: Literal["timm"] = "timm"
    architecture: str = Field("resnet18", description="a name from timm.list_models()")
    pretrained: bool = Field(False, description="timm's published weights but for the head; downloaded")
    weights: str | None = Field(None, description="a file of such weights here, in place of the download")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the classifier")
    resize: NonNegativeInt = Field(0, description=RESIZE)

    @model_validator(mode="after")
    def _weights_are_read(self) -> Timm:
        if self.weights is not None and not self.pretrained:
            raise ValueError(f"weights = {self.weights}: expected pretrained = true beside it")
        return self

    def build(self) -> Any:
        from .timm_models import factory

        return factory(self.name, self.architecture, self.dropout, self.resize, self.pretrained, self.weights)


class _Published(Option):
    dropout: float = Field(0.0, ge=0, lt=1, description="before the classifier")
    resize: NonNegativeInt = Field(0, description=RESIZE)

    def build(self) -> Any:
        from .timm_models import factory

        return factory(self.name, self.name, self.dropout, self.resize)


class EfficientNetB0(_Published):
    """EfficientNet-B0 of timm; needs the vision extra; 4,020,358 parameters on cifar10."""

    name: Literal["efficientnet_b0"] = "efficientnet_b0"


class DenseNet121(_Published):
    """DenseNet-121 of timm; needs the vision extra; 6,964,106 parameters on cifar10."""

    name: Literal["densenet121"] = "densenet121"


class NfResNet26(_Published):
    """Normaliser-free ResNet-26 of timm; needs the vision extra; 13,966,666 parameters on cifar10."""

    name: Literal["nf_resnet26"] = "nf_resnet26"


class Clip(Option):
    """CLIP's image tower of open_clip, a linear head, zero-shot where classes have names; needs the vision extra."""

    name: Literal["clip"] = "clip"
    architecture: str = Field("ViT-B-32", description="a name from open_clip.list_models()")
    pretrained: str | None = Field("openai", description="open_clip's name of the weights; downloaded; null = random")
    class_names: list[str] = Field([], description="of the classes in their order: the head is zero-shot")
    template: str = Field("a photo of a {}.", pattern=r"^[^{}]*\{\}[^{}]*$", description="text of a class, {} its name")
    side: PositiveInt = Field(224, description="of the square that images are resized to (bicubic)")

    def build(self) -> Any:
        from .clip_models import factory

        return factory(self.architecture, self.pretrained, self.class_names, self.template, self.side)
