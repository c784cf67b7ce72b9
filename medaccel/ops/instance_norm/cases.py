# SPDX-License-Identifier: Apache-2.0
"""Holds sample inputs of instance norm, shared by its tests, `medaccel verify` and its benchmark."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Describes one call. `view` says how the input lies in memory; `others` how residual and gradient do."""

    name: str
    shape: tuple[int, ...]
    view: str = ""
    others: str = ""
    residual: bool = False
    affine: bool = False
    slope: float | None = 0.01
    offset: float = 0.0  # the mean, in standard deviations

    def tensors(
        self, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """Returns input, weight, bias, residual and the output's gradient."""
        generator = torch.Generator().manual_seed(0)
        random = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
        x, residual, grad = (random(*self.shape) for _ in range(3))
        affine = (random(self.shape[1]), random(self.shape[1])) if self.affine else (None, None)
        added = laid(residual, self.others) if self.residual else None
        return laid(x + self.offset, self.view), *affine, added, laid(grad, self.others)

    def __str__(self) -> str:
        return self.name


def laid(x: Tensor, view: str) -> Tensor:
    """Returns `x` in the memory layout of a case's `view`."""
    if view == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if view == "sliced":
        whole = x.new_empty([2 * s for s in x.shape])
        part = whole[tuple(slice(0, None, 2) for _ in x.shape)]
        return part.copy_(x)
    return x[:1].expand_as(x) if view == "expanded" else x


CASES = [
    Case("plain", (2, 3, 5, 6, 7)),
    Case("channels_last", (2, 3, 5, 6, 7), "last", "last"),
    Case("several_chunks", (1, 2, 17, 18, 19)),
    Case("several_chunks_channels_last", (2, 24, 9, 10, 11), "last", "last", residual=True, affine=True),
    Case("residual", (2, 5, 4, 5, 6), residual=True, affine=True),
    Case("residual_relu", (2, 5, 4, 5, 6), residual=True, slope=0.0),
    Case("residual_negative_slope", (2, 5, 4, 5, 6), residual=True, affine=True, slope=-0.5),
    Case("residual_without_activation", (1, 5, 4, 5, 6), "last", "last", residual=True, slope=None),
    Case("negative_slope", (1, 5, 9, 8), slope=-2.0, affine=True),
    Case("norm_alone", (2, 4, 6, 7), slope=None),
    Case("affine", (2, 4, 31), affine=True),
    Case("large_mean", (1, 3, 12, 12, 12), offset=1000.0),
    Case("large_mean_channels_last", (1, 3, 12, 12, 12), "last", "last", offset=1000.0),
    Case("two_voxels", (3, 2, 1, 2, 1)),
    Case("one_channel", (2, 1, 3, 4, 5), "last"),
    Case("many_channels", (1, 70, 2, 3, 3), "last", "last", residual=True),
    Case("residual_of_another_layout", (2, 3, 4, 5, 6), "last", "", residual=True),
    Case("gradient_of_another_layout", (2, 3, 4, 5, 6), "", "last", residual=True),
    Case("sliced", (2, 3, 4, 5, 6), "sliced", "sliced", residual=True),
    Case("expanded", (2, 3, 4, 5), "expanded"),
    Case("empty_batch", (0, 3, 4, 5), residual=True, affine=True),
    Case("no_channels", (2, 0, 4, 5)),
]

# The last map of a Swin UNETR with 48 features; too large for the suites.
PRODUCTION = Case("production", (1, 48, 96, 96, 96), residual=True)


def named(name: str) -> Case:
    """Returns the case of that name."""
    return next(case for case in [*CASES, PRODUCTION] if case.name == name)
