# SPDX-License-Identifier: Apache-2.0
"""Holds the code that the fused schedulers share: coefficients that round as MONAI's do, the order of the steps, and
noise."""

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medaccel.diffusion.noising import noised
from medaccel.ops._transforms import host_values

SKIPPED_STEPS = ("inference", "training")
_TORCH = {np.float16: torch.float16, np.float32: torch.float32, np.float64: torch.float64}


@dataclass
class _Walk:
    """Lists the step that follows each inference step, and the timesteps that this table was read from."""

    timesteps: Any
    version: int | None  # None: a change of the tensor does not show in its version
    content: Tensor | None  # timesteps that lie on the CPU
    steps: list[int]  # their values
    following: dict[int, int]
    first: int  # -1: there are no timesteps
    astray: bool = False  # a step that is not listed was taken since the last start
    warned: bool = False

    def is_of(self, timesteps: Any) -> bool:
        """Tells whether `timesteps` are the ones that the table was made from, unchanged."""
        if timesteps is not self.timesteps:
            return False
        if self.content is not None:  # writes by NumPy and `.data` leave the version, so the numbers are compared
            return self.content.dtype == timesteps.dtype and torch.equal(self.content, timesteps)
        return self.version is not None and self.version == timesteps._version


class Fused:
    """Holds the part that both schedulers share. The class attributes keep the behaviour of an accelerated MONAI
    scheduler: its numbers, faults included, and torch's noise from the caller's generator."""

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

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the timesteps as MONAI does; refuses a count below 1."""
        if self._mended and num_inference_steps < 1:
            raise ValueError(
                f"{type(self).__name__}: num_inference_steps is {num_inference_steps}; expected 1 to "
                f"{self.num_train_timesteps}"
            )
        super().set_timesteps(num_inference_steps, device)  # type: ignore[misc]
        if self.timesteps.device.type != "cpu":
            self._walk_now()  # reads them once, now: no step waits for the GPU then

    # --- which step ------------------------------------------------------------------------------------------
    def _left_to_monai(self, model_output: Any, sample: Any) -> bool:
        """Tells whether an accelerated MONAI scheduler is called in a way that only MONAI's own code serves: shapes
        that broadcast, or arithmetic in bf16."""
        if self._mended:
            return False
        return (
            not isinstance(model_output, Tensor)
            or not isinstance(sample, Tensor)
            or model_output.shape != sample.shape
            or not (model_output.is_floating_point() and sample.is_floating_point())
            or self.alphas_cumprod.dtype == torch.bfloat16
        )

    def _check(self, model_output: Tensor, timestep: Any, plain: bool) -> int:
        """Returns the time step as an int, or raises an error in a sentence.

        plain: the call uses nothing beyond MONAI's step. An accelerated scheduler then takes any number: MONAI's code
        wraps negative ones around, and refuses the others.
        """
        name = type(self).__name__
        listed = self._listed(timestep)
        t = _whole(name, timestep) if listed is None else listed
        if not 0 <= t < self.num_train_timesteps and (self._mended or not plain):
            raise ValueError(f"{name}: timestep is {t}; expected 0 to {self.num_train_timesteps - 1}")
        if self.check_finite and not bool(model_output.isfinite().all()):
            raise ValueError(
                f"{name}: model_output holds a NaN or an infinity at timestep {t}; expected finite numbers"
            )
        return t

    def _listed(self, timestep: Any) -> int | None:
        """Returns the value of an entry of `timesteps` that lies on a GPU, as ``for t in scheduler.timesteps`` gives
        it, without reading it there; None for anything else."""
        walk: _Walk | None = self.__dict__.get("_walk")
        timesteps = self.timesteps
        if walk is None or not isinstance(timestep, Tensor) or timestep.device.type == "cpu" or timestep.numel() != 1:
            return None
        if not walk.is_of(timesteps) or timestep.dtype != timesteps.dtype or timesteps.dim() != 1:
            return None
        if timestep.untyped_storage()._cdata != timesteps.untyped_storage()._cdata:
            return None
        place, rest = divmod(int(timestep.storage_offset() - timesteps.storage_offset()), timesteps.stride(0))
        return walk.steps[place] if rest == 0 and 0 <= place < len(walk.steps) else None

    def _following(self, t: int, monais: int) -> tuple[int, bool]:
        """Returns the step after `t` (negative after the last), and whether the step, its noise included, is MONAI's.

        Args:
            t: the step.
            monais: the step that MONAI takes next.
        """
        if self.skipped_steps == "training":
            return monais, not self.kernel_noise
        walk = self._walk_now()
        if t == walk.first:
            walk.astray = False
        if t not in walk.following:
            walk.astray = True
            if not walk.warned:
                walk.warned = True
                warnings.warn(
                    f"{type(self).__name__}: timestep {t} is not among the {len(walk.following)} of set_timesteps; "
                    f"from here on steps go MONAI's way, with torch's noise (this one to {max(monais, 0)}), until a "
                    f"run starts at {walk.first} again",
                    stacklevel=3,
                )
        return (monais, True) if walk.astray else (walk.following[t], not self.kernel_noise)

    def _walk_now(self) -> _Walk:
        """Returns the table for the present timesteps; it is kept, because they may lie on a GPU."""
        walk: _Walk | None = self.__dict__.get("_walk")
        if walk is not None and walk.is_of(self.timesteps):
            return walk
        timesteps = self.timesteps
        steps = torch.as_tensor(timesteps).tolist()
        if any(b > a for a, b in pairwise(steps)):
            raise ValueError(f"{type(self).__name__}: timesteps are not sorted; expected decreasing ones")
        # With more steps than levels (a steps_offset, and num_train_timesteps of them), some levels are listed twice.
        following = dict(pairwise([*dict.fromkeys(steps), -1]))
        version = content = None
        if isinstance(timesteps, Tensor):
            if timesteps.device.type == "cpu":
                content = timesteps.detach().clone()
            elif not timesteps.is_inference():
                version = timesteps._version
        walk = _Walk(timesteps, version, content, steps, following, max(steps, default=-1))
        self.__dict__["_walk"] = walk
        return walk

    # --- coefficients ----------------------------------------------------------------------------------------
    def _at(self, table: Tensor, index: int) -> Any:
        """Returns an entry as a NumPy scalar: its arithmetic rounds as MONAI's 0-d tensors do, and is ten times as
        fast."""
        values = _moved(self, table, torch.device("cpu"), table.dtype).detach()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()[index]

    def _x0(self, alpha: Any) -> tuple[float, float]:
        """Returns a and b of x0 = a · x + b · m at a level with this ᾱ; they are not finite where m does not
        determine x0."""
        level, noise = float(root(alpha)), float(root(one(alpha) - alpha))
        if self.prediction_type == "epsilon":
            return (1 / level, -noise / level) if level else (math.inf, -math.inf)
        if self.prediction_type == "sample":
            return 0.0, 1.0
        return level, -noise

    def _undefined(self, t: int, following: int, alpha: Any, alpha_next: Any) -> ValueError:
        """Returns the error for a step whose coefficients are not finite numbers."""
        return ValueError(
            f"{type(self).__name__}: the step from {t} to {max(following, 0)} is undefined for a prediction of "
            f"{self.prediction_type!r} where alphas_cumprod is {float(alpha):g} and then {float(alpha_next):g}; "
            "expected values in (0, 1), or, without signal at the start (zero terminal SNR), prediction_type "
            "'v_prediction' or 'sample'"
        )

    @staticmethod
    def _guided(guided: dict[str, Any], alpha: Any) -> dict[str, Any]:
        """Adds to mask and guide the level that the kept voxels are noised to."""
        if not guided:
            return {}
        return {
            **guided,
            "guide_scale": float(root(alpha)),
            "guide_std": float(root(one(alpha) - alpha)),
        }

    @staticmethod
    def _promoted(sample: Tensor, model_output: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        """Converts both to the dtype that torch's arithmetic gives; the kernel takes a half-precision model output as
        it is.

        in_place: the sample has the dtype of `out`, which stays.
        """
        if sample.dtype == model_output.dtype or (
            in_place and torch.float64 not in (sample.dtype, model_output.dtype)
        ):
            return sample, model_output
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        return sample.to(dtype), model_output.to(dtype) if dtype == torch.float64 else model_output

    def _x0_as_monai(self, x0: Tensor, model_output: Tensor) -> Tensor:
        """Returns the model output itself, in its dtype, as MONAI's x0 if the network predicts x0."""
        if self._mended or self.prediction_type != "sample" or x0 is None:
            return x0
        return x0.to(model_output.dtype)

    def _limits(self) -> tuple[float, float] | None:
        low, high = self.clip_sample_values
        return (low, high) if self.clip_sample else None

    @staticmethod
    def _noise(
        like: Tensor, sample: Tensor, generator: torch.Generator | None, seed: int | None, t: int, torchs: bool
    ) -> dict[str, Any]:
        """Returns the step's noise: torch's, or the kernel's with the time step as its offset."""
        if seed is not None or not torchs:
            if seed is None and generator is not None:
                drawn = torch.randint(2**62, (1,), generator=generator, device=generator.device)
                # Where the generator is the sample's GPU's, the seed stays there: reading it would wait.
                on_gpu = drawn.device.type != "cpu" and drawn.device == sample.device
                return {"seed": drawn if on_gpu else int(drawn), "offset": t}
            return {"seed": seed, "offset": t}
        noise = torch.randn(like.shape, dtype=like.dtype, generator=generator, device=like.device)
        return {"noise": noise.double() if sample.dtype == torch.float64 else noise}

    # --- noising ---------------------------------------------------------------------------------------------
    def _noising_left_to_monai(self, x: Any, noise: Any, timesteps: Any) -> bool:
        """Tells, as `_left_to_monai` does, whether `add_noise` or `get_velocity` is MONAI's to compute."""
        if self._mended or noise is None or not isinstance(timesteps, Tensor):
            return False
        return noise.shape != x.shape or noise.dtype != x.dtype or timesteps.numel() not in (1, len(x))

    def _levels(self, timesteps: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns √ᾱ and √(1 − ᾱ) for each sample, by MONAI's arithmetic in the sample's precision, in float64."""
        name = type(self).__name__
        timesteps = torch.as_tensor(timesteps)
        if timesteps.dtype == torch.bool or timesteps.is_floating_point() or timesteps.is_complex():
            raise TypeError(f"{name}: timesteps are {timesteps.dtype}; expected integers")
        known = host_values(timesteps)  # timesteps on a GPU are not read here
        if (
            known is not None
            and self._mended
            and known.numel()
            and not 0 <= int(known.min()) <= int(known.max()) < self.num_train_timesteps
        ):
            raise ValueError(
                f"{name}: timesteps reach from {int(known.min())} to {int(known.max())}; "
                f"expected 0 to {self.num_train_timesteps - 1}"
            )
        if timesteps.numel() not in (1, len(like)):
            raise ValueError(
                f"{name}: timesteps has shape {tuple(timesteps.shape)}; expected ({len(like)},), one a sample, or "
                "one for all"
            )
        timesteps = timesteps.reshape(-1)
        dtype = torch.promote_types(like.dtype, torch.float32) if self._mended else like.dtype
        # Levels that the host can look up are numbers that go to a GPU as such: nothing is copied there.
        device = like.device if known is None else timesteps.device
        if not self._mended:  # MONAI moves its table for good; later steps compute with it in that dtype
            before = self.alphas_cumprod
            self.alphas_cumprod = _moved(self, before, like.device, dtype)
            if self.alphas_cumprod is not before:
                _remember(self, self.alphas_cumprod, before.to(dtype=dtype))
        table = _moved(self, self.alphas_cumprod, device, dtype)
        alpha = table[timesteps.to(table.device).long()]
        return (alpha**0.5).double(), ((1 - alpha) ** 0.5).double()

    def add_noise(
        self, original_samples: Tensor, noise: Tensor | None, timesteps: Any, *, seed: int | None = None
    ) -> Tensor:
        """Returns √ᾱ_t · x0 + √(1 − ᾱ_t) · noise, each sample at its own time step.

        Args:
            original_samples: x0, (B, …).
            noise: a tensor like x0. None: the kernel makes it from `seed`; pass that seed to `training_target` too.
            timesteps: (B,), or one for all: integers, as a tensor, an array or numbers.
            seed: the seed of the kernel's noise.
        """
        if self._noising_left_to_monai(original_samples, noise, timesteps):
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        alpha, sigma = self._levels(timesteps, original_samples)
        return noised(original_samples, alpha, sigma, noise=noise, seed=seed)

    def get_velocity(
        self, sample: Tensor, noise: Tensor | None, timesteps: Any, *, seed: int | None = None
    ) -> Tensor:
        """Returns √ᾱ_t · noise − √(1 − ᾱ_t) · x0, which a network with v prediction is trained to predict."""
        if self._noising_left_to_monai(sample, noise, timesteps):
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]
        alpha, sigma = self._levels(timesteps, sample)
        return noised(sample, -sigma, alpha, noise=noise, seed=seed)

    def training_target(
        self, original_samples: Tensor, noise: Tensor | None, timesteps: Any, *, seed: int | None = None
    ) -> Tensor:
        """Returns the network's target by `prediction_type`; pass the noise or the seed that `add_noise` got."""
        if self.prediction_type == "sample":
            return original_samples
        if self.prediction_type == "v_prediction":
            return self.get_velocity(original_samples, noise, timesteps, seed=seed)
        return noised(original_samples, 0.0, 1.0, noise=noise, seed=seed) if noise is None else noise


@dataclass
class _Copy:
    """Holds a table's copy on another device or in another dtype, and what tells that the table has changed since."""

    table: Tensor
    version: int
    content: Tensor | None  # the numbers of a table on the CPU
    copy: Tensor

    def is_of(self, table: Tensor) -> bool:
        if table is not self.table or table._version != self.version:
            return False
        return self.content is None or torch.equal(self.content, table)  # writes by NumPy leave the version


def _moved(scheduler: Any, table: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns a scheduler's table on a device and in a dtype; copies between devices, which wait, are kept."""
    if table.device == device or table.is_inference():
        return table.to(device=device, dtype=dtype)
    copies: dict[Any, list[_Copy]] = scheduler.__dict__.setdefault("_copies", {})
    for kept in copies.get((device, dtype), []):
        if kept.is_of(table):
            return kept.copy
    copy = table.to(device=device, dtype=dtype)
    _remember(scheduler, table, copy)
    return copy


def _remember(scheduler: Any, table: Tensor, copy: Tensor) -> None:
    """Keeps `copy` as what `_moved` returns for `table`."""
    if table.device == copy.device or table.is_inference():
        return
    content = table.detach().clone() if table.device.type == "cpu" else None
    copies = scheduler.__dict__.setdefault("_copies", {})
    # A scheduler has three tables.
    kept = copies.setdefault((copy.device, copy.dtype), [])[-2:]
    copies[copy.device, copy.dtype] = [*kept, _Copy(table, table._version, content, copy)]


def _whole(name: str, timestep: Any) -> int:
    """Converts a number, or an array or tensor that holds one, to an int."""
    if type(timestep) is int:
        return timestep
    if isinstance(timestep, Tensor | np.ndarray | np.generic):
        if math.prod(timestep.shape) != 1:
            raise ValueError(f"{name}: timestep has shape {tuple(timestep.shape)}; expected a single number")
        value = timestep.item()
    else:
        value = timestep
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: timestep is {timestep!r}; expected a whole number")
    if value != value or value in (math.inf, -math.inf) or value != int(value):
        raise ValueError(f"{name}: timestep is {value}; expected a whole number")
    return int(value)


def root(value: Any) -> Any:
    """Computes the square root with torch: torch's (MKL's) is not always the nearest number, and MONAI's coefficients
    are made with it."""
    return value.dtype.type(torch.tensor(float(value), dtype=_TORCH[value.dtype.type]).sqrt().item())


def one(like: Any) -> Any:
    """Returns 1 in the precision of a NumPy scalar: a Python 1 would widen it in NumPy 1."""
    return like.dtype.type(1)
