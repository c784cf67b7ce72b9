# SPDX-License-Identifier: Apache-2.0
"""MONAI's GaussianFilter on medaccel's op."""

import warnings

import torch
from monai.networks.layers import GaussianFilter as MonaiGaussianFilter
from monai.networks.layers.simplelayers import separable_filtering
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from medaccel.ops import gaussian_filter
from medaccel.ops._dispatch import exporting_plainly, refuse_scripting
from medaccel.ops.gaussian import reference


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

    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape; zeros outside, taps not renormalised (MONAI's semantics)."""
        if exporting_plainly():
            return torch.as_tensor(separable_filtering(x, self._constant_taps(x)))
        sigma = torch.stack([s.reshape(()) for s in self.sigma])
        return gaussian_filter(x, sigma, truncated=self.truncated, approx=self.approx.lower())

    def _constant_taps(self, x: Tensor) -> list[Tensor]:
        """Taps that an exported graph holds as constants, as σ is now: how many there are depends on it."""
        with warnings.catch_warnings(), _disable_current_modes(), torch.no_grad():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of the constants
            taps = [reference.taps(s.reshape(()), self.truncated, self.approx.lower(), False) for s in self.sigma]
            return [torch.from_numpy(t.cpu().numpy()).to(x.device, x.dtype) for t in taps]
