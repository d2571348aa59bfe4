"""The parameter server with real processes: its log replays to the same weights, whatever the messages travel by."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import builder, digits, finish, plan_of, quadratic

from descentlab.cluster.specs import InverseStalenessRule
from descentlab.cluster.timeline import GaussianDelay, RecordedTimeline
from descentlab.core.errors import StudyError, UserError
from descentlab.core.member_stats import member_norm
from descentlab.core.network import address_of, interfaces
from descentlab.core.tree import leaves
from descentlab.engine.crew import Limits
from descentlab.engine.journal import Entry, Journal, read_ticks
from descentlab.engine.local import LocalProcesses
from descentlab.engine.lockstep import Lockstep
from descentlab.engine.parts import Parts
from descentlab.engine.process import ParameterServer, train
from descentlab.engine.program import BlockPlan, RunPlan
from descentlab.engine.virtual import Virtual
from descentlab.engine.wire import HEADER_BYTES, TASK, Corrupted, Header, Layout, opened, seal
from descentlab.optim.specs import Adam
from descentlab.studies.crossed.spec import CrossedSpec
from descentlab.workloads.specs import Mlp, SmallCnn


@pytest.fixture(autouse=True)
def no_orphans() -> Any:
    yield
    assert multiprocessing.active_children() == []


def replayed(plan: BlockPlan, cell: CrossedSpec, server: ParameterServer) -> Virtual:
    """The log on the virtual clock; asserts weights and buffers within 1e-9 of the norm, and equal cursors."""
    replay = Virtual(plan, builder(cell)(), timeline=RecordedTimeline(server.log))
    finish(replay)
    for part in ("params", "buffers"):
        for name, p in server.state.server[part].items():
            distance = torch.linalg.vector_norm((p - replay.state.server[part][name]).double())
            assert distance <= 1e-9 * torch.linalg.vector_norm(p.double()), name
    assert torch.equal(server.state.worker["cursor"], replay.state.worker["cursor"])
    return replay


@pytest.mark.parametrize(
    ("cell", "memory"),
    [
        (digits(workers=2, dtype="float64", model=Mlp(pool=0, hidden=[16], dropout=0.1)), "socket"),
        (quadratic(workers=3, optimizer=Adam(lr=0.01)), "shared"),
        (digits(workers=2, dtype="float64", staleness_rule=InverseStalenessRule()), "auto"),
    ],
    ids=["dropout", "shared memory", "staleness rule"],
)
def test_the_log_replays_to_the_same_weights(cell: CrossedSpec, memory: Any) -> None:
    """Invariant 3: two or three processes, float64; replayed on the virtual clock within 1e-9 of the norm.

    Broken on purpose, one at a time: the current version logged instead of the one the worker had read, a batch given
    out twice: each fails.
    """
    plan, build = plan_of(cell, 60, replicates=[3]), builder(cell)
    server = ParameterServer(plan, build(), build=build, hub=LocalProcesses(60.0, memory=memory))
    finish(server)
    assert len(server.log) == 60 and {tick.workers[0] for tick in server.log} == set(range(cell.workers))
    assert max(lag for t, tick in enumerate(server.log) for lag in tick.staleness(t)) > 0
    replayed(plan, cell, server)
    assert float(member_norm(server.state.params)) > 1.0


def test_batch_norm_travels() -> None:
    """Workers' statistics are sent, averaged on the server and replayed. Broken by buffers that stay at their start."""
    cell = digits(workers=2, dtype="float64", model=SmallCnn(channels=[4, 4, 6], pool=1), batch_size=8)
    plan, build = plan_of(cell, 12, replicates=[0], route="member"), builder(cell, "member")
    server = ParameterServer(plan, build(), build=build)
    start = {name: b.clone() for name, b in server.state.buffers.items()}
    finish(server)
    moved = [name for name, b in server.state.buffers.items() if not torch.equal(b, start[name])]
    assert moved == list(start) and moved
    replayed(plan, cell, server)


def test_one_process_is_sequential_training() -> None:
    """One worker is never stale, so weights and slots are those of lockstep to the bit.

    A worker that computes on its first parameters for ever would fail.
    """
    cell = quadratic(workers=1, optimizer=Adam(lr=0.01))
    plan, build = plan_of(cell, 25, replicates=[0]), builder(cell)
    state, log = train(plan, build, timeout_s=60.0)
    assert [(tick.workers, tick.versions) for tick in log] == [((0,), (t,)) for t in range(25)]
    expected = finish(Lockstep(plan, build()))
    for a, b in zip(leaves(state.server), leaves(expected.state.server), strict=True):
        assert torch.equal(a, b)


