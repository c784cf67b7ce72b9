# SPDX-License-Identifier: Apache-2.0
"""MONAI's schedulers on the fused step: same interface, same values, one pass over memory."""

import itertools
from typing import Any

import numpy as np
import torch
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from monai.networks.schedulers.ddpm import DDPMVarianceType
from torch import Tensor

from medaccel.diffusion.noising import noised
from medaccel.ops import diffusion_step
from medaccel.ops._transforms import host_values

SKIPPED_STEPS = ("inference", "training")
_TORCH = {np.float16: torch.float16, np.float32: torch.float32, np.float64: torch.float64}


class _Fused:
    """What both schedulers share. Class attributes are what `accelerate` leaves a MONAI scheduler with: its numbers,
    faults included, and torch's noise from the caller's generator."""

    skipped_steps = "training"
    kernel_noise = False
    check_finite = False
    _mended = False

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    timesteps: Tensor
    num_train_timesteps: int
    num_inference_steps: int | None
    prediction_type: str
    clip_sample: bool
    clip_sample_values: list[float]

    def _choose(self, skipped_steps: str, kernel_noise: bool, check_finite: bool) -> None:
        name = type(self).__name__
        if skipped_steps not in SKIPPED_STEPS:
            raise ValueError(f"{name}: skipped_steps is {skipped_steps!r}; expected one of {list(SKIPPED_STEPS)}")
        low, high = self.clip_sample_values
        if not low <= high:
            raise ValueError(
                f"{name}: clip_sample_min is {low} and clip_sample_max {high}; expected the minimum not above the "
                "maximum"
            )
        self.skipped_steps, self.kernel_noise, self.check_finite = skipped_steps, kernel_noise, check_finite
        self._mended = True

    def _check(self, model_output: Tensor, timestep: Any) -> int:
        """The time step as an int, or an error in a sentence."""
        t, name = int(timestep), type(self).__name__
        if not 0 <= t < self.num_train_timesteps:
            raise ValueError(f"{name}: timestep is {t}; expected 0 to {self.num_train_timesteps - 1}")
        if self.check_finite and not bool(model_output.isfinite().all()):
            raise ValueError(
                f"{name}: model_output holds a NaN or an infinity at timestep {t}; expected finite numbers"
            )
        return t

    def _following(self, t: int) -> int:
        """The inference step after `t`; −1 after the last."""
        timesteps, table = self.__dict__.get("_after", (None, {}))
        if timesteps is not self.timesteps:  # read once, not at every step: they may lie on a GPU
            steps = self.timesteps.tolist()
            if any(b >= a for a, b in itertools.pairwise(steps)):
                raise ValueError(
                    f"{type(self).__name__}: timesteps are not sorted; expected strictly decreasing ones"
                )
            table = dict(itertools.pairwise([*steps, -1]))
            self.__dict__["_after"] = (self.timesteps, table)
        if t not in table:
            raise ValueError(
                f"{type(self).__name__}: timestep is {t}, which is not among the timesteps of set_timesteps; "
                f"expected one of {len(table)} from {max(table)} to {min(table)} (skipped_steps='training' takes any)"
            )
        return table[t]

    def _at(self, table: Tensor, index: int) -> Any:
        """An entry as a NumPy scalar: its arithmetic rounds as MONAI's 0-d tensors do, and is ten times as fast."""
        values = table.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()[index]

    def _x0(self, alpha: Any) -> tuple[float, float]:
        """x0 = a · x + b · m, at a level with this ᾱ."""
        root, noise = float(_root(alpha)), float(_root(_one(alpha) - alpha))
        if self.prediction_type == "epsilon":
            return 1 / root, -noise / root
        if self.prediction_type == "sample":
            return 0.0, 1.0
        return root, -noise

    @staticmethod
    def _guided(guided: dict[str, Any], alpha: Any) -> dict[str, Any]:
        """Mask and guide, with the level that kept voxels are noised to."""
        if not guided:
            return {}
        return {
            **guided,
            "guide_scale": float(_root(alpha)),
            "guide_std": float(_root(_one(alpha) - alpha)),
        }

    @staticmethod
    def _promoted(sample: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
        """Both in float64 where one of them is, as torch's arithmetic has it."""
        if (sample.dtype == torch.float64) != (model_output.dtype == torch.float64):
            return sample.double(), model_output.double()
        return sample, model_output

    def _limits(self) -> tuple[float, float] | None:
        low, high = self.clip_sample_values
        return (low, high) if self.clip_sample else None

    def _noise(
        self, like: Tensor, sample: Tensor, generator: torch.Generator | None, seed: int | None, t: int
    ) -> dict[str, Any]:
        """The step's noise: torch's, or the kernel's with the time step as its offset."""
        if seed is not None or self.kernel_noise:
            if seed is None and generator is not None:
                device = generator.device
                seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
            return {"seed": seed, "offset": t}
        noise = torch.randn(like.shape, dtype=like.dtype, generator=generator, device=like.device)
        return {"noise": noise.double() if sample.dtype == torch.float64 else noise}

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ) of each sample, by MONAI's arithmetic in the sample's precision, in float64."""
        known = host_values(timesteps)  # a GPU's are not read here
        if (
            known is not None
            and known.numel()
            and not 0 <= int(known.min()) <= int(known.max()) < self.num_train_timesteps
        ):
            raise ValueError(
                f"{type(self).__name__}: timesteps reach from {int(known.min())} to {int(known.max())}; "
                f"expected 0 to {self.num_train_timesteps - 1}"
            )
        dtype = torch.promote_types(like.dtype, torch.float32) if self._mended else like.dtype
        table = self.alphas_cumprod.to(device=like.device, dtype=dtype)
        if not self._mended:  # MONAI moves its table for good; later steps compute with it in that dtype
            self.alphas_cumprod = table
        alpha = table[timesteps.to(like.device)]
        return (alpha**0.5).double(), ((1 - alpha) ** 0.5).double()

    def add_noise(
        self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor, *, seed: int | None = None
    ) -> Tensor:
        """√ᾱ_t · x0 + √(1 − ᾱ_t) · noise, each sample at its own time step.

        Args:
            original_samples: x0, (B, …).
            noise: like x0; None: made in the kernel from `seed`, which `training_target` then takes too.
            timesteps: (B,), or one for all.
            seed: of the kernel's noise.
        """
        alpha, sigma = self._levels(timesteps, original_samples)
        return noised(original_samples, alpha, sigma, noise=noise, seed=seed)

    def get_velocity(
        self, sample: Tensor, noise: Tensor | None, timesteps: Tensor, *, seed: int | None = None
    ) -> Tensor:
        """√ᾱ_t · noise − √(1 − ᾱ_t) · x0: what a network with v prediction is trained to predict."""
        alpha, sigma = self._levels(timesteps, sample)
        return noised(sample, -sigma, alpha, noise=noise, seed=seed)

    def training_target(
        self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor, *, seed: int | None = None
    ) -> Tensor:
        """What the network is to predict, by `prediction_type`; noise or seed as `add_noise` got them."""
        if self.prediction_type == "sample":
            return original_samples
        if self.prediction_type == "v_prediction":
            return self.get_velocity(original_samples, noise, timesteps, seed=seed)
        return noised(original_samples, 0.0, 1.0, noise=noise, seed=seed) if noise is None else noise


class DDPMScheduler(_Fused, MonaiDDPM):
    """`monai.networks.schedulers.DDPMScheduler` on the fused step, with two faults mended.

    MONAI's step goes from t to t − 1 also where `set_timesteps` has left steps out, so that a sampler with fewer
    steps than training ends in noise. Here it goes to the next *inference* step. And the noise is made in the
    kernel, seeded by torch's generator, so it isn't what `torch.randn` would give.

    Args:
        num_train_timesteps, schedule, variance_type, clip_sample, prediction_type, clip_sample_min, clip_sample_max,
            schedule_args: as MONAI's.
        skipped_steps: "inference" (default) or "training", MONAI's behaviour.
        kernel_noise: False draws the noise with `torch.randn`, as MONAI does.
        check_finite: raise where a model output holds a NaN or an infinity; a pass over it, and on a GPU a wait.

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
        """One step of the reverse process.

        Args:
            model_output: (B, C, …); (B, 2·C, …) for a learned variance, which MONAI's own code then serves.
            timestep: a training step among those of `set_timesteps`.
            sample: x_t, (B, C, …).
            generator: of the noise, or of the kernel noise's seed.
            seed: of the kernel's noise; the time step is its offset, so one seed serves a whole run.
            out, guided: as `medaccel.ops.diffusion_step`'s `out`, and its `mask` and `guide`.

        Returns:
            (x at the next step, the predicted x0).
        """
        t = self._check(model_output, timestep)
        learned = self.variance_type in (DDPMVarianceType.LEARNED, DDPMVarianceType.LEARNED_RANGE)
        if learned and model_output.shape[1] == 2 * sample.shape[1]:
            return super().step(model_output, t, sample, generator)
        following = t - 1 if self.skipped_steps == "training" else self._following(t)
        alpha_prod = self._at(self.alphas_cumprod, t)
        one = _one(alpha_prod)
        alpha_prod_next = self._at(self.alphas_cumprod, following) if following >= 0 else one
        if following == t - 1:
            alpha, beta = self._at(self.alphas, t), self._at(self.betas, t)
        else:
            alpha = alpha_prod / alpha_prod_next
            beta = one - alpha
        a, b = self._x0(alpha_prod)
        c = _root(alpha_prod_next) * beta / (one - alpha_prod)
        d = _root(alpha) * (one - alpha_prod_next) / (one - alpha_prod)
        place, s = {}, 0.0
        if t > 0 and following >= 0:
            s = float(_root(self._step_variance(alpha_prod, alpha_prod_next, beta)))
        if s or guided:
            place = self._noise(model_output, sample, generator, seed, t)
        sample, model_output = self._promoted(sample, model_output)
        return diffusion_step(
            sample, model_output, a=a, b=b, c=float(c), d=float(d), e=0.0, s=s, clip=self._limits(), out=out,
            **place, **self._guided(guided, alpha_prod_next),
        )  # fmt: skip

    def _step_variance(self, alpha_prod: Any, alpha_prod_next: Any, beta: Any) -> Any:
        if self.variance_type == DDPMVarianceType.FIXED_LARGE:
            return beta
        one = _one(alpha_prod)
        variance = (one - alpha_prod_next) / (one - alpha_prod) * beta
        if self.variance_type == DDPMVarianceType.FIXED_SMALL:
            return max(variance, variance.dtype.type(1e-20))
        return variance


