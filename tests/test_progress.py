"""What is left after a resume, and the time that is said to be left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from descentlab.launch import progress
from descentlab.store.progress import BlockStatus, Status


def test_what_a_checkpoint_holds_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 100 member-steps each: one not begun, one three quarters through, one unknown to the directory."""
    known = (BlockStatus("new", "queued", 0, 50), BlockStatus("old", "interrupted", 75, 100))
    monkeypatch.setattr(progress, "status", lambda path: Status("recovery", known, ()))
    blocks: list[dict[str, Any]] = [{"key": key, "member_steps": 100} for key in ("new", "old", "other")]
    assert progress.remaining(Path("out"), blocks) == 100 + 25 + 100


def test_the_time_left_is_at_the_speed_of_this_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """225 member-steps left of 300; after 25 of them in 10 s the other 200 need 80 s."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress(225, "recovery")
    now[0] = 10.0
    bar.tick(25)
    assert bar.eta() == "80 s left"
