# SPDX-License-Identifier: Apache-2.0
"""Implements `unet`: one network for many scanners and exposures, which is told the noise that it takes away.

The noise is measured in the image itself (`root_noise`), so that exposure, dose and unit play no part in what the
network predicts, the activity λ. The exposure t enters the blend E[PET_T | PET_t] = (t·PET_t + (T − t)·λ)/T alone.
Training is on varied studies (`medaccel.restoration.simulation.varied`), which are made once and kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.training_range import TrainingRange, noise_level, root_noise
from medaccel.restoration.methods import load_method
from medaccel.restoration.methods.base import Fitted, Method, Restoration, RestorationRequest, check_volume
from medaccel.restoration.methods.networks.method import body_box, choose_weight, device_of
from medaccel.restoration.methods.networks.study_patches import StudyPatches
from medaccel.restoration.methods.networks.unet import RestorationUNet
from medaccel.restoration.methods.networks.varied_patches import VariedPatches
from medaccel.restoration.settings import UNetSettings
from medaccel.restoration.simulation.varied import write_varied
from medaccel.restoration.study import PETStudy, load_study
from medaccel.studies.digest import file_sha256
from medaccel.studies.tables import write_csv
from medaccel.training import ranks
from medaccel.training.fit import NetworkFit, train
from medaccel.weights import find

LEAST_SECONDS = 5  # shorter exposures were never trained on
_HALO = 24  # voxels that a slab sees of its neighbours
_SLAB = 64
_WEIGHT_WINDOW, _WEIGHT_FLOOR = 5, 0.05  # voxels, SUV
_MEASURED_STUDIES = 48  # varied studies whose noise level is measured for the training range
# These play no part in training: changing them must not make it another training.
_NOT_TRAINED = ("varied_folder", "flips", "weights")


class UNetFit(NetworkFit):
    """Trains a `RestorationUNet`: the loss is the share of the input's squared error that it leaves.

    A voxel's error is divided by a power of its noise's variance, `evenness` (0: hot organs, whose noise is the
    largest, make the most of it; 1: all voxels alike). The weights are a function of the input alone, so whatever
    the power, the expected activity has the least loss.
    """

    def losses(self, batch: Mapping[str, Any], index: int) -> dict[str, Tensor]:
        volume, truth, mask = batch["input"], batch["noise_free"], batch["mask"]
        predicted = self.network(volume, batch["noise"], batch["spacing"]).float()
        with torch.no_grad():
            smooth = F.avg_pool3d(F.pad(volume, (_WEIGHT_WINDOW // 2,) * 6, mode="replicate"), _WEIGHT_WINDOW, 1)
            # The noise's standard deviation grows with about the 3/4th power of the activity.
            weight = mask * (smooth + _WEIGHT_FLOOR) ** (-1.5 * self.settings["evenness"])
            before = (weight * (volume - truth).square()).flatten(1).sum(1)
        left = (weight * (predicted - truth).square()).flatten(1).sum(1) / before.clamp_min(1e-6)
        return {"loss": left.mean()}


class _Validation(lightning.Callback):
    """Writes the averaged weights' share of the limit on the validation studies into a CSV file, every so many
    steps."""

    def __init__(self, method: UNetMethod, studies: Sequence[PETStudy], file: Path) -> None:
        self.method, self.studies, self.file = method, studies, file
        self.rows: list[list[float]] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        every = self.method.settings["validate_steps"]
        if ranks.rank() or not self.studies or not every or trainer.global_step % every:
            return
        callbacks: list[Any] = trainer.callbacks
        averages = [getattr(c, "_average_model", None) for c in callbacks]
        averaged = next((a.module for a in averages if a is not None), pl_module)
        shares = self.method.shares(averaged.network, self.studies)
        self.rows.append([trainer.global_step, *(round(100 * share, 2) for share in shares)])
        columns = ["step", *(f"share_{t}s" for t in self.method.task.input_seconds)]
        write_csv(self.file, [dict(zip(columns, row, strict=True)) for row in self.rows], columns)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [list(row) for row in state_dict["rows"]]


class UNetMethod(Method):
    """Restores with a `RestorationUNet`; see the module."""

    name = "unet"
    Settings = UNetSettings
    any_exposure = True
    distributed = True

    def __init__(self, task: Any, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, settings)
        s = self.settings
        if s["steps"] % s["steps_per_epoch"]:
            raise ValueError(
                f"{self.name}: steps is {s['steps']}; expected a multiple of steps_per_epoch, {s['steps_per_epoch']}"
            )
        if len(s["channels"]) != len(s["blocks"]) or not s["channels"]:
            raise ValueError(
                f"{self.name}: channels is {list(s['channels'])} and blocks {list(s['blocks'])}; expected one number "
                "of each for every level"
            )
        self.network = self._build()
        multiple = self.network.multiple
        if len(s["roi_size"]) != 3 or any(n < multiple or n % multiple for n in s["roi_size"]):
            raise ValueError(
                f"{self.name}: roi_size is {list(s['roi_size'])}; expected three multiples of {multiple}"
            )

    def _build(self) -> RestorationUNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = RestorationUNet(self.settings["channels"], self.settings["blocks"])
        return network.to(memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload]

    def fit(
        self,
        studies: Sequence[Path],
        validation: Sequence[Path],
        *,
        folder: Path,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        exposures = (*self.task.input_seconds, self.task.target_seconds)
        chosen = [load_study(path, exposures) for path in validation[: self.settings["validation_studies"]]]
        if self.settings["weights"]:
            self._take(self.settings["weights"])
        else:
            self._train(folder, chosen, seed, progress)
        if ranks.rank() == 0 and chosen:
            choose_weight(
                self.task,
                chosen,
                self.fitted,
                lambda study, seconds: self.predict(study.exposures[seconds], study.spacing),
            )

    def _take(self, weights: str) -> None:
        """Takes over trained weights, with the settings of their network."""
        path = find(weights)
        trained = load_method(path, self.name)
        assert isinstance(trained, UNetMethod)
        own = {key: self.settings[key] for key in ("weights", "validation_studies", "flips", "accelerator")}
        self.settings = trained.settings | own
        self.network = trained.network
        self.fitted = Fitted(parameters=trained.fitted.parameters | {"weights_sha256": file_sha256(path)})

    def _train(self, folder: Path, validation: Sequence[PETStudy], seed: int, progress: bool) -> None:
        s = self.settings
        cache = Path(s["varied_folder"]) if s["varied_folder"] else folder / "varied"
        seeds = range(s["varied_studies"])
        files = list(tqdm(write_varied(cache, seeds), desc="varied studies", total=len(seeds), disable=not progress))
        patches = VariedPatches(files, s["roi_size"], seed)
        self.network = self._build()
        folder.mkdir(parents=True, exist_ok=True)
        losses, seconds, seconds_per_step = train(
            UNetFit(self.network, {k: v for k, v in s.items() if k not in _NOT_TRAINED}),
            patches,
            folder,
            seed=seed,
            progress=progress,
            callbacks=[_Validation(self, validation, folder / "validation.csv")],
        )
        self.network = self.network.cpu().eval()
        self.fitted = Fitted(losses=losses, seconds=seconds)
        self.fitted.parameters = {
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "steps": s["steps"],
            "seconds_per_step": seconds_per_step,
            "trained_on": len(files),
            "training_range": _range_of(files, patches.records).plain(),
        }

    def finetune(
        self,
        studies: Sequence[Path],
        *,
        folder: Path,
        nested: bool = True,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Trains the present weights further on measured studies, see `StudyPatches`.

        Args:
            studies: study folders with all exposures of the task.
            folder: holds logs, and the files that an interrupted training continues from.
            nested: the shorter exposures' events are a part of the longer one's.
            seed: seed of all randomness.
            progress: show a progress bar.

        Raises:
            ValueError: a study is damaged or shows no body; a loss isn't finite.
        """
        patches = StudyPatches(studies, self.task, self.settings["roi_size"], nested=nested, seed=seed)
        settings = {k: v for k, v in self.settings.items() if k not in _NOT_TRAINED}
        losses, seconds, _ = train(UNetFit(self.network, settings), patches, folder, seed=seed, progress=progress)
        self.network = self.network.cpu().eval()
        self.fitted.losses, self.fitted.seconds = losses, seconds
        self.fitted.parameters["finetuned_on"] = len(studies)

    def shares(self, network: nn.Module, studies: Sequence[PETStudy]) -> list[float]:
        """Returns, for each exposure, the mean share of the input's squared error that the network takes away."""
        found = []
        for seconds in self.task.input_seconds:
            shares = []
            for study in studies:
                truth = study.noise_free
                if truth is None:
                    continue
                mask = metrics.body_mask(truth, study.spacing)
                image = study.exposures[seconds]
                predicted = self.predict(image, study.spacing, network, flips=1)
                shares.append(1 - metrics.mse(predicted, truth, mask) / metrics.mse(image, truth, mask))
            found.append(float(np.mean(shares)) if shares else math.nan)
        return found

    @torch.no_grad()
    def predict(
        self, volume: np.ndarray, spacing: Sequence[float], network: nn.Module | None = None, flips: int | None = None
    ) -> np.ndarray:
        """Predicts the activity of one PET, SUV; the air far from the body stays as it is.

        Args:
            volume: (i, j, k), SUV.
            spacing: mm.
            network: another network than the method's own, on its device.
            flips: images that are averaged, 1 or 2; None: the setting.
        """
        if network is None:
            network = self.network.to(device_of(self.settings))
        device = next(network.parameters()).device
        noise = torch.tensor([root_noise(volume, spacing)], dtype=torch.float32, device=device)
        steps = torch.tensor([[float(s) for s in spacing]], dtype=torch.float32, device=device)
        box = body_box(volume, spacing)
        image = torch.from_numpy(np.ascontiguousarray(volume[box], dtype=np.float32))[None, None]
        sides = image.shape[2:]
        padding = [n for side in reversed(sides) for n in (0, -side % self.network.multiple)]
        image = F.pad(image, padding, mode="replicate")
        result = torch.empty_like(image)
        twice = (self.settings["flips"] if flips is None else flips) == 2
        slices = image.shape[4]
        for start in range(0, slices, _SLAB):
            low, high = max(start - _HALO, 0), min(start + _SLAB + _HALO, slices)
            slab = image[..., low:high].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=_fast_bfloat16(device)):
                predicted = network(slab, noise, steps).float()
                if twice:
                    mirrored = network(slab.flip(2, 3, 4), noise, steps).float().flip(2, 3, 4)
                    predicted = (predicted + mirrored) / 2
            stop = min(start + _SLAB, slices)
            result[..., start:stop] = predicted[..., start - low : stop - low].cpu()
        restored = volume.astype(np.float32)
        restored[box] = result[0, 0, : sides[0], : sides[1], : sides[2]].numpy()
        return restored

    def restore(self, request: RestorationRequest) -> Restoration:
        volume = request.volume
        check_volume(self.name, volume, request.spacing)
        t = self.seconds(request.seconds)
        predicted = self.predict(volume, request.spacing)
        weight = np.float32(self._weight(t))
        return Restoration(weight * volume + (1 - weight) * predicted, activity=predicted, weight=float(weight))

    def seconds(self, seconds: int | None) -> int:
        """Returns the exposure that a request names, or the primary one; any from 5 s to below the target will do."""
        chosen = self.task.input_seconds[0] if seconds is None else seconds
        if not LEAST_SECONDS <= chosen < self.task.target_seconds:
            raise ValueError(
                f"{self.name}: seconds is {chosen}; expected {LEAST_SECONDS} or more, and fewer than "
                f"{self.task.target_seconds}, the exposure to predict"
            )
        return chosen

    def _weight(self, seconds: int) -> float:
        """Returns the PET's weight in the blend: t/T and what the nearest exposure's choice has beyond that."""
        chosen = self.fitted.choices.get("weight", {})
        share = seconds / self.task.target_seconds
        if not chosen:
            return share
        nearest = min(chosen, key=lambda t: abs(int(t) - seconds))
        return min(share + float(chosen[nearest]) - int(nearest) / self.task.target_seconds, 1.0)

    def state(self) -> dict[str, Any]:
        return {"network": self.network.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])  # files of weights hold half precision; this widens them
        self.network.eval()


def _range_of(files: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> TrainingRange:
    """Measures the range of varied studies, the noise on the first few of them."""
    spacings = np.array([record["spacing"] for record in records])
    seconds = sorted({int(t) for record in records for t in record["seconds"]})
    levels = []
    for file, record in list(zip(files, records, strict=True))[:_MEASURED_STUDIES]:
        images = np.load(file, mmap_mode="r")
        levels += [
            noise_level(np.asarray(image, dtype=np.float32), record["spacing"])
            for image in images[1 : 1 + len(record["seconds"])]
        ]
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    return TrainingRange(
        tuple(seconds),
        (float(low[0]), float(low[1]), float(low[2])),
        (float(high[0]), float(high[1]), float(high[2])),
        min(levels),
        max(levels),
    )


def _fast_bfloat16(device: torch.device) -> bool:
    """Tells whether the processor multiplies 16-bit floats in hardware; elsewhere they are emulated, slowly."""
    if device.type != "cpu":
        return True
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())
