"""Re-execution from kept gradients: Adam's updates are inverted, as the published recovery does."""

from __future__ import annotations

import pytest
import torch
from test_arms import HIT, MLP, alarms, cell, fault, runs_of, train

from descentlab.core.errors import UserError
from descentlab.core.state import State
from descentlab.core.tree import leaves
from descentlab.launch.build import build_parts
from descentlab.optim.specs import Adam, AdamW, Sgd
from descentlab.perturb.arm_specs import Reexecute
from descentlab.perturb.inversion import inverse_of


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_an_update_of_adam_is_undone(name: str) -> None:
    """Against ``torch.optim`` in float64, two members at two rates. A wrong beta, step count or decay fails."""
    spec = Adam(eps=1e-6) if name == "adam" else AdamW(weight_decay=0.1)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    rates, history = [1e-2, 3e-3], []
    generator = torch.Generator().manual_seed(0)
    singles = [torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in rates]
    rules = [
        kind([w], lr=lr, eps=spec.eps, weight_decay=spec.weight_decay) for w, lr in zip(singles, rates, strict=True)
    ]

    def now() -> dict[str, torch.Tensor]:
        held = [rule.state[w] for rule, w in zip(rules, singles, strict=True)]
        moments = {k: torch.stack([h[k] for h in held]).clone() for k in ("exp_avg", "exp_avg_sq")}
        return {"w": torch.stack([w.detach().clone() for w in singles]), **moments}

    for _ in range(4):
        grads = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
        for w, g, rule in zip(singles, grads, rules, strict=True):
            w.grad = g.clone()
            rule.step()
        history.append((grads, now()))
    state = State.start({"w": history[-1][1]["w"].clone()}, {})
    state.server["slots"] = {k: {"w": history[-1][1][k].clone()} for k in ("exp_avg", "exp_avg_sq")}
    state.opt_step.fill_(4)
    inverse = inverse_of(spec)
    assert not isinstance(inverse, str)
    for (grads, _), (_, before) in zip(history[:0:-1], history[-2::-1], strict=True):
        inverse.undo(state, {"w": grads}, torch.tensor(rates, dtype=torch.float64))
        torch.testing.assert_close(state.params["w"], before["w"], rtol=1e-11, atol=1e-12)
        for slot in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state.slots[slot]["w"], before[slot], rtol=1e-9, atol=1e-11)
    assert state.opt_step.tolist() == [1, 1]


@pytest.mark.parametrize(("value", "near"), [(1e4, True), (1e30, False)])
def test_reexecution_from_kept_gradients(value: float, near: bool) -> None:
    """The published way brings back the twin as far as rounding lets it, and not after a huge gradient; with kept
    states both come back to the bit. (Float64; one update too few undone fails.)"""
    settings = {**MLP, "optimizer": Adam(lr=1e-3), "dtype": "float64"}
    gradient = fault(value).model_copy(update={"layer": "layers.1", "direction": "grad_weight"})
    parts = build_parts(cell(**settings, fault=gradient, arm=Reexecute(keep="gradients", slot_bound=50)), "vmap")
    states, frame, _ = train(parts, runs_of(parts))
    assert [a for a in alarms(frame) if a[3] == "reexecute"] == [
        ("f0", HIT, 0, "reexecute"),
        ("f1", HIT, 0, "reexecute"),
    ]
    for r in (0, 1):
        wanted, got = states[f"t{r}"], states[f"f{r}"]
        assert wanted.clock["step"].equal(got.clock["step"]) and wanted.opt_step.equal(got.opt_step)
        apart = max(float((a - b).abs().max()) for a, b in zip(leaves(wanted.params), leaves(got.params), strict=True))
        assert (apart < 1e-6) == near


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": Sgd()}, "adam or adamw"),
        ({"optimizer": Adam(amsgrad=True)}, "amsgrad"),
        ({"optimizer": Adam(weight_decay=0.1)}, "weight_decay"),
    ],
)
def test_what_cannot_be_inverted_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_parts(cell(**settings, arm=Reexecute(keep="gradients")), "vmap")
