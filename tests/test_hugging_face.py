"""Hugging Face datasets: the adapter on a stand-in for the library, and on the library itself where it is installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import descentlab as dl
from descentlab.core.errors import UserError
from descentlab.workloads.datasets.specs import HuggingFace

RNG = np.random.default_rng(0)


class Rows:
    """Stands in for ``datasets.Dataset``: columns by name."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


def pictures(n: int, *shape: int) -> list[np.ndarray]:
    return list(RNG.integers(0, 256, (n, *shape), dtype=np.uint8))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Rows]]:
    """Name -> splits, behind a module that has the two functions the adapter calls."""
    known: dict[str, dict[str, Rows]] = {
        "grey": {
            "train": Rows(image=pictures(40, 8, 8), label=[i % 4 for i in range(40)]),
            "test": Rows(image=pictures(8, 8, 8), label=[3] * 8),
        },
        "colour": {
            "train": Rows(img=pictures(6, 4, 5, 3), y=[0, 1] * 3),
            "test": Rows(img=pictures(2, 4, 5, 3), y=[1, 0]),
        },
        "text": {
            "train": Rows(text=["abcab" * 8, "cab"]),
            "dev": Rows(text=["bca" * 9]),
            "test": Rows(text=["abd" * 9]),
        },
    }

    def load_dataset(path: str, config: str | None = None) -> dict[str, Rows]:
        if path not in known:
            raise FileNotFoundError(f"no dataset {path}\nlong explanation")
        return known[path]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return known


def test_images_and_labels_keep_their_places(hub: dict[str, dict[str, Rows]]) -> None:
    data = HuggingFace(path="grey").build().checked()
    assert (data.n, data.shape, data.classes) == ((40, 0, 8), (1, 8, 8), 4)
    assert torch.equal(
        (data.x_train[7, 0] * 255).round().to(torch.uint8), torch.from_numpy(hub["grey"]["train"]["image"][7])
    )
    colour = HuggingFace(path="colour", input="img", label="y").build().checked()
    assert colour.shape == (3, 4, 5) and colour.y_test.tolist() == [1, 0]
    assert float(colour.x_train[2, 1, 3, 4] * 255) == pytest.approx(int(hub["colour"]["train"]["img"][2][3, 4, 1]))


def test_text_is_cut_by_its_splits_and_shares_one_alphabet(hub: dict[str, dict[str, Rows]]) -> None:
    data = HuggingFace(path="text", kind="text", input="text", validation="dev", block=5).build().checked()
    assert data.vocabulary == "\nabcd" and data.classes == 5
    assert "".join(data.vocabulary[i] for i in data.x_train[0]) == "abcab"
    assert torch.equal(data.x_test[0, 1:], data.y_test[0, :-1])
    assert data.n == (44 - 5, 27 - 5, 27 - 5)


def test_it_trains(hub: dict[str, dict[str, Rows]], tmp_path: Path) -> None:
    words = ["dataset=hf", "dataset.path=grey", "model=mlp", "model.pool=0", "batch_size=8", "steps=3", "replicates=1"]
    assert dl.run("training", *words, out=tmp_path / "o", launcher="local").frame.height == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "none"}, "dataset.path = 'none': expected a dataset that can be opened (no dataset none)"),
        ({"path": "grey", "test": "dev"}, "dataset.test = 'dev': expected a split of grey (train, test)"),
        ({"path": "grey", "input": "img"}, "dataset.input = 'img': expected a column of grey (image, label)"),
        ({"path": "text", "kind": "text", "input": "text", "block": 99}, "dataset.block = 99: expected less than"),
    ],
)
def test_a_mistake_is_one_line(hub: dict[str, dict[str, Rows]], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        HuggingFace(**settings).build()
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"dataset = 'hf': expected the hf extra: pip install 'descentlab\[hf\]'"):
        HuggingFace().build()


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the hf extra is not installed")
def test_the_library_itself(tmp_path: Path) -> None:
    import datasets

    rows = {"image": [p.tolist() for p in pictures(6, 4, 4)], "label": [0, 1] * 3}
    made = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name in ("train", "test")})
    made.save_to_disk(str(tmp_path / "d"))
    data = HuggingFace(path=str(tmp_path / "d")).build().checked()
    assert data.n == (6, 0, 6) and data.shape == (1, 4, 4)
