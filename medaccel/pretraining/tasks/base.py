# SPDX-License-Identifier: Apache-2.0
"""Defines a pretraining task: its settings, its head, its change of an item, and its loss."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from medaccel.pretraining.settings import TaskSettings
from medaccel.studies.typed import UnfitError

if TYPE_CHECKING:
    from medaccel.nets import SwinUNETR


class Network(Protocol):
    """Describes the part of `medaccel.pretraining.network.PretrainingNet` that tasks know."""

    @property
    def backbone(self) -> SwinUNETR: ...

    @property
    def heads(self) -> nn.ModuleDict: ...

    def features(self, x: Tensor, levels: Collection[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Step:
    """Holds the inputs of one step's losses.

    Args:
        net: the network.
        maps: maps of both views, (2B, C, *spatial) by level: the first views, then the second ones.
        batch: the items' tensors, (B, …).
        progress: finished share of the training, 0 … 1.
    """

    net: Network
    maps: Mapping[str, Tensor]
    batch: Mapping[str, Tensor]
    progress: float


class PretextTask(abc.ABC):
    """Defines one task to learn without labels.

    Args:
        settings: plain values that differ from the defaults of `Settings`.
        roi_size: voxels of a view.

    Raises:
        ValueError: settings are unknown, or values have another kind.
    """

    name: ClassVar[str]
    #: The task's settings have these names, types, defaults and meanings.
    Settings: ClassVar[type[TaskSettings]] = TaskSettings
    #: The task's own inputs, beside the views, need these backbone levels.
    own_levels: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, settings: Mapping[str, Any], roi_size: Sequence[int]) -> None:
        try:
            self.settings = self.Settings.read(settings).whole()
        except UnfitError as unfit:
            raise unfit.within(self.name, self.Settings.separator) from None
        self.roi_size = tuple(int(n) for n in roi_size)

    @property
    def view_levels(self) -> frozenset[str]:
        """Returns the backbone levels that the task needs from both views."""
        return frozenset()

    @abc.abstractmethod
    def head(self, backbone: SwinUNETR, feature_size: int) -> nn.Module:
        """Builds the part that is trained beside the backbone, and not kept."""

    def prepare(self, item: dict[str, Tensor], image: Tensor, rng: np.random.Generator) -> None:  # noqa: B027
        """Adds to an item, or changes its views.

        Args:
            item: "view1", "view2" (1, *roi_size), if any task needs views, and "affine1", "affine2".
            image: the whole volume, (1, i, j, k), in canonical orientation, windowed to 0 … 1.
            rng: the item's own generator.
        """

    @abc.abstractmethod
    def losses(self, step: Step) -> dict[str, Tensor]:
        """Returns the loss, under the task's name, and further figures to log.

        Each is a mean over items, so that the mean over processes which share a batch is one process's.
        """


def process_group() -> Any:
    """Returns the group of all processes that share a batch; None if there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.group.WORLD
    return None
