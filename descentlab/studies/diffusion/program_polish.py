"""From the end of gradient descent to a point without gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .program_curvature import dense_hessian, set_weights


def _slope(module: nn.Module, work: Any) -> tuple[float, np.ndarray]:
    """Loss and gradient ``[D]`` of all training data, in float64."""
    value = work.loss(module(work.data.x_train), work.data.y_train)
    parts = torch.autograd.grad(value, list(module.parameters()))
    return float(value.detach()), torch.cat([g.flatten() for g in parts]).double().numpy(force=True)


def polished(
    method: str,
    module: nn.Module,
    work: Any,
    theta: np.ndarray,
    steps: int,
    tolerance: float,
    advance: Callable[[], None],
) -> tuple[np.ndarray, list[float]]:
    """(weights, gradient norms on the way). ``lbfgs`` lowers the loss; ``newton`` lowers the gradient's norm
    (Levenberg-Marquardt), so it stops at the critical point next to the start, which may be a saddle."""
    set_weights(module, theta)
    make = _lbfgs if method == "lbfgs" else _newton
    return make(module, work, theta, steps, tolerance, advance)


def _lbfgs(
    module: nn.Module, work: Any, theta: np.ndarray, steps: int, tolerance: float, advance: Callable[[], None]
) -> tuple[np.ndarray, list[float]]:
    params = list(module.parameters())
    optimizer = torch.optim.LBFGS(
        params, max_iter=20, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = work.loss(module(work.data.x_train), work.data.y_train)
        value.backward()
        return value

    path = [float(np.linalg.norm(_slope(module, work)[1]))]
    for _ in range(0, steps, 20):
        optimizer.step(closure)
        advance()
        path.append(float(np.linalg.norm(_slope(module, work)[1])))
        if path[-1] <= tolerance:
            break
    return torch.cat([p.detach().flatten() for p in params]).double().numpy(force=True), path


def _newton(
    module: nn.Module, work: Any, theta: np.ndarray, steps: int, tolerance: float, advance: Callable[[], None]
) -> tuple[np.ndarray, list[float]]:
    gradient = _slope(module, work)[1]
    path, damping = [float(np.linalg.norm(gradient))], 1e-3
    matrix = None
    for _ in range(steps):
        if path[-1] <= tolerance:
            break
        advance()
        if matrix is None:
            matrix = dense_hessian(module, work.loss, (work.data.x_train, work.data.y_train))
            values, vectors = np.linalg.eigh(matrix)
        trial = theta - vectors @ (values / (values**2 + damping**2) * (vectors.T @ gradient))
        set_weights(module, trial)
        slope = _slope(module, work)[1]
        if np.linalg.norm(slope) < path[-1]:
            theta, gradient, matrix, damping = trial, slope, None, damping / 3
            path.append(float(np.linalg.norm(gradient)))
        else:
            damping *= 4
    set_weights(module, theta)
    return theta, path
