# SPDX-License-Identifier: Apache-2.0
"""Defines invertible scalings of SUV, in which a network sees cold and hot voxels alike and nothing is clipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A network's output beyond this is about to overflow: sinh(12) is 81 000 SUV, 500 times a hot bladder.
_LARGEST = 12.0


@dataclass(frozen=True)
class Scaling:
    """Pairs `forward`, from SUV to the network's input, with `inverse`, its inverse on all values that a network may
    give."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _unroot(y: Tensor) -> Tensor:
    # Below the end of its branch the square would turn round, so it continues linearly.
    return torch.where(y > -0.25, (y + 0.5).square() - 0.25, 0.5 * (y + 0.25) - 0.1875)


SCALINGS: dict[str, Scaling] = {
    # This is linear below 1 SUV, logarithmic above: a lesion's relative error weighs the same at SUV 5 and 50.
    "asinh": Scaling(torch.asinh, lambda y: torch.sinh(y.clamp(-_LARGEST, _LARGEST))),
    # The root evens out counting noise; a quarter SUV keeps the slope at zero finite.
    "sqrt": Scaling(lambda suv: (suv.clamp_min(0) + 0.25).sqrt() - 0.5, _unroot),
}


def scaling(name: str) -> Scaling:
    """Returns a scaling by its name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in SCALINGS:
        raise ValueError(f"scaling is {name!r}; expected one of {', '.join(SCALINGS)}")
    return SCALINGS[name]
