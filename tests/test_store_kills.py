"""Killed at any moment, cut short or damaged: results are equal, or the error names the file.

The oracle of the kill tests is the table of an undisturbed execution. Breaking the mechanism on purpose makes them
fail: write the checkpoint before the parts it names, write parts in place, or skip ``drop_uncovered``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from store_job import STEPS, new_directory, train, whole_job

from descentlab.core.errors import StudyError
from descentlab.store import BlockWriter, Results, atomic, equal_tables, load, status


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing guards against a power cut, which no test makes; its order has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    path = tmp_path_factory.mktemp("undisturbed") / "out"
    train(new_directory(path))
    return load(path)


def assert_same_results(path: Path, expected: Results) -> None:
    found = load(path)
    assert equal_tables(found.frame, expected.frame) == []
    assert found.hits == expected.hits
    assert found.status == expected.status
    stray = list(path.rglob("*.tmp"))
    assert stray == []


# ---------------------------------------------------------------------------------------------------------------- kills


class Killed(BaseException):
    """Not an Exception: like a kill, no handler of the store may run on it."""


class Killer:
    """Raises :class:`Killed` in place of the k-th system call that changes the disk; of a write, half is done."""

    CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "truncate")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None) -> None:
        self.count, self.at = 0, at
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name), name))

    def wrap(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count != self.at:
                return call(*args, **kwargs)
            if name == "write":
                call(args[0], bytes(args[1])[: len(args[1]) // 2])
            raise Killed

        return wrapped


def test_killed_at_every_system_call_gives_equal_tables(tmp_path: Path, undisturbed: Results) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = Killer(patch, at=None)
        whole_job(tmp_path / "count")
    assert calls.count > 80  # all of: marker, parts, checkpoints, done.json, derived tables
    for k in range(1, calls.count + 1):
        path = tmp_path / f"k{k}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Killer(patch, at=k)
            whole_job(path)
        whole_job(path)
        assert_same_results(path, undisturbed)


def test_killed_twice_gives_equal_tables(tmp_path: Path, undisturbed: Results) -> None:
    """The second kill falls into the clean-up of the first."""
    for first in range(34, 110, 11):
        for second in range(1, 40, 9):
            path = tmp_path / f"{first}-{second}"
            for k in (first, second):
                with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                    Killer(patch, at=k)
                    whole_job(path)
            whole_job(path)
            assert_same_results(path, undisturbed)
            shutil.rmtree(path)


def test_a_process_that_is_really_killed_can_be_resumed(tmp_path: Path, undisturbed: Results) -> None:
    """SIGKILL from inside, at the rename of the third part: nothing of the interpreter's clean-up runs."""
    script = (
        "import os, signal, sys, store_job as t; from pathlib import Path\n"
        "real = os.replace\n"
        "def replace(a, b):\n"
        "    if str(b).endswith('part-00002.arrow'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(a, b)\n"
        "os.replace = replace\n"
        "t.whole_job(Path(sys.argv[1]))\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    before = status(tmp_path / "out")
    assert [(b.state, b.steps, b.total) for b in before.blocks] == [("interrupted", 4, STEPS)]
    assert load(tmp_path / "out").frame["step"].max() == 3  # only what the checkpoint vouches for
    whole_job(tmp_path / "out")
    assert_same_results(tmp_path / "out", undisturbed)


def test_data_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    atomic.write_bytes(tmp_path / "x", b"data")
    assert calls == ["write", "fsync", "replace", "fsync"]  # the last one is the folder's


def test_rows_after_the_checkpoint_do_not_count(tmp_path: Path) -> None:
    directory = new_directory(tmp_path / "out")
    train(directory, stop=5)
    block = BlockWriter(directory, "b0")
    block.resume()
    block.rows({"run": ["a0"], "step": [4], "attempt": [0]})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("descentlab.store.block._dump_state", lambda *_: (_ for _ in ()).throw(Killed()))
        block.checkpoint({}, 5)
    assert (block.folder / "metrics/part-00002.arrow").exists()
    assert load(directory.path).frame["step"].max() == 3
    BlockWriter(directory, "b0").resume()
    assert not (block.folder / "metrics/part-00002.arrow").exists()


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("how", ["truncated", "missing", "changed"])
@pytest.mark.parametrize("file", ["metrics/part-00001.arrow", "hits/part-00000.jsonl", "checkpoint.pt"])
def test_damage_to_a_covered_file_names_it(tmp_path: Path, file: str, how: str) -> None:
    directory = new_directory(tmp_path / "out")
    train(directory, stop=5)
    target = directory.block_folder("b0") / file
    data = target.read_bytes()
    if how == "missing":
        target.unlink()
    elif how == "truncated":
        target.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        target.write_bytes(data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :])
    if file == "checkpoint.pt" and how == "missing":  # then nothing is covered: the block starts again
        assert BlockWriter(directory, "b0").resume() is None
        return
    with pytest.raises(StudyError, match=r"delete the block folder .*b0 to recompute it") as caught:
        BlockWriter(directory, "b0").resume()
    assert str(target) in str(caught.value) and "\n" not in str(caught.value)
    shutil.rmtree(directory.block_folder("b0"))  # the advice works
    train(directory)
    assert load(directory.path).frame.height == 2 * STEPS


