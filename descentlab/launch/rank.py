"""One process of a block under torchrun: ``python -m descentlab.launch.rank DIR BLOCK``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster.namespaces import end_with_parent, enter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..engine.distributed import Distributed, Hook
    from ..engine.driver import Progress
    from ..engine.environment import Environment
    from ..store import BlockWriter, RunDirectory
    from .bucket_log import BucketLog
    from .usage import Usage

ASK_EVERY = 10  # updates between two questions whether to stop or to write a checkpoint
GO, SAVE, LEAVE = 0, 1, 2
BUCKET_MB = 25.0  # of a study without a key for it: DDP's own


def main(path: Path, key: str) -> None:
    """Train the block from its last checkpoint to its end, or until asked to stop."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    end_with_parent()
    namespaces = [name for name in os.environ.get("DESCENTLAB_NETNS", "").split(",") if name]
    if namespaces:
        enter(namespaces[rank])  # before any thread is started

    import torch
    import torch.distributed as dist

    from .block import one_line
    from .distributed import MEETING, MESSAGE

    torch.set_num_threads(1)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    folder = path / "blocks" / key
    (folder / MESSAGE.format(rank)).unlink(missing_ok=True)  # of an earlier attempt
    meet = folder / f"{MEETING}{os.environ.get('TORCHELASTIC_RUN_ID', '0')}-{attempt}"
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(meet), world), rank=rank, world_size=world)
        _train(path, key, rank)
        dist.barrier()
    except Exception as error:
        (folder / MESSAGE.format(rank)).write_text(f"process {rank}: {one_line(error)}\n")
        raise
    finally:
        if rank == 0:
            meet.unlink(missing_ok=True)
    dist.destroy_process_group()


def hook_of(cell: Any, replicate: int) -> Hook:
    """The communication hook that does what a cell's compressor does in lockstep."""
    from ..comm.hook import CompressorHook
    from ..comm.plain_hooks import AllReduceHook, TorchPowerSGDHook
    from ..comm.powersgd_hook import PowerSGDHook

    option = getattr(cell, "compressor", None)
    if option is None or option.name == "none":
        return AllReduceHook()
    if option.name == "torch_powersgd":
        return TorchPowerSGDHook(option.rank, min_compression_rate=option.min_compression_rate, seed=cell.seed)
    if option.name == "powersgd":
        keys = ("min_compression_rate", "start_iteration", "error_feedback", "warm_start")
        return PowerSGDHook(
            option.rank, seed=cell.seed, replicate=replicate, **{key: getattr(option, key) for key in keys}
        )
    return CompressorHook(option.build(), seed=cell.seed, replicate=replicate)


def _train(path: Path, key: str, rank: int) -> None:
    from ..core.state import State
    from ..engine.distributed import Distributed
    from ..engine.environment import measure_environment
    from ..store import BlockWriter, RunDirectory
    from .block import _flush, _status, make_recorder, open_block
    from .bucket_log import BucketLog
    from .build import build_parts
    from .determinism import settled
    from .plan import SEMANTICS
    from .run_state import agreed_step, load_own
    from .usage import Usage

    directory = RunDirectory.open(path)
    block, settings = open_block(directory, key)
    cell: Any = settings
    run = block.plan.runs[0]
    writer = BlockWriter(directory, key, semantics=SEMANTICS, runs=[run.id], steps=run.stop) if rank == 0 else None
    held = writer.resume() if writer is not None else None
    step = agreed_step(held[1] if held else 0)
    own = load_own(directory.block_folder(key), rank, step) if step else None
    recorder = (
        make_recorder(cell, clock_s=held[0]["wall_s"], diverged=dict(held[0]["diverged"]))
        if held
        else make_recorder(cell)
    )
    parts = build_parts(cell, block.plan.route, [cell], block.update)
    parts.link = None
    if rank:  # all processes know when an evaluation is due; only the first makes it
        parts.on_schedule, parts.observables = [], []
    hook = hook_of(cell, run.replicate)
    one_bucket = getattr(getattr(cell, "compressor", None), "name", "") == "torch_powersgd"
    bucket_mb = 1e6 if one_bucket else getattr(cell, "bucket_mb", BUCKET_MB)
    environment = measure_environment(*getattr(parts.rank_policy, "measuring", ()))
    if writer is not None:
        _note(directory, key, "measured between the processes", environment)
    state = State.from_state_dict(own["state"]) if own else None
    own_settings: dict[str, Any] = {"hook": hook, "bucket_mb": bucket_mb, "environment": environment}
    engine = Distributed(block.plan, parts, state, step, recorder, **own_settings)  # type: ignore[arg-type]
    if own:
        hook.load_state_dict(own["hook"])
    usage = Usage()
    log = BucketLog(directory.block_folder(key), run.id, step) if writer is not None else None
    with settled(cell.deterministic):
        for progress in _loop(engine, writer, cell, directory.block_folder(key), usage, log):
            if log is not None:
                log.write(progress.step - 1, hook.buckets())
            while engine.measured and writer is not None:
                at, found = engine.measured.pop(0)
                _note(directory, key, f"measured again before update {at}", found)
    if log is not None:
        log.close()
    hook.close()
    if writer is not None and engine.step >= run.stop:
        _flush(writer, recorder, {run.id: cell.optimizer.name}, usage)
        writer.finish([_status(run.id, run.stop, recorder)])


def _note(directory: RunDirectory, key: str, text: str, found: Environment) -> None:
    directory.event("environment", text, block=key, **vars(found))


def _loop(
    engine: Distributed, writer: BlockWriter | None, cell: Any, folder: Path, usage: Usage, log: BucketLog | None
) -> Iterator[Progress]:
    """Update after update; every ``ASK_EVERY`` of them process 0 says what to do next."""
    from .block import _flush
    from .distributed import STEP, STOP
    from .run_state import decide, drop_older, save_own

    saved, told = time.monotonic(), 0.0
    names = {run.id: cell.optimizer.name for run in engine.plan.runs}
    for progress in engine.run():
        yield progress
        if writer is not None and time.monotonic() - told > 0.2:
            (folder / STEP).write_text(str(progress.step))
            told = time.monotonic()
        if progress.step % ASK_EVERY or progress.step >= engine.plan.stop:
            continue
        word = GO
        if writer is None:
            engine.recorder.flush()  # the first process keeps the rows
        else:
            word = LEAVE if (folder / STOP).exists() else SAVE if time.monotonic() - saved > cell.checkpoint_s else GO
        word = decide(word)
        if word == GO:
            continue
        save_own(folder, engine.rank, progress.step, engine.state_dict())
        decide(word)  # all have written
        if writer is not None:
            assert log is not None
            log.flush()
            _flush(writer, engine.recorder, names, usage)
            recorder = engine.recorder
            writer.checkpoint({"wall_s": recorder.now(), "diverged": dict(recorder.diverged)}, progress.step)
        saved = time.monotonic()
        decide(word)  # the checkpoint counts
        drop_older(folder, engine.rank, progress.step)
        if word == LEAVE:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
