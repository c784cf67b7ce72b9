# SPDX-License-Identifier: Apache-2.0
"""The network that is pretrained: a Swin UNETR and the tasks' heads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from medaccel.nets import SwinUNETR
from medaccel.pretraining.levels import features, parts_for, within
from medaccel.pretraining.tasks.base import PretextTask


class PretrainingNet(nn.Module):
    """Joins a Swin UNETR and the heads of some tasks.

    Parts of the backbone that no task needs are frozen, and left out of `trained_state`.

    Args:
        tasks: the tasks whose heads are made.
        feature_size: f of the backbone. Default 48.
        options: further options of `medaccel.nets.SwinUNETR`, such as `use_checkpoint`.

    Attributes:
        backbone: SwinUNETR of one input channel. heads: by task.
    """

    def __init__(self, tasks: Sequence[PretextTask], *, feature_size: int = 48, **options: Any) -> None:
        super().__init__()
        self.backbone = SwinUNETR(in_channels=1, out_channels=2, feature_size=feature_size, **options)
        self.levels = frozenset().union(*(task.view_levels | task.own_levels for task in tasks))
        parts = parts_for(self.levels)
        for name, parameter in self.backbone.named_parameters():
            if not within(name, parts):
                parameter.requires_grad_(False)
        self.heads = nn.ModuleDict()
        for task in tasks:  # in the order of the registry: the same options start from the same weights
            self.heads[task.name] = task.head(self.backbone, feature_size)

    def features(self, x: Tensor, levels: Collection[str]) -> dict[str, Tensor]:
        """Computes `features` of the backbone."""
        return features(self.backbone, x, levels)

    def trained_state(self) -> dict[str, Tensor]:
        """Returns the backbone's state_dict, on the CPU, without tensors that no task has trained."""
        parts = parts_for(self.levels)
        state = self.backbone.state_dict()
        return {name: value.detach().cpu().clone() for name, value in state.items() if within(name, parts)}
