"""Resources that run out: a full disk, no memory, no compiler; each is one clear line, and nothing stored is lost."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from small import digits, finish, plan_of
from torch import nn

import descentlab as dl
from descentlab.config.resolve import resolve
from descentlab.core import native as core_native
from descentlab.core.errors import StudyError
from descentlab.core.footprint import footprint
from descentlab.core.member_stats import compiled_stats
from descentlab.core.native import compiled_code
from descentlab.core.streams import Streams
from descentlab.engine import native, work
from descentlab.engine.batched_cnn import cnn_kernel
from descentlab.engine.lockstep import Lockstep
from descentlab.launch import api, build, memory
from descentlab.launch.block import run_block
from descentlab.launch.isolate import isolate
from descentlab.launch.memory import bytes_per_member, members_at_most, naming_the_knob
from descentlab.launch.pool import KEPT, Outcome
from descentlab.launch.prepare import prepare
from descentlab.optim.compiled import library_for
from descentlab.store import VOLATILE, RunDirectory, load
from descentlab.workloads.specs import FlexibleCnn, Mlp, ResNet18

ROOT = Path(__file__).parent.parent
SMALL = ("fault=none", "timeline=barrier", "compressor=none", "model=mlp", "batch_size=16", "steps=60")
STEPS = ("replicates=2", "checkpoint_s=0.05", "observe.evaluate_every=0")


def command(out: Path, *settings: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``descentlab run crossed`` as a user would, in a process of its own."""
    code = "from descentlab.cli.main import main; main()"
    arguments = ["run", "crossed", *SMALL, *STEPS, *settings, "--out", str(out)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=variables, capture_output=True, text=True, timeout=120
    )


def table(out: Path) -> pl.DataFrame:
    return load(out).frame.drop(VOLATILE, strict=False).sort("run", "step", "attempt")


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB in a mount namespace of this process: gone afterwards, also if the process is killed."""
    own = ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
    if not own or subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here: no mount namespace of its own")
    folder = tmp_path / "tiny"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.strip() or made.returncode}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)
        assert not os.path.ismount(folder)


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves about ``leave`` bytes."""
    filler = folder / "filler"
    size = os.statvfs(folder)
    filler.write_bytes(bytes(max(0, size.f_bavail * size.f_frsize - leave)))
    return filler


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """The table of a run with room enough."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert command(out).returncode == 0
    return table(out)


@pytest.mark.parametrize("leave", [80_000, 170_000])
def test_a_full_disk_is_one_line_and_the_same_command_finishes(leave: int, tiny: Path, reference: pl.DataFrame) -> None:
    """Full while the plan is written, and while blocks are stored.

    Broken by a state that is replaced before its successor is whole, or by a failure note that needs room itself.
    """
    filler = fill(tiny, leave)
    full = command(tiny / "run", "processes=1")
    said = [line for line in full.stderr.splitlines() if "disk full" in line]
    assert full.returncode == 1 and len(said) == 1, full.stderr
    assert said[0].startswith("error: ") and "the last good state is kept; free space" in said[0]
    assert "Traceback" not in full.stderr + full.stdout
    filler.unlink()
    again = command(tiny / "run", "processes=1")
    assert again.returncode == 0, again.stderr
    assert table(tiny / "run").equals(reference, null_equal=True)


def test_out_of_memory_in_a_block_names_the_knobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a block: one line, the checkpoint before it stays, and the same command finishes.

    Broken by an error that reaches the user as it is, or by a checkpoint written while failing.
    """
    settings = [*SMALL, "checkpoint_s=0.001", "observe.evaluate_every=0", "optimizer=sgd", "replicates=2"]
    resolved, original, calls = resolve("crossed", settings), Lockstep._advance, [0]
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    with monkeypatch.context() as patch:
        patch.setattr("descentlab.engine.driver.Engine._advance", _after(30, calls, error, original))
        with pytest.raises(StudyError) as caught:
            api.run(resolved, tmp_path / "run", launcher="local", with_report=False)
    assert str(caught.value) == (
        "out of memory in a block of 2 members with batch_size = 16; the last good state is kept; "
        "lower processes, members_per_block or batch_size and run again"
    )
    assert len(list((tmp_path / "run").glob("blocks/*/checkpoint.pt"))) == 1
    for name in ("run", "whole"):
        assert api.run(resolved, tmp_path / name, launcher="local", with_report=False) == 0
    assert table(tmp_path / "run").equals(table(tmp_path / "whole"), null_equal=True)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_every_kind_of_failed_allocation_is_recognised(error: Exception) -> None:
    with (
        pytest.raises(StudyError, match=r"memory in planning; .*members_per_block"),
        naming_the_knob("planning"),
    ):
        raise error


