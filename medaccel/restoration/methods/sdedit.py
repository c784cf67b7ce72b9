# SPDX-License-Identifier: Apache-2.0
"""Implements `diffusion_sdedit`: a prior over noise-free PETs that never saw a noisy one, guided by the PET to
restore.

In SDEdit (Meng et al., ICLR 2022), enough noise is added to the guide to drown its own, and the diffusion removes
both. The paper's t0 for photographs, 400–500 of 1000, erases lesions; it is searched here from small values upward,
starting where the added noise is a fraction of the guide's. Samples are averaged in SUV and, where that is better on
validation, blended with the PET as (t·PET_t + (T − t)·λ̂)/T.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medaccel.diffusion import SDEdit
from medaccel.ops import gaussian_filter
from medaccel.restoration.methods.base import Fitted, RestorationRequest, RestorationTask
from medaccel.restoration.methods.diffusion import DiffusionMethod
from medaccel.restoration.methods.networks.method import Candidates
from medaccel.restoration.methods.networks.scaling import scaling
from medaccel.restoration.settings import SDEditSettings
from medaccel.restoration.study import PETStudy

_SMOOTH = 1.0  # voxels
_LARGEST = 4.0  # standard deviations of the noise


def _weights(seconds: int, target_seconds: int) -> list[float]:
    """Returns the weights of PET_t to try: none, t/T, and more on the way to 1, for a prior that deserves less."""
    share = seconds / target_seconds
    return [0.0, *(round(share + k / 6 * (1 - share), 4) for k in range(6))]


class _NoiseShown(nn.Module):
    """Shows a network, beside x, the difference to its smoothed copy in units of the level's noise; the network adds
    to that.

    Where the volume is smooth, that difference is the noise itself, and v is mostly noise at the low levels that
    SDEdit visits. Without it the noise is a hundredth of x's variance there, and hundreds of steps are spent on
    finding it.
    """

    def __init__(self, network: nn.Module, sigmas: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("sigmas", torch.tensor(sigmas), persistent=False)
        self.sigmas: Tensor

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Maps x (B, 1, i, j, k) at the levels `time` (B,) to the network's output."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            smooth = gaussian_filter(x, _SMOOTH, mode="nearest", normalize=True)
            lacking = (x - smooth) / self.sigmas[time.long()].reshape(-1, 1, 1, 1, 1)
            # An organ's edge is no noise, however many times it exceeds it.
            shown = _LARGEST * torch.tanh(lacking / _LARGEST)
        return shown + self.network(torch.cat([x, shown], dim=1), time).float()


class DiffusionSDEdit(DiffusionMethod):
    """Applies SDEdit to the PET, over several levels; see the module."""

    name = "diffusion_sdedit"
    Settings = SDEditSettings

    def __init__(self, task: RestorationTask, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, settings)
        self.levels = int(self.settings["levels"])
        tried = list(self.settings["t0"])
        if not tried or tried != sorted(set(tried)) or tried[0] < 1 or tried[-1] > self.levels:
            raise ValueError(f"{self.name}: t0 is {tried}; expected increasing levels from 1 to {self.levels}")

    @property
    def inputs(self) -> int:
        return 1

    def build(self) -> nn.Module:
        return _NoiseShown(super().build(), [self.sde.level(i).sigma for i in range(len(self.sde))])

    def clean(self, batch: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
        return scaling(self.settings["scaling"]).forward(batch["noise_free"]), []

    def draw(self, request: RestorationRequest, seeds: Sequence[int], t0: int | None = None) -> Iterator[np.ndarray]:
        if t0 is None:
            middle = self.settings["t0"][len(self.settings["t0"]) // 2]
            t0 = int(self.fitted.choices.get("t0", {}).get(str(self.seconds(request.seconds)), middle))
        scale = scaling(self.settings["scaling"])
        guide = scale.forward(torch.from_numpy(np.ascontiguousarray(request.volume, dtype=np.float32))[None, None])
        steps = min(t0, self.settings["sampling_steps"])
        edit = SDEdit(self.evaluate, self.sde, t0, steps, prediction="v_prediction", check_finite=True)
        for seed in seeds:
            drawn = edit(guide, seeds=[seed], progress=request.progress).samples[0, 0, 0]
            yield scale.inverse(drawn).clamp_min(0).numpy()

    def choose(self, validation: Sequence[PETStudy], fitted: Fitted, seed: int, progress: bool) -> None:
        candidates = Candidates(self.task, validation)
        seeds = [seed * 1000 + k for k in range(self.settings["validation_samples"])]
        for seconds in self.task.input_seconds:
            best, worse = "", 0
            for t0 in self.settings["t0"]:
                for study in validation:
                    image = study.exposures[seconds]
                    request = RestorationRequest(image, study.spacing, seconds, study.ct, progress=progress)
                    mean, _ = self.moments(request, seeds, t0=t0)
                    for weight in _weights(seconds, self.task.target_seconds):
                        name = f"t0 {t0}, weight {weight:g}"
                        candidates.add(name, study, seconds, weight * image + (1 - weight) * mean)
                before, best = best, candidates.best(seconds)
                worse = 0 if best != before else worse + 1
                if worse == 2:
                    break
            level, share = best.removeprefix("t0 ").split(", weight ")
            fitted.choices.setdefault("t0", {})[str(seconds)] = int(level)
            fitted.choices.setdefault("weight", {})[str(seconds)] = float(share)
            self.cap(seconds, fitted)
        fitted.scores = candidates.scores()
