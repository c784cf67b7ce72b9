# SPDX-License-Identifier: Apache-2.0
"""The ops: one folder each, with the public function, its plain PyTorch reference and its registration."""

from medaccel.ops._dispatch import use_reference
from medaccel.ops.diffusion_step import diffusion_step
from medaccel.ops.gaussian import gaussian_filter
from medaccel.ops.instance_norm import instance_norm_act
from medaccel.ops.window_attention import shifted_window_attention

__all__ = ["diffusion_step", "gaussian_filter", "instance_norm_act", "shifted_window_attention", "use_reference"]
