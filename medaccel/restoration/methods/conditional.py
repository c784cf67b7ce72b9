# SPDX-License-Identifier: Apache-2.0
"""Implements `diffusion_conditional`: samples of the activity given the PET, its smoothed copies, the exposure and
perhaps a CT.

The residual of the scaled activity to the smoothed PET is diffused, in units of its own spread, so that the
schedule's noise ends above every structure in it. The mean of the samples estimates E[λ | PET_t], and their spread
its uncertainty; the calibration of that spread is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medaccel.diffusion.samplers import Sampler
from medaccel.restoration.methods.base import Fitted, RestorationRequest
from medaccel.restoration.methods.diffusion import DiffusionMethod
from medaccel.restoration.methods.networks.method import Candidates, as_batch, weights
from medaccel.restoration.methods.networks.nets import Conditioning
from medaccel.restoration.settings import ConditionalSettings
from medaccel.restoration.study import PETStudy


class DiffusionConditional(DiffusionMethod):
    """Diffuses the residual to the smoothed PET; see the module."""

    name = "diffusion_conditional"
    Settings = ConditionalSettings

    @cached_property
    def conditioning(self) -> Conditioning:
        """Returns the network's inputs from the PET, the exposure and the CT."""
        return Conditioning(self.settings["scaling"], self.settings["use_ct"], self.settings["base"])

    @property
    def inputs(self) -> int:
        return self.conditioning.channels

    def clean(self, batch: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
        ct = batch["ct"] if self.settings["use_ct"] else None
        known, base = self.conditioning(batch["input"], batch["spacing"], batch["seconds"], ct, batch["denoised"])
        residual = self.conditioning.scaling.forward(batch["noise_free"]) - base
        return residual / self.settings["spread"], [known]

    @torch.no_grad()
    def draw(self, request: RestorationRequest, seeds: Sequence[int]) -> Iterator[np.ndarray]:
        from tqdm import tqdm

        around = request.ct if self.settings["use_ct"] else None
        known, base = self.conditioning(
            *as_batch(request.volume, request.spacing, self.seconds(request.seconds), around, self.settings["base"])
        )
        sampler = Sampler(self.sde, "ancestral", prediction="v_prediction", check_finite=True)
        for seed in tqdm(seeds, desc="samples", disable=not request.progress, leave=False):
            start = sampler.start(tuple(base.shape), seed=seed, like=base)
            drawn = sampler.sample(
                lambda x, time: self.evaluate(x, time, known), start, seed=seed, steps=self.settings["sampling_steps"]
            )
            activity = self.conditioning.scaling.inverse(base + self.settings["spread"] * drawn)
            yield activity[0, 0].clamp_min(0).numpy()

    def choose(self, validation: Sequence[PETStudy], fitted: Fitted, seed: int, progress: bool) -> None:
        candidates = Candidates(self.task, validation)
        seeds = [seed * 1000 + k for k in range(self.settings["validation_samples"])]
        for seconds in self.task.input_seconds:
            for study in validation:
                image = study.exposures[seconds]
                request = RestorationRequest(image, study.spacing, seconds, study.ct, progress=progress)
                mean, _ = self.moments(request, seeds)
                for weight in (0.0, *weights(seconds, self.task.target_seconds)):
                    candidates.add(f"weight {weight:g}", study, seconds, weight * image + (1 - weight) * mean)
            best = candidates.best(seconds)
            fitted.choices.setdefault("weight", {})[str(seconds)] = float(best.removeprefix("weight "))
            self.cap(seconds, fitted)
        fitted.scores = candidates.scores()
