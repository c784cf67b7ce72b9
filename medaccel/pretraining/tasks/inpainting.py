# SPDX-License-Identifier: Apache-2.0
"""Defines inpainting: blocks of both views are filled with noise, and the network restores the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.networks.utils import pixelshuffle
from torch import Tensor, nn

from medaccel.nets import SwinUNETR
from medaccel.ops import gaussian_filter
from medaccel.pretraining.levels import STRIDES, channels, check_level
from medaccel.pretraining.settings import InpaintingSettings
from medaccel.pretraining.tasks.base import Network, PretextTask, Step

_LEAST_WEIGHT = 1e-6  # weight of the visible voxels; below it they have no usable mean


def cut_out(shape: tuple[int, ...], share: float, sides: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Draws a mask of blocks, True within.

    Args:
        shape: the view's shape.
        share: greatest share of its voxels that may be masked.
        sides: range of a block's side, as a share of the view's.
        rng: source of randomness.

    Returns:
        bool, the view's shape; blocks are laid until the next one would exceed the share.
    """
    mask = np.zeros(shape, dtype=bool)
    while True:
        size = [max(1, round(n * rng.uniform(*sides))) for n in shape]
        start = [int(rng.integers(n - s + 1)) for n, s in zip(shape, size, strict=True)]
        block = tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))
        if mask.sum() + np.count_nonzero(~mask[block]) > share * mask.size:
            return mask
        mask[block] = True


def smooth_fill(view: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """Fills hidden voxels with the mean of the visible voxels around them, with Gaussian weights.

    Args:
        view: (B, 1, *spatial); its values in the holes are ignored.
        mask: bool, the view's shape, True in the holes.
        sigma: σ of the weights, in voxels. Voxels without a visible one within 4 σ become 0.

    Returns:
        The mean in holes and elsewhere, fp32, the view's shape.
    """
    seen = (~mask).float()
    with torch.autocast(view.device.type, enabled=False):  # a quotient of small numbers
        weights = gaussian_filter(seen, sigma)
        return gaussian_filter(view.float() * seen, sigma) / weights.clamp(min=_LEAST_WEIGHT)


class Reconstruction(nn.Module):
    """Maps (B, C, *spatial) to (B, 1, *(spatial · stride)): a channel for each voxel of a pixel, shuffled into place.

    Its output starts at 0.
    """

    def __init__(self, channels: int, stride: int, hidden: int) -> None:
        super().__init__()
        self.stride = stride
        last = nn.Conv3d(hidden, stride**3, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(torch.as_tensor(last.bias))
        self.layers = nn.Sequential(nn.Conv3d(channels, hidden, 1), nn.GELU(), last)

    def forward(self, features: Tensor) -> Tensor:
        return pixelshuffle(self.layers(features), 3, self.stride)


class Inpainting(PretextTask):
    """Replaces blocks of 5 to 25 % of each side, at most 30 % of a view, by noise; the loss is L1 to the original.

    As in the published Swin UNETR pretraining (Tang et al., CVPR 2022), both views are cut out, so that the other
    tasks see the holes too and the backbone runs once for all. The network predicts the change from `smooth_fill`,
    which knows how bright its surroundings are: the backbone's norms remove the brightness from the features, and a
    network that had to predict the view itself gave the mean of two windows' greys in either. The prediction is made
    at `level` by 1 × 1 × 1 convolutions and a pixel shuffle: finer blocks of the U-Net, the expensive ones, are not
    computed.
    """

    name = "inpainting"
    Settings = InpaintingSettings

    def __init__(self, settings: Mapping[str, Any], roi_size: Any) -> None:
        super().__init__(settings, roi_size)
        self.level = check_level("inpainting: level", self.settings["level"])
        self.share = float(self.settings["share"])
        sides = self.settings["sides"]
        if len(sides) != 2 or not 0 < sides[0] <= sides[1] <= 1:
            raise ValueError(f"inpainting: sides is {sides!r}; expected two shares, 0 < smallest <= largest <= 1")
        self.sides = (float(sides[0]), float(sides[1]))

    @property
    def view_levels(self) -> frozenset[str]:
        return frozenset({self.level})

    def head(self, backbone: SwinUNETR, feature_size: int) -> nn.Module:
        return Reconstruction(channels(self.level, feature_size), STRIDES[self.level], self.settings["hidden"])

    def prepare(self, item: dict[str, Tensor], image: Tensor, rng: np.random.Generator) -> None:
        for number in (1, 2):
            view = item[f"view{number}"]
            item[f"target{number}"] = item.pop(f"clean{number}", view)
            item[f"mask{number}"], item[f"view{number}"] = self.hide(view, rng)

    def hide(self, view: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Returns the mask of a view (1, *roi_size), and the view with noise from 0 to 1 within."""
        mask = torch.from_numpy(cut_out(tuple(view.shape[1:]), self.share, self.sides, rng))[None]
        noise = torch.from_numpy(rng.random(view.shape, dtype=np.float32))
        return mask, torch.where(mask, noise, view)

    def predict(self, net: Network, features: Tensor, view: Tensor, mask: Tensor) -> Tensor:
        """Predicts views (B, 1, *roi_size), fp32, from their maps at `level`, their visible voxels, and the masks."""
        return self.fill(view, mask) + net.heads[self.name](features).float()

    def fill(self, view: Tensor, mask: Tensor) -> Tensor:
        """Computes `smooth_fill` as the start of training; 4 σ are half the largest block, so its middle still
        reaches visible voxels."""
        return smooth_fill(view, mask, self.sides[1] * max(self.roi_size) / 8)

    def losses(self, step: Step) -> dict[str, Tensor]:
        view, target, mask = (
            torch.cat([step.batch[f"{name}{n}"] for n in (1, 2)]) for name in ("view", "target", "mask")
        )
        distance = (self.predict(step.net, step.maps[self.level], view, mask) - target).abs()
        if self.settings["on"] == "all":
            return {self.name: distance.mean()}
        # The mean is taken per view, so that all items count alike whatever their holes.
        inside = (distance * mask).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1).clamp(min=1)
        return {self.name: inside.mean()}
