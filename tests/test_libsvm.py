"""libsvm files as datasets, and slices of the parts of any dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import Trained

from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.core.slices import pieces


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("train", [("train", 0, 1280)]),
        ("train[:90%]", [("train", 0, 1152)]),
        ("train[-10%:]+test[5:7]", [("train", 1152, 1280), ("test", 5, 7)]),
        ("train[100:-100]", [("train", 100, 1180)]),
        ("test[50%:9999]", [("test", 180, 360)]),
    ],
)
def test_slices(text: str, places: list[tuple[str, int, int]]) -> None:
    found = pieces(text, {"train": 1280, "validation": 157, "test": 360})
    assert [(p.part, p.first, p.last) for p in found] == places


def test_splits_cut_every_dataset() -> None:
    """Training on a slice sees that slice alone; the epoch is shorter; overlaps are refused."""
    run = Trained("splits.train=train[:50%]", "splits.test=train[50%:]+test", "epochs=1")
    whole = run.cell.dataset.build()
    assert run.frame.height == 10 and torch.equal(run.engine.parts.train[1], whole.y_train[:640])
    assert len(run.engine.parts.test[1]) == 640 + 360
    with pytest.raises(UserError, match=r"splits.test = 'train\[80%:\]': expected samples apart from splits.train"):
        Trained("splits.train=train[:90%]", "splits.test=train[80%:]", "steps=1")
    with pytest.raises(UserError, match=r"splits\.test = .test\[5:5\].: expected at least one"):
        Trained("splits.test=test[5:5]", "steps=1")


def write_libsvm(path: Path, n: int, labels: tuple[int, ...], seed: int) -> np.ndarray:
    """A sparse file of n rows with 6 columns, and the same as a dense table with the labels in front."""
    rng = np.random.default_rng(seed)
    table = np.where(rng.random((n, 6)) < 0.5, rng.normal(size=(n, 6)).round(3), 0)
    table[:, 0] += 2.0
    table[:, 1] = rng.normal(size=n).round(3)
    y = np.array([labels[i % len(labels)] for i in range(n)])
    rows = (" ".join(f"{j + 1}:{v:.3f}" for j, v in enumerate(row) if v) for row in table)
    path.write_text("".join(f"{label:+d} {row}\n" for label, row in zip(y, rows, strict=True)))
    return np.column_stack([y, table])


def test_a_libsvm_file_trains(tmp_path: Path) -> None:
    """Rows have length 1, labels -1 and 1 become 0 and 1, and a fifth is held out, each class in proportion."""
    table = write_libsvm(tmp_path / "a.libsvm", 100, (-1, 1), 0)
    words = ["dataset=libsvm", f"dataset.path={tmp_path / 'a.libsvm'}", "batch_size=16", "steps=60", "optimizer.lr=1"]
    run = Trained(*words)
    data = run.cell.dataset.build()
    assert (data.n, data.classes, data.shape) == ((80, 0, 20), 2, (6,))
    unit = table[:, 1:] / np.linalg.norm(table[:, 1:], axis=1, keepdims=True)
    known = {tuple(row.round(4)): (label > 0) for row, label in zip(unit, table[:, 0], strict=True)}
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert [bool(v) for v in y] == [known[tuple(row.round(4))] for row in x.numpy().astype(np.float64)]
        assert y.float().mean() == 0.5
    assert run.column("train_loss")[-1] < run.column("train_loss")[0]


def test_libsvm_files_as_published_and_for_regression(tmp_path: Path) -> None:
    one, two = tmp_path / "a", tmp_path / "a.t"
    table = write_libsvm(one, 30, (3, 1, 2), 0)
    write_libsvm(two, 9, (1, 2, 3), 1)
    words = ["dataset=libsvm", f"dataset.path={one}", f"dataset.test_path={two}", "dataset.normalise=false"]
    data = resolve("training", [*words, "dataset.validation=5"]).cells[0].dataset.build()
    assert (data.n, data.classes) == ((25, 5, 9), 3)
    np.testing.assert_allclose(torch.cat([data.x_train, data.x_validation]), table[:, 1:], rtol=1e-6)
    assert torch.cat([data.y_train, data.y_validation]).tolist() == (table[:, 0] - 1).astype(int).tolist()
    data = resolve("training", [*words, "dataset.task=regression"]).cells[0].dataset.build()
    assert data.classes == 0 and data.y_train[:, 0].tolist() == table[:, 0].tolist()


def test_a9a_by_name_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are found where data are kept; no checksum is published, and that is said."""
    from typer.testing import CliRunner

    from descentlab.cli.main import app

    (tmp_path / "libsvm").mkdir()
    for name, n in (("a9a", 20), ("a9a.t", 8)):
        write_libsvm(tmp_path / "libsvm" / name, n, (-1, 1), n)
    monkeypatch.setenv("DESCENTLAB_DATA", str(tmp_path))
    data = resolve("training", ["dataset=a9a"]).cells[0].dataset.build()
    assert (data.n, data.classes) == ((20, 0, 8), 2) and "not verified" in data.source
    lines = CliRunner().invoke(app, ["fetch", "a9a"]).stdout.splitlines()
    assert len(lines) == 2 and all("not verified: no checksum is published" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "dataset.path = .*expected a file that exists"),
        ("1 a:b\n", "dataset.path = .*expected lines 'label index:value"),
        ("", "expected (lines|at least one sample)"),
        ("0.5 1:1\n1 2:3\n", "dataset.task = 'classification': expected whole numbers"),
        ("1 1:1\n1 2:3\n", "at least two of them"),
    ],
)
def test_a_bad_libsvm_file_is_one_line(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        resolve("training", ["dataset=libsvm", f"dataset.path={path}"]).cells[0].dataset.build()
