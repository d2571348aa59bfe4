"""Datasets: formats, splits that never overlap, one download for all, and what an absent file says."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from descentlab.cli import main as cli
from descentlab.core.errors import StudyError, UserError
from descentlab.testing.workloads import check_workload
from descentlab.workloads.base import Data
from descentlab.workloads.datasets import (
    cifar,
    cifar10,
    cifar100,
    files,
    idx,
    sources,
    tinyshakespeare,
)
from descentlab.workloads.datasets.sources import RemoteFile, Source
from descentlab.workloads.datasets.split import Sizes
from descentlab.workloads.specs import (
    DATASETS,
    MODELS,
    Cifar10,
    Cifar100,
    Digits,
    FashionMnist,
    GaussianMixture,
    Mlp,
    Mnist,
    Mnist1dLike,
    Mnist5k,
    MnistSimilar,
    NanoGpt,
    Quadratic,
    TeacherStudent,
    TinyShakespeare,
)

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(data folder, cache) of this test alone; nothing is taken from the machine."""
    own, cache = tmp_path / "data", tmp_path / "cache"
    own.mkdir()
    monkeypatch.setenv("DESCENTLAB_DATA", str(own))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return own, cache / "descentlab"


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def idx_gz(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def place(
    own: Path, monkeypatch: pytest.MonkeyPatch, origin: str, contents: list[bytes], alternative: bool = False
) -> None:
    """Write a source's files and let it expect their checksums."""
    source: Source = getattr(sources, origin)
    kind = "alternatives" if alternative else "files"
    made = []
    for file, content in zip(getattr(source, kind), contents, strict=True):
        path = own / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        made.append(replace(file, checksum=sha256(content)))
    changed = replace(source, **{kind: tuple(made)})
    for module in [m for name, m in sys.modules.items() if name.startswith("descentlab.workloads.datasets")]:
        if getattr(module, origin, None) is source:
            monkeypatch.setattr(module, origin, changed)


def digits(n: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (n, 28, 28)), RNG.integers(0, 10, n)


@pytest.mark.parametrize(("spec", "origin"), [(Mnist, "MNIST"), (FashionMnist, "FASHION_MNIST")])
def test_idx_files_and_their_split(
    spec: type[Mnist], origin: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), (x_test, y_test) = digits(30), digits(9)
    place(folders[0], monkeypatch, origin, [idx_gz(a) for a in (x, y, x_test, y_test)])
    data = spec(train=20, validation=4, test=5).build().checked()
    assert (data.n, data.shape, data.classes) == ((20, 4, 5), (1, 28, 28), 10)
    assert data.source and data.licence and len(data.sha256()) == 64
    for part, images, labels in (("train", x[:20], y[:20]), ("validation", x[26:], y[26:]), ("test", x_test, y_test)):
        n = len(getattr(data, f"y_{part}"))
        np.testing.assert_array_equal((getattr(data, f"x_{part}")[:, 0] * 255).round().numpy(), images[:n])
        np.testing.assert_array_equal(getattr(data, f"y_{part}").numpy(), labels[:n])
    assert spec(validation=4).build().n == (26, 4, 9)
    for wrong, words in (({"train": 27}, "dataset.train"), ({"test": 10}, "dataset.test"), ({}, "dataset.validation")):
        with pytest.raises(UserError, match=words):
            spec(**{"validation": 4 if wrong else 5000, **wrong}).build()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no gzip", "not a readable gzip file"),
        (idx_gz(np.zeros((3, 2)))[:-6], "not a readable gzip file"),
        (gzip.compress(b"\1\0\x08\1"), "not an IDX file"),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 5, 1, 2])), "promises 5 bytes, 2 follow"),
    ],
    ids=["no gzip", "cut short", "no header", "too few"],  # not the bytes: gzip writes the time into them
)
def test_a_damaged_idx_file_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(StudyError, match=words) as error:
        idx.read(tmp_path / "x.gz")
    assert "x.gz" in str(error.value)


def photographs(n: int, classes: int) -> tuple[np.ndarray, list[int]]:
    return RNG.integers(0, 256, (n, cifar.PIXELS), dtype=np.uint8), RNG.integers(0, classes, n).tolist()


