# SPDX-License-Identifier: Apache-2.0
"""Trains a segmentation network on numbered crops of labelled scans with Dice and cross entropy, and validates it.

Crop n of a run is the same whatever the network was initialized with, whatever the number of workers and processes
and whenever it is drawn: its random numbers come from (seed, n) alone. A run that was killed continues with the crops
that it would have had.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import lightning
import numpy as np
import torch
from monai.data import MetaTensor
from monai.losses import DiceLoss
from monai.transforms import (
    Compose,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)
from nibabel.nifti1 import Nifti1Image
from torch import Tensor, nn

from medaccel.data.ct_transforms import canonical, window
from medaccel.data.msd import Case, MSDDataset, load_case
from medaccel.nets import SwinUNETR
from medaccel.segmentation.evaluation.metrics import dice
from medaccel.segmentation.model.inference import predict_labels
from medaccel.training import ranks
from medaccel.training.fit import NetworkFit

# At most so many places of each kind are kept as centres of crops.
_PLACES = 100_000
_T = TypeVar("_T")
_R = TypeVar("_R")


def make_network(settings: Mapping[str, Any], classes: int, seed: int) -> SwinUNETR:
    """Makes a Swin UNETR whose random weights depend on the seed alone; torch's random state stays as it is.

    Args:
        settings: the result of `medaccel.segmentation.model.presets.make_settings`.
        classes: number of classes, background included.
        seed: seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SwinUNETR(in_channels=1, out_channels=classes, feature_size=settings["feature_size"])
    prior, bias = settings["foreground_prior"], network.out.conv.conv.bias
    if prior:
        with torch.no_grad():
            bias.fill_(math.log(prior / (1 - prior)))
            bias[0] = 0.0
    return network


class Crops(torch.utils.data.Dataset):
    """Yields endless numbered crops of labelled cases: {"image": (1, i, j, k) 0 … 1, "label": (1, i, j, k)}, float32.

    Args:
        dataset: the cases' data set.
        cases: the cases to train on.
        settings: the result of `medaccel.segmentation.model.presets.make_settings`; `cache` "memory" reads each case
            once, "none" for each crop.
        seed: together with a crop's number, it seeds all randomness of the crop.
        progress: show a bar while cases are read.

    Raises:
        ValueError: there are no cases, or `load_case` refuses one.
    """

    def __init__(
        self,
        dataset: MSDDataset,
        cases: Sequence[Case],
        settings: Mapping[str, Any],
        *,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        from tqdm import tqdm

        if not cases:
            raise ValueError("no training cases")
        self.dataset, self.cases, self.settings, self.seed = dataset, tuple(cases), settings, seed
        self.loaded: list[dict[str, Any]] = []
        if settings["cache"] == "memory":
            self.loaded = [self._load(case) for case in tqdm(cases, desc="training cases", disable=not progress)]
        self.random = _random_transforms(settings)

    def __len__(self) -> int:
        return 1 << 62  # the dataset is endless

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, index])
        number = int(rng.integers(len(self.cases)))
        item = self.loaded[number] if self.loaded else self._load(self.cases[number])
        self.random.set_random_state(seed=int(rng.integers(2**31)))
        with warnings.catch_warnings():
            # A case without foreground is worth learning from too.
            warnings.filterwarnings("ignore", message="Num foregrounds 0")
            crop: Any = self.random(dict(item))[0]
        return {key: torch.as_tensor(crop[key]).as_subclass(Tensor).float() for key in ("image", "label")}

    def _load(self, case: Case) -> dict[str, Any]:
        scan, label = load_case(self.dataset, case)
        volumes = canonical(scan, self.settings["spacing"], label=label)
        item = {
            "image": window(volumes["image"].as_tensor(), self.settings["window"]),
            "label": volumes["label"].as_tensor().to(torch.uint8),
        }
        padded = SpatialPadd(["image", "label"], self.settings["roi_size"])(item)
        image, truth = (torch.as_tensor(padded[key]).as_subclass(Tensor) for key in ("image", "label"))
        foreground = truth > 0
        body = (image > 0) & ~foreground
        elsewhere = body if bool(body.any()) else ~foreground
        return {"image": image, "label": truth, "foreground": _places(foreground), "elsewhere": _places(elsewhere)}


