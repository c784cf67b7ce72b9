# SPDX-License-Identifier: Apache-2.0
"""Defines a restoration method as the pipeline sees it: fitted on study folders, then handed one PET after
another."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from medaccel.data.files import atomic_path
from medaccel.restoration.evaluation.metrics import check_seconds, check_spacing
from medaccel.restoration.settings import MethodSettings
from medaccel.studies.typed import UnfitError, settings_class

FORMAT = 1  # version of a method's checkpoint


@dataclass(frozen=True)
class RestorationTask:
    """Names the exposures to restore from and the one to predict.

    Args:
        input_seconds: exposures to restore from, s; the first is the primary one.
        target_seconds: the exposure to predict, s.

    Raises:
        ValueError: there is no input exposure, or one is not shorter than the target.
    """

    input_seconds: tuple[int, ...] = (60,)
    target_seconds: int = 90

    def __post_init__(self) -> None:
        if not self.input_seconds:
            raise ValueError("input_seconds is empty; expected at least one exposure in s")
        for seconds in self.input_seconds:
            check_seconds(seconds, self.target_seconds)


@dataclass(frozen=True, eq=False)
class RestorationRequest:
    """Describes one PET to restore, and how to restore it.

    Args:
        volume: (i, j, k), SUV, float32.
        spacing: voxel size, mm.
        seconds: its exposure; None: the task's primary one.
        ct: HU on the same grid, for the methods that use it.
        samples: how many to draw, for the methods that draw; None: the setting.
        keep_samples: return the samples too, not only their mean and deviation.
        seed: seed of the samples.
        progress: show a progress bar.
    """

    volume: np.ndarray
    spacing: Sequence[float]
    seconds: int | None = None
    ct: np.ndarray | None = None
    samples: int | None = None
    keep_samples: bool = False
    seed: int = 0
    progress: bool = False


@dataclass(frozen=True)
class Restoration:
    """Holds a method's restoration of one PET; arrays (i, j, k) in SUV, float32.

    Args:
        volume: the prediction of the target exposure.
        activity: the activity λ, if the method predicts it: volume = weight·PET_t + (1 − weight)·λ.
        weight: weight of the PET in that blend; t/T has the least squared error.
        std: standard deviation of the activity's samples, if the method draws any.
        samples: (K, i, j, k), the activity's samples, if they were asked for.
    """

    volume: np.ndarray
    activity: np.ndarray | None = None
    weight: float = 0.0
    std: np.ndarray | None = None
    samples: np.ndarray | None = None


@dataclass
class Fitted:
    """Holds the results of a fit, for the report and for config.yaml.

    Args:
        choices: plain JSON values, chosen on the validation studies: a strength, t0, a blend's weight.
        scores: mean MSE and 1 − SSIM score (%) on the validation studies, by candidate, named for readers.
        losses: one value per epoch, by name, such as {"training": …, "validation": …}.
        seconds: duration of the fit, which had `steps` optimizer steps of `seconds_per_step`.
        parameters: further plain values for the report, such as σ in mm.
    """

    choices: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    parameters: dict[str, Any] = field(default_factory=dict)


class Method(abc.ABC):
    """Restores PETs in one particular way.

    A method is made for a `RestorationTask`, fitted once, stored in one file, and restores from then on. It sees
    studies as folders (`medaccel.restoration.study`), so that it decides what it keeps in memory.

    Args:
        task: the exposures to restore from and to predict.
        settings: the method's settings, plain JSON values; unknown ones are refused.
    """

    name: ClassVar[str]
    #: The method's settings have these names, types, defaults and meanings.
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    #: These are the defaults, plain. A subclass without `Settings` may set them here; the settings then have their
    #: types.
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: Settings in configs and checkpoints of earlier versions have these names; the values are today's names.
    renamed: ClassVar[Mapping[str, str]] = {}
    samples: ClassVar[bool] = False  # True if `restore` can draw several
    any_exposure: ClassVar[bool] = False  # True if `seconds` accepts exposures that the method wasn't fitted on
    distributed: ClassVar[bool] = False  # True if all processes of `torchrun` fit together

    def __init__(self, task: RestorationTask, settings: Mapping[str, Any] | None = None) -> None:
        self.task = task
        try:
            self.settings: dict[str, Any] = self.Settings.read(settings or {}).whole()
        except UnfitError as unfit:
            raise unfit.within(self.name, self.Settings.separator) from None
        self.fitted = Fitted()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "defaults" in vars(cls) and "Settings" not in vars(cls):
            cls.Settings = settings_class(f"{cls.__name__}Settings", cls.defaults, MethodSettings)
        cls.defaults, cls.renamed = cls.Settings.defaults(), cls.Settings.renamed

    @abc.abstractmethod
    def fit(
        self,
        studies: Sequence[Path],
        validation: Sequence[Path],
        *,
        folder: Path,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Fits to study folders with all exposures of the task, and makes the method's choices.

        Args:
            studies: the studies to fit to.
            validation: the studies to choose on, never those that the method is scored on. If empty, nothing is
                chosen and the defaults stand.
            folder: holds logs, and the files that an interrupted fit continues from.
            seed: seed of all randomness.
            progress: show a progress bar.

        Raises:
            ValueError: the studies can't be fitted to; a loss isn't finite.
            FileNotFoundError: a study lacks an exposure of the task.
        """

    @abc.abstractmethod
    def restore(self, request: RestorationRequest) -> Restoration:
        """Restores one PET.

        Raises:
            ValueError: the volume is no SUV (`check_volume`), or its exposure is none of the task's.
        """

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Returns tensors and plain values that `load_state` needs."""

    @abc.abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state`."""

    def at(self, seconds: int) -> Method | None:
        """Returns the method for an exposure that it may not have been fitted on; None if it can't restore it."""
        try:
            self.seconds(seconds)
        except ValueError:
            return None
        return self

    def save(self, path: Path) -> None:
        """Stores the fitted method, atomically."""
        content = {
            "format": FORMAT,
            "method": self.name,
            "input_seconds": list(self.task.input_seconds),
            "target_seconds": self.task.target_seconds,
            "settings": self.settings,
            "fitted": vars(self.fitted),
            "state": self.state(),
        }
        with atomic_path(path, force=True) as temporary:
            torch.save(content, temporary)

    def seconds(self, seconds: int | None) -> int:
        """Returns the exposure that a request names, or the primary one; refuses one that the task doesn't have."""
        chosen = self.task.input_seconds[0] if seconds is None else seconds
        if chosen not in self.task.input_seconds:
            raise ValueError(
                f"{self.name}: seconds is {chosen}; expected one of {', '.join(map(str, self.task.input_seconds))}, "
                "which the method was fitted to"
            )
        return chosen


def check_volume(name: str, volume: np.ndarray, spacing: Sequence[float]) -> None:
    """Raises ValueError unless `volume` is a 3-D float array of finite SUV that can be restored."""
    check_spacing((float(spacing[0]), float(spacing[1]), float(spacing[2])))
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise ValueError(f"{name}: volume has shape {volume.shape}; expected three axes of at least two voxels")
    bad = int(np.count_nonzero(~np.isfinite(volume)))
    if bad:
        raise ValueError(f"{name}: volume has {bad} voxels that are NaN or infinite; expected SUV")
    if volume.min() < 0:
        raise ValueError(f"{name}: volume has a least value of {volume.min():g}; expected SUV >= 0")
    if not volume.any():
        raise ValueError(f"{name}: volume is zero everywhere; expected SUV")
