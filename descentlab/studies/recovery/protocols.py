"""What a report says of the protocol: who trained up to the fault, and what those that continued were given."""

from __future__ import annotations

import json
from pathlib import Path

from ...analysis.results import ResultsLike

TEXTS = {
    "baseline": "optimizer state was handed over where both optimizers have the same quantity",
    "dropped": "optimizer state was dropped, and with it what the fault did to it",
    "shadow": "each continued with slots it had tracked from the same gradients, the faulty one among them",
}


def protocol_notes(results: ResultsLike) -> list[str]:
    """One line for every protocol but scratch among the runs."""
    found = dict.fromkeys(_of(run.get("settings") or {}) for run in results.runs)
    return [
        f"Protocol {protocol}: {baseline} trained up to and through the fault, then every optimizer continued; "
        f"{TEXTS[how]}. On the step of the fault and before, all values are {baseline}'s; decays of slots and frozen "
        "updates are not predicted."
        for protocol, baseline, how in found
        if protocol != "scratch"
    ]


def tune_notes(results: ResultsLike) -> list[str]:
    """How the learning rates were chosen, where they were."""
    file = Path(results.path) / "tune.json"
    if not file.is_file():
        return []
    choice = json.loads(file.read_text())
    rates = [
        f"{one['optimizer']['name']} {one['lr']:g} ({one['validation_loss']:.3f} nats"
        + (", at the edge of what was tried)" if one["at_the_edge"] else ")")
        for one in choice["chosen"]
    ]
    word = "are" if choice["equal"] else "are not"
    return [
        f"Learning rates of smallest validation loss after {choice['request']['steps']} fault-free updates, on other "
        f"seeds: {', '.join(rates)}. By this measure the optimizers {word} equally good: the losses differ by "
        f"{choice['spread']:.3f} nats, the stated tolerance is {choice['tolerance']:g}."
    ]


def _of(settings: dict[str, object]) -> tuple[str, str, str]:
    protocol, baseline = str(settings.get("protocol", "scratch")), settings.get("baseline")
    name = str(baseline.get("name")) if isinstance(baseline, dict) else "none"
    dropped = protocol == "baseline" and settings.get("carry_state") is False
    return protocol, name, "dropped" if dropped else protocol
