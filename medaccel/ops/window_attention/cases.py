# SPDX-License-Identifier: Apache-2.0
"""Holds sample inputs of shifted-window attention, shared by its tests, `medaccel verify` and its benchmark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def relative_position_index(window_size: Sequence[int]) -> Tensor:
    """Returns MONAI's index into a bias table of prod(2·w − 1) rows, (tokens, tokens)."""
    axes = torch.meshgrid(*(torch.arange(w) for w in window_size), indexing="ij")
    position = torch.stack([a.flatten() for a in axes], dim=1)  # (tokens, axes)
    index = torch.zeros(len(position), len(position), dtype=torch.int64)
    for axis, w in enumerate(window_size):
        index = index * (2 * w - 1) + position[:, None, axis] - position[None, :, axis] + w - 1
    return index


@dataclass(frozen=True)
class Case:
    """Describes one call: the map, the windows and the heads."""

    name: str
    sizes: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    heads: int
    head_dim: int
    batch: int = 1
    full_window: tuple[int, ...] | None = None  # the effective window takes a corner of this window's index
    pad: bool = True
    dropout_p: float = 0.0
    spread: float = 1.0  # the standard deviation of q, k and v
    view: str = ""

    def tensors(
        self, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns qkv, bias_table, bias_index and pad_qkv."""
        generator = torch.Generator().manual_seed(seed)
        channels = 3 * self.heads * self.head_dim
        full = self.full_window or self.window
        rows, tokens = math.prod(2 * w - 1 for w in full), math.prod(self.window)
        index = relative_position_index(full)[:tokens, :tokens]
        shape = (self.batch, *self.sizes, channels)
        if self.view == "sliced":
            qkv = torch.randn([2 * s for s in shape], generator=generator, dtype=dtype)[
                tuple(slice(0, None, 2) for _ in shape)
            ]
        elif self.view == "channels_first":
            qkv = torch.randn((self.batch, channels, *self.sizes), generator=generator, dtype=dtype).movedim(1, -1)
        elif self.view == "expanded":
            qkv = torch.randn((1, *shape[1:]), generator=generator, dtype=dtype).expand(shape)
        else:
            qkv = torch.randn(shape, generator=generator, dtype=dtype)
        table = torch.randn(rows, self.heads, generator=generator, dtype=dtype)
        pad = torch.randn(channels, generator=generator, dtype=dtype) if self.pad else None
        return qkv * self.spread, table, index, pad

    def options(self) -> dict[str, Any]:
        """Returns the op's keyword arguments, except pad_qkv."""
        seed = torch.tensor(81985529216486895) if self.dropout_p else None
        return {
            "window_size": self.window,
            "shift_size": self.shift,
            "dropout_p": self.dropout_p,
            "dropout_seed": seed,
        }

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("whole_windows", (8, 8, 8), (4, 4, 4), (0, 0, 0), 2, 8),
    Case("whole_windows_shifted", (8, 8, 8), (4, 4, 4), (2, 2, 2), 2, 8),
    Case("padded", (9, 5, 7), (4, 4, 4), (0, 0, 0), 3, 8),
    Case("padded_shifted", (9, 10, 11), (4, 4, 4), (2, 2, 2), 3, 4, batch=2),
    Case("padding_fills_a_region", (5, 9, 6), (4, 4, 4), (2, 2, 2), 1, 16),
    Case("swin_window", (8, 7, 15), (7, 7, 7), (3, 0, 3), 1, 16, full_window=(7, 7, 7)),
    Case("swin_unetr", (9, 14, 8), (7, 7, 7), (3, 3, 3), 3, 8, batch=2),
    Case("smaller_than_the_window", (3, 9, 5), (3, 4, 4), (0, 2, 2), 2, 8, full_window=(4, 4, 4)),
    Case("one_window", (3, 3, 3), (3, 3, 3), (0, 0, 0), 4, 8, full_window=(7, 7, 7)),
    Case("image", (9, 14), (7, 7), (3, 3), 2, 8, batch=2),
    Case("signal", (37,), (8,), (4,), 2, 8),
    Case("long_signal_window", (1100,), (1100,), (0,), 1, 4),
    Case("single_token", (1, 1, 1), (1, 1, 1), (0, 0, 0), 1, 4),
    Case("window_of_one_token", (3, 2, 3), (1, 1, 1), (0, 0, 0), 1, 4),
    Case("size_one_axes", (1, 9, 1), (1, 4, 1), (0, 2, 0), 2, 8),
    Case("uneven_shift", (9, 9, 9), (4, 3, 2), (1, 2, 1), 2, 8),
    Case("head_dim_32", (5, 6, 5), (4, 4, 4), (2, 2, 2), 2, 32),
    Case("head_dim_64", (4, 4, 4), (4, 4, 4), (0, 0, 0), 1, 64),
    Case("head_dim_5", (5, 6, 5), (4, 4, 4), (2, 2, 2), 2, 5),
    Case("head_dim_70", (4, 5), (3, 3), (1, 1), 1, 70),
    Case("head_dim_1", (5, 6), (3, 3), (1, 1), 3, 1),
    Case("zeros_as_padding", (5, 5, 5), (4, 4, 4), (2, 2, 2), 2, 8, pad=False),
    Case("dropout", (9, 6, 5), (4, 4, 4), (2, 2, 2), 2, 8, batch=2, dropout_p=0.3),
    Case("large_scores", (9, 9, 9), (4, 4, 4), (2, 2, 2), 2, 8, spread=12.0),
    Case("empty_batch", (4, 4, 4), (2, 2, 2), (1, 1, 1), 2, 8, batch=0),
    Case("empty_axis", (4, 0, 4), (2, 2, 2), (0, 0, 0), 2, 8),
    Case("sliced", (5, 6, 7), (3, 3, 3), (1, 1, 1), 2, 8, view="sliced"),
    Case("channels_first", (5, 6, 7), (3, 3, 3), (1, 1, 1), 2, 8, batch=2, view="channels_first"),
    Case("expanded", (5, 6, 7), (3, 3, 3), (1, 1, 1), 2, 8, batch=2, view="expanded"),
]

# The first stage of a Swin UNETR with 48 features at 96³; too large for the suites.
PRODUCTION = Case("production", (48, 48, 48), (7, 7, 7), (3, 3, 3), 3, 16)


def named(name: str) -> Case:
    """Returns the case of that name."""
    return next(case for case in [*CASES, PRODUCTION] if case.name == name)