def test_what_can_be_resumed_is_not_cut_into_pieces(tmp_path: Path) -> None:
    """A block that ran out of memory or room keeps its folder; broken by a cut, which deletes the checkpoint."""
    with pytest.raises(StudyError) as caught, naming_the_knob("a block"):
        raise MemoryError
    outcomes = [Outcome("a", "failed", str(caught.value)), Outcome("b", "failed", f"disk full; {KEPT}")]
    directory = RunDirectory.create(tmp_path / "run", "crossed", "study: crossed\n")
    assert isolate(directory, outcomes, lambda parts: pytest.fail("tried in pieces")) == outcomes


def _after(n: int, calls: list[int], error: Exception, original: Any) -> Any:
    def advance(self: Any, now: Any) -> None:
        calls[0] += 1
        if calls[0] > n:
            raise error
        original(self, now)

    return advance


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes"), naming_the_knob("a block"):
        raise RuntimeError("shapes do not fit")


def test_a_real_limit_on_memory_is_named(tmp_path: Path) -> None:
    """A process that may have 1.5 GB more than it holds asks torch for a batch of several: one line, no traceback."""
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from descentlab.config.resolve import resolve\n"
        "from descentlab.core.errors import StudyError\n"
        "from descentlab.launch import api\n"
        "resolved = resolve('crossed', sys.argv[2:])\n"
        "held = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + 1_500_000_000,) * 2)\n"
        "try:\n"
        "    api.run(resolved, Path(sys.argv[1]), launcher='local', with_report=False)\n"
        "except StudyError as error:\n"
        "    sys.exit(str(error))\n"
    )
    wide = ["fault=none", "timeline=barrier", "compressor=none", "optimizer=sgd", "batch_size=3000", "replicates=1"]
    model = "model={name: flexible_cnn, channels: [256], kernels: [3], downsample: 1}"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), *wide, model],
        env=variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("out of memory in ") and "members_per_block or batch_size" in line, done.stderr