def test_a_barrier_is_lockstep_to_the_bit() -> None:
    """Broken by a mean in the order of arrival, by a round that begins before all have ended, by delays that reach the
    weights."""
    cell = quadratic(workers=3)
    plan, build = plan_of(cell, 8, replicates=[1]), builder(cell)
    server = ParameterServer(plan, build(), build=build, quorum=3, delay=GaussianDelay(0.005, 0.005))
    finish(server)
    assert [(tick.workers, tick.versions) for tick in server.log] == [((0, 1, 2), (t, t, t)) for t in range(8)]
    for a, b in zip(leaves(server.state.params), leaves(finish(Lockstep(plan, build())).state.params), strict=True):
        assert torch.equal(a, b)


def test_a_bound_and_groups() -> None:
    """No worker is ever more than ``bound`` gradients ahead when it reads; updates of two have two different workers.

    Broken on purpose by a bound that is ignored: worker 0 needs 20 times as long as the others.
    """
    cell = quadratic(workers=3)
    plan, build = plan_of(cell, 30, replicates=[0]), builder(cell)
    server = ParameterServer(plan, build(), build=build, bound=2, delay=GaussianDelay(0.005, 0.0, 20.0))
    finish(server)
    done = [0, 0, 0]
    for tick in server.log:
        done[tick.workers[0]] += 1
        assert max(done) - min(done) <= 3  # read at most 2 ahead, and then made one more
    replayed(plan, cell, server)
    server = ParameterServer(plan, build(), build=build, quorum=2)
    finish(server)
    assert all(len(set(tick.workers)) == 2 for tick in server.log)
    replayed(plan, cell, server)


def test_a_server_goes_on_from_its_log(tmp_path: Path) -> None:
    """Abandoned after 25 updates with a state of update 10, or with none: the logged updates are made again, to the bit
    on the same machine, and none is repeated. Its workers are gone.

    A log that is cut to the state's step, or held weights that are not restored, would fail.
    """
    cell = quadratic(workers=3, optimizer=Adam(lr=0.01))
    plan, build = plan_of(cell, 40, replicates=[0]), builder(cell)
    first = ParameterServer(plan, build(), build=build, journal=Journal(tmp_path / "log"))
    run, saved = first.run(), None
    for progress in run:
        if progress.step == 10:
            first.before_checkpoint()
            saved = first.state.clone()
        if progress.step == 25:
            break
    pids = first.hub.pids  # type: ignore[attr-defined]
    run.close()
    wait_until_gone(pids)
    for state, step in ((saved, 10), (None, 0)):
        journal = Journal(tmp_path / "log")
        again = ParameterServer(plan, build(), state, step, build=build, journal=journal)  # type: ignore[arg-type]
        made = again.run()
        for progress in made:
            if progress.step == 25:
                break
        made.close()
        for a, b in zip(leaves(again.state.server), leaves(first.state.server), strict=True):
            assert torch.equal(a, b)
        assert [e.update for e in journal.entries] == list(range(25))
    last = ParameterServer(plan, build(), build=build, journal=Journal(tmp_path / "log"))
    finish(last)
    assert len(read_ticks(tmp_path / "log")) == 40
    replayed(plan, cell, last)


def test_a_damaged_log_is_said(tmp_path: Path) -> None:
    """A last line without its end is dropped, it was never acknowledged; anything else is an error that names it."""
    entry = Entry(0, (0,), (0,), (0,), (0,), 0.1)
    journal = Journal(tmp_path / "log")
    journal.append(entry)
    journal.close()
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole + whole[:20])
    journal = Journal(tmp_path / "log")
    journal.close()
    assert journal.entries == [entry] and (tmp_path / "log").read_bytes() == whole
    for bad in (whole + whole, whole + b"{}\n", b"nonsense\n"):
        (tmp_path / "log").write_bytes(bad)
        with pytest.raises(StudyError, match="is damaged"):
            Journal(tmp_path / "log")
    with pytest.raises(StudyError, match="does not exist"):
        read_ticks(tmp_path / "other")
    (tmp_path / "log").write_bytes(whole)
    cell = quadratic()
    started = ParameterServer(plan_of(cell, 5, replicates=[0]), builder(cell)(), build=builder(cell)).state
    with pytest.raises(StudyError, match="has 1 updates and the checkpoint has 3"):
        ParameterServer(
            plan_of(cell, 5, replicates=[0]),
            builder(cell)(),
            started,
            3,
            build=builder(cell),
            journal=Journal(tmp_path / "log"),
        )


def wait_until_gone(pids: list[int]) -> None:
    """Ended, or a zombie whose parent has not been told yet; a minute is for loaded machines."""
    assert pids
    until = time.monotonic() + 60.0
    for pid in pids:
        while (state := Path(f"/proc/{pid}/stat")).is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z":
            if time.monotonic() > until:
                pytest.fail(f"process {pid} is still there")
            time.sleep(0.01)


