# SPDX-License-Identifier: Apache-2.0
"""Draws the inputs of a step: numbered items of two views with their geometry, and the tasks' own additions.

Item n is the same whatever the number of workers and processes, and whenever it is drawn: its random numbers come
from (seed, n) alone. So a run that was killed continues with the items that it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, RandCoarseDropout, RandGaussianNoise
from torch import Tensor

from medaccel.data.ct_transforms import window
from medaccel.data.views import TwoViews, intensity_transforms
from medaccel.pretraining.data import Volumes
from medaccel.pretraining.tasks import PretextTask

# This tells a batch's random numbers from an item's.
_OF_A_BATCH = 1


class Items(torch.utils.data.Dataset):
    """Yields endless numbered items.

    A view is a window of HU, 0 … 1, cut, turned and scaled by `medaccel.data.TwoViews`, with its changes of
    intensity; voxels outside the scan are 0. If inpainting is among the tasks, its blocks take the place of
    `TwoViews`' own, and its target is the view before noise is added.

    Args:
        volumes: the scans that items are drawn from.
        tasks: the tasks that the items serve.
        windows: HU limits; both views of an item, and all items of a batch, have the same window: views in different
            windows differ in grey level alone, so they are useless negatives.
        batch_size: items of a step, over all processes; step n has the items from n · batch_size on.
        roi_size: voxels of a view.
        views: options of `medaccel.data.TwoViews`.
        seed: together with an item's number, it seeds all randomness of the item.

    Raises:
        ValueError: `TwoViews` refuses the options.
    """

    def __init__(
        self,
        volumes: Volumes,
        tasks: Sequence[PretextTask],
        *,
        windows: Sequence[Sequence[float]],
        roi_size: Sequence[int],
        batch_size: int = 1,
        views: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.volumes, self.tasks, self.seed, self.batch_size = volumes, list(tasks), seed, batch_size
        self.windows = [(float(low), float(high)) for low, high in windows]
        self.paired = any(task.view_levels for task in tasks)
        self.restores = any(task.name == "inpainting" for task in tasks)
        changes = intensity_transforms(roi_size)
        hidden = (RandCoarseDropout, RandGaussianNoise) if self.restores else ()
        try:
            self.views = TwoViews(
                roi_size, intensity=[c for c in changes if not isinstance(c, hidden)], **dict(views or {})
            )
        except TypeError as error:
            raise ValueError(f"views is {dict(views or {})}; expected options of TwoViews ({error})") from error
        self.noise = Compose([c for c in changes if isinstance(c, RandGaussianNoise)])

    def __len__(self) -> int:
        return 1 << 62  # the dataset is endless

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, index])
        shared = np.random.default_rng([self.seed, index // self.batch_size, _OF_A_BATCH])
        return self.item(int(rng.integers(len(self.volumes))), rng, int(shared.integers(len(self.windows))))

    def item(self, number: int, rng: np.random.Generator, shown: int = 0) -> dict[str, Tensor]:
        """Draws an item of one volume, in one of the windows.

        Returns:
            "view1", "view2" (1, *roi_size), "affine1", "affine2" (4, 4), if a task needs views; and the tasks' own
            additions.
        """
        volume = self.volumes[number]
        image = window(volume.as_tensor(), self.windows[shown])
        item: dict[str, Tensor] = {}
        if self.paired:
            self.views.set_random_state(seed=int(rng.integers(2**31)))
            item = self.views(MetaTensor(image, affine=volume.affine))
            if self.restores:
                self.noise.set_random_state(seed=int(rng.integers(2**31)))
                for n in (1, 2):
                    item[f"clean{n}"] = item[f"view{n}"]
                    item[f"view{n}"] = self.noise(item[f"view{n}"])
        # MONAI's transforms give MetaTensors; only their affines are needed from here on, and these are kept apart.
        item = {key: value.as_subclass(Tensor) for key, value in item.items()}
        for task in self.tasks:
            task.prepare(item, image, rng)
        return item