def test_evaluation_is_cut_so_that_no_result_is_larger_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution with 12 x 8 x 8 results on 36 digits with room for five: the means are those of the whole.

    Broken by a bound on the inputs alone (64 elements a sample instead of 768), or by an unweighted mean of means.
    """
    cell = digits(model=FlexibleCnn(channels=[12]), dtype="float64", workers=1)
    for route in ("member", "vmap"):
        parts = build.build_parts(cell, route)  # type: ignore[arg-type]
        engine, sizes = Lockstep(plan_of(cell, 1, replicates=[0, 1]), parts), list[int]()
        x, y = parts.test[0][:36], parts.test[1][:36]
        whole = parts.many.evaluate(engine.state, x, y)
        first = next(m for m in parts.many.module.modules() if isinstance(m, nn.Conv2d))  # type: ignore[attr-defined]
        handle = first.register_forward_pre_hook(lambda m, a, sizes=sizes: sizes.append(len(a[0])))
        with monkeypatch.context() as patch:
            patch.setattr(work, "EVALUATE_ELEMENTS", 5 * 768 + 100)
            cut = parts.many.evaluate(engine.state, x, y)
        handle.remove()
        assert sizes == ([5] * 7 + [1]) * 2, route
        for a, b in zip(whole, cut, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_footprint_by_hand() -> None:
    """A linear map 64-16, SiLU, a linear map 16-10: autograd keeps the input, the first output and its SiLU."""
    parts = build.workload(digits(model=Mlp(pool=0, hidden=[16])))
    found = footprint(parts.module(Streams(0), 0), parts.data.x_train)
    assert (found.largest, found.kept) == (64, 64 + 16 + 16)


def test_the_estimate_by_hand() -> None:
    """Ten weights, three buffer values, one worker: 6 x 10 + 2 x 3 + 4 x 100 elements of 4 bytes."""
    shapes: dict[str, Any] = {"params": {"w": (2, 5)}, "buffers": {"b": (3,)}}
    assert bytes_per_member(**shapes, kept=100, batch_size=4, workers=1, element_size=4) == 4 * (60 + 6 + 400)
    assert bytes_per_member(**shapes, kept=100, batch_size=4, workers=3, element_size=8) == 8 * (60 + 18 + 30 + 400)


def test_an_accelerators_memory_caps_the_members_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with room for three and a half members at 80 %: blocks of three, and plan.json says why."""
    settings = [*SMALL, "replicates=8", "optimizer=sgd"]
    free = prepare(resolve("crossed", settings), tmp_path / "run", False)["plan"]
    assert [len(b["runs"]) for b in free["blocks"]] == [8] and "memory" not in free["blocks"][0]
    cell = resolve("crossed", settings).cells[0]
    one = build.survey(cell).bytes_per_member
    monkeypatch.setattr(build, "free_bytes", lambda device: int(3.5 * one / memory.SHARE))
    plan = prepare(resolve("crossed", settings), tmp_path / "run", False)["plan"]
    assert max(len(b["runs"]) for b in plan["blocks"]) <= 3 and sum(len(b["runs"]) for b in plan["blocks"]) == 8
    decision = {"bytes_per_member": one, "device_bytes": int(3.5 * one / memory.SHARE), "members_at_most": 3}
    assert all(b["memory"] == decision for b in plan["blocks"])
    monkeypatch.setattr(build, "free_bytes", lambda device: one)
    with pytest.raises(StudyError, match=r"one member needs about .* lower batch_size, or use device=cpu"):
        prepare(resolve("crossed", settings), tmp_path / "run", False)


@pytest.mark.gpu
def test_a_campaign_on_an_accelerator_meets_the_same_faults(tmp_path: Path) -> None:
    """The plan is that of a CPU to the byte; losses before the fault agree to rounding, and every run has its fault."""
    words = ["size=quick", "dataset=digits", "optimizer=sgd,adam", "cases=2", "recovery_steps=3", "fault.step=4"]
    cpu, gpu = (dl.run("recovery", *words, f"device={d}", out=tmp_path / d, launcher="local") for d in ("cpu", "cuda"))
    assert gpu.campaign == cpu.campaign and len(gpu.hits) == len(cpu.hits) == 4
    assert [hit["index"] for hit in gpu.hits] == [hit["index"] for hit in cpu.hits]
    before = [r.frame.filter(pl.col("step") < 4).sort("run", "step")["train_loss"] for r in (cpu, gpu)]
    np.testing.assert_allclose(before[1], before[0], rtol=1e-3)


@pytest.mark.gpu
def test_the_estimate_covers_what_a_real_accelerator_uses() -> None:
    """Three updates of ResNet-18 stay below the estimate for its members (the rest is the share that is left free)."""
    cell = digits(model=ResNet18(), device="cuda", workers=1, batch_size=32)
    site = build.survey(cell)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    finish(Lockstep(plan_of(cell, 3), build.build_parts(cell, "vmap")))
    used = torch.cuda.max_memory_allocated() - before
    assert used < 2 * site.bytes_per_member / memory.SHARE


def test_members_per_block_cuts_what_has_not_begun(tmp_path: Path) -> None:
    """A lower setting packs blocks anew that have stored nothing, and leaves the others."""
    settings = [*SMALL, "replicates=8", "optimizer=sgd"]
    assert members_at_most("vmap", 5, 1, None)[0] == 5
    first = prepare(resolve("crossed", settings), tmp_path, False)["plan"]
    (tmp_path / "plan.json").write_text(json.dumps(first))
    small = prepare(resolve("crossed", [*settings, "members_per_block=3"]), tmp_path, False)["plan"]
    assert max(len(b["runs"]) for b in small["blocks"]) <= 3
    done = tmp_path / "blocks" / first["blocks"][0]["key"]
    done.mkdir(parents=True)
    (done / "checkpoint.pt").touch()
    kept = prepare(resolve("crossed", [*settings, "members_per_block=3"]), tmp_path, False)["plan"]
    assert [b["key"] for b in kept["blocks"]] == [first["blocks"][0]["key"]]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (native.kernel, cnn_kernel, compiled_stats, library_for)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    yield
    for cache in caches:
        cache.cache_clear()


