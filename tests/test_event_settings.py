"""Settings of events that have no meaning, and events that a workload cannot have: one error line each."""

from __future__ import annotations

from typing import Any

import pytest
from small_events import of, plan

from descentlab.config.resolve import resolve
from descentlab.core.errors import UserError
from descentlab.perturb.event_specs import Event

MISTAKES = [
    ({"target": "weights", "op": "swap"}, "op = 'swap': expected one of set, add, mul, flip, noise, kick for target"),
    ({"target": "weights", "op": "mul"}, "magnitude = None: expected a number for op mul"),
    ({"op": "flip", "magnitude": 2.0}, "magnitude = 2.0: expected none for op flip"),
    ({"where": "post_forward"}, "where = 'post_forward': expected one of pre_forward, pre_apply, post_apply"),
    ({"slot": "momentum"}, "slot = 'momentum': expected a kind of slot for target slot, none for any other"),
    ({"target": "slot"}, "slot = None: expected a kind of slot for target slot"),
    ({"target": "batch", "op": "swap", "parameter": "w"}, "parameter = 'w': expected none for target batch"),
    ({"elements": 2, "fraction": 0.5}, "expected one of elements, fraction and index"),
    ({"target": "lr", "op": "mul", "magnitude": 2.0, "elements": 3}, "elements = 3: expected none for target lr"),
    ({"index": [1]}, "index = [1]: expected a parameter in which these elements lie"),
    ({"every": 3}, "every = 3: expected 1, for duration = 1 means one step"),
    ({"duration": None, "drift": 1.1}, "drift = 1.1: expected 1 for op flip, which has no magnitude"),
    ({"op": "mul", "magnitude": 2.0, "relative": True}, "relative = True: expected op set, add, noise or kick"),
    ({"op": "noise", "magnitude": -1.0}, "magnitude = -1.0: expected 0 or more for op noise"),
    ({"op": "mul", "magnitude": 2.0, "bit": 3}, "bit = 3: expected none for op mul"),
    ({"worker": 1}, "worker = 1: expected 0 for target weights, which is on the server"),
    ({"target": "slot", "slot": "momentum", "step": 0}, "step = 0: expected 1 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), MISTAKES, ids=lambda x: str(x)[:40])
def test_what_has_no_meaning_is_one_clear_error(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as caught:
        Event(**settings)
    assert words in str(caught.value)


def test_an_event_after_the_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"fault\.step = 60: expected a step below steps = 60"):
        resolve("crossed", ["fault=event", "fault.step=60", "size=quick"])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            Event(parameter="thetta"),
            "fault.parameter = 'thetta': expected a parameter of the model: theta. did you mean",
        ),
        (Event(parameter="theta", index=[24]), "fault.index = 24: expected 0 to 23, elements of a (4, 6) tensor"),
        (Event(elements=25), "fault.elements = 25: expected at most 24"),
        (Event(bit=64), "fault.bit = 64: expected 0 to 63"),
        (Event(target="buffer"), "fault.target = 'buffer': expected a model with buffers; this one has none"),
        (Event(target="labels", op="swap"), "fault.op = 'swap': expected one of set, add, mul, noise for real targets"),
        (Event(target="loss", op="mul", magnitude=2.0, worker=2), "fault.worker = 2: expected a worker from 0 to 0"),
    ],
    ids=lambda x: getattr(x, "target", None),
)
def test_what_the_workload_lacks_is_said_before_training(fault: Event, words: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(of(fault))
    assert words in str(caught.value)
