"""How much of each tensor is corrupt: not finite, or beyond any size that training gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.corrupt import CORRUPT, CORRUPT_BEYOND, CORRUPT_SHARE
from ..core.protocols import Measured


def corrupt_elements(t: Tensor, beyond: float = CORRUPT_BEYOND) -> Tensor:
    """True where an element is NaN, infinite or larger than ``beyond`` in absolute value; the shape of ``t``."""
    return ~(t.detach().abs() <= beyond)


class Corruption:
    """Share of corrupt elements of every weight after the update and of every gradient that was applied.

    Columns ``corrupt_weights/NAME`` and ``corrupt_gradient/NAME``, 0 to 1: elements that are NaN, infinite or larger
    than 1e6 in absolute value.
    """

    name, needs = "corruption", frozenset({"grad"})

    def measure(self, m: Measured) -> dict[str, Tensor]:
        trees = {"weights": m.state.params, "gradient": m.grads}
        return {
            f"{CORRUPT}{kind}/{name}": corrupt_elements(t).flatten(1).double().mean(dim=1)
            for kind, tree in trees.items()
            for name, t in tree.items()
        }


@dataclass
class CorruptionCounts:
    """Corrupt elements by layer: name -> (corrupt, all) of what the layers gave and of their weights."""

    activations: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)

    def share(self) -> float:
        """Corrupt share of all weights."""
        return sum(c for c, _ in self.weights.values()) / max(1, sum(n for _, n in self.weights.values()))

    def beyond(self, threshold: float = CORRUPT_SHARE) -> bool:
        """Whether more than this share of the weights is corrupt; the default is the published 0.1 %."""
        return self.share() > threshold


@contextmanager
def corruption(model: nn.Module, *, beyond: float = CORRUPT_BEYOND) -> Iterator[CorruptionCounts]:
    """Count what is corrupt in a model of your own, layer by layer: ``with dl.corruption(model) as counts: model(x)``.

    ``activations`` are the outputs of every layer without layers of its own, of the last call within the block;
    ``weights`` are counted when the block ends. Nothing is changed. Combine it with ``dl.inject`` to see how far a
    fault spreads.
    """
    counts = CorruptionCounts()

    def hook(name: str) -> object:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                counts.activations[name] = (int(corrupt_elements(output, beyond).sum()), output.numel())

        return look

    leaves = [(name, layer) for name, layer in model.named_modules() if not any(layer.children())]
    handles = [layer.register_forward_hook(hook(name)) for name, layer in leaves]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            counts.weights = {
                name: (int(corrupt_elements(p, beyond).sum()), p.numel()) for name, p in model.named_parameters()
            }
