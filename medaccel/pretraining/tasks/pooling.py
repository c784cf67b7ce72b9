# SPDX-License-Identifier: Apache-2.0
"""What stands for a whole view: the mean of a map over its pixels, standardised."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medaccel.pretraining.tasks.base import process_group

_DECAY = 0.9  # of the running mean and variance: those of about ten steps
_FLOOR = 1e-6


class StandardisedMean(nn.Module):
    """(B, C, *spatial) to (B, C): the mean over pixels, each channel by its running mean and deviation.

    Views differ little in such a mean: their embeddings start nearly parallel, and a contrast of directions finds no
    gradient there. Without the channels' means they do differ. The running figures, of all processes' views together,
    are what DINO's centre is; gradients don't pass through them, so items stay independent of each other, which batch
    normalisation would end. They are buffers: a resumed training has them, and evaluation takes them as they are.

    Args:
        channels: C.
    """

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, features: Tensor) -> Tensor:
        pooled = features.float().flatten(2).mean(dim=2)
        if self.training and torch.is_grad_enabled():
            self._follow(pooled.detach())
        return (pooled - self.mean) / (self.variance + _FLOOR).sqrt()

    def _follow(self, pooled: Tensor) -> None:
        moments = torch.stack([pooled.mean(dim=0), pooled.square().mean(dim=0)])
        group = process_group()
        if group is not None:
            dist.all_reduce(moments, group=group)
            moments /= dist.get_world_size(group)
        mean, variance = moments[0], (moments[1] - moments[0].square()).clamp(min=0)
        weight = 1.0 if int(self.steps) == 0 else 1 - _DECAY
        # New tensors: this step's backward may still need the old ones.
        self.mean = torch.lerp(self.mean, mean, weight)
        self.variance = torch.lerp(self.variance, variance, weight)
        self.steps = self.steps + 1
