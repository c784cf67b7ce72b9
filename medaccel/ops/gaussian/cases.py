# SPDX-License-Identifier: Apache-2.0
"""Holds sample inputs of the Gaussian filter, shared by its tests, `medaccel verify` and its benchmark."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

APPROX = ("erf", "sampled", "scalespace")
MODES = ("constant", "reflect", "nearest", "mirror", "wrap")


@dataclass(frozen=True)
class Case:
    """Describes one call: how its input is made, and its options."""

    name: str
    shape: tuple[int, ...]
    sigma: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    view: str = ""  # how the tensor lies in memory

    def input(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Returns the input tensor (B, C, *spatial) in the case's memory layout."""
        generator = torch.Generator().manual_seed(seed)
        shape = list(self.shape)
        if self.view == "sliced":  # every axis is part of a larger tensor's, the last with step 2
            x = torch.randn([*(s + 2 for s in shape[:-1]), 2 * shape[-1] + 1], generator=generator, dtype=dtype)
            return x[(*(slice(1, s + 1) for s in shape[:-1]), slice(0, 2 * shape[-1], 2))]
        if self.view == "cropped":
            x = torch.randn([s + 3 for s in shape], generator=generator, dtype=dtype)
            return x[tuple(slice(1, s + 1) for s in shape)]
        if self.view == "transposed":
            shape[2], shape[-1] = shape[-1], shape[2]
            return torch.randn(shape, generator=generator, dtype=dtype).transpose(2, -1)
        if self.view == "batch_last":
            return torch.randn([*shape[1:], shape[0]], generator=generator, dtype=dtype).movedim(-1, 0)
        x = torch.randn(shape, generator=generator, dtype=dtype)
        if self.view == "channels_last":
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            return x.contiguous(memory_format=formats[len(shape)])
        if self.view == "expanded":
            return x[:, :1].expand(shape)
        return x

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("signal", (2, 3, 37), (1.3,)),
    Case("long_signal", (1, 1, 2500), (3.0,)),
    Case("image", (2, 2, 19, 26), (0.8, 2.0)),
    Case("wide_image", (1, 1, 5, 1300), (1.0, 2.5)),
    Case("volume", (1, 2, 11, 14, 17), (1.0, 2.0, 0.6)),
    Case("volume_of_registers", (1, 1, 16, 16, 64), (1.5, 1.5, 1.5)),
    Case("several_tiles", (1, 1, 6, 35, 70), (2.0, 2.0, 2.0)),
    Case("size_one_axes", (2, 1, 1, 9, 1), (2.0, 2.0, 2.0)),
    Case("single_voxel", (1, 1, 1, 1, 1), (1.0, 1.0, 1.0)),
    Case("empty_batch", (0, 2, 8, 8, 8), (1.0, 1.0, 1.0)),
    Case("empty_axis", (1, 2, 8, 0, 8), (1.0, 1.0, 1.0)),
    Case("identity", (1, 1, 6, 7, 8), (0.0, 0.0, 0.0)),
    Case("one_axis_only", (1, 1, 6, 7, 8), (0.0, 1.0, 0.0)),
    Case("last_axis_only", (1, 1, 6, 7, 8), (0.0, 0.0, 1.0)),
    Case("tiny_sigma", (1, 1, 6, 7, 8), (0.05, 0.1, 0.2)),
    Case("radius_beyond_volume", (1, 1, 5, 6, 7), (4.0, 9.0, 6.0)),
    Case("short_truncation", (1, 1, 12, 13, 14), (2.0, 2.0, 2.0), {"truncated": 1.0}),
    Case("normalized", (1, 1, 12, 13, 14), (1.0, 2.0, 3.0), {"normalize": True}),
    Case("channels_last", (2, 3, 9, 10, 11), (1.0, 1.5, 2.0), view="channels_last"),
    Case("channels_last_image", (2, 5, 21, 22), (1.0, 1.5), view="channels_last"),
    Case("transposed", (1, 2, 9, 10, 23), (1.0, 1.5, 2.0), view="transposed"),
    Case("cropped", (2, 2, 9, 10, 11), (1.0, 1.5, 2.0), view="cropped"),
    Case("sliced", (1, 2, 9, 10, 11), (1.0, 1.5, 2.0), view="sliced"),
    Case("batch_last", (3, 1, 9, 10, 11), (1.0, 1.5, 2.0), view="batch_last"),
    Case("expanded", (1, 4, 9, 10, 11), (1.0, 1.5, 2.0), view="expanded"),
]

# A CT; too large for the suites.
PRODUCTION = Case("production", (1, 1, 256, 256, 192), (2.0, 2.0, 1.5))


def named(name: str) -> Case:
    """Returns the case of that name."""
    return next(case for case in [*CASES, PRODUCTION] if case.name == name)
