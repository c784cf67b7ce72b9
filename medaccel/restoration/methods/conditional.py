# SPDX-License-Identifier: Apache-2.0
"""Implements `diffusion_conditional`: samples of the activity given the PET, its smoothed copies, the exposure and
perhaps a CT.

The residual of the scaled activity to the smoothed PET is diffused, in units of its own spread, so that the
schedule's noise ends above every structure in it. The mean of the samples estimates E[λ | PET_t], and their spread
its uncertainty; the calibration of that spread is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from medaccel.diffusion.samplers import Sampler
from medaccel.restoration.methods.base import Fitted, Task
from medaccel.restoration.methods.diffusion import DiffusionMethod
from medaccel.restoration.methods.network import Candidates, as_batch, weights
from medaccel.restoration.methods.networks import Conditioning
from medaccel.restoration.study import Study


class DiffusionConditional(DiffusionMethod):
    """Has, beside `DiffusionMethod`'s settings, `spread`: the residual's spread in the network's scaling."""

    name = "diffusion_conditional"
    defaults: ClassVar[Mapping[str, Any]] = {**DiffusionMethod.defaults, "spread": 0.1}

    def __init__(self, task: Task, settings: Mapping[str, Any] | None = None) -> None:
        chosen = {**self.defaults, **(settings or {})}
        self.conditioning = Conditioning(chosen["scaling"], chosen["use_ct"], chosen["base"])
        super().__init__(task, settings)
        if not self.settings["spread"] > 0:
            raise ValueError(f"{self.name}: spread is {self.settings['spread']}; expected a number > 0")

    @property
    def inputs(self) -> int:
        return self.conditioning.channels

    def clean(self, batch: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
        ct = batch["ct"] if self.settings["use_ct"] else None
        known, base = self.conditioning(batch["input"], batch["spacing"], batch["seconds"], ct, batch["denoised"])
        residual = self.conditioning.scaling.forward(batch["noise_free"]) - base
        return residual / self.settings["spread"], [known]

    @torch.no_grad()
    def draw(
        self,
        volume: np.ndarray,
        spacing: Sequence[float],
        seconds: int,
        ct: np.ndarray | None,
        seeds: Sequence[int],
        progress: bool,
    ) -> Iterator[np.ndarray]:
        from tqdm import tqdm

        around = ct if self.settings["use_ct"] else None
        known, base = self.conditioning(*as_batch(volume, spacing, seconds, around, self.settings["base"]))
        sampler = Sampler(self.sde, "ancestral", prediction="v_prediction", check_finite=True)
        for seed in tqdm(seeds, desc="samples", disable=not progress, leave=False):
            start = sampler.start(tuple(base.shape), seed=seed, like=base)
            drawn = sampler.sample(
                lambda x, time: self.evaluate(x, time, known), start, seed=seed, steps=self.settings["sampling_steps"]
            )
            activity = self.conditioning.scaling.inverse(base + self.settings["spread"] * drawn)
            yield activity[0, 0].clamp_min(0).numpy()

    def choose(self, validation: Sequence[Study], fitted: Fitted, seed: int, progress: bool) -> None:
        candidates = Candidates(self.task, validation)
        seeds = [seed * 1000 + k for k in range(self.settings["validation_samples"])]
        for seconds in self.task.input_seconds:
            for study in validation:
                image = study.exposures[seconds]
                mean, _ = self.moments(image, study.spacing, seconds, study.ct, seeds, progress)
                for weight in (0.0, *weights(seconds, self.task.target_seconds)):
                    candidates.add(f"weight {weight:g}", study, seconds, weight * image + (1 - weight) * mean)
            best = candidates.best(seconds)
            fitted.choices.setdefault("weight", {})[str(seconds)] = float(best.removeprefix("weight "))
            self.cap(seconds, fitted)
        fitted.scores = candidates.scores()