def test_damage_to_a_finished_block_names_the_file(tmp_path: Path) -> None:
    directory = new_directory(tmp_path / "out")
    train(directory)
    target = directory.block_folder("b0") / "metrics/part-00000.arrow"
    target.write_bytes(target.read_bytes()[:-1])
    with pytest.raises(StudyError, match=r"part-00000\.arrow is damaged"):
        load(directory.path)


def test_other_versions_are_refused(tmp_path: Path) -> None:
    directory = new_directory(tmp_path / "out")
    train(directory, stop=5)
    with pytest.raises(StudyError, match="computed under semantics 1, this version has 2"):
        BlockWriter(directory, "b0", semantics=2).resume()
    train(directory)
    with pytest.raises(StudyError, match="semantics"):
        _ = BlockWriter(directory, "b0", semantics=2).is_done
    done = directory.block_folder("b0") / "done.json"
    done.write_text(done.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(StudyError, match="has format 9, this version reads 1"):
        load(directory.path)


def test_a_truncated_last_line_of_an_appended_file_is_dropped_with_a_warning(tmp_path: Path) -> None:
    directory = new_directory(tmp_path / "out")
    directory.append_jsonl("runs.jsonl", [{"run": "a0"}, {"run": "a1"}])
    path = directory.path / "runs.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    assert directory.read_jsonl("runs.jsonl") == [{"run": "a0"}]
    assert directory.read_jsonl("events.jsonl") == []  # a reader never writes: the line may still be on its way
    new_directory(tmp_path / "out")
    assert [e["message"] for e in directory.read_jsonl("events.jsonl")] == [
        "runs.jsonl: the last line was cut short and has been dropped"
    ]
    directory.append_jsonl("runs.jsonl", [{"run": "a2"}])
    assert directory.read_jsonl("runs.jsonl") == [{"run": "a0"}, {"run": "a2"}]


@pytest.mark.parametrize("name", ["runs.jsonl", "events.jsonl", "resolved.jsonl"])
def test_damage_elsewhere_in_a_jsonl_file_is_an_error(tmp_path: Path, name: str) -> None:
    directory = new_directory(tmp_path / "out")
    (directory.path / name).write_text('{"run": "a0"}\n{"ru\n{"run": "a2"}\n')
    with pytest.raises(StudyError, match=f"{name} is damaged at line 2"):
        directory.read_jsonl(name)


def test_a_replaced_file_may_not_end_in_half_a_line(tmp_path: Path) -> None:
    directory = new_directory(tmp_path / "out")
    (directory.path / "campaign.jsonl").write_text('{"case": 0}\n{"ca')
    with pytest.raises(StudyError, match=r"campaign\.jsonl is damaged at line 2"):
        directory.read_jsonl("campaign.jsonl")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_keeps_the_last_good_state(small_disk: Path) -> None:
    directory = new_directory(small_disk / "out")
    train(directory, stop=5)
    before = load(directory.path).frame
    block = BlockWriter(directory, "b0")
    state, step = block.resume() or pytest.fail("no checkpoint")
    big = {**state, "big": torch.zeros(100_000)}
    with pytest.raises(
        StudyError, match=r"disk full while writing .*checkpoint\.pt; the last good state is kept; free space"
    ):
        block.checkpoint(big, step + 1)
    assert equal_tables(load(directory.path).frame, before) == []
    assert list(small_disk.rglob("*.tmp")) == []
    train(directory)
    assert load(directory.path).frame.height == 2 * STEPS
