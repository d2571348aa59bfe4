"""The determinism self-test passes on what is deterministic and names what is not; the order of samples is hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from descentlab.config.resolve import resolve
from descentlab.core.streams import Streams
from descentlab.launch.build import data_order
from descentlab.testing import check_deterministic

SMALL = ["size=quick", "cases=1", "dataset=digits", "model=mlp", "model.pool=0", "optimizer=sgd", "batch_size=128"]


def test_a_study_is_deterministic_in_this_process_and_in_others() -> None:
    order = check_deterministic("recovery", *SMALL)
    (cell,) = resolve("recovery", SMALL).cells
    n = 1280  # training images of digits
    epochs = [
        Streams(0).permutation("order", n, replicate=[0], worker=[0], step=[e])[0][: n // 128 * 128] for e in (0, 1)
    ]
    expected = np.concatenate(epochs)[:1000].astype("<i8")
    assert order == data_order(cell) == hashlib.sha256(expected.tobytes()).hexdigest()
    (other,) = resolve("recovery", [*SMALL, "seed=1"]).cells
    assert data_order(other) != order


def test_what_is_not_deterministic_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import time, torch\nclass Clock:\n    name, needs = 'clock', frozenset()\n    def measure(self, m):\n"
    (tmp_path / "observes_time.py").write_text(
        text + "        return {'nanoseconds': torch.full((len(m.loss),), time.time_ns(), dtype=torch.float64)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AssertionError, match="column nanoseconds"):
        check_deterministic("recovery", *SMALL, "observe.extra=[observes_time:Clock]")
