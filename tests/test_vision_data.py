"""Datasets of torchvision and timm by name: on stand-ins for the libraries, and on the libraries where they are."""

from __future__ import annotations

import importlib.util
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.workloads.datasets.vision_specs import TimmDataset, Torchvision

HERE = importlib.util.find_spec("torchvision") is not None and importlib.util.find_spec("timm") is not None
needs_vision = pytest.mark.skipif(not HERE, reason="the vision extra is not installed")


class Picture:
    """Stands in for a PIL image: an array, and a resize that repeats or drops pixels."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.pixels

    def resize(self, size: tuple[int, int], how: int) -> Picture:
        rows, columns = (np.arange(n) * old // n for n, old in zip(size[::-1], self.pixels.shape, strict=False))
        return Picture(self.pixels[rows][:, columns])


def pictures(n: int, *shape: int, seed: int) -> list[tuple[Picture, int]]:
    drawn = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    return [(Picture(pixels), i % 3) for i, pixels in enumerate(drawn)]


TRAIN, TEST = pictures(12, 4, 5, 3, seed=0), pictures(6, 4, 5, 3, seed=1)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modules with the names the adapter calls; what they were asked for."""
    asked: list[Any] = []

    def by_train(root: str, train: bool = True, download: bool = False) -> Any:
        asked.append((root, train, download))
        if root == "empty":
            raise RuntimeError("Dataset not found.\nYou can use download=True")
        return TRAIN if train else TEST

    def by_split(root: str, split: str = "train") -> Any:
        asked.append((root, split))
        return {"train": TRAIN, "extra": TRAIN[:4], "test": TEST}[split]

    def folder(root: str) -> Any:
        asked.append(root)
        return TRAIN if root.endswith("train") else [(Picture(np.zeros((7, 7, 3), np.uint8)), 0)]

    class ByTrain(list):
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            super().__init__(by_train(root, train, download))

    def captions(root: str, notes: str, train: bool = True) -> Any:
        return TRAIN

    def boxes(root: str, train: bool = True) -> Any:
        return [(TRAIN[0][0], {"box": [1, 2]})]

    def create_dataset(name: str, root: str, split: str, download: bool) -> Any:
        asked.append((name, root, split, download))
        assert name == "torch/cifar10", f"Unknown dataset {name}"
        return TRAIN if split == "train" else TEST

    class Letters(ByTrain):
        """As EMNIST: what it hands on is not in its own signature."""

        def __init__(self, root: str, split: str, **kwargs: Any) -> None:
            asked.append(split)
            super().__init__(root, **kwargs)

    vision, timm = types.ModuleType("torchvision.datasets"), types.ModuleType("timm.data")
    made = {
        "CIFAR10": by_train,
        "SVHN": by_split,
        "ImageFolder": folder,
        "Boxes": boxes,
        "EMNIST": Letters,
        "Captions": captions,
        "FakeData": lambda size: TRAIN,
    }
    vars(vision).update(made, __all__=tuple(made))
    vars(timm).update(create_dataset=create_dataset)
    for name, module in (("torchvision.datasets", vision), ("timm.data", timm)):
        monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType(name.partition(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_every_split_of_a_dataset_by_its_name(library: list[Any]) -> None:
    """Pixels in [0, 1], channels first, classes at their pictures, the last training samples held out."""
    data = Torchvision(root="here", validation=2).build()
    assert (data.n, data.shape, data.classes, data.name) == ((10, 2, 6), (3, 4, 5), 3, "torchvision:CIFAR10")
    assert library == [("here", True, False), ("here", False, False)]
    for x, (picture, label), y in zip(data.x_train, TRAIN, data.y_train, strict=False):
        assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(picture.pixels).permute(2, 0, 1))
        assert int(y) == label
    assert torch.equal(
        data.x_validation[1], torch.from_numpy(TRAIN[11][0].pixels.astype(np.float32) / 255).permute(2, 0, 1)
    )
    other = Torchvision(dataset="SVHN", train="extra").build()
    assert other.n == (4, 0, 6) and library[2:] == [("data", "extra"), ("data", "test")]


def test_a_class_that_hands_its_settings_on_is_opened_in_both_parts(library: list[Any]) -> None:
    """As EMNIST: its split names a collection with a training and a test part of its own."""
    data = Torchvision(dataset="EMNIST", root="here", train="letters", test="letters", download=True).build()
    assert data.n == (12, 0, 6)
    assert library == ["letters", ("here", True, True), "letters", ("here", False, True)]


def test_timm_opens_both_splits(library: list[Any]) -> None:
    data = TimmDataset(root="there", download=True).build()
    assert data.n == (12, 0, 6) and data.name == "timm:torch/cifar10"
    assert library == [("torch/cifar10", "there", part, True) for part in ("train", "validation")]


def test_images_of_several_sizes_are_brought_to_one(library: list[Any]) -> None:
    with pytest.raises(UserError, match=r"dataset\.side = 0: expected a side that all images are resized to"):
        Torchvision(dataset="ImageFolder", root="r").build()
    data = Torchvision(dataset="ImageFolder", root="r", side=3).build()
    assert data.shape == (3, 3, 3) and library[-2:] == [str(Path("r") / "train"), str(Path("r") / "test")]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            Torchvision(dataset="CIFAR11"),
            "dataset.dataset = 'CIFAR11': expected one of torchvision's 7 datasets. did you",
        ),
        (
            Torchvision(root="empty"),
            r"dataset.root = 'empty': expected a folder .*\(Dataset not found.\)\. dataset.downl",
        ),
        (
            Torchvision(dataset="FakeData"),
            "dataset.dataset = 'FakeData': expected a dataset with a training and a test",
        ),
        (Torchvision(dataset="Boxes"), "a dataset with one class per image, not {'box': "),
        (Torchvision(dataset="SVHN", test="train"), "dataset.test = 'train': expected another part than dataset.train"),
        (TimmDataset(test="train"), "dataset.test = 'train': expected another part than dataset.train"),
        (Torchvision(dataset="SVHN", download=True), "dataset.download = True: expected false: torchvision has no"),
        (Torchvision(dataset="Captions"), "dataset.dataset = 'Captions': expected a dataset that needs a folder and"),
        (Torchvision(validation=12), "dataset.validation = 12: expected fewer than the 12 training samples"),
        (
            TimmDataset(dataset="cifar"),
            r"dataset.dataset = 'cifar': expected a name of timm.data.create_dataset \(Unkn",
        ),
    ],
)
def test_a_mistake_is_one_line(library: list[Any], spec: Any, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        spec.build()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(HERE, reason="the vision extra is installed")
@pytest.mark.parametrize("spec", [Torchvision(), TimmDataset()])
def test_without_the_extra(spec: Any) -> None:
    with pytest.raises(UserError, match=r"dataset = '(torchvision|timm)': expected the vision extra"):
        spec.build()


def write_mnist(folder: Path) -> np.ndarray:
    """A data set in MNIST's own files, made up: 40 training and 8 test pictures; the training pictures."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng, kept = np.random.default_rng(0), []
    for part, n in (("train", 40), ("t10k", 8)):
        x, y = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + x.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + y.tobytes())
        kept.append(x)
    return kept[0]


@needs_vision
def test_the_libraries_read_local_files(tmp_path: Path) -> None:
    """torchvision itself, timm itself, and a run of each, on files that this test has written."""
    pixels = write_mnist(tmp_path)
    for spec in (
        Torchvision(dataset="MNIST", root=str(tmp_path)),
        TimmDataset(dataset="torch/mnist", root=str(tmp_path)),
    ):
        data = spec.build()
        assert (data.n, data.shape) == ((40, 0, 8), (1, 28, 28))
        np.testing.assert_allclose(data.x_train[:, 0] * 255, pixels, atol=1e-3)
        assert data.y_train.tolist() == [i % 10 for i in range(40)]
    words = ["dataset=torchvision", "dataset.dataset=MNIST", f"dataset.root={tmp_path}", "model=linear", "batch_size=8"]
    found = dl.run("training", *words, "replicates=1", "epochs=1", out=tmp_path / "out", launcher="local")
    assert found.frame.height == 5


@needs_vision
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves its files open
def test_folders_of_pictures(tmp_path: Path) -> None:
    """Both libraries on root/PART/CLASS/FILE, pictures of several sizes."""
    from PIL import Image

    for part in ("train", "test", "validation"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(3):
                colour = (200, 0, 0) if label == "dog" else (0, 0, 200)
                Image.new("RGB", (20 + i, 30), colour).save(tmp_path / part / label / f"{i}.png")
    for spec in (
        Torchvision(dataset="ImageFolder", root=str(tmp_path), side=16),
        TimmDataset(dataset="", root=str(tmp_path), side=16),
    ):
        data = spec.build()
        assert (data.n, data.shape, data.classes) == ((6, 0, 6), (3, 16, 16), 2)
        assert torch.equal(data.x_test[:, 0].mean((1, 2)) > 0.5, data.y_test == 1)