def failing_build(cell: Any, parent: int) -> Parts:
    if os.getpid() != parent:
        raise RuntimeError("no such data here")
    return builder(cell)()


def test_a_worker_that_fails_says_why() -> None:
    """One line with the reason, the traceback beside it: a worker that only exited would be replaced without it."""
    cell, told = quadratic(workers=2), []
    build = partial(failing_build, cell, os.getpid())
    server = ParameterServer(
        plan_of(cell, 5, replicates=[0]), build(), build=build, note=lambda kind, text: told.append((kind, text))
    )
    with pytest.raises(StudyError, match=r"^worker \d failed: RuntimeError: no such data here$"):
        finish(server)
    assert told[0][0] == "worker_failed" and "Traceback" in told[0][1]


def test_what_it_cannot_do_is_refused() -> None:
    """Several members, a planned perturbation, a compressor with memory or a silly quorum never start."""
    from small import plan_fault

    from descentlab.comm.specs import PowerSgd
    from descentlab.perturb.specs import Rd

    cell = quadratic(fault=Rd(step=1))
    parts = builder(cell)()
    with pytest.raises(ValueError, match="one run"):
        ParameterServer(plan_of(cell, 5), parts, build=builder(cell))
    with pytest.raises(ValueError, match="quorum = 3"):
        ParameterServer(plan_of(cell, 5, replicates=[0]), parts, build=builder(cell), quorum=3)
    hit = BlockPlan("k", 0, "vmap", (RunPlan("r", 0, 5, 0.1, (plan_fault(parts, 0),), True),))
    with pytest.raises(ValueError, match="without a planned perturbation"):
        ParameterServer(hit, parts, build=builder(cell))
    cell = quadratic(compressor=PowerSgd())
    with pytest.raises(ValueError, match="whole"):
        ParameterServer(plan_of(cell, 5, replicates=[0]), builder(cell)(), build=builder(cell))


def test_a_port_in_use_and_an_interface_that_is_not_there() -> None:
    """One line each, with the setting; nothing is started."""
    cell = quadratic(workers=2)
    plan, build = plan_of(cell, 5, replicates=[0]), builder(cell)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = ParameterServer(plan, build(), build=build, hub=LocalProcesses(5.0, port=port))
        with pytest.raises(UserError, match=rf"^engine.port = {port}: expected a port of 127.0.0.1 that is free"):
            finish(server)
    with pytest.raises(UserError, match=r"^engine.interface = 'nosuch0': expected a network interface of this machine"):
        address_of("nosuch0", "engine.interface")
    assert address_of(None, "engine.interface") == "127.0.0.1"
    if "lo" in interfaces():
        assert address_of("lo", "engine.interface") == "127.0.0.1"


def test_messages_are_what_was_sent_or_are_refused() -> None:
    """Every single bit of a message that is flipped is noticed; tensors of several types come back.

    Broken on purpose: a sum of the numbers that is not looked at fails.
    """
    tree = {"params": {"w": torch.randn(1, 3), "b": torch.randn(1, 2).double()}, "n": torch.tensor([7])}
    layout = Layout(tree)
    memory = memoryview(bytearray(HEADER_BYTES + layout.size))
    views = layout.views(memory)
    for view, value in zip(views.all, leaves(tree), strict=True):
        view.copy_(value)
    size = seal(memory, Header(TASK, 5, 4, 3, 2, 0.5, layout.size))
    assert size == len(memory) and opened(memory) == Header(TASK, 5, 4, 3, 2, 0.5, layout.size)
    assert all(torch.equal(a, b) for a, b in zip(leaves(layout.views(memory).tree), leaves(tree), strict=True))
    for bit in range(8 * size):
        memory[bit // 8] ^= 1 << bit % 8
        if bit // 8 not in range(HEADER_BYTES - 4, HEADER_BYTES):  # padding
            with pytest.raises(Corrupted):
                opened(memory)
        memory[bit // 8] ^= 1 << bit % 8
    for wrong in (memory[:10], memory[:-8], memory[:0]):
        with pytest.raises(Corrupted):
            opened(wrong)


def test_limits_hold() -> None:
    """A worker that dies is not replaced where none may be, and the line says how to go on."""
    cell = quadratic(workers=2)
    hub = LocalProcesses(20.0)
    plan, build = plan_of(cell, 10**6, replicates=[0]), builder(cell)
    server = ParameterServer(plan, build(), build=build, hub=hub, limits=Limits(20.0, 60.0, 0))
    pids: list[int] = []
    with pytest.raises(StudyError, match=r"worker \d is lost \(killed by signal 9\).*engine.restarts = 0.*goes on"):
        for progress in server.run():
            if progress.step == 5:
                pids = hub.pids
                os.kill(pids[0], 9)
    assert len(server.log) >= 5
    wait_until_gone(pids)
