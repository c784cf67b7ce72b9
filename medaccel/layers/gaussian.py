# SPDX-License-Identifier: Apache-2.0
"""MONAI's GaussianFilter on medaccel's op."""

import torch
from monai.networks.layers import GaussianFilter as MonaiGaussianFilter
from torch import Tensor, nn

from medaccel.ops import gaussian_filter


def filter_unsupported(module: nn.Module) -> str | None:
    """None where `GaussianFilter` may take the place of MONAI's; else why not."""
    approx = str(getattr(module, "approx", ""))
    if approx.lower() not in ("erf", "sampled", "scalespace"):
        return f"its approx is {approx!r}, which medaccel does not know"
    return None


class GaussianFilter(MonaiGaussianFilter):
    """Drop-in for `monai.networks.layers.GaussianFilter`, with MONAI's constructor, attributes and state_dict.

    ``GaussianFilter(spatial_dims, sigma, truncated=4.0, approx="erf", requires_grad=False)``: σ in voxels, one number
    or one per axis; with `requires_grad`, the parameters ``kernel_sigma_0``, ``kernel_sigma_1``, … are learnt.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape; zeros outside, taps not renormalised (MONAI's semantics)."""
        sigma = torch.stack([s.reshape(()) for s in self.sigma])
        return gaussian_filter(x, sigma, truncated=self.truncated, approx=self.approx.lower())
