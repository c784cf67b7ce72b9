# SPDX-License-Identifier: Apache-2.0
"""Items by their number: a dataset whose item n depends on (seed, n) alone gives a resumed run what it missed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch


class Numbered(torch.utils.data.Sampler):
    """The numbers of a process's items, from the step that training has reached when it is iterated.

    Args:
        batch_size: items a step, of all processes.
        rank, world_size: this process, and how many there are.
        step: gives the optimizer steps that were made; a resumed run goes on with the next one's items.
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
