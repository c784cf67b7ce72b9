# SPDX-License-Identifier: Apache-2.0
"""Builds the inputs of the networks from a PET, and the residual network that predicts the activity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medaccel.ops import gaussian_filter
from medaccel.restoration.methods.networks.scaling import scaling

# A network sees smoothed copies beside the PET with these σ in mm: about the width of the noise, and twice that. With
# the base "gaussian", the network's output is added to the narrower one: it then starts as a filter.
SMOOTHING = (4.0, 8.0)
BASES = ("gaussian", "nlm")
REFERENCE_SECONDS = 60.0
_CT_SCALE = 1000.0  # HU


class Conditioning(nn.Module):
    """Turns PET, exposure and CT into input channels, in the scaling that the network works in.

    Args:
        name: name of the scaling.
        use_ct: add two channels: HU/1000, and one that tells whether there is a CT.
        base: the image that residuals are added to: the narrower smoothed copy ("gaussian"), or the PET denoised by
            non-local means ("nlm"), which is then a channel.
    """

    def __init__(self, name: str = "asinh", use_ct: bool = False, base: str = "gaussian") -> None:
        super().__init__()
        if base not in BASES:
            raise ValueError(f"base is {base!r}; expected one of {', '.join(BASES)}")
        self.scaling = scaling(name)
        self.use_ct, self.base = use_ct, base
        self.channels = 2 + len(SMOOTHING) + 2 * use_ct + (base == "nlm")

    def forward(
        self,
        volume: Tensor,
        spacing: Tensor,
        seconds: Tensor,
        ct: Tensor | None = None,
        denoised: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the channels (B, C, i, j, k), and the scaled base (B, 1, i, j, k) that a residual is added to.

        Args:
            volume: (B, 1, i, j, k), SUV.
            spacing: (B, 3), mm.
            seconds: (B,), the exposure.
            ct: (B, 1, i, j, k), HU; NaN throughout a sample without a CT; None: no sample has one.
            denoised: (B, 1, i, j, k), SUV, for the base "nlm".
        """
        scaled = [self.scaling.forward(volume)]
        # Residuals are added to the base, so it keeps its precision under autocast.
        with torch.autocast(volume.device.type, enabled=False):
            for sigma in SMOOTHING:
                # The samples of a batch may differ in voxel size.
                smooth = [
                    gaussian_filter(v[None], sigma / s.to("cpu", torch.float64), mode="nearest", normalize=True)
                    for v, s in zip(volume, spacing, strict=True)
                ]
                scaled.append(self.scaling.forward(torch.cat(smooth)))
        exposure = (seconds.to(volume) / REFERENCE_SECONDS).log2()
        channels = [*scaled, exposure[:, None, None, None, None].expand_as(volume)]
        if self.use_ct:
            known = torch.zeros_like(volume) if ct is None else (~ct.isnan()).to(volume)
            hu = torch.zeros_like(volume) if ct is None else ct.nan_to_num(0.0).clamp(-1024, 3000) / _CT_SCALE
            channels += [hu, known]
        base = scaled[1]
        if self.base == "nlm":
            assert denoised is not None
            base = self.scaling.forward(denoised)
            channels.append(base)
        return torch.cat(channels, dim=1), base


class ActivityNet(nn.Module):
    """Adds a network's output, in the scaled domain, to a PET's smoothed or denoised copy.

    The sum predicts the activity, or the target itself.

    Args:
        network: (B, `Conditioning.channels`, i, j, k) → (B, 1, i, j, k).
        conditioning: see there.
    """

    def __init__(self, network: nn.Module, conditioning: Conditioning) -> None:
        super().__init__()
        self.network, self.conditioning = network, conditioning

    def forward(
        self,
        volume: Tensor,
        spacing: Tensor,
        seconds: Tensor,
        ct: Tensor | None = None,
        denoised: Tensor | None = None,
    ) -> Tensor:
        """Predicts (B, 1, i, j, k), SUV; its arguments are those of `Conditioning`."""
        channels, base = self.conditioning(volume, spacing, seconds, ct, denoised)
        return self.conditioning.scaling.inverse(base + self.network(channels).to(base.dtype))


def swin_unetr(channels: int, settings: Mapping[str, Any]) -> nn.Module:
    """Builds MONAI's Swin UNETR with medaccel's kernels; its last layer is near zero, so that the residual starts
    small."""
    from monai.networks.nets import SwinUNETR

    from medaccel._accelerate import accelerate

    network = SwinUNETR(
        in_channels=channels,
        out_channels=1,
        feature_size=int(settings["feature_size"]),
        depths=tuple(settings["depths"]),
        num_heads=tuple(settings["num_heads"]),
        spatial_dims=3,
    )
    last = network.out.conv.conv
    with torch.no_grad():
        last.weight.mul_(0.1)
        assert last.bias is not None
        last.bias.zero_()
    if settings.get("accelerate", True):
        accelerate(network)
    return network


def blend(volume: Tensor, activity: Tensor, seconds: Tensor, target_seconds: float) -> Tensor:
    """Returns E[PET_T | PET_t, λ] = (t·PET_t + (T − t)·λ)/T, with one t per sample; all (B, 1, i, j, k), SUV."""
    weight = (seconds.to(volume) / target_seconds).reshape(-1, *[1] * (volume.dim() - 1))
    return weight * volume + (1 - weight) * activity


def whole(n: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least n."""
    return multiple * math.ceil(n / multiple)
