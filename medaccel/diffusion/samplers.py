# SPDX-License-Identifier: Apache-2.0
"""Turns a network's predictions into a sample, one fused step in place after another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from medaccel.diffusion import coefficients as c
from medaccel.diffusion.noising import noised
from medaccel.diffusion.sde import _Sde
from medaccel.ops import diffusion_step

METHODS = ("ancestral", "ddim", "euler_maruyama", "dpm_solver_2m")
SNR = 0.16  # signal-to-noise ratio of the Langevin corrector; Song et al., ICLR 2021, app. G
# Noise drawn outside the steps has these offsets, which no step uses.
START = 1 << 40

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampler:
    """Goes from noise to data by one of several methods.

    Attributes:
        sde: the levels: `VPSDE` or `VESDE`.
        method: "ancestral" (DDPM), "ddim", "euler_maruyama" (the reverse SDE) or "dpm_solver_2m" (a second-order ODE
            solver).
        prediction: the network's output: "epsilon", "sample", "v_prediction" or "score".
        eta: weight of the noise in "ddim".
        corrector_steps: Langevin steps before each step ("predictor–corrector").
        snr: the corrector's signal-to-noise ratio.
        clip: (min, max) of the predicted x0; must be None for "euler_maruyama", which predicts no x0.
        check_finite: raise where a prediction holds a NaN or an infinity, naming the step.
    """

    sde: _Sde
    method: str = "ddim"
    prediction: str = "epsilon"
    eta: float = 0.0
    corrector_steps: int = 0
    snr: float = SNR
    clip: tuple[float, float] | None = None
    check_finite: bool = False

    def __post_init__(self) -> None:
        c.check_prediction(self.prediction)
        if self.method not in METHODS:
            raise ValueError(f"Sampler: method is {self.method!r}; expected one of {list(METHODS)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"Sampler: eta is {self.eta}; expected 0 to 1")
        if self.corrector_steps < 0 or not self.snr > 0:
            raise ValueError(
                f"Sampler: corrector_steps is {self.corrector_steps} and snr {self.snr}; expected a count >= 0 and a "
                "number > 0"
            )
        if self.clip is not None and self.method == "euler_maruyama":
            raise ValueError("Sampler: clip is given, but euler_maruyama predicts no x0 to clip; expected None")
        if self.clip is not None and not self.clip[0] <= self.clip[1]:
            raise ValueError(f"Sampler: clip is {self.clip}; expected (min, max) with min <= max, or None")

    def start(self, shape: tuple[int, ...], *, seed: int, like: Tensor, t0: int | float | None = None) -> Tensor:
        """Returns pure noise at the level t0 to start from: `shape`, with the dtype and device of `like`."""
        level = self.sde.level(self.sde.start(len(self.sde) if t0 is None else t0) - 1)
        zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return noised(zeros, 0.0, level.sigma, seed=seed, offset=START)

    @torch.no_grad()
    def run(
        self,
        model: Model,
        state: "State",
        indices: list[int],
        *,
        seed: int,
        guided: dict[str, Tensor] | None = None,
        sample_offset: int = 0,
    ) -> Iterator["State"]:
        """Takes the steps from indices[state.step] on, in place; yields after each, so that a caller may watch or
        stop.

        Args:
            model: (x, time (B,)) → the prediction, like x.
            state: a sample at the level indices[0], ``State(x)``, or what an interrupted run yielded last; its x is
                overwritten.
            indices: strictly decreasing levels, ending with −1; `_Sde.indices` makes them.
            seed: the seed of all noise; each step's offset is its index, so a resumed run goes on with the same bits.
            guided: `mask` and `guide` of `medaccel.ops.diffusion_step`.
            sample_offset: number of the batch's first sample.
        """
        if indices[-1:] != [-1] or any(b >= a for a, b in pairwise(indices)):
            raise ValueError(
                f"Sampler: indices are {indices[:3]}…{indices[-3:]}, unsorted or without -1 at the end; expected "
                "strictly decreasing ones that end with -1"
            )
        x, previous = state.x, state.previous
        for n in range(state.step, len(indices) - 1):
            index, following = indices[n], indices[n + 1]
            place: dict[str, Any] = {"seed": seed, "sample_offset": sample_offset}
            for k in range(self.corrector_steps):
                m = self._predict(model, x, index)
                offset = index * (self.corrector_steps + 1) + k
                step = c.langevin(self.prediction, self.sde.level(index), self._langevin_step(x, m, index))
                diffusion_step(x, m, out=(x, None), offset=offset, **step, **place)
            m = self._predict(model, x, index)
            step = self._coefficients(index, following, indices[n - 1] if n > 0 and previous is not None else None)
            guide: dict[str, Any] = dict(guided or {})
            if guide:
                level = self.sde.level(following)
                guide |= {"guide_scale": level.alpha, "guide_std": level.sigma}
            multistep = self.method == "dpm_solver_2m"
            x0 = torch.empty_like(x) if multistep else None
            offset = index * (self.corrector_steps + 1) + self.corrector_steps
            diffusion_step(
                x, m, out=(x, x0), previous=previous, clip=self.clip, offset=offset, **step, **guide, **place
            )
            previous = x0
            yield State(x, n + 1, previous)

    def sample(
        self,
        model: Model,
        x: Tensor,
        *,
        seed: int,
        t0: int | float | None = None,
        steps: int | None = None,
        sample_offset: int = 0,
        progress: bool = False,
    ) -> Tensor:
        """Goes from `x` at the level t0 (None: pure noise of the last level) to a sample, in `steps` steps.

        Args:
            model: (x, time (B,)) → the prediction.
            x: (B, …); it is not changed. `start` makes one.
            seed, sample_offset: the noise's seed, and the number of the batch's first sample.
            t0, steps: those of `_Sde.indices`.
            progress: show a progress bar.
        """
        from tqdm import tqdm

        indices = self.sde.indices(t0, steps)
        x = x.clone(memory_format=torch.contiguous_format)
        run = self.run(model, State(x), indices, seed=seed, sample_offset=sample_offset)
        for _ in tqdm(run, total=len(indices) - 1, disable=not progress, leave=False):
            pass
        return x

    def _predict(self, model: Model, x: Tensor, index: int) -> Tensor:
        time = torch.full((x.shape[0],), self.sde.time(index), dtype=torch.float32, device=x.device)
        m = model(x, time)
        if self.check_finite and not bool(m.isfinite().all()):
            raise ValueError(
                f"Sampler: the model's output holds a NaN or an infinity at level {index} (time {float(time[0]):g}); "
                "expected finite numbers"
            )
        return m.to(x.dtype) if (m.dtype == torch.float64) != (x.dtype == torch.float64) else m

    def _coefficients(self, index: int, following: int, before: int | None) -> dict[str, Any]:
        level, to = self.sde.level(index), self.sde.level(following)
        if self.method == "ancestral":
            return c.ancestral(self.prediction, level, to)
        if self.method == "ddim":
            return c.ddim(self.prediction, level, to, self.eta)
        if self.method == "dpm_solver_2m":
            return c.dpm_solver_2m(self.prediction, level, to, None if before is None else self.sde.level(before))
        step = c.euler_maruyama(self.prediction, level, to)
        if to.sigma == 0:
            step["s"] = 0.0  # noise added in the last step would stay in the sample
        return step

    def _langevin_step(self, x: Tensor, m: Tensor, index: int) -> float | Tensor:
        """Returns 2 · α · (snr · ‖z‖ / ‖score‖)², norms averaged over the batch; ‖z‖ is taken as √n, its value within
        a share of 1/√(2n). On a GPU it stays there, as a tensor: nothing waits for it."""
        level = self.sde.level(index)
        _, _, p, q = c.predictions(self.prediction, level)
        noise = q * m if p == 0 else p * x + q * m
        mean = noise.flatten(1).double().norm(dim=1).mean()
        size = x[0].numel() ** 0.5
        if x.device.type != "cpu":
            return 2 * self.sde.step_size(index) * (self.snr * size / (mean / level.sigma).clamp(min=1e-12)) ** 2
        return 2 * self.sde.step_size(index) * (self.snr * size / max(float(mean) / level.sigma, 1e-12)) ** 2


@dataclass
class State:
    """Holds the progress of a run, which goes on from it with the same bits, given seed and indices."""

    x: Tensor
    step: int = 0
    previous: Tensor | None = None


@torch.no_grad()
def sample_rectified_flow(model: Model, x: Tensor, *, steps: int, times: float = 1000.0) -> Tensor:
    """Samples a rectified flow by Euler's method, from noise at time 1 to data at time 0.

    Args:
        model: (x, time · times (B,)) → x0 − noise, as MONAI's `RFlowScheduler` is trained.
        x: (B, …), standard normal noise; it is not changed.
        steps: number of steps, all of equal length.
        times: the network's scale of time.

    Source: Liu et al., "Flow straight and fast", ICLR 2023.
    """
    if steps < 1:
        raise ValueError(f"sample_rectified_flow: steps is {steps}; expected at least 1")
    x = x.clone(memory_format=torch.contiguous_format)
    for n in range(steps):
        time, following = 1 - n / steps, 1 - (n + 1) / steps
        m = model(x, torch.full((x.shape[0],), time * times, device=x.device))
        diffusion_step(x, m, out=(x, None), **c.rectified_flow(time, following))
    return x