def _places(mask: Tensor) -> np.ndarray:
    """Returns flat indices of a mask, evenly thinned out if there are more than needed."""
    found = np.flatnonzero(mask.numpy())
    return found[:: len(found) // _PLACES + 1]


def _random_transforms(s: Mapping[str, Any]) -> Compose:
    both = ["image", "label"]
    steps: list[Any] = [
        RandCropByPosNegLabeld(
            both,
            label_key="label",
            spatial_size=s["roi_size"],
            pos=s["positive"],
            neg=s["negative"],
            num_samples=1,
            fg_indices_key="foreground",
            bg_indices_key="elsewhere",
        )
    ]
    steps += [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in s["flip_axes"]]
    if s["rotate90"]:
        steps.append(RandRotate90d(both, prob=0.5, max_k=3, spatial_axes=(0, 1)))
    if s["rotate"] or s["zoom"]:
        steps.append(
            RandAffined(
                both,
                prob=0.5,
                rotate_range=[math.radians(s["rotate"])] * 3,
                scale_range=[s["zoom"]] * 3,
                mode=["bilinear", "nearest"],
                padding_mode="zeros",
            )
        )
    if s["intensity_scale"]:
        steps.append(RandScaleIntensityd("image", factors=s["intensity_scale"], prob=0.5))
    if s["intensity_shift"]:
        steps.append(RandShiftIntensityd("image", offsets=s["intensity_shift"], prob=0.5))
    if s["noise"]:
        steps.append(RandGaussianNoised("image", prob=0.2, std=s["noise"]))
    return Compose(steps)


class SegmentationFit(NetworkFit):
    """Trains a network by Dice plus cross entropy of its softmax: MONAI's `DiceCELoss`, if classes weigh the same.

    Args:
        network: maps (B, 1, i, j, k) to logits (B, classes, i, j, k).
        classes: number of classes, background included.
        settings: the result of `medaccel.segmentation.model.presets.make_settings`; it may have further keys, which
            distinguish trainings.
    """

    def __init__(self, network: nn.Module, classes: int, settings: Mapping[str, Any]) -> None:
        super().__init__(network, settings)
        self.dice = DiceLoss(
            include_background=settings["include_background"],
            to_onehot_y=True,
            softmax=True,
            batch=settings["batch_dice"],
        )
        # `DiceCELoss` would weigh its Dice part too, but not for a single structure.
        weights = [1.0] + [float(settings["foreground_weight"])] * (classes - 1)
        self.cross_entropy = nn.CrossEntropyLoss(torch.tensor(weights))

    def losses(self, batch: Mapping[str, Any], index: int) -> dict[str, Tensor]:
        """Returns "loss" and its parts, "dice" and "cross_entropy", for crops as `Crops` gives them."""
        logits, label = self.network(batch["image"]).float(), batch["label"]
        overlap, entropy = self.dice(logits, label), self.cross_entropy(logits, label[:, 0].long())
        return {"loss": overlap + entropy, "dice": overlap, "cross_entropy": entropy}


def shared_out(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Returns a function's results for each item, each computed by one of torchrun's processes and known to all."""
    own = [function(item) for item in items[ranks.rank() :: ranks.world_size()]]
    if ranks.world_size() == 1:
        return own
    of_ranks: list[Any] = [None] * ranks.world_size()
    torch.distributed.all_gather_object(of_ranks, own)
    return [of_ranks[number % len(of_ranks)][number // len(of_ranks)] for number in range(len(items))]


class Validation(lightning.Callback):
    """Measures the mean foreground Dice on validation cases, on the network's grid, and keeps the weights with the
    best.

    The curve also has the mean training loss since the previous point. All of it is in the checkpoint, for the run
    that resumes. Among equal ones, the earlier weights are kept. Several processes divide the cases among them.

    Args:
        cases: (HU on the network's grid, labels likewise), as `canonical` gives them.
        classes: number of classes, background included.
        settings: the result of `medaccel.segmentation.model.presets.make_settings`.
    """

    def __init__(self, cases: Sequence[Mapping[str, MetaTensor]], classes: int, settings: Mapping[str, Any]) -> None:
        self.cases, self.classes, self.settings = cases, classes, settings
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, float] = {"step": 0, "dice": -1.0}
        self.weights: dict[str, Tensor] = {}
        self.losses: list[float] = []  # losses since the curve's last point, but for `_fresh`
        self._fresh: list[Tensor] = []  # on the device: a number each step would wait for it each step
        self.seconds = 0.0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, *_: Any
    ) -> None:
        step = trainer.global_step
        self._fresh.append(outputs["loss"].detach())
        if step % self.settings["validate_every"] and step < self.settings["steps"]:
            return
        start = time.perf_counter()
        self._settle()
        network = pl_module.network
        assert isinstance(network, nn.Module)
        found = float(np.mean(shared_out(lambda case: self._dice(network, case), self.cases)))
        loss = float(np.mean(shared_out(lambda _: float(np.mean(self.losses)), range(ranks.world_size()))))
        self.curve.append({"step": step, "dice": found, "loss": loss})
        self.losses = []
        if found > self.best["dice"]:
            self.best = {"step": step, "dice": found}
            self.weights = {k: v.detach().to("cpu", copy=True) for k, v in network.state_dict().items()}
        for logger in trainer.loggers:
            logger.log_metrics({"validation/dice": found}, step=step)
        self.seconds += time.perf_counter() - start

    def _dice(self, network: nn.Module, case: Mapping[str, MetaTensor]) -> float:
        labels = predict_labels(network, case["image"], self.settings)
        truth = case["label"].numpy()[0]
        return float(np.mean([dice(labels == value, truth == value) for value in range(1, self.classes)]))

    def _settle(self) -> None:
        if self._fresh:
            self.losses += torch.stack(self._fresh).tolist()
            self._fresh = []

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        names = ("curve", "best", "weights", "losses", "seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve, self.best = list(state_dict["curve"]), dict(state_dict["best"])
        self.weights, self.losses, self._fresh = dict(state_dict["weights"]), list(state_dict["losses"]), []
        self.seconds = state_dict["seconds"]


def validation_case(scan: Nifti1Image, label: Nifti1Image, settings: Mapping[str, Any]) -> dict[str, MetaTensor]:
    """Prepares a case for `Validation`."""
    return canonical(scan, settings["spacing"], label=label)
