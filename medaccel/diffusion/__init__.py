# SPDX-License-Identifier: Apache-2.0
"""Diffuses and denoises volumes on the fused step: schedulers with MONAI's interface, samplers, SDEdit and
noising."""

from medaccel.diffusion.nets import TimeConditionedSwinUNETR, running_average, small_unet
from medaccel.diffusion.noising import noised
from medaccel.diffusion.samplers import Sampler, sample_rectified_flow
from medaccel.diffusion.schedulers import DDIMScheduler, DDPMScheduler
from medaccel.diffusion.sde import VESDE, VPSDE
from medaccel.diffusion.sdedit import SDEdit, SDEditResult

__all__ = [
    "VESDE",
    "VPSDE",
    "DDIMScheduler",
    "DDPMScheduler",
    "SDEdit",
    "SDEditResult",
    "Sampler",
    "TimeConditionedSwinUNETR",
    "noised",
    "running_average",
    "sample_rectified_flow",
    "small_unet",
]
