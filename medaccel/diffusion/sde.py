# SPDX-License-Identifier: Apache-2.0
"""Tabulates the levels of the two families of diffusions, from the least noise (index 0) to the most."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from medaccel.diffusion.coefficients import CLEAN, Level


class _Sde:
    """Holds the levels x_i = alpha_i · x0 + sigma_i · ε for i = 0 … len − 1; index −1 is the clean volume."""

    def __init__(self, alphas: Tensor, sigmas: Tensor):
        self._levels = [Level(a, s) for a, s in zip(alphas.tolist(), sigmas.tolist(), strict=True)]

    def __len__(self) -> int:
        return len(self._levels)

    def level(self, index: int) -> Level:
        """Returns the level of an index; −1 is the clean volume."""
        if not -1 <= index < len(self):
            raise ValueError(f"{type(self).__name__}: index is {index}; expected -1 to {len(self) - 1}")
        return CLEAN if index == -1 else self._levels[index]

    def time(self, index: int) -> float:
        """Returns the number by which the network is told the level."""
        return float(index)

    def step_size(self, index: int) -> float:
        """Returns the α that scales the Langevin corrector's step (Song et al., 2021, alg. 4 and 5)."""
        return 1.0

    def start(self, t0: int | float) -> int:
        """Returns the number of noise levels that `t0` means: an int is that number, a float a share of the schedule.

        Raises:
            ValueError: `t0` is outside the schedule.
        """
        name = type(self).__name__
        if isinstance(t0, float):
            if not 0 < t0 <= 1:
                raise ValueError(f"{name}: t0 is {t0}; expected a share of the schedule in (0, 1], or a whole number")
            return max(1, round(t0 * len(self)))
        if not 1 <= t0 <= len(self):
            raise ValueError(f"{name}: t0 is {t0}; expected 1 to {len(self)} of the schedule's levels")
        return t0

    def indices(self, t0: int | float | None = None, steps: int | None = None) -> list[int]:
        """Returns the levels that a sampler visits: from t0 − 1 down to 0 and −1, `steps` of them before the last.

        Args:
            t0: the `t0` of `start`; None: the whole schedule.
            steps: their number, spread evenly over the levels; None: every level.
        """
        first = self.start(len(self) if t0 is None else t0)
        count = first if steps is None else steps
        if not 1 <= count <= first:
            raise ValueError(f"{type(self).__name__}: steps is {count}; expected 1 to {first}, the levels up to t0")
        if count == 1:
            return [first - 1, -1]
        spread = torch.linspace(first - 1, 0, count, dtype=torch.float64).round().long().tolist()
        return [*spread, -1]

    def suggest_t0(self, noise_level: float) -> int:
        """Returns the smallest t0 whose noise, relative to its signal, is at least `noise_level`.

        Args:
            noise_level: standard deviation of the guide's own noise, in the units that the network sees: the added
                noise should match it, so that it drowns the guide's noise but not its content.

        Raises:
            ValueError: not positive, or beyond the schedule.
        """
        if not noise_level > 0:
            raise ValueError(
                f"{type(self).__name__}: noise_level is {noise_level}; expected a standard deviation > 0"
            )
        for index, (alpha, sigma) in enumerate(self._levels):
            if sigma >= noise_level * alpha:
                return index + 1
        most = self._levels[-1].sigma / self._levels[-1].alpha
        raise ValueError(
            f"{type(self).__name__}: noise_level is {noise_level}; expected at most {most:.4g}, the "
            "schedule's largest"
        )


class VPSDE(_Sde):
    """Tabulates a variance-preserving diffusion (DDPM): alpha² + sigma² = 1.

    Args:
        beta_min, beta_max: β(t) rises linearly between them over t in [0, 1].
        steps: levels; β_i = β(i / (steps − 1)) / steps. The defaults are DDPM's: 1e-4 to 0.02 in 1000 steps.

    Source: Song et al., "Score-based generative modeling through stochastic differential equations", ICLR 2021.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, steps: int = 1000):
        if not 0 < beta_min <= beta_max < steps:
            raise ValueError(
                f"VPSDE: beta_min is {beta_min}, beta_max {beta_max} and steps {steps}; expected 0 < beta_min <= "
                "beta_max < steps"
            )
        self._set((1 - torch.linspace(beta_min, beta_max, steps, dtype=torch.float64) / steps).cumprod(0))

    def _set(self, alphas_cumprod: Tensor) -> None:
        super().__init__(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> "VPSDE":
        """Builds the table for any schedule from the present `alphas_cumprod` of a MONAI scheduler; later edits of it
        are not seen."""
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").flatten()
        values = table.tolist()
        if not values or any(not b < a for a, b in pairwise(values)):
            raise ValueError("VPSDE: alphas_cumprod is not sorted; expected values in (0, 1), strictly decreasing")
        if not (values[0] < 1 and values[-1] > 0):
            raise ValueError(
                f"VPSDE: alphas_cumprod reaches from {values[0]:g} to {values[-1]:g}; expected values in (0, 1): "
                "a level without noise or without signal (zero terminal SNR) is none that a sampler can start from"
            )
        sde = cls.__new__(cls)
        sde._set(table)
        return sde

    def step_size(self, index: int) -> float:
        before = self.level(index - 1).alpha
        return (self.level(index).alpha / before) ** 2


class VESDE(_Sde):
    """Tabulates a variance-exploding diffusion (NCSN): alpha = 1, and sigma rises geometrically.

    Args:
        sigma_min, sigma_max: least and greatest noise, in the units that the network sees.
        steps: levels.
        time: the number by which the network is told the level: "index" or "sigma".

    Source: the one of `VPSDE`.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, steps: int = 1000, *, time: str = "index"):
        if not 0 < sigma_min < sigma_max or steps < 2:
            raise ValueError(
                f"VESDE: sigma_min is {sigma_min}, sigma_max {sigma_max} and steps {steps}; expected 0 < sigma_min < "
                "sigma_max and at least 2 steps"
            )
        if time not in ("index", "sigma"):
            raise ValueError(f"VESDE: time is {time!r}; expected 'index' or 'sigma'")
        self._time = time
        sigmas = torch.linspace(math.log(sigma_min), math.log(sigma_max), steps, dtype=torch.float64).exp()
        super().__init__(torch.ones_like(sigmas), sigmas)

    def time(self, index: int) -> float:
        return float(index) if self._time == "index" else self.level(index).sigma
