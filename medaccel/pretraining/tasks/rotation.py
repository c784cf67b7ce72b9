# SPDX-License-Identifier: Apache-2.0
"""Defines rotation: by how many right angles was the patient turned?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import RandSpatialCrop, SpatialPad
from torch import Tensor, nn

from medaccel.nets import SwinUNETR
from medaccel.pretraining.levels import elements
from medaccel.pretraining.settings import RotationSettings
from medaccel.pretraining.tasks.base import Network, PretextTask, Step

_NOISE = 0.03  # greatest noise, as a share of the window; its strength is drawn


class Rotation(PretextTask):
    """Turns a crop of its own, from the canonically oriented volume, by k · 90° in the axial plane; the network tells
    k.

    The views can't serve: they may be flipped and turned already, and then no answer is right. The crop goes through
    the transformer alone, without a decoder, so it costs a fraction of the views.
    """

    name = "rotation"
    own_levels = frozenset({"encoder4"})
    Settings = RotationSettings

    def __init__(self, settings: Mapping[str, Any], roi_size: Any) -> None:
        super().__init__(settings, roi_size)
        if self.roi_size[0] != self.roi_size[1]:
            raise ValueError(
                f"rotation: roi_size is {list(self.roi_size)}; expected as many voxels from left to right as from "
                "back to front, because the task turns them into each other"
            )

    def head(self, backbone: SwinUNETR, feature_size: int) -> nn.Module:
        # The head sees all pixels of the last map, not their mean: where the spine lies tells more than that there is
        # one.
        return nn.Sequential(nn.Flatten(), nn.Linear(elements("encoder4", feature_size, self.roi_size), 4))

    def prepare(self, item: dict[str, Tensor], image: Tensor, rng: np.random.Generator) -> None:
        crop = self.crop(image, rng)
        turns = int(rng.integers(4))
        noise = rng.standard_normal(crop.shape, dtype=np.float32) * np.float32(rng.uniform(0, _NOISE))
        item["rotation_view"] = self.turned(crop, turns) + torch.from_numpy(noise)
        item["rotation"] = torch.tensor(turns)

    def crop(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Cuts (1, *roi_size) from anywhere in a volume, which is padded if it is smaller."""
        cropper = RandSpatialCrop(self.roi_size, random_size=False).set_random_state(seed=int(rng.integers(2**31)))
        return torch.as_tensor(cropper(SpatialPad(self.roi_size)(image))).as_subclass(Tensor)

    @staticmethod
    def turned(crop: Tensor, turns: int) -> Tensor:
        """Turns (1, i, j, k) by right angles about the patient's long axis."""
        return torch.rot90(crop, turns, (1, 2)).contiguous()

    def logits(self, net: Network, x: Tensor) -> Tensor:
        """Maps (B, 1, *roi_size) to logits (B, 4)."""
        scores: Tensor = net.heads[self.name](net.features(x, {"encoder4"})["encoder4"])
        return scores

    def losses(self, step: Step) -> dict[str, Tensor]:
        logits = self.logits(step.net, step.batch["rotation_view"]).float()
        turns = step.batch["rotation"]
        right = (logits.detach().argmax(dim=1) == turns).float().mean()
        return {self.name: F.cross_entropy(logits, turns), "rotation_accuracy": right}