def archives(layout: cifar.Layout, content: dict[str, tuple[np.ndarray, list[int]]]) -> tuple[bytes, bytes]:
    """(pickles, records): both published forms of the same pictures."""
    pickled, plain = {}, {}
    for name, (x, y) in content.items():
        content_ = pickle.dumps({b"data": x, layout.label.encode(): y}, protocol=2)
        pickled[name] = content_.replace(b"numpy._core", b"numpy.core")  # as numpy 1 named it, the published files too
        coarse = bytes([7] * (layout.label_bytes - 1))
        rows = [coarse + bytes([label]) + row.tobytes() for row, label in zip(x, y, strict=True)]
        plain[f"{name}.bin"] = b"".join(rows)
    return tar(pickled), tar(plain)


@pytest.mark.parametrize(
    ("spec", "layout", "origin"), [(Cifar10, cifar10.LAYOUT, "CIFAR10"), (Cifar100, cifar100.LAYOUT, "CIFAR100")]
)
def test_both_forms_of_cifar_are_the_same_data(
    spec: type[Cifar10],
    layout: cifar.Layout,
    origin: str,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = {name: photographs(6, layout.classes) for name in (*layout.train, *layout.test)}
    pickled, plain = archives(layout, content)
    place(folders[0], monkeypatch, origin, [plain], alternative=True)
    second = spec(validation=2).build()
    place(folders[0], monkeypatch, origin, [pickled])
    first = spec(validation=2).build()
    assert first.sha256() == second.sha256()
    assert first.n == (6 * len(layout.train) - 2, 2, 6) and first.shape == (3, 32, 32)
    assert first.classes == layout.classes

    x = np.concatenate([content[name][0] for name in layout.train]).reshape(-1, 3, 32, 32) / 255.0
    mean, std = x.mean((0, 2, 3), keepdims=True), x.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(first.x_train.numpy(), ((x - mean) / std)[:-2], atol=2e-6)
    y = [label for name in layout.train for label in content[name][1]]
    assert [*first.y_train.tolist(), *first.y_validation.tolist()] == y
    scalar = spec(validation=2, scale="scalar").build()
    np.testing.assert_allclose(scalar.x_train.numpy(), ((x - x.mean()) / x.std())[:-2], atol=2e-6)
    unit = spec(validation=2, scale="unit").build()
    np.testing.assert_allclose(unit.x_validation.numpy(), x[-2:], atol=1e-6)


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"train": pickle.dumps(Harmful())}, "has no use for"),
        ({"test": b""}, "train"),
        ({"train.bin": b"123"}, "reshape"),
    ],
)
def test_a_bad_archive_is_named(members: dict[str, bytes], words: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(tar(members))
    with pytest.raises(StudyError, match=words) as error:
        cifar.read(tmp_path / "x.tar.gz", cifar100.LAYOUT, ("train",))
    assert "x.tar.gz" in str(error.value)


PLAY = "First Citizen:\nBefore we proceed any further, hear me speak. Zounds 42!\n" * 20


def text_windows(x: torch.Tensor) -> str:
    """The stretch of text that windows with stride 1 were cut from, as ids."""
    return "".join(chr(65 + int(i)) for i in [*x[:, 0].tolist(), *x[-1, 1:].tolist()])


def test_tinyshakespeare_is_cut_before_windows_are_made(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a window reaches over a cut: then training sees characters that are tested."""
    place(folders[0], monkeypatch, "TINYSHAKESPEARE", [PLAY.encode()])
    data = TinyShakespeare(characters=1000, symbols=12, block=16).build().checked()
    letters = "".join(c if c in "abcdefghijklmnopqrstuvwxy" else " " for c in PLAY[:1000].lower())
    ranked = sorted(set(letters), key=lambda c: (-letters.count(c), c))
    kept = "".join(c if c in ranked[:12] else " " for c in letters)
    assert data.vocabulary == "".join(sorted(set(kept))) and data.classes == 12 == len(data.vocabulary)
    ids = "".join(chr(65 + data.vocabulary.index(c)) for c in kept)
    for part, (a, b) in {"train": (0, 800), "validation": (800, 900), "test": (900, 1000)}.items():
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        assert text_windows(x) == ids[a : b - 1] and text_windows(y) == ids[a + 1 : b]
        assert x.shape == y.shape == (b - a - 16, 16)
    spaced = TinyShakespeare(characters=1000, symbols=12, block=16, test=4).build()
    rows = [0, 28, 55, 83]  # of the 84 windows: 0, 27.67, 55.33, 83
    assert torch.equal(spaced.x_test, data.x_test[rows]) and torch.equal(spaced.y_test, data.y_test[rows])
    assert torch.equal(spaced.x_train, data.x_train)
    with pytest.raises(UserError, match=r"dataset.test = 85: expected at most the 84 test windows"):
        TinyShakespeare(characters=1000, symbols=12, block=16, test=85).build()
    everything = TinyShakespeare(characters=None, alphabet="all", symbols=256).build()
    assert everything.vocabulary == "".join(sorted(set(PLAY)))
    with pytest.raises(UserError, match=r"dataset.characters = 99999: expected at most"):
        TinyShakespeare(characters=99999).build()
    with pytest.raises(UserError, match=r"dataset.block = 16: expected less than 10"):
        TinyShakespeare(characters=100).build()


def test_rare_symbols_where_there_is_no_space() -> None:
    vocabulary, ids = tinyshakespeare.encode("aaabbc", "all", 2)
    assert (vocabulary, ids.tolist()) == ("ab", [0, 0, 0, 1, 1, 0])


@pytest.mark.parametrize(
    "spec",
    [
        Mnist5k(),
        MnistSimilar(n=600),
        Digits(),
        Quadratic(),
        GaussianMixture(),
        TeacherStudent(),
        TeacherStudent(task="classification"),
        Mnist1dLike(),
    ],
    ids=lambda s: s.name,
)
def test_parts_never_overlap(spec: Any) -> None:
    """No (input, target) of one part is in another."""
    data = spec.build().checked()
    assert data.name == spec.name and data.source and data.licence and min(data.n) > 0
    seen: dict[str, set[bytes]] = {}
    for part in ("train", "validation", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        seen[part] = {a.numpy().tobytes() + b.numpy().tobytes() for a, b in zip(x, y, strict=True)}
        assert len(seen[part]) >= 0.99 * len(x)
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    assert data.sha256() == spec.build().sha256()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(address, folder, requests so far) of a web server."""
    folder, requests = tmp_path / "site", list[str]()
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder, requests
        server.shutdown()
        thread.join()


def one_file(address: str, content: bytes) -> Source:
    return Source("made", "", "", (RemoteFile("sub/x.bin", f"{address}/x.bin", sha256(content)),))


def test_processes_that_start_together_download_once(
    site: tuple[str, Path, list[str]], folders: tuple[Path, Path]
) -> None:
    """Breaks without the lock: then each of them asks the server."""
    address, folder, requests = site
    content = RNG.bytes(3 * files.CHUNK)
    (folder / "x.bin").write_bytes(content)
    code = (
        "from descentlab.workloads.datasets import files\n"
        "from descentlab.workloads.datasets.sources import RemoteFile, Source\n"
        "import sys\n"
        "assert 'torch' not in sys.modules\n"
        f"print(files.paths({one_file(address, content)!r})[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    jobs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {job.communicate(timeout=60)[0].strip() for job in jobs}
    assert found == {str(folders[1] / "sub" / "x.bin")} and len(requests) == 1
    assert (folders[1] / "sub" / "x.bin").read_bytes() == content
    assert sorted(p.name for p in (folders[1] / "sub").iterdir()) == [".x.bin.lock", "x.bin"]


def test_the_own_folder_is_searched_first_and_never_written(
    site: tuple[str, Path, list[str]], folders: tuple[Path, Path]
) -> None:
    address, _, requests = site
    for folder in folders:
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "x.bin").write_bytes(b"same")
    assert files.paths(one_file(address, b"same")) == [folders[0] / "sub" / "x.bin"]
    (folders[0] / "sub" / "x.bin").write_bytes(b"else")
    with pytest.raises(StudyError, match="damaged, or another file: sha256") as error:
        files.paths(one_file(address, b"same"))
    assert str(folders[0] / "sub" / "x.bin") in str(error.value) and not requests


@pytest.mark.parametrize(("served", "reason"), [(b"other content", "sha256 of what came"), (None, "File not found")])
def test_a_failed_download_leaves_nothing_and_says_where_to_put_the_file(
    served: bytes | None, reason: str, site: tuple[str, Path, list[str]], folders: tuple[Path, Path]
) -> None:
    address, folder, _ = site
    if served is not None:
        (folder / "x.bin").write_bytes(served)
    with pytest.raises(StudyError, match=reason) as error:
        files.paths(one_file(address, b"the right content"))
    line = str(error.value)
    assert "\n" not in line and f"{address}/x.bin" in line
    assert all(str(base / "sub" / "x.bin") in line for base in folders)
    assert [p.name for p in (folders[1] / "sub").iterdir()] == [".x.bin.lock"]


def test_every_source_has_an_origin_a_licence_and_checksums() -> None:
    held = [v for v in vars(sources).values() if isinstance(v, Source)]
    assert len(held) == 7
    lengths = {"sha256": 64, "md5": 32}
    for source in held:
        assert source.source and source.licence and source.files
        for file in (*source.files, *source.alternatives):
            if not file.checksum:  # none is published, and that is said
                assert "not verified" in source.source
                continue
            algorithm, _, digits_ = file.checksum.partition(":")
            assert len(digits_) == lengths[algorithm] and int(digits_, 16)
    paths = [file.path for source in held for file in (*source.files, *source.alternatives)]
    assert len(paths) == len(set(paths))  # MNIST and Fashion-MNIST name their files alike


def test_fetch(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    place(folders[0], monkeypatch, "TINYSHAKESPEARE", [PLAY.encode()])
    result = CliRunner().invoke(cli.app, ["fetch", "tinyshakespeare", "digits"])
    assert result.exit_code == 0
    path = folders[0] / "tinyshakespeare.txt"
    assert result.stdout.splitlines() == [f"tinyshakespeare: {path}", "digits: nothing to download"]
    result = CliRunner().invoke(cli.app, ["fetch", "mnits"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "NAME = 'mnits'" in result.stderr and "did you mean 'mnist'?" in result.stderr
    monkeypatch.setattr(files, "_fetch", _offline)
    result = CliRunner().invoke(cli.app, ["fetch", "mnist"])
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 1 and str(folders[0] / "mnist" / "train-images-idx3-ubyte.gz") in line


def _offline(url: str, target: Path, checksum: str) -> None:
    raise OSError("no network")


def tiny(n: int = 4, classes: int = 2, spoil: str = "") -> Data:
    """A dataset of one's own."""
    x, y = torch.zeros(n, 3), torch.zeros(n, dtype=torch.int64)
    parts = {k: (x if k.startswith("x") else y) for k in ("x_train", "y_train", "x_test", "y_test")}
    if spoil:
        parts[spoil] = torch.full((n,), classes) if spoil.startswith("y") else torch.zeros(n, 5)
    return Data("tiny", x_validation=x, y_validation=y, classes=classes, source="here", licence="none", **parts)


def test_any_dataset_by_name() -> None:
    spec = DATASETS.parse({"name": f"{__name__}:tiny", "options": {"n": 6}})
    assert spec.build().n == (6, 6, 6)
    for options, words in (
        ({"m": 1}, r"dataset.options = \{'m': 1\}: expected arguments of"),
        ({"spoil": "y_test"}, "y_test holds classes outside 0 to 1"),
        ({"spoil": "x_test"}, "test part have another shape"),
        ({"n": 0}, "no training samples"),
    ):
        with pytest.raises(UserError, match=words):
            DATASETS.parse({"name": f"{__name__}:tiny", "options": options}).build()
    with pytest.raises(UserError, match="a function that returns Data; it returned Sizes"):
        wrong = {"name": "descentlab.workloads.datasets.split:Sizes", "options": vars(Sizes(1, 1, 1))}
        DATASETS.parse(wrong).build()


def test_the_examples_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "third_party")
    dataset = DATASETS.parse("my_dataset:spirals")
    for model in (Mlp(), MODELS.parse({"name": "my_model:Sines", "options": {"width": 12}})):
        check_workload(dataset, model)
    data = dataset.build()
    seen = torch.cdist(data.x_test, data.x_train).argmin(1)
    assert float((data.y_train[seen] == data.y_test).double().mean()) > 0.9  # two classes that can be told apart


def test_shakespeare_with_nanogpt_passes_the_check(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"{chr(97 + a)}{chr(97 + b)}{chr(97 + c)}" for a, b, c in RNG.integers(0, 25, (400, 3))]
    place(folders[0], monkeypatch, "TINYSHAKESPEARE", [" ".join(words).encode()])
    check_workload(TinyShakespeare(characters=None), NanoGpt())
