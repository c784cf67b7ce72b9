# SPDX-License-Identifier: Apache-2.0
"""Defines instance contrast: which view is of the same scan?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medaccel.nets import SwinUNETR
from medaccel.ops import info_nce_loss, nt_xent_loss
from medaccel.pretraining.levels import channels, elements
from medaccel.pretraining.settings import InstanceSettings
from medaccel.pretraining.tasks.base import Network, PretextTask, Step, process_group
from medaccel.pretraining.tasks.standardise import StandardisedMap

_LEVEL = "encoder4"


class Instance(PretextTask):
    """Contrasts views by NT-Xent on the standardised last map, through two layers, with all processes' negatives.

    It also logs log N − L of InfoNCE at the same temperature, a lower bound on the mutual information of the two
    views, in nats, which can't exceed log N, where N is the number of items of a step.
    """

    name = "instance"
    Settings = InstanceSettings

    def __init__(self, settings: Mapping[str, Any], roi_size: Any) -> None:
        super().__init__(settings, roi_size)
        self.temperature = float(self.settings["temperature"])

    @property
    def view_levels(self) -> frozenset[str]:
        return frozenset({_LEVEL})

    def head(self, backbone: SwinUNETR, feature_size: int) -> nn.Module:
        width = channels(_LEVEL, feature_size)
        inputs = elements(_LEVEL, feature_size, self.roi_size)
        return nn.Sequential(
            StandardisedMap(),
            nn.Linear(inputs, width),
            nn.GELU(),
            nn.Linear(width, self.settings["dimensions"]),
        )

    def embed(self, net: Network, maps: Mapping[str, Tensor]) -> Tensor:
        """Embeds the maps of all views that are compared: (B, dimensions), in autocast's dtype."""
        embedding: Tensor = net.heads[self.name](maps[_LEVEL])
        return embedding

    def losses(self, step: Step) -> dict[str, Tensor]:
        first, second = self.embed(step.net, step.maps).chunk(2)
        group = process_group()
        loss = nt_xent_loss(first, second, temperature=self.temperature, group=group)
        with torch.no_grad():
            _, bound = info_nce_loss(
                first.detach(), second.detach(), temperature=self.temperature, group=group, return_bound=True
            )
        return {self.name: loss, "mutual_information_bound": bound}
