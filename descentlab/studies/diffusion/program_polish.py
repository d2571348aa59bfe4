"""From the end of gradient descent to a point without gradient, or as near to one as a method comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .program_curvature import dense_hessian, pieces, set_weights
from .program_pull import Pull

KEPT = 0.1  # Newton goes on with its Hessian while a step lowers the gradient this far: a Hessian costs many gradients


class Objective:
    """The loss of all training data with the pull, in float64."""

    def __init__(self, module: nn.Module, work: Any, pull: Pull) -> None:
        self.module, self.pull, self.loss = module.double(), pull, work.loss
        x, y = (t.double() if t.is_floating_point() else t for t in (work.data.x_train, work.data.y_train))
        self.data, self.pieces, self.params = (x, y), pieces(module, (x, y), rows=1), list(module.parameters())

    def theta(self) -> np.ndarray:
        """Weights ``[D]``."""
        return torch.cat([p.detach().flatten() for p in self.params]).numpy(force=True)

    def slope(self) -> tuple[float, np.ndarray]:
        """Value and gradient ``[D]``."""
        samples = sum(len(y) for _, y in self.pieces)
        value, gradient = 0.0, np.zeros(sum(p.numel() for p in self.params))
        for x, y in self.pieces:
            part, share = self.loss(self.module(x), y), len(y) / samples
            value += share * float(part.detach())
            slopes = torch.autograd.grad(part, self.params)
            gradient += share * torch.cat([g.flatten() for g in slopes]).numpy(force=True)
        theta = self.theta()
        return value + self.pull.value(theta), gradient + self.pull.gradient(theta)

    def hessian(self) -> np.ndarray:
        """``[D, D]``."""
        return self.pull.added(dense_hessian(self.module, self.loss, pieces(self.module, self.data)))


def polished(
    method: str,
    module: nn.Module,
    work: Any,
    theta: np.ndarray,
    steps: int,
    tolerance: float,
    advance: Callable[[int], None],
    pull: Pull | None = None,
) -> tuple[np.ndarray, list[float]]:
    """(weights, gradient norms on the way), of the loss with the ``pull``. ``lbfgs`` lowers the loss; ``newton`` lowers
    the gradient's norm (Levenberg-Marquardt), so it stops at the critical point next to the start, which may be a
    saddle; ``both``: the one and then, from where it ends, the other, each with so many ``steps`` at most."""
    set_weights(module, theta)
    objective, path = Objective(module, work, pull or Pull()), list[float]()
    for make in {"lbfgs": (_lbfgs,), "newton": (_newton,), "both": (_lbfgs, _newton)}[method]:
        theta, part = make(objective, steps, tolerance, advance)
        path += part[1:] if path else part
    return theta, path


def _lbfgs(
    objective: Objective, steps: int, tolerance: float, advance: Callable[[int], None]
) -> tuple[np.ndarray, list[float]]:
    optimizer = torch.optim.LBFGS(
        objective.params,
        max_iter=20,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )
    cuts = np.cumsum([p.numel() for p in objective.params])[:-1]

    def closure() -> Tensor:
        value, slope = objective.slope()
        for p, g in zip(objective.params, np.split(slope, cuts), strict=True):
            p.grad = torch.from_numpy(g).reshape(p.shape).to(p)
        return torch.tensor(value, dtype=torch.float64)

    path, last = [float(np.linalg.norm(objective.slope()[1]))], objective.theta()
    for _ in range(0, steps, 20):
        if path[-1] <= tolerance:
            break
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                optimizer.step(closure)
                norm = float(np.linalg.norm(objective.slope()[1]))
            except IndexError:  # torch's line search, on a slope that is not finite
                norm = float("nan")
        advance(0)
        if not np.isfinite(norm):
            set_weights(objective.module, last)
            break
        if np.array_equal(objective.theta(), last):  # no step lowers the loss as far as float64 can tell
            break
        path.append(norm)
        last = objective.theta()
    return last, path


def _newton(
    objective: Objective, steps: int, tolerance: float, advance: Callable[[int], None]
) -> tuple[np.ndarray, list[float]]:
    theta, gradient = objective.theta(), objective.slope()[1]
    path, damping = [float(np.linalg.norm(gradient))], 1e-3
    matrix = None
    for _ in range(steps):
        if path[-1] <= tolerance:
            break
        advance(0)
        if matrix is None:
            matrix = objective.hessian()
            values, vectors = np.linalg.eigh(matrix)
        trial = theta - vectors @ (values / (values**2 + damping**2) * (vectors.T @ gradient))
        set_weights(objective.module, trial)
        slope = objective.slope()[1]
        if np.linalg.norm(slope) < path[-1]:
            theta, gradient, damping = trial, slope, damping / 3
            path.append(float(np.linalg.norm(gradient)))
            matrix = matrix if path[-1] < KEPT * path[-2] else None
        else:
            damping *= 4
            if damping > 1e6 * float(np.abs(values).max()):  # no step however short lowers the gradient
                break
    set_weights(objective.module, theta)
    return theta, path
