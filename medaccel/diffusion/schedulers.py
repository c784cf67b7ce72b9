# SPDX-License-Identifier: Apache-2.0
"""Runs MONAI's schedulers on the fused step: same interface, same values, one pass over memory."""

import math
from typing import Any

import numpy as np
import torch
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from monai.networks.schedulers.ddpm import DDPMVarianceType
from torch import Tensor

from medaccel.diffusion._fused import Fused, one, root
from medaccel.ops import diffusion_step

_LEARNED = (DDPMVarianceType.LEARNED, DDPMVarianceType.LEARNED_RANGE)


class DDPMScheduler(Fused, MonaiDDPM):
    """Runs `monai.networks.schedulers.DDPMScheduler` on the fused step, with two faults mended.

    MONAI's step goes from t to t − 1 also where `set_timesteps` has left steps out, so that a sampler with fewer
    steps than training ends in noise. Here it goes to the next *inference* step. The kernel makes the noise, seeded
    by torch's generator, so it differs from `torch.randn`'s.

    A timestep that `set_timesteps` does not list has no next one: from there on, steps are MONAI's (to t − 1, with
    torch's noise), after one warning, until a run starts at the first timestep again.

    Args:
        num_train_timesteps, schedule, variance_type, clip_sample, prediction_type, clip_sample_min, clip_sample_max,
            schedule_args: MONAI's.
        skipped_steps: "inference" (default) or "training", MONAI's behaviour.
        kernel_noise: False draws the noise with `torch.randn`, as MONAI does.
        check_finite: raise if a model output holds a NaN or an infinity; costs a pass over it, and a wait on a GPU.

    `medaccel.accelerate` gives MONAI's own schedulers this class with MONAI's behaviour in all of these.

    Source: Ho et al., "Denoising diffusion probabilistic models", NeurIPS 2020.
    """

    def __init__(
        self,
        *arguments: Any,
        skipped_steps: str = "inference",
        kernel_noise: bool = True,
        check_finite: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(*arguments, **others)
        self._choose(skipped_steps, kernel_noise, check_finite)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        *,
        seed: int | None = None,
        out: Any = None,
        **guided: Any,
    ) -> tuple[Tensor, Tensor]:
        """Takes one step of the reverse process.

        Args:
            model_output: (B, C, …); (B, 2·C, …) for a learned variance, whose noise is always torch's.
            timestep: a training step, of those of `set_timesteps` (see above): an int, or an array or tensor of one.
            sample: x_t, (B, C, …).
            generator: draws the noise, or the seed of the kernel's noise.
            seed: the seed of the kernel's noise; the time step is its offset, so one seed serves a whole run.
            out, guided: `out`, `mask` and `guide` of `medaccel.ops.diffusion_step`.

        Returns:
            (x at the next step, the predicted x0).

        Raises:
            ValueError: the step is not defined, such as one that predicts noise at a level without signal (zero
                terminal SNR). An accelerated scheduler returns MONAI's result: infinities, clipped.
        """
        plain = seed is None and out is None and not guided
        if plain and self._left_to_monai(model_output, sample):
            return super().step(model_output, timestep, sample, generator)
        t = self._check(model_output, timestep, plain)
        learned = self.variance_type in _LEARNED and model_output.shape[1] == 2 * sample.shape[1]
        if learned and not plain:
            raise ValueError(
                f"{type(self).__name__}: model_output has shape {tuple(model_output.shape)}, a mean and a variance, "
                "with which seed, out, mask and guide are not served; expected none of them"
            )
        if not 0 <= t < self.num_train_timesteps:
            return super().step(model_output, t, sample, generator)
        following, torchs = self._following(t, t - 1)
        if learned and following == t - 1:
            return super().step(model_output, t, sample, generator)
        variance = None
        if learned:
            model_output, variance = model_output.split(sample.shape[1], dim=1)
        alpha_prod = self._at(self.alphas_cumprod, t)
        alpha_prod_next = self._at(self.alphas_cumprod, following) if following >= 0 else one(alpha_prod)
        with np.errstate(all="ignore"):  # undefined values are refused just below
            coefficients = self._coefficients(t, following, alpha_prod, alpha_prod_next)
        if not all(map(math.isfinite, coefficients.values())):
            if plain and not self._mended:
                return super().step(model_output, t, sample, generator)
            raise self._undefined(t, following, alpha_prod, alpha_prod_next)
        place: dict[str, Any] = {}
        if coefficients["s"] or guided or (torchs and t > 0):  # MONAI draws where its variance is 0, too
            place = self._noise(model_output, sample, generator, seed, t, torchs or learned)
        if variance is not None and coefficients["s"]:
            place["noise"] = place["noise"] * self._learned_std(variance, alpha_prod, alpha_prod_next)
            coefficients["s"] = 1.0
        sample, wide = self._promoted(sample, model_output, out is not None)
        x_next, x0 = diffusion_step(
            sample, wide, **coefficients, clip=self._limits(), out=out,
            **place, **self._guided(guided, alpha_prod_next),
        )  # fmt: skip
        return x_next, self._x0_as_monai(x0, model_output)

    def _coefficients(self, t: int, following: int, alpha_prod: Any, alpha_prod_next: Any) -> dict[str, Any]:
        unit = one(alpha_prod)
        if following == t - 1:
            alpha, beta = self._at(self.alphas, t), self._at(self.betas, t)
        else:
            alpha = alpha_prod / alpha_prod_next
            beta = unit - alpha
        a, b = self._x0(alpha_prod)
        c = root(alpha_prod_next) * beta / (unit - alpha_prod)
        d = root(alpha) * (unit - alpha_prod_next) / (unit - alpha_prod)
        noisy = t > 0 and following >= 0
        s = root(self._step_variance(alpha_prod, alpha_prod_next, beta)) if noisy else 0.0
        return {"a": a, "b": b, "c": float(c), "d": float(d), "e": 0.0, "s": float(s)}

    def _learned_std(self, variance: Tensor, alpha_prod: Any, alpha_prod_next: Any) -> Tensor:
        """Returns the standard deviation from a network's variance, read as MONAI does, for a step that leaves levels
        out."""
        if self.variance_type == DDPMVarianceType.LEARNED_RANGE:
            most = one(alpha_prod) - alpha_prod / alpha_prod_next
            least = self._step_variance(alpha_prod, alpha_prod_next, most)
            share = (variance + 1) / 2
            variance = share * float(most) + (1 - share) * float(least)
        return variance**0.5

    def _step_variance(self, alpha_prod: Any, alpha_prod_next: Any, beta: Any) -> Any:
        if self.variance_type == DDPMVarianceType.FIXED_LARGE:
            return beta
        unit = one(alpha_prod)
        variance = (unit - alpha_prod_next) / (unit - alpha_prod) * beta
        if self.variance_type == DDPMVarianceType.FIXED_SMALL:
            return max(variance, variance.dtype.type(1e-20))
        return variance


