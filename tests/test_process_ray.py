"""The parameter server on actors: against a stand-in for Ray everywhere, against Ray itself where it is installed."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from process_job import cell_of
from saboteur import Saboteur, noted
from small import builder, digits, finish, plan_of
from test_process import replayed

from descentlab.core.errors import UserError
from descentlab.engine.crew import Limits
from descentlab.engine.process import ParameterServer
from descentlab.engine.ray_actors import RayActors, check_installed


@dataclass(eq=False)
class Reference:
    """To an answer that is computed when it is asked for."""

    actor: Any
    message: bytes | None


class FakeRay:
    """As much of Ray as the transport uses, in this process; answers come in random order, from new memory each time.

    ``dies_at``: the actor's call, counted over all, at which its process is said to be gone.
    """

    def __init__(self, dies_at: int = -1) -> None:
        self.exceptions = SimpleNamespace(RayError=RuntimeError)
        self.draw, self.calls, self.dies_at = random.Random(0), 0, dies_at
        self.killed: list[Any] = []
        self.options: dict[str, Any] = {}

    def is_initialized(self) -> bool:
        return True

    def remote(self, **options: Any) -> Any:
        self.options = options

        def wrap(cls: type) -> Any:
            return SimpleNamespace(remote=lambda *arguments: self._actor(cls(*arguments)))

        return wrap

    def _actor(self, made: Any) -> Any:
        actor = SimpleNamespace(made=made)
        actor.answer = SimpleNamespace(remote=lambda message: Reference(actor, message))
        return actor

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        assert num_returns == 1 and timeout >= 0
        chosen = self.draw.choice(references)
        return [chosen], [r for r in references if r is not chosen]

    def get(self, reference: Reference) -> bytes:
        actor, message = reference.actor, reference.message
        self.calls += 1
        if self.calls == self.dies_at:
            raise RuntimeError("The actor died unexpectedly\nand a lot of advice")
        assert actor not in self.killed
        return actor.made.answer(message)

    def kill(self, actor: Any, no_restart: bool) -> None:
        assert no_restart
        self.killed.append(actor)


@pytest.mark.parametrize("dies_at", [-1, 2, 30])
def test_the_protocol_on_a_stand_in(dies_at: int) -> None:
    """60 updates; an actor that dies at its start or later is replaced; the log replays; all actors are killed at the
    end. Broken on purpose: tensors that stay views of the first message (Ray's messages lie elsewhere each time)."""
    cell, told = digits(workers=3, dtype="float64"), []
    plan, build = plan_of(cell, 60, replicates=[3]), builder(cell)
    fake = FakeRay(dies_at)
    server = ParameterServer(plan, build(), build=build, hub=RayActors(ray=fake), note=lambda *a: told.append(a))
    finish(server)
    replayed(plan, cell, server)
    assert len(server.log) == 60 and fake.options["max_restarts"] == 0
    assert len(fake.killed) == 3 + (dies_at > 0) and len(told) == (dies_at > 0)
    assert all(kind == "worker_replaced" and "The actor died unexpectedly;" in text for kind, text in told)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_on_ray_itself_a_killed_actor_is_replaced(tmp_path: Path) -> None:
    """SIGKILL of an actor's process; the rest as above, nothing left."""
    plan, build = plan_of(cell_of(2), 40, replicates=[0]), builder(cell_of(2))

    def worker(*arguments: Any) -> Saboteur:
        return Saboteur(*arguments, folder=str(tmp_path))

    server = ParameterServer(plan, build(), build=build, hub=RayActors(), limits=Limits(60.0, 120.0, 2), worker=worker)
    for progress in server.run():
        if progress.step == 10:
            os.kill(noted(tmp_path, "pids")[0], signal.SIGKILL)
    replayed(plan, cell_of(2), server)
    assert set(noted(tmp_path, "acknowledged")) and len(noted(tmp_path, "pids")) == 3


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^engine.transport = 'ray': expected local, or an environment with Ray"):
        check_installed("engine.transport")
