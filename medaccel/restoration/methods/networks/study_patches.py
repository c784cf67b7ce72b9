# SPDX-License-Identifier: Apache-2.0
"""Cuts random training patches from a handful of measured studies, for fine-tuning without noise-free images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medaccel.restoration.evaluation.metrics import Array, body_mask
from medaccel.restoration.evaluation.training_range import root_noise
from medaccel.restoration.methods.base import RestorationTask
from medaccel.restoration.methods.networks.varied_patches import flipped, patch_of
from medaccel.restoration.study import PETStudy, load_study


class StudyPatches(torch.utils.data.Dataset):
    """Yields endless numbered patches of studies that stay in memory; item n depends on (seed, n) alone.

    Without a noise-free image the reference is one whose noise is independent of the input's, so that the loss has
    its minimum at the activity (Noise2Noise, Lehtinen et al. 2018): of nested exposures (T·PET_T − t·PET_t)/(T − t),
    the scan without its first t seconds, else PET_T itself.

    Args:
        studies: folders.
        task: the exposures.
        roi_size: voxels along each axis.
        nested: the shorter exposures' events are a part of the longer one's, as in list-mode rebins.
        seed: together with an item's number, it seeds all randomness of the item.
    """

    def __init__(
        self,
        studies: Sequence[Path],
        task: RestorationTask,
        roi_size: Sequence[int],
        *,
        nested: bool = True,
        seed: int = 0,
    ) -> None:
        self.task, self.roi_size, self.nested, self.seed = task, tuple(roi_size), nested, seed
        self.prepared = [self._prepare(path) for path in studies]

    def __len__(self) -> int:
        return 1 << 62  # the dataset is endless

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        study, body, centres, noises = self.prepared[int(rng.integers(len(self.prepared)))]
        seconds = int(rng.choice(self.task.input_seconds))
        image = study.exposures[seconds]
        centre = centres[int(rng.integers(len(centres)))]
        where = tuple(
            slice(start := int(np.clip(c - side // 2, 0, max(n - side, 0))), min(start + side, n))
            for c, side, n in zip(centre, self.roi_size, image.shape, strict=True)
        )
        stack = patch_of([image[where], self._reference(study, seconds, where)], body[where], self.roi_size)
        tensors = torch.from_numpy(flipped(stack, rng))
        return {
            "input": tensors[:1],
            "noise_free": tensors[1:2],
            "mask": tensors[2:],
            "noise": torch.tensor(noises[seconds], dtype=torch.float32),
            "spacing": torch.tensor(study.spacing, dtype=torch.float32),
        }

    def _prepare(self, path: Path) -> tuple[PETStudy, Array, Array, dict[int, float]]:
        study = load_study(path, (*self.task.input_seconds, self.task.target_seconds))
        body = body_mask(study.exposures[self.task.target_seconds], study.spacing)
        if not body.any():
            raise ValueError(f"{path}: no body was found in the {self.task.target_seconds} s image")
        noises = {t: root_noise(study.exposures[t], study.spacing) for t in self.task.input_seconds}
        return study, body, np.argwhere(body), noises

    def _reference(self, study: PETStudy, seconds: int, where: tuple[slice, ...]) -> Array:
        if study.noise_free is not None:
            return study.noise_free[where]
        longest = self.task.target_seconds
        target = study.exposures[longest][where]
        if not self.nested:
            return target
        return (longest * target - seconds * study.exposures[seconds][where]) / np.float32(longest - seconds)
