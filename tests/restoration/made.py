# SPDX-License-Identifier: Apache-2.0
"""Methods that tests can look into, and PETs and checkpoints for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import nibabel
import numpy as np
import torch
from scipy import ndimage

from medaccel.data import make_nifti, save_nifti
from medaccel.restoration.apply import TRAINING_RANGE
from medaccel.restoration.evaluation.training_range import TrainingRange, noise_level
from medaccel.restoration.methods.base import Method, Restoration, RestorationRequest, RestorationTask

SPACING = (4.0, 4.0, 3.0)
AFFINE = np.array([[-4.0, 0, 0, 50], [0, 4, 0, -60], [0, 0, 3, 7], [0, 0, 0, 1]])


class Smoother(Method):
    """Takes a share of a Gaussian's result; what it was handed can be looked at."""

    name: ClassVar[str] = "smoother"
    defaults: ClassVar[Mapping[str, Any]] = {"sigma": 1.0}
    handed: ClassVar[dict[str, Any]] = {}

    def fit(self, studies: Sequence[Path], validation: Sequence[Path], **options: Any) -> None:
        raise NotImplementedError("these tests only load it")

    def restore(self, request: RestorationRequest) -> Restoration:
        self.handed.clear()
        self.handed.update(vars(request))
        return Restoration(ndimage.gaussian_filter(request.volume, self.settings["sigma"]))

    def state(self) -> dict[str, Any]:
        return {"weight": torch.ones(2)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state["weight"].shape != (2,):
            raise RuntimeError("size mismatch for weight")


class Drawer(Smoother):
    """A method that draws; its std is of the activity."""

    name: ClassVar[str] = "drawer"
    samples: ClassVar[bool] = True

    def restore(self, request: RestorationRequest) -> Restoration:
        mean = super().restore(request).volume
        noise = np.random.default_rng(request.seed).random(request.volume.shape).astype(np.float32)
        return Restoration(mean, activity=mean, weight=self.seconds(request.seconds) / 90, std=noise)


class Broken(Smoother):
    name: ClassVar[str] = "broken"

    def restore(self, request: RestorationRequest) -> Restoration:
        return Restoration(np.full_like(request.volume, np.nan))


def body(seed: int = 0, shape: tuple[int, int, int] = (24, 22, 20)) -> np.ndarray:
    """Makes a warm block in air, with noise."""
    volume = np.zeros(shape, dtype=np.float32)
    volume[4:-4, 4:-4, :] = 2
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (volume * (1 + 0.1 * noise)).clip(0).astype(np.float32)


def checkpoint(folder: Path, kind: type[Method] = Smoother, *, told: bool = True) -> Path:
    method = kind(RestorationTask((60, 30), 90))
    if told:
        level = noise_level(body(), SPACING)
        method.fitted.parameters[TRAINING_RANGE] = TrainingRange((60, 30), SPACING, SPACING, level, level).plain()
    path = folder / f"{kind.name}.pt"
    method.save(path)
    return path


def nifti(path: Path, values: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Path:
    save_nifti(path, make_nifti(body() if values is None else values, affine))
    return path


def values(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)
