"""How long one abnormal gradient stays in an optimizer's state, in closed form.

Setting: one scalar weight whose gradient is g at every step except step 0, where it is G (the spike), after ``before``
steps of g; constant learning rate. k counts steps from the spike: k = 0 is the faulty update itself. In real training
the gradient is not constant. A second moment still cannot fade faster than its decay, v_(k+1) >= beta2 v_k whatever the
gradients, so for Adam, AMSGrad, RMSprop and Adagrad the predicted number of steps is a lower bound for the slot; for
momentum, where later gradients of the other sign cancel the tail, it is an approximation.

Source: derived from the update rules of ``torch.optim``; tests/test_slots.py holds every line against torch itself.
Adadelta is not here: under a constant gradient its update never settles, so there is no normal update to return to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Steps = int | np.ndarray
WITHIN = 0.1  # an update or a slot within 10 % of normal counts as normal
LATE = math.inf  # so many steps before the spike that averages have settled


def sgd_update(k: Steps, g: float, spike: float, lr: float = 1.0) -> np.ndarray:
    """Size of update k without momentum: lr G at k = 0, lr g after. Nothing persists but the weights, moved by lr G."""
    return lr * np.where(np.asarray(k) == 0, spike, g)


def momentum_update(
    k: Steps, g: float, spike: float, lr: float = 1.0, momentum: float = 0.9, before: float = LATE
) -> np.ndarray:
    """Heavy ball, b' = mu b + gradient, update lr b: lr (g (1 - mu^t) / (1 - mu) + mu^k (G - g)), t = before + k + 1.

    The tail adds up to lr (G - g) / (1 - mu).
    """
    k = np.asarray(k, dtype=float)
    settled = g * (1 - momentum ** (before + k + 1)) / (1 - momentum)
    return lr * (settled + momentum**k * (spike - g))


def _bias(beta: float, before: float, k: np.ndarray) -> np.ndarray:
    return 1 - beta ** (before + k + 1)


def adam_update(
    k: Steps,
    g: float,
    spike: float,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    before: float = LATE,
) -> np.ndarray:
    """Adam (also AdamW without its decay): lr m / (sqrt(v) + eps), both corrected for their start, t = before + k + 1.

    m = g + beta1^k (1 - beta1) (G - g) / (1 - beta1^t), v = g^2 + beta2^k (1 - beta2) (G^2 - g^2) / (1 - beta2^t).
    At k = 0 the size is bounded by lr (1 - beta1) / sqrt(1 - beta2) however large G; while v is polluted it is about
    lr g / (G sqrt((1 - beta2) beta2^k)): the weight is frozen.
    """
    k, (first, second) = np.asarray(k, dtype=float), betas
    m = g + first**k * (1 - first) * (spike - g) / _bias(first, before, k)
    v = g**2 + second**k * (1 - second) * (spike**2 - g**2) / _bias(second, before, k)
    return lr * m / (np.sqrt(v) + eps)


def amsgrad_update(
    k: Steps,
    g: float,
    spike: float,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    before: float = LATE,
) -> np.ndarray:
    """AMSGrad keeps the largest v: as Adam, with v = the uncorrected v of the spike over 1 - beta2^t; never recovers.

    Uncorrected v of the spike: beta2 g^2 (1 - beta2^before) + (1 - beta2) G^2. For \\|G\\| >= \\|g\\|.
    """
    k, (first, second) = np.asarray(k, dtype=float), betas
    m = g + first**k * (1 - first) * (spike - g) / _bias(first, before, k)
    held = second * g**2 * (1 - second**before) + (1 - second) * spike**2
    settled = g**2 * _bias(second, before, k)  # without a spike, or one this small, v goes on growing
    later = settled + second**k * (1 - second) * (spike**2 - g**2)
    return lr * m / (np.sqrt(np.maximum(held, later) / _bias(second, before, k)) + eps)


def rmsprop_update(
    k: Steps, g: float, spike: float, lr: float = 1.0, alpha: float = 0.99, eps: float = 1e-8, before: float = LATE
) -> np.ndarray:
    """RMSprop: lr gradient / (sqrt(v) + eps), v = g^2 (1 - alpha^t) + alpha^k (1 - alpha) (G^2 - g^2), uncorrected.

    At k = 0 at most lr / sqrt(1 - alpha); then about lr g / (G sqrt((1 - alpha) alpha^k)) while v is polluted.
    """
    k = np.asarray(k, dtype=float)
    v = g**2 * _bias(alpha, before, k) + alpha**k * (1 - alpha) * (spike**2 - g**2)
    return lr * np.where(k == 0, spike, g) / (np.sqrt(v) + eps)


def adagrad_update(
    k: Steps, g: float, spike: float, lr: float = 1.0, initial: float = 0.0, eps: float = 1e-10, before: float = 0
) -> np.ndarray:
    """Adagrad: lr gradient / (sqrt(s) + eps), s = initial + before g^2 + G^2 + k g^2. Nothing is ever forgotten."""
    k = np.asarray(k, dtype=float)
    s = initial + before * g**2 + spike**2 + k * g**2
    return lr * np.where(k == 0, spike, g) / (np.sqrt(s) + eps)


def batchnorm_variance(k: Steps, normal: float, hit: float, momentum: float = 0.1) -> np.ndarray:
    """Running variance k steps after one batch of variance ``hit``: normal + (1 - momentum)^k momentum (hit - normal).

    ``momentum`` as torch has it: the weight of the new batch. One element V among N of a channel gives
    ``hit`` = V^2 / N (torch's unbiased variance, other elements near 0). Infinity stays for good.
    """
    return normal + (1 - momentum) ** np.asarray(k, dtype=float) * momentum * (hit - normal)


def _steps_above(excess: float, allowed: float, decay: float) -> float:
    """Later steps k = 1, 2, … at which excess decay^k is above ``allowed``; infinite without decay."""
    if excess <= allowed:
        return 0
    if math.isinf(excess) or decay >= 1:
        return math.inf
    return math.floor(math.log(excess / allowed) / -math.log(decay)) if decay > 0 else 0


def steps_until_normal(rule: str, ratio: float, **settings: float) -> float:
    """How many updates after the spike differ from normal by more than 10 %; ``ratio`` = G / g >= 1, spike late.

    ``rule``: sgd | momentum | adam | amsgrad | rmsprop | adagrad. Settings: ``momentum``; ``beta2``; ``alpha``;
    ``accumulated`` (what Adagrad had summed before the spike, in units of g^2). Infinite: never.

    - momentum: mu^k (ratio - 1) (1 - mu) <= 0.1
    - adam, rmsprop: decay^k (1 - decay) (ratio^2 - 1) <= 1 / 0.9^2 - 1, since an update is g / sqrt(v)
    - amsgrad: never, once (1 - beta2) (ratio^2 - 1) is above that
    - adagrad: against its own twin, sqrt(twin's s / s) >= 0.9: k >= 0.81 / 0.19 (ratio^2 - 1) - accumulated - 1
    """
    slack = 1 / (1 - WITHIN) ** 2 - 1
    if rule == "sgd":
        return 0
    if rule == "momentum":
        mu = settings.get("momentum", 0.9)
        return _steps_above((ratio - 1) * (1 - mu), WITHIN, mu)
    if rule in ("adam", "amsgrad"):
        beta = settings.get("beta2", 0.999)
        return _steps_above((1 - beta) * (ratio**2 - 1), slack, beta if rule == "adam" else 1.0)
    if rule == "rmsprop":
        alpha = settings.get("alpha", 0.9)
        return _steps_above((1 - alpha) * (ratio**2 - 1), slack, alpha)
    if rule == "adagrad":
        return max(0, math.ceil((ratio**2 - 1) / slack - settings.get("accumulated", 0.0)) - 2)
    raise ValueError(f"rule = {rule!r}: expected sgd, momentum, adam, amsgrad, rmsprop or adagrad")


def variance_steps(ratio: float, momentum: float = 0.1) -> float:
    """Later steps at which a running variance ``ratio`` times its normal value at the hit is over 10 % too large."""
    return _steps_above(ratio - 1, WITHIN, 1 - momentum)


def slot_parts(optimizer: Mapping[str, Any]) -> list[tuple[float, int]]:
    """(decay, power of the gradient) of every slot of an optimizer's settings (torch's names); [] for none or unknown.

    A slot takes (1 - decay) gradient^power of a gradient; a heavy ball takes all of it.
    """
    name = str(optimizer.get("name", ""))
    if name in ("adam", "adamw", "nadam"):
        first, second = (float(b) for b in optimizer.get("betas", (0.9, 0.999)))
        return [(first, 1), (1.0 if optimizer.get("amsgrad") else second, 2)]
    if name == "rmsprop":
        return [(float(optimizer.get("alpha", 0.99)), 2)]
    if name == "adagrad":
        return [(1.0, 2)]
    if name == "sgd" and optimizer.get("momentum"):
        return [(float(optimizer["momentum"]), 1)]
    return []


def slot_curve(optimizer: Mapping[str, Any], hit: float, normal: float, steps: np.ndarray) -> np.ndarray | None:
    """Predicted largest slot element over its normal value, k = ``steps`` after a hit that left it at ``hit``.

    One element polluted by one gradient G, then normal gradients: every slot keeps decay^k of what G put into it and
    the largest is seen, ratio = 1 + (max over slots of decay^k part) / normal. For Adam the part is beta1^k (1 -
    beta1) G or beta2^k (1 - beta2) G^2; G follows from ``hit``. None for an optimizer without known slots.
    """
    parts = slot_parts(optimizer)
    added = hit - normal
    if not parts or not normal > 0 or not added > 0 or not math.isfinite(hit):
        return None
    k = np.asarray(steps, dtype=float)
    weights = _slot_weights(optimizer, parts)
    if len(parts) == 1:
        return 1 + added * parts[0][0] ** k / normal
    (first, _), (second, _) = parts
    gradient = min(added / weights[0], math.sqrt(added / weights[1]))  # the larger of the two parts is what is seen
    seen = np.maximum(first**k * weights[0] * gradient, second**k * weights[1] * gradient**2)
    return 1 + seen / normal


def _slot_weights(optimizer: Mapping[str, Any], parts: list[tuple[float, int]]) -> list[float]:
    """Share of gradient^power a slot takes in; AMSGrad's largest second moment is fed by a slot that decays."""
    if len(parts) == 1:
        return [1.0]
    return [1 - float(beta) for beta in optimizer.get("betas", (0.9, 0.999))]


def slot_steps(optimizer: Mapping[str, Any], ratio: float, normal: float) -> float | None:
    """Later steps at which the predicted slot is over 10 % above normal, from its ``ratio`` to normal at the hit.

    0 when the slot was not raised by more than that; infinite where the slot never forgets or is not finite; None for
    an optimizer without known slots.
    """
    parts = slot_parts(optimizer)
    if not parts or not normal > 0:
        return None
    if ratio <= 1 + WITHIN:
        return 0
    if not math.isfinite(ratio):
        return math.inf
    if len(parts) == 1:
        return _steps_above(ratio - 1, WITHIN, parts[0][0])
    weights = _slot_weights(optimizer, parts)
    added = (ratio - 1) * normal
    gradient = min(added / weights[0], math.sqrt(added / weights[1]))
    return max(
        _steps_above(weight * gradient**power / normal, WITHIN, decay)
        for weight, (decay, power) in zip(weights, parts, strict=True)
    )


def _memory(optimizer: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """(rule of :func:`steps_until_normal`, its settings) of an optimizer's settings; "" for an unknown one."""
    name = str(optimizer.get("name", ""))
    if name in ("adam", "adamw"):
        rule = "amsgrad" if optimizer.get("amsgrad") else "adam"
        return rule, {"beta2": float(optimizer.get("betas", (0.9, 0.999))[1])}
    if name == "rmsprop":
        return name, {"alpha": float(optimizer.get("alpha", 0.99))}
    if name == "sgd":
        momentum = float(optimizer.get("momentum") or 0.0)
        return ("momentum", {"momentum": momentum}) if momentum else ("sgd", {})
    return "", {}


def update_steps(optimizer: Mapping[str, Any], ratio: float) -> float | None:
    """:func:`steps_until_normal` for an optimizer's settings and a gradient ``ratio`` times the usual; None: unknown.

    A heavy ball's updates are too large until then, not frozen, so it counts as 0 here.
    """
    rule, settings = _memory(optimizer)
    if not rule or not ratio > 1:
        return None
    return 0 if rule == "momentum" else steps_until_normal(rule, ratio, **settings)


def update_curve(optimizer: Mapping[str, Any], ratio: float, steps: np.ndarray) -> np.ndarray | None:
    """Predicted size of update k = ``steps`` after a gradient ``ratio`` times the usual, over the usual update.

    None for an optimizer that :func:`steps_until_normal` does not know or that never settles.
    """
    rule, settings = _memory(optimizer)
    if rule == "adam":
        return adam_update(steps, 1.0, ratio, betas=(float(optimizer.get("betas", (0.9, 0.999))[0]), settings["beta2"]))
    if rule == "rmsprop":
        return rmsprop_update(steps, 1.0, ratio, **settings)
    if rule == "momentum":
        return momentum_update(steps, 1.0, ratio, **settings) * (1 - settings["momentum"])
    return sgd_update(steps, 1.0, ratio) if rule == "sgd" else None
