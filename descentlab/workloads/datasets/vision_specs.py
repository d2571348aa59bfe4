"""Settings of image datasets that torchvision or timm know by name (the ``vision`` extra)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt

from ...core.specs import Option

if TYPE_CHECKING:
    from .vision import Wanted


class _Named(Option):
    """What both libraries' datasets share."""

    root: str = Field("data", description="folder of the files")
    download: bool = Field(False, description="let the library download what is missing, if it can")
    side: NonNegativeInt = Field(0, description="of the square that images are resized to; 0 = all have one size")
    validation: NonNegativeInt = Field(0, description="last training samples, held out from training")

    def wanted(self) -> Wanted:
        from .vision import Wanted

        return Wanted(self.root, self.download, self.side, self.validation)


class Torchvision(_Named):
    """Labelled images that torchvision has by name, as floats in [0, 1]; needs the vision extra."""

    name: Literal["torchvision"] = "torchvision"
    dataset: str = Field("CIFAR10", description="a class of torchvision.datasets; ImageFolder: root/train, root/test")
    train: str = Field("train", description="split to train on, of a class that has several by name")
    test: str = Field("test", description="split to test on, likewise")

    def build(self) -> Any:
        from .vision import of_torchvision

        return of_torchvision(self.dataset, (self.train, self.test), self.wanted())


class TimmDataset(_Named):
    """Labelled images that timm.data opens by name, as floats in [0, 1]; needs the vision extra."""

    name: Literal["timm"] = "timm"
    dataset: str = Field("torch/cifar10", description="a name of create_dataset; empty = folders root/train, …")
    train: str = Field("train", description="split to train on")
    test: str = Field("validation", description="split to test on")

    def build(self) -> Any:
        from .vision import of_timm

        return of_timm(self.dataset, (self.train, self.test), self.wanted())
