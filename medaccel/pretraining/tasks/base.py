# SPDX-License-Identifier: Apache-2.0
"""Defines a pretraining task: its settings, its head, its change of an item, and its loss."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from medaccel.studies.settings import check_group, nearest

if TYPE_CHECKING:
    from medaccel.nets import SwinUNETR
    from medaccel.pretraining.network import PretrainingNet


@dataclass(frozen=True)
class Step:
    """Holds the inputs of one step's losses.

    Args:
        net: the network.
        maps: maps of both views, (2B, C, *spatial) by level: the first views, then the second ones.
        batch: the items' tensors, (B, …).
        progress: finished share of the training, 0 … 1.
    """

    net: PretrainingNet
    maps: Mapping[str, Tensor]
    batch: Mapping[str, Tensor]
    progress: float


class Task(abc.ABC):
    """Defines one task to learn without labels.

    Args:
        settings: plain values that differ from `defaults`.
        roi_size: voxels of a view.

    Raises:
        ValueError: settings are unknown, or values have another kind.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: The task's own inputs, beside the views, need these backbone levels.
    own_levels: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, settings: Mapping[str, Any], roi_size: Sequence[int]) -> None:
        unknown = set(settings) - set(self.defaults)
        if unknown:
            raise ValueError(
                f"{self.name}: settings {sorted(unknown)} are unknown; expected some of "
                f"{', '.join(self.defaults) or 'none'}{nearest(min(unknown), self.defaults)}"
            )
        self.settings = copy.deepcopy({**self.defaults, **check_group(self.name, settings, self.defaults)})
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

    def number(self, key: str, low: float, high: float = float("inf")) -> float:
        """Returns a setting that is a number above `low` and at most `high`.

        Raises:
            ValueError: it isn't.
        """
        value = self.settings[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            bound = f" and at most {high:g}" if np.isfinite(high) else ""
            raise ValueError(f"{self.name}: {key} is {value!r}; expected a number above {low:g}{bound}")
        return float(value)

    def count(self, key: str) -> int:
        """Returns a setting that is a whole number of at least 1.

        Raises:
            ValueError: it isn't.
        """
        value = self.settings[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.name}: {key} is {value!r}; expected a whole number >= 1")
        return value


def process_group() -> Any:
    """Returns the group of all processes that share a batch; None if there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.group.WORLD
    return None
