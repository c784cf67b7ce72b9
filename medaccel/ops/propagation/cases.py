# SPDX-License-Identifier: Apache-2.0
"""Holds sample inputs of pixel propagation, shared by its tests, `medaccel verify` and its benchmark."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Describes one call on feature maps whose pixels are rows. `shape`: batch, pixels, channels of features and of
    values."""

    name: str
    shape: tuple[int, int, int, int]
    power: float = 2.0

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features, values and the output's gradient."""
        batch, n, channels, value_channels = self.shape
        generator = torch.Generator().manual_seed(0)
        sizes = (channels, value_channels, value_channels)
        x, v, g = (torch.randn(batch, n, c, generator=generator, dtype=torch.float64).to(dtype) for c in sizes)
        return x, v, g

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one_pixel", (2, 1, 3, 2)),
    Case("odd_sizes", (2, 130, 19, 33)),
    Case("map_of_7_cubed", (1, 343, 64, 64)),
    Case("one_channel", (1, 97, 1, 1)),
    Case("no_values", (3, 40, 8, 0)),
    Case("empty_batch", (0, 5, 4, 4)),
    Case("no_pixels", (2, 0, 4, 4)),
]

# Two feature maps of 16³ pixels; too large for the suites.
PRODUCTION = Case("production", (2, 16**3, 64, 64))


def named(name: str) -> Case:
    """Returns the case of that name."""
    return next(case for case in [*CASES, PRODUCTION] if case.name == name)
