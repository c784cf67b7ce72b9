# SPDX-License-Identifier: Apache-2.0
"""Expresses each sampler's update in the coefficients of `medaccel.ops.diffusion_step`.

A level of a diffusion is x = alpha · x0 + sigma · ε: variance-preserving ones have alpha² + sigma² = 1,
variance-exploding ones alpha = 1. A step goes from a level to one with less noise. Everything is plain float
arithmetic in double; nothing here touches a volume. Only the Langevin corrector's step may be a tensor.
"""

import math
from typing import Any, NamedTuple

from torch import Tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction", "score")


class Level(NamedTuple):
    """Describes a level of noise: x = alpha · x0 + sigma · ε."""

    alpha: float
    sigma: float


CLEAN = Level(1.0, 0.0)


class Predictions(NamedTuple):
    """Holds the coefficients of x0 = a · x + b · m and ε = p · x + q · m, for a network's output m."""

    a: float
    b: float
    p: float
    q: float


def check_prediction(prediction: str) -> str:
    """Returns the kind of prediction, or raises an error in a sentence."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"diffusion: prediction is {prediction!r}; expected one of {list(PREDICTIONS)}")
    return prediction


def predictions(prediction: str, level: Level) -> Predictions:
    """Returns the coefficients by which x0 and ε follow from the network's output.

    "epsilon": m = ε; "sample": m = x0; "v_prediction": m = alpha · ε − sigma · x0 (Salimans & Ho, ICLR 2022);
    "score": m = ∇ log p(x) = −ε / sigma.
    """
    alpha, sigma = level
    if (alpha == 0 and prediction in ("epsilon", "score")) or (sigma == 0 and prediction == "sample"):
        missing = "signal" if alpha == 0 else "noise"
        raise ValueError(
            f"diffusion: the level has no {missing}, so a prediction of {prediction!r} says nothing of x0 and noise; "
            "expected another prediction, as 'v_prediction'"
        )
    if prediction == "epsilon":
        return Predictions(1 / alpha, -sigma / alpha, 0.0, 1.0)
    if prediction == "sample":
        return Predictions(0.0, 1.0, 1 / sigma, -alpha / sigma)
    if prediction == "score":
        return Predictions(1 / alpha, sigma * sigma / alpha, 0.0, -sigma)
    check_prediction(prediction)
    total = alpha * alpha + sigma * sigma
    return Predictions(alpha / total, -sigma / total, sigma / total, alpha / total)


def _step(a: float, b: float, **others: float | Tensor) -> dict[str, Any]:
    return {"a": a, "b": b, "c": 0.0, "d": 0.0, "e": 0.0, "s": 0.0, **others}


def add_noise(level: Level) -> dict[str, Any]:
    """Returns the coefficients of q(x_t | x0); the sample is x0."""
    return _step(1.0, 0.0, d=level.alpha, s=level.sigma)


def ancestral(prediction: str, level: Level, following: Level) -> dict[str, Any]:
    """Returns the coefficients that draw from q(x′ | x, x0): DDPM's step (Ho et al., 2020, eq. 6–7) on any two
    levels, variance "fixed small"."""
    ratio = level.alpha / following.alpha
    added = level.sigma**2 - (ratio * following.sigma) ** 2  # variance that the forward step adds
    a, b, _, _ = predictions(prediction, level)
    return _step(
        a,
        b,
        c=following.alpha * added / level.sigma**2,
        d=ratio * (following.sigma / level.sigma) ** 2,
        s=math.sqrt(added) * following.sigma / level.sigma,
    )


def ddim(prediction: str, level: Level, following: Level, eta: float = 0.0) -> dict[str, Any]:
    """Returns the coefficients of DDIM's step (Song et al., ICLR 2021, eq. 12 and 16); eta 0 is deterministic, eta 1
    has the ancestral step's variance."""
    ratio = level.alpha / following.alpha
    added = max(level.sigma**2 - (ratio * following.sigma) ** 2, 0.0)
    s = eta * math.sqrt(added) * following.sigma / level.sigma
    a, b, p, q = predictions(prediction, level)
    direction = math.sqrt(max(following.sigma**2 - s * s, 0.0))
    return _step(a, b, c=following.alpha, d=direction * p, e=direction * q, s=s)


def euler_maruyama(prediction: str, level: Level, following: Level) -> dict[str, Any]:
    """Returns the coefficients of the reverse SDE's step (Song et al., "Score-based generative modeling through
    SDEs", ICLR 2021, app. D–E).

    Variance-exploding, and SDEdit's (Meng et al., ICLR 2022): x′ = x + ε² · score + ε · z with ε² = σ² − σ′².
    Variance-preserving: x′ = (2 − √(1−β)) · x + β · score + √β · z, β = 1 − (α/α′)²: their "reverse diffusion" form.
    """
    a, b, p, q = predictions(prediction, level)
    ratio = level.alpha / following.alpha
    beta = level.sigma**2 - (ratio * following.sigma) ** 2
    drift = 2.0 - ratio
    factor = -beta / level.sigma  # score = −ε / sigma
    return _step(a, b, d=drift + factor * p, e=factor * q, s=math.sqrt(beta))


def dpm_solver_2m(prediction: str, level: Level, following: Level, before: Level | None) -> dict[str, Any]:
    """Returns the coefficients of DPM-Solver++(2M) (Lu et al., 2022, alg. 2); `before` is the level of the previous
    x0. The step is first order if `before` is None, or if it is a last step to noise 0."""
    a, b, _, _ = predictions(prediction, level)
    if following.sigma == 0:
        return _step(a, b, c=following.alpha)
    h = _log_ratio(following) - _log_ratio(level)
    weight = -following.alpha * math.expm1(-h)
    if before is None:
        return _step(a, b, c=weight, d=following.sigma / level.sigma)
    r = (_log_ratio(level) - _log_ratio(before)) / h
    return _step(a, b, c=weight * (1 + 0.5 / r), d=following.sigma / level.sigma, f=-weight * 0.5 / r)


def _log_ratio(level: Level) -> float:
    return math.log(level.alpha / level.sigma)


def langevin(prediction: str, level: Level, step: float | Tensor) -> dict[str, Any]:
    """Returns the coefficients of the Langevin corrector: x′ = x + step · score + √(2 · step) · z, at the same
    level. Of a step on a GPU, a tensor (), they are tensors there."""
    a, b, p, q = predictions(prediction, level)
    factor = -step / level.sigma
    return _step(
        a, b, d=1 + factor * p, e=factor * q, s=(2 * step).sqrt() if isinstance(step, Tensor) else math.sqrt(2 * step)
    )


def rectified_flow(time: float, following: float) -> dict[str, Any]:
    """Returns the coefficients of Euler's step for dx/dt = −m from time to following (both in [0, 1]; 1 is noise; m =
    x0 − noise, as MONAI's)."""
    return _step(1.0, time, d=1.0, e=time - following)
