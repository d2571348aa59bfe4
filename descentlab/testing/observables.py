"""Does an observable measure every member for itself, and nothing but measure?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.protocols import Measured, Observable
from ..core.state import State
from ..core.tree import clone, leaves, take
from ..observe.specs import EVALUATED, PER_STEP

MEMBERS = 4
NEEDS = {"loss", "grad", "update", "eval"}
RESERVED = {*PER_STEP, *EVALUATED}


def check_observable(observable: Any, *, shipped: bool = False) -> None:
    """An instance with ``name``, ``needs`` and ``measure``.

    ``measure`` gives a number (or a row of numbers) per member by column name; a member's numbers depend on no other
    member; nothing it is shown is changed; NaN weights give numbers, not an exception; the columns are always the same.
    ``shipped=True`` allows the names of the columns that every run has.
    """
    name = getattr(observable, "name", type(observable).__name__)
    assert isinstance(observable, Observable), f"{name}: needs the attributes name, needs and measure"
    unknown = set(observable.needs) - NEEDS
    assert not unknown, f"{name}: needs {sorted(unknown)}; known are {', '.join(sorted(NEEDS))}"
    seen = _measured(observable.needs, range(MEMBERS))
    held = [t.clone() for t in _tensors(seen)]
    found = observable.measure(seen)
    unchanged = all(torch.equal(a, b) for a, b in zip(held, _tensors(seen), strict=True))
    assert unchanged, f"{name}: measure changes what it is shown"
    for column, values in found.items():
        assert shipped or column not in RESERVED, f"{name}: column '{column}' belongs to descentlab"
        good = isinstance(values, Tensor) and values.dim() in (1, 2) and len(values) == MEMBERS
        assert good, f"{name}: column '{column}' is no tensor with one entry per member"
    for members in ([2], [3, 1]):
        part = observable.measure(_measured(observable.needs, members))
        assert set(part) == set(found), f"{name}: the columns depend on how many members there are"
        for column, values in part.items():
            equal = torch.allclose(values.double(), found[column][members].double(), rtol=1e-12, equal_nan=True)
            assert equal, f"{name}: '{column}' of a member depends on the members beside it"
    spoilt = _measured(observable.needs, range(MEMBERS))
    for tensor in leaves(spoilt.state.params):
        tensor[0] = torch.nan
    broken = observable.measure(spoilt)
    assert set(broken) == set(found), f"{name}: the columns change when weights are NaN"
    for column, values in broken.items():
        rest = torch.allclose(values[1:].double(), found[column][1:].double(), rtol=1e-12, equal_nan=True)
        assert rest, f"{name}: NaN weights of one member change '{column}' of another"


def _measured(needs: frozenset[str], members: Any) -> Measured:
    """Four small members after an update, of which ``members`` are shown; what is not in ``needs`` is missing."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(MEMBERS, *shape, dtype=torch.float64, generator=generator)

    params = {"layer.weight": draw(3, 5), "layer.bias": draw(3), "norm.weight": draw(3)}
    grads = {k: draw(*p.shape[1:]) for k, p in params.items()}
    state = State.start(params, {"norm.running_mean": draw(3), "norm.running_var": draw(3).exp()})
    state.slots["momentum_buffer"] = {k: draw(*p.shape[1:]) for k, p in params.items()}
    before = {k: p - 0.1 * grads[k] for k, p in params.items()}
    rows = list(members)
    loss, accuracy, lr = draw().square()[rows], draw().sigmoid()[rows], torch.full((len(rows),), 0.1)
    x, y = torch.arange(12, dtype=torch.float64).view(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    shown = state.take(rows)

    def evaluate(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
        weight = shown.params["layer.weight"][:, :, :2].double()
        out = torch.einsum("mko,no->mnk", weight, x)
        return out.square().mean((1, 2)), (out.argmax(-1) == y).double().mean(1)

    wanted = clone(take(before, rows)) if "update" in needs else None
    return Measured(
        shown,
        take(grads, rows) if "grad" in needs else {},
        loss,
        accuracy,
        lr,
        wanted,
        evaluate if "eval" in needs else None,
        (x, y),
    )


def _tensors(m: Measured) -> list[Tensor]:
    return [*leaves(m.state.state_dict()), *leaves(m.grads), *leaves(m.before or {}), m.loss, m.accuracy, m.lr]
