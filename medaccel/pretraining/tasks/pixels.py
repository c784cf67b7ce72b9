# SPDX-License-Identifier: Apache-2.0
"""Defines tasks on pixels of feature maps: contrast between places, and PixPro's consistency."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medaccel.data.views import feature_affine
from medaccel.losses import PixelConsistencyLoss, PixelContrastiveLoss
from medaccel.nets import SwinUNETR
from medaccel.ops import pixel_propagation
from medaccel.pretraining.levels import channels, check_level, features
from medaccel.pretraining.settings import PixelSettings, PixProSettings
from medaccel.pretraining.tasks.base import Network, PretextTask, Step

#: PixPro's momentum is this in the first step; it rises to 1.
FIRST_MOMENTUM = 0.99


def projector(level: str, feature_size: int, dimensions: int) -> nn.Sequential:
    """Builds 1 × 1 × 1 convolutions from a level's map to `dimensions` channels."""
    width = channels(level, feature_size)
    return nn.Sequential(nn.Conv3d(width, 2 * width, 1), nn.GELU(), nn.Conv3d(2 * width, dimensions, 1))


class _PixelTask(PretextTask):
    """Holds the part that both tasks share: a level, its projector, and the places of its pixels."""

    radius: float | None

    def __init__(self, settings: Mapping[str, Any], roi_size: Any) -> None:
        super().__init__(settings, roi_size)
        self.level = check_level(f"{self.name}: level", self.settings["level"])
        radius = self.settings["radius"]
        self.radius = None if radius is None else float(radius)

    @property
    def view_levels(self) -> frozenset[str]:
        return frozenset({self.level})

    def affines(self, batch: Mapping[str, Tensor], projected: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B, 4, 4) from both views' pixels to mm."""
        size = projected.shape[2:]
        first, second = (feature_affine(batch[f"affine{n}"].float(), self.roi_size, size) for n in (1, 2))
        return first, second

    def project(self, net: Network, maps: Mapping[str, Tensor]) -> Tensor:
        """Projects views' maps to (B, dimensions, *spatial).

        They keep autocast's dtype, in which the ops of the losses are fastest; these add up in fp32 themselves.
        """
        head = net.heads[self.name]
        assert isinstance(head, _Projecting | PixProHead)
        projected: Tensor = head.projector(maps[self.level])
        return projected


class _Projecting(nn.Module):
    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector


class PixelContrast(_PixelTask):
    """Contrasts pixels by `medaccel.losses.PixelContrastiveLoss`, in both directions.

    A place is told from all others of the other view.
    """

    name = "pixel"
    Settings = PixelSettings

    def __init__(self, settings: Mapping[str, Any], roi_size: Any) -> None:
        super().__init__(settings, roi_size)
        self.loss = PixelContrastiveLoss(float(self.settings["temperature"]), self.radius)

    def head(self, backbone: SwinUNETR, feature_size: int) -> nn.Module:
        return _Projecting(projector(self.level, feature_size, self.settings["dimensions"]))

    def losses(self, step: Step) -> dict[str, Tensor]:
        projected = self.project(step.net, step.maps)
        affines = self.affines(step.batch, projected)
        # The loss goes item by item: a mean over all items' pixels would weigh them by their views' overlap, and then
        # processes that share a batch would not have one process's loss.
        parts = [t.split(1) for t in (*projected.chunk(2), *affines)]
        each = [self.loss(*arguments) for arguments in zip(*parts, strict=True)]
        return {self.name: torch.stack(each).mean()}


class PixProHead(nn.Module):
    """Holds PixPro's projector and propagation, and the momentum copies of backbone and projector, which get no
    gradient.

    The copies are buffers of the training like any weight: they are in its checkpoints, so a resumed run has them.
    """

    def __init__(self, backbone: SwinUNETR, projector: nn.Module, dimensions: int, power: float) -> None:
        super().__init__()
        self.projector, self.power = projector, power
        self.transform = nn.Conv3d(dimensions, dimensions, 1)
        self.momentum_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(projector).requires_grad_(False)

    @torch.no_grad()
    def follow(self, backbone: nn.Module, momentum: float) -> None:
        """Moves the copies towards their originals."""
        pairs = ((self.momentum_backbone, backbone), (self.momentum_projector, self.projector))
        for slow, fast in pairs:
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new.to(old.dtype), 1 - momentum)

    def propagate(self, projected: Tensor) -> Tensor:
        """Replaces each pixel of (B, C, *spatial) by a mean of the pixels that resemble it."""
        # Squares of 256 channels are added up in fp32.
        values = F.normalize(self.transform(projected).float(), dim=1).to(projected.dtype)
        rows, said = (t.flatten(2).transpose(1, 2) for t in (projected, values))
        return pixel_propagation(rows, said, power=self.power).transpose(1, 2).reshape(projected.shape)


class PixPro(_PixelTask):
    """Computes PixPro's consistency (Xie et al., CVPR 2021) between propagated pixels and a momentum encoder's pixels
    of the other view.

    The momentum is 1 − 0.01 · (cos(π k / K) + 1) / 2 in step k of K. The copies move at the beginning of a step, to
    the weights that the last one left. Beside the backbone's pass, a second one without gradient takes about a third
    of the step's time.
    """

    name = "pixpro"
    Settings = PixProSettings

    def __init__(self, settings: Mapping[str, Any], roi_size: Any) -> None:
        super().__init__(settings, roi_size)
        self.loss = PixelConsistencyLoss(self.radius)

    def head(self, backbone: SwinUNETR, feature_size: int) -> nn.Module:
        dimensions = self.settings["dimensions"]
        return PixProHead(
            backbone, projector(self.level, feature_size, dimensions), dimensions, float(self.settings["power"])
        )

    def losses(self, step: Step) -> dict[str, Tensor]:
        head = step.net.heads[self.name]
        assert isinstance(head, PixProHead)
        head.follow(step.net.backbone, momentum(step.progress))
        projected = self.project(step.net, step.maps)
        with torch.no_grad():
            views = torch.cat([step.batch["view1"], step.batch["view2"]])
            slow = features(head.momentum_backbone, views, {self.level})[self.level]
            keys = head.momentum_projector(slow)
        affines = self.affines(step.batch, projected)
        loss = self.loss(*head.propagate(projected).chunk(2), *affines, *keys.chunk(2))
        return {self.name: loss}


def momentum(progress: float) -> float:
    """Returns PixPro's momentum at a share of the training."""
    return 1 - (1 - FIRST_MOMENTUM) * (math.cos(math.pi * progress) + 1) / 2
