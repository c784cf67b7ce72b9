# SPDX-License-Identifier: Apache-2.0
"""Holds the parts that the methods with a network share: patches, training that resumes, windows, and a choice on
validation."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.metrics import Array, Mask
from medaccel.restoration.methods.base import Fitted, Method, RestorationTask
from medaccel.restoration.methods.networks.base_image import base_image
from medaccel.restoration.methods.networks.residual import residual_shrinkage
from medaccel.restoration.settings import NetworkSettings
from medaccel.restoration.study import PETStudy, load_study
from medaccel.training import ranks
from medaccel.training.fit import NetworkFit, train
from medaccel.training.memory import place_of_sums

#: The blend with the activity is chosen among these weights of PET_t beyond t/T: SSIM favours a little more noise.
EXTRA_WEIGHTS = (0.0, 0.03, 0.06, 0.09)
_MARGIN = 16.0  # mm
_CT_DROPOUT = 0.2  # share of the patches that are shown without their CT, so that a PET without one is nothing new


class NetworkMethod(Method):
    """Restores with a network."""

    Settings: ClassVar[type[NetworkSettings]] = NetworkSettings
    multiple: ClassVar[int] = 32  # windows must be multiples of this
    least: ClassVar[int] = (
        64  # voxels of a window's longest side: at 32 the last map has one voxel, which has no norm
    )
    distributed = True
    placed = ""  # where the last volume's windows were added up, in words

    def __init__(self, task: RestorationTask, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, settings)
        if self.settings["steps"] % self.settings["steps_per_epoch"]:
            raise ValueError(
                f"{self.name}: steps is {self.settings['steps']}; expected a multiple of steps_per_epoch, "
                f"{self.settings['steps_per_epoch']}"
            )
        roi = self.settings["roi_size"]
        if len(roi) != 3 or max(roi) < self.least or any(n < 1 or n % self.multiple for n in roi):
            raise ValueError(
                f"{self.name}: roi_size is {list(roi)}; expected three multiples of {self.multiple} voxels, one of "
                f"them {self.least} or more"
            )
        with torch.random.fork_rng(devices=[]):  # the weights of an unfitted method are always the same
            torch.manual_seed(0)
            self.network = self.build()
        self.network.eval()

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """Builds the network of these settings, untrained."""

    @abc.abstractmethod
    def module(self) -> NetworkFit:
        """Returns the module that trains `network`."""

    @abc.abstractmethod
    def choose(self, validation: Sequence[PETStudy], fitted: Fitted, seed: int, progress: bool) -> None:
        """Fills `fitted.choices` and `fitted.scores` from the trained network's results on these studies."""

    def fit(
        self,
        studies: Sequence[Path],
        validation: Sequence[Path],
        *,
        folder: Path,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        from medaccel.restoration.methods.networks.patches import Patches

        torch.manual_seed(seed)
        self.network = self.build()
        patches = Patches(
            studies,
            self.task,
            roi_size=self.settings["roi_size"],
            reference=self.settings["reference"],
            use_ct=self.settings["use_ct"],
            base=self.settings["base"],
            ct_dropout=_CT_DROPOUT if self.settings["use_ct"] else 0.0,
            seed=seed,
            cache=self.settings["cache"],
            cache_folder=folder / "cache",
            progress=progress,
        )
        losses, seconds, seconds_per_step = train(self.module(), patches, folder, seed=seed, progress=progress)
        del patches
        self.network = self.network.cpu().eval()
        fitted = Fitted(losses=losses, seconds=seconds)
        fitted.parameters = {
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "steps": self.settings["steps"],
            "seconds_per_step": seconds_per_step,
            "trained_on": len(studies),
        }
        if ranks.rank() == 0 and validation:
            chosen = validation[: self.settings["validation_studies"]]
            exposures = (*self.task.input_seconds, self.task.target_seconds)
            self.choose([load_study(path, exposures) for path in chosen], fitted, seed, progress)
        self.fitted = fitted

    def windows(self, inputs: Tensor, network: nn.Module | Any) -> Tensor:
        """Applies a network to one volume (1, C, i, j, k) of any size, in blended windows, on the method's device.

        The network gives one channel. The result is on the CPU, wherever the windows were added up (`placed`).
        """
        from monai.inferers import sliding_window_inference

        device = self.device()
        self.network.to(device)
        # The sums, what they are divided by, and for a moment a copy of their part within the volume.
        roi = self.settings["roi_size"]
        voxels = math.prod(max(n, r) for n, r in zip(inputs.shape[2:], roi, strict=True))
        place, self.placed = place_of_sums(device, 3 * inputs.element_size() * voxels)
        result = sliding_window_inference(
            inputs,
            tuple(roi),
            self.settings["sw_batch_size"],
            network,
            overlap=self.settings["overlap"],
            mode="gaussian",
            padding_mode="replicate",
            sw_device=device,
            device=place,
        )
        assert isinstance(result, Tensor)
        return result.cpu()

    @property
    def training_settings(self) -> dict[str, Any]:
        """Returns the settings without those that play no part in training: changing these must not make it another
        training."""
        return {key: value for key, value in self.settings.items() if key != "residual_shrinkage"}

    def shrunk_residual_added(self, volume: Array, activity: Array, spacing: Sequence[float]) -> Array:
        """Returns the activity, (i, j, k) SUV, after the residual shrinkage that the settings ask for."""
        threshold = self.settings["residual_shrinkage"]
        if not threshold:
            return activity
        mask = metrics.body_mask(volume, (float(spacing[0]), float(spacing[1]), float(spacing[2])))
        box = body_box(volume, spacing)
        result = activity.copy()
        result[box] = residual_shrinkage(volume[box], activity[box], mask[box], spacing, threshold)
        return result

    def device(self) -> torch.device:
        """Returns the device on which windows are computed: the first GPU, unless the settings keep to the CPU."""
        return device_of(self.settings)

    def state(self) -> dict[str, Any]:
        return {"network": self.network.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.network.eval()


class Candidates:
    """Scores candidate restorations on validation studies, and picks one.

    The criterion is the mean of the MSE score's share of its limit and the 1 − SSIM score's share of its ceiling, so
    that neither is improved at the other's cost; if a study has no noise-free image, the ceiling is unknown and the
    plain 1 − SSIM score stands for it.
    """

    def __init__(self, task: RestorationTask, studies: Sequence[PETStudy]) -> None:
        self.task = task
        self.rows: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        self._scorers = {
            (study.name, seconds): _Scorer(study, seconds, task.target_seconds)
            for study in studies
            for seconds in task.input_seconds
        }

    def add(self, name: str, study: PETStudy, seconds: int, restored: Array) -> None:
        """Adds one candidate's image of one study and exposure."""
        self.rows.setdefault((name, seconds), []).append(self._scorers[study.name, seconds](restored))

    def best(self, seconds: int, among: Sequence[str] | None = None) -> str:
        """Returns the candidate with the highest criterion; the first of equal ones."""
        names = [name for name, s in self.rows if s == seconds and (among is None or name in among)]
        return max(names, key=lambda name: np.mean([row[2] for row in self.rows[name, seconds]]))

    def scores(self) -> dict[str, tuple[float, float]]:
        """Returns the mean MSE and 1 − SSIM score (%) of each candidate."""
        result = {}
        for (name, seconds), rows in self.rows.items():
            mean = np.mean(rows, axis=0)
            result[f"{seconds} s, {name}"] = (float(mean[0]), float(mean[1]))
        return result


class _Scorer:
    """Computes MSE score, 1 − SSIM score and criterion of a restoration of one study."""

    def __init__(self, study: PETStudy, seconds: int, target_seconds: int) -> None:
        self.image, self.target = study.exposures[seconds], study.exposures[target_seconds]
        self.mask: Mask = metrics.body_mask(self.target, study.spacing)
        metrics.check_volumes(self.mask, input=self.image, target=self.target)
        self.before = self._distances(self.image)
        self.limit = 100 * metrics.mse_limit(seconds, target_seconds)
        self.ceiling = 100.0
        if study.noise_free is not None:
            least, _ = metrics.ssim_ceiling(self.image, study.noise_free, self.target, self.mask)
            self.ceiling = max(metrics.score(least, self.before[1]), 1.0)

    def _distances(self, restored: Array) -> tuple[float, float]:
        return (
            metrics.mse(restored, self.target, self.mask),
            metrics.ssim_distance(restored, self.target, self.mask),
        )

    def __call__(self, restored: Array) -> tuple[float, float, float]:
        after = self._distances(restored)
        scores = [metrics.score(new, old) for new, old in zip(after, self.before, strict=True)]
        return scores[0], scores[1], 0.5 * (scores[0] / self.limit + scores[1] / self.ceiling)


def body_box(volume: np.ndarray, spacing: Sequence[float]) -> tuple[slice, slice, slice]:
    """Returns the box of the body and 16 mm of air around it, which is all that a network needs; the whole volume if
    no body is found."""
    steps = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    body = metrics.body_mask(volume, steps)
    if not body.any():
        body = np.ones_like(body)
    where = [np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    margins = [math.ceil(_MARGIN / s) for s in steps]
    i, j, k = (
        slice(max(int(w[0]) - m, 0), min(int(w[-1]) + 1 + m, n))
        for w, m, n in zip(where, margins, volume.shape, strict=True)
    )
    return i, j, k


def device_of(settings: Mapping[str, Any]) -> torch.device:
    """Returns the device of a network: the first GPU, unless its settings keep to the CPU."""
    gpu = torch.cuda.is_available() and settings["accelerator"] != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def choose_weight(
    task: RestorationTask,
    validation: Sequence[PETStudy],
    fitted: Fitted,
    predict: Callable[[PETStudy, int], Array],
) -> None:
    """Chooses the weight of PET_t in its blend with the predicted activity, and notes all candidates' scores.

    Args:
        task: the exposures.
        validation: the studies to choose on.
        fitted: gets the choices and the scores.
        predict: predicts the activity of a study's exposure.
    """
    candidates = Candidates(task, validation)
    for study in validation:
        for seconds in task.input_seconds:
            image, predicted = study.exposures[seconds], predict(study, seconds)
            for weight in weights(seconds, task.target_seconds):
                candidates.add(f"weight {weight:g}", study, seconds, weight * image + (1 - weight) * predicted)
    fitted.scores = candidates.scores()
    fitted.choices = {
        "weight": {str(t): float(candidates.best(t).removeprefix("weight ")) for t in task.input_seconds}
    }


def weights(seconds: int, target_seconds: int) -> Iterator[float]:
    """Yields the weights of PET_t in the blend with the activity; t/T, which has the least MSE, comes first."""
    for extra in EXTRA_WEIGHTS:
        yield round(seconds / target_seconds + extra, 4)


def as_batch(
    volume: np.ndarray, spacing: Sequence[float], seconds: int, ct: np.ndarray | None, base: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Turns one volume into the arguments of `Conditioning`."""
    image = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None, None]
    hu = None if ct is None else torch.from_numpy(np.ascontiguousarray(ct, dtype=np.float32))[None, None]
    denoised = torch.from_numpy(base_image(volume, spacing))[None, None] if base == "nlm" else None
    return (
        image,
        torch.tensor([[float(s) for s in spacing]], dtype=torch.float64),
        torch.tensor([float(seconds)]),
        hu,
        denoised,
    )