def has_compiler() -> bool:
    return native.kernel(torch.float32) is not None


def test_the_notice_without_a_compiler_reaches_the_terminal_once(tmp_path: Path) -> None:
    """Two worker processes plan and train, and nothing but the parent speaks of it; plan.json says what was decided."""
    done = command(tmp_path / "run", "processes=2", environment={"CC": "no-such-compiler"})
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "compile" in line]
    assert said == [
        "note: no compiled code on this machine, so small networks train slower: "
        "no C compiler (cc, or the one named in CC)"
    ]
    assert "RuntimeWarning" not in done.stderr
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["compiled"] is False


def interrupted(out: Path, settings: list[str]) -> None:
    """A run that has stopped before its end, as a signal would leave it."""
    directory_settings = resolve("crossed", settings)
    with pytest.MonkeyPatch.context() as patch:
        stopped = lambda directory, keys, *_: [Outcome(key, "interrupted") for key in keys]  # noqa: E731
        patch.setattr("descentlab.launch.execute.in_process", stopped)
        api.run(directory_settings, out, launcher="local", with_report=False)


@pytest.mark.usefixtures("no_compiler")
def test_a_study_begun_with_compiled_code_is_not_continued_without(tmp_path: Path) -> None:
    settings = [*SMALL, "optimizer=sgd", "replicates=2"]
    interrupted(tmp_path / "run", settings)
    plan = tmp_path / "run" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "compiled": True}))
    with pytest.raises(StudyError, match=r"begun with compiled code, which this machine cannot build \(no C compiler"):
        api.run(resolve("crossed", settings), tmp_path / "run", launcher="local", with_report=False)
    key = json.loads(plan.read_text())["blocks"][0]["key"]
    with pytest.raises(StudyError, match="begun with compiled code"):  # a worker on another machine
        run_block(tmp_path / "run", key)


def test_a_study_begun_without_compiled_code_stays_without(tmp_path: Path) -> None:
    """Continued where there is a compiler it gives the same table to the bit as one that never met one; with compiled
    code the table differs, or this test would prove nothing."""
    if not has_compiler():
        pytest.skip("no C compiler on this machine")
    settings = [*SMALL, "optimizer=sgd", "replicates=2"]
    interrupted(tmp_path / "run", settings)
    plan = tmp_path / "run" / "plan.json"
    assert json.loads(plan.read_text())["compiled"] is True
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "compiled": False}))
    api.run(resolve("crossed", settings), tmp_path / "run", launcher="local", with_report=False)
    api.run(resolve("crossed", settings), tmp_path / "compiled", launcher="local", with_report=False)
    cell = resolve("crossed", settings).cells[0]
    with compiled_code(False):
        engine = finish(Lockstep(plan_of(cell, 60), build.build_parts(cell, "vmap")))
        losses = engine.recorder.flush()[0]["train_loss"]
    slow, fast = (table(tmp_path / name)["train_loss"].to_list() for name in ("run", "compiled"))
    assert sorted(slow) == sorted(losses) and slow != fast
    assert core_native.enabled()


def test_a_dry_run_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what it could not check; with the file in place it checks that. Broken by any request."""
    monkeypatch.delenv("DESCENTLAB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("a dry run asked the network"))
    lines = api.estimate(resolve("crossed", ["dataset=tinyshakespeare", "model=nanogpt", "fault=none"]))
    assert lines[0].endswith("runs; not on this machine, and not downloaded by a dry run: tinyshakespeare")
    assert lines[1].startswith("not checked: blocks, cost") and "descentlab fetch tinyshakespeare" in lines[1]
    assert not list(tmp_path.rglob("*.part"))
    assert "not checked" not in "".join(api.estimate(resolve("crossed", SMALL)))
