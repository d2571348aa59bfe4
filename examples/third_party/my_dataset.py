"""A dataset of one's own: two spirals. descentlab run crossed dataset=my_dataset:spirals"""

import numpy as np
import torch

from descentlab.workloads.base import Data


def spirals(n: int = 640, noise: float = 0.05) -> Data:
    """Points ``[n, 2]`` on two interleaved spirals, a class each; cut 80 / 10 / 10 as drawn."""
    rng = np.random.default_rng(0)  # the data do not depend on a study's seed
    y = rng.integers(0, 2, n)
    angle = 3.0 * np.pi * np.sqrt(rng.random(n))
    radius = angle / (3.0 * np.pi)
    turned = angle + np.pi * y
    x = np.stack([radius * np.cos(turned), radius * np.sin(turned)], axis=1) + noise * rng.standard_normal((n, 2))
    inputs, classes = torch.from_numpy(x), torch.from_numpy(y)
    a, b = n * 8 // 10, n * 9 // 10
    parts = (inputs[:a], classes[:a], inputs[a:b], classes[a:b], inputs[b:], classes[b:])
    return Data("spirals", *parts, classes=2, source="generated", licence="none needed")
