# SPDX-License-Identifier: Apache-2.0
"""Builds a residual U-Net without normalisation layers that restores PETs of any noise level, voxel size and unit.

It works on the square root of the image, where the noise of a reconstruction varies little with the uptake, divided
by the noise's standard deviation as measured in the image itself: the same noise looks the same to the network,
whatever the exposure, the dose, the scanner or the unit. Most of its work is done at full and at half resolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The network sees noise of one standard deviation as this, which brings its input to the order of one.
NOISE_UNIT = 0.1
_REFERENCE_MM = 4.0


class _Block(nn.Module):
    """Adds the result of two convolutions to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(channels, channels, 3, padding=1)
        self.second = nn.Conv3d(channels, channels, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)
        with torch.no_grad():
            self.second.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.activation(self.first(x)))


class RestorationUNet(nn.Module):
    """Predicts the activity from a PET and the noise that was measured in it; see the module.

    Args:
        channels: channels of each level, the full resolution first; each further level has half the resolution.
        blocks: residual blocks of each level on the way down; on the way up as many, but none at the bottom.
    """

    def __init__(self, channels: Sequence[int] = (32, 64, 128), blocks: Sequence[int] = (1, 2, 2)) -> None:
        super().__init__()
        self.multiple = 2 ** (len(channels) - 1)
        self.head = nn.Conv3d(3, channels[0], 3, padding=1)
        levels = range(len(channels))
        self.down = nn.ModuleList(
            nn.Sequential(*(_Block(channels[level]) for _ in range(blocks[level]))) for level in levels
        )
        self.up = nn.ModuleList(
            nn.Sequential(*(_Block(channels[level]) for _ in range(blocks[level]))) for level in levels[:-1]
        )
        self.shrink = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in itertools.pairwise(channels))
        self.grow = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in itertools.pairwise(channels))
        self.tail = nn.Conv3d(channels[0], 1, 3, padding=1)
        with torch.no_grad():
            self.tail.weight.mul_(0.1)
            assert self.tail.bias is not None
            self.tail.bias.zero_()

    def forward(self, volume: Tensor, noise: Tensor, spacing: Tensor) -> Tensor:
        """Returns the activity, in the volume's unit.

        Args:
            volume: (B, 1, i, j, k), >= 0, sides that are multiples of `multiple`.
            noise: (B,), `medaccel.restoration.evaluation.training_range.root_noise` of the whole image.
            spacing: (B, 3), mm.
        """
        unit = (noise / NOISE_UNIT).to(volume).reshape(-1, 1, 1, 1, 1)
        root = volume.sqrt() / unit
        sizes = (spacing / _REFERENCE_MM).log2().to(volume)
        constants = torch.stack([sizes[:, :2].mean(1), sizes[:, 2]], dim=1)[:, :, None, None, None]
        x = torch.cat([root, constants.expand(-1, -1, *volume.shape[2:])], dim=1)
        x = self.head(x.contiguous(memory_format=torch.channels_last_3d))
        skips = []
        for blocks, shrink in zip(self.down, self.shrink, strict=False):
            x = blocks(x)
            skips.append(x)
            x = shrink(x)
        x = self.down[-1](x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](self.grow[level](x) + skips[level])
        return ((root + self.tail(x).to(root.dtype)).clamp_min(0) * unit).square()
