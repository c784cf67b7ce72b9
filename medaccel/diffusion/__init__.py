# SPDX-License-Identifier: Apache-2.0
"""Diffusion: schedulers with MONAI's interface, samplers and noising on the fused step."""

from medaccel.diffusion.noising import noised
from medaccel.diffusion.schedulers import DDIMScheduler, DDPMScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler", "noised"]
