# SPDX-License-Identifier: Apache-2.0
"""Holds sample inputs of the ops on two views' pixels, shared by their tests, `medaccel verify` and their
benchmarks."""

from dataclasses import dataclass

import torch
from torch import Tensor


def centres(sizes: tuple[int, ...], spacing: tuple[float, ...], corner: tuple[float, ...]) -> Tensor:
    """Returns the centres (pixels, axes) of a feature map's pixels, in row-major order."""
    axes = [
        c + s * (torch.arange(n, dtype=torch.float64) + 0.5) for n, s, c in zip(sizes, spacing, corner, strict=True)
    ]
    return torch.cartesian_prod(*axes).reshape(-1, len(sizes))


@dataclass(frozen=True)
class Views:
    """Describes two feature maps of crops that overlap, the second one shifted and, maybe, finer or coarser."""

    name: str
    sizes: tuple[int, ...]
    channels: int
    batch: int = 2
    key_sizes: tuple[int, ...] | None = None
    zoom: float = 1.0  # size of the second view's pixels
    shift: float = 0.4  # shift of the second view, in pixels of the first
    radius: float = 1.2
    temperature: float = 0.3
    view: str = ""

    def tensors(self, dtype: torch.dtype = torch.float32, coords: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Returns query, key, query_coords, key_coords and radius (B,)."""
        generator = torch.Generator().manual_seed(0)
        rank = len(self.sizes)
        spacing = (1.0, 1.25, 0.75)[:rank]
        at_query = centres(self.sizes, spacing, (0.0,) * rank)
        zoomed = tuple(s * self.zoom for s in spacing)
        at_key = centres(self.key_sizes or self.sizes, zoomed, tuple(s * self.shift for s in spacing))
        pixels = (len(at_query), len(at_key))
        wider = 2 if self.view == "sliced" else 1
        query, key = (
            torch.randn(self.batch, n * wider, self.channels * wider, generator=generator, dtype=torch.float64)
            for n in pixels
        )
        if self.view == "sliced":
            query, key = query[:, ::2, ::2], key[:, ::2, ::2]
        elif self.view == "channels_first":
            query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
        radius = self.radius * torch.linspace(1.0, 1.3, self.batch, dtype=coords)
        features = [t.to(dtype) for t in (query, key)]
        return (*features, *(t.to(coords).expand(self.batch, -1, -1) for t in (at_query, at_key)), radius)

    def __str__(self) -> str:
        return self.name


CASES = [
    Views("volume", (6, 7, 8), 64),
    Views("image", (13, 17), 32, radius=1.5),
    Views("signal", (301,), 8),
    Views("finer_view", (5, 6, 4), 24, key_sizes=(7, 9, 8), zoom=0.55),
    Views("coarser_view", (9, 8, 8), 20, key_sizes=(3, 4, 5), zoom=2.1, radius=1.5),
    Views("half_overlap", (8, 8, 8), 16, shift=4.2),
    Views("no_overlap", (4, 5, 6), 16, shift=40.0),
    Views("one_pixel", (1, 1, 1), 7),
    Views("one_channel", (5, 4, 3), 1),
    Views("odd_channels", (7, 5, 9), 37),
    Views("many_channels", (4, 5, 6), 260, batch=1),
    Views("all_positive", (4, 5, 6), 16, radius=100.0),
    Views("sharp", (6, 7, 8), 48, temperature=0.01),
    Views("blunt", (6, 7, 8), 48, temperature=10.0),
    Views("several_chunks", (9, 10, 11), 12),
    Views("empty_batch", (4, 4), 8, batch=0),
    Views("no_queries", (0, 4), 8, key_sizes=(3, 4)),
    Views("no_keys", (3, 4), 8, key_sizes=(4, 0)),
    Views("sliced", (5, 6, 7), 12, view="sliced"),
    Views("channels_first", (5, 6, 7), 12, view="channels_first"),
]

# Two feature maps of 16³ pixels; too large for the suites.
PRODUCTION = Views("production", (16, 16, 16), 64)


def named(name: str) -> Views:
    """Returns the case of that name."""
    return next(case for case in [*CASES, PRODUCTION] if case.name == name)
