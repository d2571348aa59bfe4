"""Two commands on one directory: no run is trained twice, nothing is damaged, and a dead owner blocks nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from descentlab import store
from descentlab.core.errors import StudyError, UserError
from descentlab.launch import block
from descentlab.store import RunDirectory, claim

ROOT = Path(__file__).parent.parent
GRID = ["training", "dataset=digits", "model={name: mlp, pool: 0, hidden: [8]}", "optimizer=noted_sgd:NotedSGD"]
GRID += ["optimizer.lr=0.1,0.05,0.02,0.01", "replicates=1", "members_per_block=1", "steps=40", "checkpoint_s=600"]
GRID += ["observe.evaluate_every=20"]
NOTED = '''
import os, time, torch

class NotedSGD(torch.optim.Optimizer):
    """SGD that notes which process makes how many updates, and waits in each until the file GATE exists."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        params = [(p, group["lr"]) for group in self.param_groups for p in group["params"]]
        if sum(p.numel() for p, _ in params) > 500:  # not in the start-up check
            with open(f"{os.environ['NOTES']}/{os.getpid()}", "a") as notes:
                notes.write(".")
            while not os.path.exists(os.environ["GATE"]):
                time.sleep(0.05)
        with torch.no_grad():
            for p, lr in params:
                p.sub_(p.grad, alpha=lr)
'''
HOLD = """
import sys, time
from pathlib import Path
from descentlab.store.claim import take
held = take(Path(sys.argv[1]), "b0")
print("held" if held else "refused", flush=True)
time.sleep(600)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def wait_for(ready: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


def test_a_claim_is_held_by_one_process_and_lost_with_it(tmp_path: Path) -> None:
    """With SIGKILL, after which no code of the owner runs. Fails when a claim outlives its process, or is shared."""
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    with owner, owner.stdout:
        assert owner.stdout.readline() == "held\n"
        assert claim.take(tmp_path, "b0") is None
        assert claim.holders(tmp_path)["b0"]["pid"] == owner.pid
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert claim.holders(tmp_path) == {}
    taken = claim.take(tmp_path, "b0")
    assert taken is not None
    with taken:
        assert claim.take(tmp_path, "b0") is None  # nor twice by one process
        assert claim.holders(tmp_path)["b0"]["pid"] == os.getpid()
    assert claim.holders(tmp_path) == {}


def test_a_claim_of_another_host_counts_until_it_is_silent_for_the_lease(tmp_path: Path) -> None:
    """As on a file system that keeps locks to one host: only the record and its age speak."""
    path = tmp_path / claim.FOLDER / "b0"
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "token": "x"}))
    assert claim.take(tmp_path, "b0") is None and claim.holders(tmp_path)["b0"]["host"] == "elsewhere"
    silent = time.time() - claim.LEASE_S - 1
    os.utime(path, (silent, silent))
    taken = claim.take(tmp_path, "b0")
    assert taken is not None
    taken.check()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "token": "x"}))
    with pytest.raises(StudyError, match="block b0 was taken over by elsewhere, process 1"):
        taken.check()
    taken.release()
    assert json.loads(path.read_text())["token"] == "x"  # not ours to give back


def test_a_record_cut_short_is_no_claim(tmp_path: Path) -> None:
    (tmp_path / claim.FOLDER).mkdir()
    (tmp_path / claim.FOLDER / "b0").write_text('{"host": "else')
    assert claim.holders(tmp_path) == {}
    taken = claim.take(tmp_path, "b0")
    assert taken is not None
    taken.release()


def test_a_claimed_block_is_left_alone(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "training", "study: training\n")
    directory.replace_json("plan.json", {"blocks": [{"key": "b0", "runs": ["a"]}]})
    held = claim.take(tmp_path, "b0")
    assert held is not None
    with held:
        assert block.run_block(tmp_path, "b0") == "elsewhere"
    assert not (tmp_path / "blocks" / "b0").exists()
    assert block.run_block(tmp_path, "cut") == "elsewhere"  # no longer in the plan


class Commands:
    """``descentlab`` in processes of its own, in a folder with the user's module."""

    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, path / "notes"
        self.notes.mkdir()
        (path / "noted_sgd.py").write_text(NOTED)

    def start(self, *arguments: str, gate: str = ".") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "descentlab.cli", "run", *GRID, *arguments],
            cwd=self.path,
            env={**ENVIRONMENT, "NOTES": str(self.notes), "GATE": str(self.path / gate)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def updates(self) -> Counter[int]:
        """Updates by process."""
        return Counter({int(path.name): path.stat().st_size for path in self.notes.iterdir()})


def finish(process: subprocess.Popen[str]) -> str:
    """What it said on stderr; it has to end well."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """The table of one launch by itself, which makes each of 4 x 40 updates once."""
    commands = Commands(tmp_path_factory.mktemp("alone"))
    finish(commands.start("--launcher", "local", "--out", "out"))
    assert list(commands.updates().values()) == [160]
    return store.load(commands.path / "out").frame


def test_two_launches_at_once_share_the_runs(tmp_path: Path, alone: pl.DataFrame) -> None:
    """Together they make as many updates as one launch, and get its table.

    Without the claim they would make twice as many. A third with other settings, or with --overwrite, is refused.
    """
    commands = Commands(tmp_path)
    local = ["--launcher", "local", "--out", "out"]
    both = [commands.start(*local, gate="open") for _ in range(2)]
    wait_for(lambda: len(commands.updates()) == 2, "both to train")
    changed, again = commands.start(*local, "seed=1"), commands.start(*local, "--overwrite")
    for process in (changed, again):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "expected a directory that no other command runs, or the settings it runs (process" in errors
    (tmp_path / "open").touch()
    for process in both:
        finish(process)
    assert {process.pid for process in both} == set(commands.updates())
    assert sum(commands.updates().values()) == 160
    assert store.status(tmp_path / "out").counts() == {"done": 4}
    assert store.equal_tables(store.load(tmp_path / "out").frame, alone) == []


def test_the_survivor_takes_over_from_a_killed_command(tmp_path: Path, alone: pl.DataFrame) -> None:
    """SIGKILL of one of two; the other waits for its block, gets it, and ends with the table of one launch.

    Fails when a dead owner keeps its claim, and when a command does not wait for what another one has.
    """
    commands = Commands(tmp_path)
    local = ["--launcher", "local", "--out", "out"]
    victim = commands.start(*local, gate="never")
    wait_for(lambda: commands.updates()[victim.pid], "the first to train")
    survivor = commands.start(*local)
    wait_for(lambda: len(list((tmp_path / "out/blocks").glob("*/done.json"))) == 3, "the second to do the rest")
    assert survivor.poll() is None
    victim.kill()
    victim.communicate()
    assert "sharing the work: 1 runs are under way in process" in finish(survivor)
    assert store.equal_tables(store.load(tmp_path / "out").frame, alone) == []


def test_create_refuses_other_settings_while_a_command_runs(tmp_path: Path) -> None:
    with RunDirectory.join(tmp_path, "training", "study: training\n"):
        with RunDirectory.join(tmp_path, "training", "study: training\n"):
            pass  # the same may join
        for document, overwrite in (("study: training\nseed: 1\n", False), ("study: training\n", True)):
            with pytest.raises(UserError, match="no other command runs"):
                RunDirectory.create(tmp_path, "training", document, overwrite=overwrite)
    RunDirectory.create(tmp_path, "training", "study: training\nseed: 1\n")
