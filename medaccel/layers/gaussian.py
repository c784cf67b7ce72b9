# SPDX-License-Identifier: Apache-2.0
"""MONAI's GaussianFilter on medaccel's op."""

from typing import Any, ClassVar

import torch
from monai.networks.layers import GaussianFilter as MonaiGaussianFilter
from torch import Tensor

from medaccel.layers._bypass import number, warn_once
from medaccel.ops import gaussian_filter

_APPROX = ("erf", "sampled", "scalespace")


def filter_unsupported(module: Any) -> str | None:
    """None where `GaussianFilter` may take the place of MONAI's; else why not."""
    if MonaiGaussianFilter.forward is not GaussianFilter._MONAI_FORWARD:
        return "MONAI's GaussianFilter.forward has been replaced"
    if str(module.approx).lower() not in _APPROX:
        return f"its approx is {module.approx!r}, which medaccel does not know"
    if not number(module.truncated):
        return f"its truncated is a {type(module.truncated).__name__}; expected a number"
    if any(s.numel() != 1 for s in module.sigma):
        return "its sigma has several values for an axis"
    return None


class GaussianFilter(MonaiGaussianFilter):
    """Drop-in for `monai.networks.layers.GaussianFilter`, with MONAI's constructor, attributes and state_dict.

    ``GaussianFilter(spatial_dims, sigma, truncated=4.0, approx="erf", requires_grad=False)``: σ in voxels, one number
    or one per axis; with `requires_grad`, the parameters ``kernel_sigma_0``, ``kernel_sigma_1``, … are learnt.
    """

    _MONAI_FORWARD: ClassVar = MonaiGaussianFilter.forward

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape; zeros outside, taps not renormalised (MONAI's semantics)."""
        if (reason := filter_unsupported(self)) is not None:
            warn_once(self, reason)
            return super().forward(x)
        sigma = torch.stack([s.reshape(()) for s in self.sigma])
        try:
            return gaussian_filter(x, sigma, truncated=self.truncated, approx=self.approx.lower())
        except ValueError:
            # A σ that training has driven below 0: MONAI takes its magnitude, with three taps.
            if torch.compiler.is_compiling() or not any(float(s.detach()) < 0 for s in self.sigma):
                raise
        warn_once(self, "its sigma is negative")
        return super().forward(x)
