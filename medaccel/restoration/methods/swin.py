# SPDX-License-Identifier: Apache-2.0
"""Implements `swin_unetr`: one network for all exposures, which predicts the activity and leaves the known blend to
arithmetic.

E[PET_T | PET_t] = (t·PET_t + (T − t)·E[λ | PET_t])/T, so a network that predicts λ has less to learn than one that
predicts PET_T, and its prediction can be scored against the truth. `predict: target` makes it predict PET_T, for
comparison. The exposure is an input (count-aware), and so are two smoothed copies of the PET; the network's output is
added to the narrower one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medaccel.restoration.methods.base import Fitted, Restoration, RestorationRequest, check_volume
from medaccel.restoration.methods.networks import losses
from medaccel.restoration.methods.networks.method import NetworkMethod, as_batch, body_box, choose_weight
from medaccel.restoration.methods.networks.nets import ActivityNet, Conditioning, blend, swin_unetr
from medaccel.restoration.settings import SwinSettings
from medaccel.restoration.study import PETStudy
from medaccel.training.fit import NetworkFit


class ActivityFit(NetworkFit):
    """Trains an `ActivityNet`.

    The squared error is divided by that of the study's input: the ratio is 1 minus the study's score, so a hot
    patient weighs no more than another. Beside it, at `scaled_weight`, stands the squared error in the network's
    scaling, which does not leave the cold organs to the hot ones; and with `mse_ssim` the 1 − SSIM of the restored
    image, divided by the input's, at `ssim_weight`.
    """

    network: ActivityNet

    def __init__(self, network: ActivityNet, settings: Mapping[str, Any], target_seconds: int) -> None:
        super().__init__(network, settings)
        self.target_seconds = target_seconds

    def losses(self, batch: Mapping[str, Any], index: int) -> dict[str, Tensor]:
        s, mask, image = self.settings, batch["mask"], batch["input"]
        ct = batch["ct"] if s["use_ct"] else None
        predicted = self.network(image, batch["spacing"], batch["seconds"], ct, batch["denoised"])
        predicted = predicted.float()
        to_target, to_truth, distance = batch["errors"].float().unbind(1)
        if s["predict"] == "target":
            restored, compared, reference, error = predicted, predicted, batch["target"], to_target
        else:
            restored = blend(image, predicted, batch["seconds"], self.target_seconds)
            simulated = batch["has_noise_free"].reshape(-1, 1, 1, 1, 1)
            compared = torch.where(simulated, predicted, restored)
            reference = batch["noise_free"]  # holds the target if there is no noise-free image
            error = torch.where(batch["has_noise_free"], to_truth, to_target)
        terms = {}
        scale = self.network.conditioning.scaling.forward
        if s["loss"] != "ssim":
            terms["mse"] = (losses.squared_error(compared, reference, mask) / error).mean()
            scaled = losses.squared_error(scale(compared), scale(reference), mask)
            terms["scaled"] = s["scaled_weight"] * scaled.mean()
        if s["loss"] != "mse":
            ssim = losses.ssim_distance(restored, batch["target"], mask) / distance
            terms["ssim"] = s["ssim_weight"] * ssim.mean()
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


class SwinUNETRMethod(NetworkMethod):
    """Restores with an accelerated Swin UNETR (Hatamizadeh et al., 2022); see the module."""

    name = "swin_unetr"
    Settings = SwinSettings

    def build(self) -> nn.Module:
        conditioning = Conditioning(self.settings["scaling"], self.settings["use_ct"], self.settings["base"])
        return ActivityNet(swin_unetr(conditioning.channels, self.settings), conditioning)

    def module(self) -> NetworkFit:
        assert isinstance(self.network, ActivityNet)
        return ActivityFit(self.network, self.training_settings, self.task.target_seconds)

    def choose(self, validation: Sequence[PETStudy], fitted: Fitted, seed: int, progress: bool) -> None:
        if self.settings["predict"] == "target":
            return
        choose_weight(
            self.task,
            validation,
            fitted,
            lambda study, seconds: self.predict(study.exposures[seconds], study.spacing, seconds, study.ct),
        )

    @torch.no_grad()
    def predict(
        self, volume: np.ndarray, spacing: Sequence[float], seconds: int, ct: np.ndarray | None
    ) -> np.ndarray:
        """Predicts the activity, or the target, of one PET, SUV; the air far from the body stays as it is."""
        box = body_box(volume, spacing)
        around = None if ct is None or not self.settings["use_ct"] else ct[box]
        image, steps, exposure, hu, denoised = as_batch(volume[box], spacing, seconds, around, self.settings["base"])
        # Windows are cut from all volumes at once.
        stacked = torch.cat([image, *(other for other in (hu, denoised) if other is not None)], dim=1)

        def window(patch: Tensor) -> Tensor:
            count, others = patch.shape[0], list(patch[:, 1:].split(1, dim=1))
            copy = others.pop() if denoised is not None else None
            chart = others.pop() if hu is not None else None
            return self.network(patch[:, :1], steps.expand(count, 3), exposure.expand(count), chart, copy)

        predicted = volume.astype(np.float32)
        predicted[box] = np.maximum(self.windows(stacked, window)[0, 0].float().numpy(), 0)
        return (
            predicted
            if self.settings["predict"] == "target"
            else self.shrunk_residual_added(volume, predicted, spacing)
        )

    def restore(self, request: RestorationRequest) -> Restoration:
        volume = request.volume
        check_volume(self.name, volume, request.spacing)
        t = self.seconds(request.seconds)
        predicted = self.predict(volume, request.spacing, t, request.ct)
        if self.settings["predict"] == "target":
            return Restoration(predicted)
        chosen = self.fitted.choices.get("weight", {})
        weight = np.float32(chosen.get(str(t), t / self.task.target_seconds))
        blended = weight * volume + (1 - weight) * predicted
        return Restoration(blended, activity=predicted, weight=float(weight))
