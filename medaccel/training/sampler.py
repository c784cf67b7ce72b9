# SPDX-License-Identifier: Apache-2.0
"""Numbers a dataset's items: an item n that depends on (seed, n) alone gives a resumed run the items it missed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch


class Numbered(torch.utils.data.Sampler):
    """Yields the numbers of a process's items, from the step that training has reached when it is iterated.

    Args:
        batch_size: items per step, over all processes.
        rank, world_size: this process, and how many there are.
        step: returns the number of optimizer steps made; a resumed run goes on with the next step's items.
    """

    def __init__(
        self, batch_size: int, rank: int = 0, world_size: int = 1, step: Callable[[], int] = lambda: 0
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"batch_size is {batch_size}; expected a multiple of the {world_size} processes that share it"
            )
        self.batch_size, self.rank, self.world_size, self.step = batch_size, rank, world_size, step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.step() * self.batch_size + self.rank, self.world_size)
