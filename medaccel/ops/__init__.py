# SPDX-License-Identifier: Apache-2.0
"""Holds the ops: one folder each, with the public function, its plain PyTorch reference and its registration."""

from medaccel.ops._dispatch import use_reference
from medaccel.ops.diffusion_step import diffusion_step
from medaccel.ops.gaussian import gaussian_filter
from medaccel.ops.instance_norm import instance_norm_act
from medaccel.ops.nt_xent import info_nce_loss, nt_xent_loss
from medaccel.ops.pixel_consistency import pixel_consistency_loss
from medaccel.ops.pixel_contrast import pixel_contrastive_loss
from medaccel.ops.propagation import pixel_propagation
from medaccel.ops.window_attention import shifted_window_attention

__all__ = [
    "diffusion_step",
    "gaussian_filter",
    "info_nce_loss",
    "instance_norm_act",
    "nt_xent_loss",
    "pixel_consistency_loss",
    "pixel_contrastive_loss",
    "pixel_propagation",
    "shifted_window_attention",
    "use_reference",
]
