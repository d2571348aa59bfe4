"""CLIP's image towers: the adapter on a stand-in for open_clip, whose embeddings are known; no published weights."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from test_models import images
from torch import Tensor, nn

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.workloads.base import Data
from descentlab.workloads.models.clip_models import DEVIATION, MEAN
from descentlab.workloads.models.vision_specs import Clip

COLOURS = ["red", "green", "blue"]


class Tower(nn.Module):
    """An image's embedding is its mean colour, unnormalised, times a weight of one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        colour = x.mean((2, 3)) * torch.tensor(DEVIATION) + torch.tensor(MEAN)
        return colour * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual, self.logit_scale = Tower(), nn.Parameter(torch.tensor(2.0))

    def encode_image(self, x: Tensor) -> Tensor:
        return self.visual(x)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return 5.0 * torch.eye(3)[tokens[:, 0]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were embedded, by a stand-in that reads the colour out of them."""
    texts: list[str] = []

    def tokenizer(given: list[str]) -> Tensor:
        texts.extend(given)
        return torch.tensor([[next(i for i, c in enumerate(COLOURS) if c in text)] for text in given])

    def create_model(name: str, pretrained: str | None = None) -> Model:
        if name != "ViT-B-32":
            raise RuntimeError(f"Model config for {name} not found.")
        return Model()

    module = types.ModuleType("open_clip")
    module.create_model, module.get_tokenizer = create_model, lambda name: tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return texts


def coloured() -> Data:
    """Plain red, green and blue images, a little mixed."""
    y = torch.arange(12) % 3
    x = 0.2 + 0.6 * torch.eye(3)[y].view(12, 3, 1, 1).expand(12, 3, 4, 4)
    return Data("colours", x, y, x[:0], y[:0], x, y, classes=3, source="", licence="")


def test_zero_shot_classifies_without_training(asked: list[str]) -> None:
    """Embeddings of length 1 of both kinds, times exp(logit scale); fails when the classes' texts are out of order, or
    when one of the two is not normalised."""
    data = coloured()
    factory = Clip(class_names=COLOURS, side=6).build()
    module = factory.build(data)
    x = factory.stem(data.x_test)
    assert x.shape == (12, 3, 6, 6) and asked == [f"a photo of a {c}." for c in COLOURS]
    logits = module(x)
    assert torch.equal(logits.argmax(1), data.y_test)
    first = torch.tensor([0.8, 0.2, 0.2])
    expected = torch.tensor(2.0).exp() * first / first.norm()
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


def test_grey_images_and_a_head_to_train(asked: list[str], tmp_path: Path) -> None:
    words = ["dataset=digits", "model=clip", "model.pretrained=null", "model.side=8", "replicates=1", "steps=2"]
    frame = dl.run("training", *words, "optimizer=sgd", "optimizer.lr=0.1", out=tmp_path / "o", launcher="local").frame
    assert frame.height == 2 and asked == [] and frame["train_loss"].is_finite().all()


def test_mistakes(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, data, said in (
        (Clip(class_names=["red"]), coloured(), "a name for each of the 3 classes"),
        (Clip(architecture="ViT-Z"), coloured(), "names open_clip has, with their weights"),
        (Clip(), images(2, 4), "grey or coloured images"),
    ):
        with pytest.raises(UserError, match=said):
            spec.build().build(data)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match="the vision extra"):
        Clip().build()
