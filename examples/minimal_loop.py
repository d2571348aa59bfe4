"""The method of the recovery study in one loop: train, fork a twin, hit one forward output, train both, compare.

Plain PyTorch and numpy; nothing of descentlab is used. Run it: python examples/minimal_loop.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 64
HIT_STEP, RECOVERY_STEPS = 60, 100
CASES = 5


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 real 8x8 digits, averaged to 6x6 and flattened: x_train, y_train, x_test, y_test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order].astype(np.float32) / 16.0).unsqueeze(1)
    x = F.adaptive_avg_pool2d(images, 6).flatten(1)
    y = torch.from_numpy(digits.target[order].astype(np.int64))
    return x[:1280], y[:1280], x[1280:], y[1280:]


def make_model(seed: int) -> nn.Module:
    """36 inputs, 8 hidden units, 10 classes: 386 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(36, 8), nn.SiLU(), nn.Linear(8, 10))


def batch_indices(n: int, steps: int, seed: int) -> list[Tensor]:
    """Which samples each step sees: every epoch is a fresh permutation, the incomplete last batch is dropped."""
    rng, per_epoch = np.random.default_rng(seed), n // BATCH
    epochs = [rng.permutation(n)[: per_epoch * BATCH].reshape(-1, BATCH) for _ in range(-(-steps // per_epoch))]
    return [torch.from_numpy(rows) for rows in np.concatenate(epochs)[:steps]]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, batches: Sequence[Tensor]
) -> list[float]:
    """One update per batch of sample indices; returns the loss of each batch before its update, in nats."""
    losses = []
    for batch in batches:
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


@contextmanager
def hit(layer: nn.Linear, first: int, count: int, value: float) -> Iterator[None]:
    """While active, ``count`` consecutive elements of the layer's product, from flat index ``first``, are ``value``.

    The hardware fails in the matrix unit: the bias is added afterwards, and the backward pass runs as if all had been
    right.
    """

    def replace(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        columns = torch.arange(first, first + count) % layer.out_features
        wrong = out.detach().clone()
        wrong.view(-1)[first : first + count] = value + layer.bias.detach()[columns]
        return out + (wrong - out).detach()  # forward: the wrong values; backward: the identity

    handle = layer.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def fork(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A twin: the same weights and the same optimizer state, sharing no memory."""
    return copy.deepcopy((model, optimizer))  # copied together, so that the optimizer holds the twin's weights


def test_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy in nats."""
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


test_loss.__test__ = False  # type: ignore[attr-defined]  # a measurement, not a test case for pytest


def run_case(case: int, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, float, float]:
    """One planned fault: (value written, excess test loss over the twin in nats, the twin's test loss)."""
    x, y, x_test, y_test = data
    batches = batch_indices(len(x), HIT_STEP + 1 + RECOVERY_STEPS, seed=case)
    model = make_model(case)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    train(model, optimizer, x, y, batches[:HIT_STEP])
    twin, twin_optimizer = fork(model, optimizer)

    draw = np.random.default_rng(1000 + case)
    value = float(10 ** draw.uniform(2.5, 12))
    first = 16 * int(draw.integers(BATCH * 8 // 16))  # one of the runs of 16 elements of the hidden layer's output
    with hit(model[0], first, 16, value):  # type: ignore[index]
        train(model, optimizer, x, y, batches[HIT_STEP : HIT_STEP + 1])
    train(model, optimizer, x, y, batches[HIT_STEP + 1 :])
    train(twin, twin_optimizer, x, y, batches[HIT_STEP:])

    reference = test_loss(twin, x_test, y_test)
    return value, test_loss(model, x_test, y_test) - reference, reference


def main() -> None:
    """Five planned faults, one line each, then their mean."""
    torch.set_num_threads(1)
    data = load_digits()
    excess = []
    for case in range(CASES):
        value, more, reference = run_case(case, data)
        excess.append(more)
        print(f"case {case}: value {value:8.1e}  twin's test loss {reference:.4f}  excess test loss {more:+.4f} nats")
    spread = np.std(excess, ddof=1) / np.sqrt(CASES)
    print(f"adam: mean excess test loss {np.mean(excess):+.4f} nats, standard error {spread:.4f}, n = {CASES}")


if __name__ == "__main__":
    main()