class DDIMScheduler(Fused, MonaiDDIM):
    """Runs `monai.networks.schedulers.DDIMScheduler` on the fused step.

    MONAI's steps are spread evenly and rounded, but each goes to t − T // N, which is the next one only if N divides
    T − 1 suitably. Here it goes to the next inference step (`skipped_steps="training"`: MONAI's way).

    Args:
        num_train_timesteps, schedule, clip_sample, set_alpha_to_one, steps_offset, prediction_type, clip_sample_min,
            clip_sample_max, schedule_args: MONAI's.
        skipped_steps, kernel_noise, check_finite: those of `DDPMScheduler`.

    Source: Song et al., "Denoising diffusion implicit models", ICLR 2021.
    """

    final_alpha_cumprod: Tensor

    def __init__(
        self,
        *arguments: Any,
        skipped_steps: str = "inference",
        kernel_noise: bool = True,
        check_finite: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(*arguments, **others)
        self._choose(skipped_steps, kernel_noise, check_finite)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        seed: int | None = None,
        out: Any = None,
        **guided: Any,
    ) -> tuple[Tensor, Tensor]:
        """Takes one step of the reverse process; its arguments are those of `DDPMScheduler.step`, and eta, the weight
        of the noise."""
        plain = seed is None and out is None and not guided
        if plain and self._left_to_monai(model_output, sample):
            return super().step(model_output, timestep, sample, eta, generator)
        t = self._check(model_output, timestep, plain)
        if not 0 <= t < self.num_train_timesteps:
            return super().step(model_output, t, sample, eta, generator)
        assert self.num_inference_steps is not None
        following, torchs = self._following(t, t - self.num_train_timesteps // self.num_inference_steps)
        alpha_prod = self._at(self.alphas_cumprod, t)
        if following >= 0:
            alpha_prod_next = self._at(self.alphas_cumprod, following)
        else:
            alpha_prod_next = alpha_prod.dtype.type(float(self.final_alpha_cumprod))
        with np.errstate(all="ignore"):  # undefined values are refused just below
            coefficients = self._coefficients(alpha_prod, alpha_prod_next, eta)
        if not all(map(math.isfinite, coefficients.values())):
            if plain and not self._mended:
                return super().step(model_output, t, sample, eta, generator)
            raise self._undefined(t, following, alpha_prod, alpha_prod_next)
        place = self._noise(model_output, sample, generator, seed, t, torchs) if eta > 0 or guided else {}
        sample, wide = self._promoted(sample, model_output, out is not None)
        x_next, x0 = diffusion_step(
            sample, wide, **coefficients, clip=self._limits(), out=out,
            **place, **self._guided(guided, alpha_prod_next),
        )  # fmt: skip
        return x_next, self._x0_as_monai(x0, model_output)

    def _coefficients(self, alpha_prod: Any, alpha_prod_next: Any, eta: float) -> dict[str, Any]:
        unit = one(alpha_prod)
        beta_prod = unit - alpha_prod
        variance = ((unit - alpha_prod_next) / beta_prod) * (unit - alpha_prod / alpha_prod_next)
        std = alpha_prod.dtype.type(eta) * root(variance)
        rest = unit - alpha_prod_next - std * std
        if self._mended and rest < 0:  # rounding can make this negative where no signal is left: MONAI's root is NaN
            rest = rest * 0
        direction = float(root(rest))
        a, b = self._x0(alpha_prod)
        signal, noise = float(root(alpha_prod)), float(root(beta_prod))
        if self.prediction_type == "epsilon":
            p, q = 0.0, 1.0
        elif self.prediction_type == "sample":
            p, q = (1 / noise, -signal / noise) if noise else (math.inf, -math.inf)
        else:
            p, q = noise, signal
        c = float(root(alpha_prod_next))
        return {"a": a, "b": b, "c": c, "d": direction * p, "e": direction * q, "s": float(std)}


def scheduler_unsupported(scheduler: Any) -> str | None:
    """Says why medaccel's scheduler can't take the place of MONAI's; returns None if it can."""
    if "step" in scheduler.__dict__ or "add_noise" in scheduler.__dict__:
        return "its step or add_noise has been replaced on the instance"
    return None