class DDIMScheduler(_Fused, MonaiDDIM):
    """`monai.networks.schedulers.DDIMScheduler` on the fused step.

    MONAI's steps are spread evenly and rounded, but each goes to t − T // N, which is not the next of them unless N
    divides T − 1 suitably. Here it goes to the next inference step (`skipped_steps="training"`: MONAI's way).

    Args:
        num_train_timesteps, schedule, clip_sample, set_alpha_to_one, steps_offset, prediction_type, clip_sample_min,
            clip_sample_max, schedule_args: as MONAI's.
        skipped_steps, kernel_noise, check_finite: as `DDPMScheduler`'s.

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
        """One step of the reverse process; arguments as `DDPMScheduler.step`'s, and eta, the weight of the noise."""
        t = self._check(model_output, timestep)
        assert self.num_inference_steps is not None
        stride = self.num_train_timesteps // self.num_inference_steps
        following = t - stride if self.skipped_steps == "training" else self._following(t)
        alpha_prod = self._at(self.alphas_cumprod, t)
        one = _one(alpha_prod)
        if following >= 0:
            alpha_prod_next = self._at(self.alphas_cumprod, following)
        else:
            alpha_prod_next = alpha_prod.dtype.type(float(self.final_alpha_cumprod))
        beta_prod = one - alpha_prod
        variance = ((one - alpha_prod_next) / beta_prod) * (one - alpha_prod / alpha_prod_next)
        std = alpha_prod.dtype.type(eta) * _root(variance)
        direction = float(_root(one - alpha_prod_next - std * std))
        a, b = self._x0(alpha_prod)
        root, noise = float(_root(alpha_prod)), float(_root(beta_prod))
        if self.prediction_type == "epsilon":
            p, q = 0.0, 1.0
        elif self.prediction_type == "sample":
            p, q = 1 / noise, -root / noise
        else:
            p, q = noise, root
        place = self._noise(model_output, sample, generator, seed, t) if eta > 0 or guided else {}
        sample, model_output = self._promoted(sample, model_output)
        return diffusion_step(
            sample, model_output, a=a, b=b, c=float(_root(alpha_prod_next)), d=direction * p, e=direction * q,
            s=float(std), clip=self._limits(), out=out, **place, **self._guided(guided, alpha_prod_next),
        )  # fmt: skip


def _root(value: Any) -> Any:
    """By torch: its square root (MKL's) is not always the nearest number, and MONAI's coefficients are made of it."""
    return value.dtype.type(torch.tensor(float(value), dtype=_TORCH[value.dtype.type]).sqrt().item())


def _one(like: Any) -> Any:
    """1 in the precision of a NumPy scalar: a Python 1 would widen it in NumPy 1."""
    return like.dtype.type(1)


def scheduler_unsupported(scheduler: Any) -> str | None:
    """None where ours may take the place of MONAI's scheduler; else why not."""
    if "step" in scheduler.__dict__ or "add_noise" in scheduler.__dict__:
        return "its step or add_noise has been replaced on the instance"
    return None
