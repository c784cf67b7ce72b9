# SPDX-License-Identifier: Apache-2.0
"""Runs MONAI's GaussianFilter on medaccel's op."""

import warnings
from typing import Any, ClassVar

import torch
from monai.networks.layers import GaussianFilter as MonaiGaussianFilter
from monai.networks.layers.simplelayers import separable_filtering
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from medaccel.layers._bypass import number, warn_once
from medaccel.ops import gaussian_filter
from medaccel.ops._dispatch import exporting_plainly, refuse_scripting
from medaccel.ops.gaussian import reference

_APPROX = ("erf", "sampled", "scalespace")


def filter_unsupported(module: Any) -> str | None:
    """Says why `GaussianFilter` can't take the place of MONAI's; returns None if it can."""
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
    """This class is a drop-in for `monai.networks.layers.GaussianFilter`, with MONAI's constructor, attributes and
    state_dict.

    ``GaussianFilter(spatial_dims, sigma, truncated=4.0, approx="erf", requires_grad=False)``: σ in voxels, one number
    or one per axis; with `requires_grad`, the parameters ``kernel_sigma_0``, ``kernel_sigma_1``, … are learnt.
    """

    _MONAI_FORWARD: ClassVar = MonaiGaussianFilter.forward
    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor) -> Tensor:
        """Filters (B, C, *spatial) and keeps its shape; the outside counts as zeros and the taps are not
        renormalised, as in MONAI."""
        if (reason := filter_unsupported(self)) is not None:
            warn_once(self, reason)
            return super().forward(x)
        if exporting_plainly():
            return torch.as_tensor(separable_filtering(x, self._constant_taps(x)))
        sigma = torch.stack([s.reshape(()) for s in self.sigma])
        try:
            return gaussian_filter(x, sigma, truncated=self.truncated, approx=self.approx.lower())
        except ValueError:
            # If training has driven σ below 0, MONAI takes its magnitude, with three taps.
            if torch.compiler.is_compiling() or not any(float(s.detach()) < 0 for s in self.sigma):
                raise
        warn_once(self, "its sigma is negative")
        return super().forward(x)

    def _constant_taps(self, x: Tensor) -> list[Tensor]:
        """Returns the taps for the present σ, which an exported graph holds as constants, since their number depends
        on σ."""
        with warnings.catch_warnings(), _disable_current_modes(), torch.no_grad():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # torch.jit.trace warns of the constants
            taps = [reference.taps(s.reshape(()), self.truncated, self.approx.lower(), False) for s in self.sigma]
            return [torch.from_numpy(t.cpu().numpy()).to(x.device, x.dtype) for t in taps]
