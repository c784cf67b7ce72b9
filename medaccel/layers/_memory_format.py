# SPDX-License-Identifier: Apache-2.0
"""Chooses the memory layout in which the convolutions of accelerated blocks run: the one place where the rule stands.

A layout changes strides, not values, and is handed on: convolutions, norms, sums and concatenations keep the one that
they are given. So a network copies where a contiguous map first meets a convolution that wants channels last, and
nowhere else. Parameters stay as they lie; torch reorders a weight in each call, which is small beside a map.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from medaccel.ops._dispatch import autocast_dtype
from medaccel.ops._transforms import in_transform

ChannelsLast = bool | Literal["auto"]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_LEAST_VOXELS = 512


def pays_on_cuda(dtype: torch.dtype, channels_in: int, channels_out: int, voxels: int) -> bool:
    """Tells whether a convolution on a GPU should run channels last.

    The matrix units read channels-last bf16 and fp16, in vectors of eight channels; of contiguous maps cuDNN makes
    such copies itself, one each way in every call. Few channels (an image's) are padded in either layout, and decide
    about their output's. In a map of few voxels the weight is larger than the map, and reordering it costs more. The
    rule was not measured yet: `channels_last=` of `accelerate` overrides it.

    Args:
        dtype: the convolution's, which is autocast's where it is on.
        channels_in, channels_out: the convolution's.
        voxels: the number of all samples' together.
    """
    if dtype not in (torch.bfloat16, torch.float16) or voxels < _LEAST_VOXELS:
        return False
    return channels_out % 8 == 0 and (channels_in % 8 == 0 or channels_in < 8)


def pays_on_cpu(x: Tensor) -> bool:
    """Tells whether a convolution on a CPU should run channels last.

    oneDNN's 3-D convolutions in fp32 take up to twice as long on contiguous maps. torch leaves small ones (the second
    condition is its own) to another routine, and for thin ones the copy costs what it saves.
    """
    handed_over = x.dim() == 5 and (x.shape[0] > 1 or x[0, :, :, :, 0].numel() > 20480)
    return handed_over and x.dtype == torch.float32 and x.shape[1] >= 12


def for_convolution(x: Tensor, channels_out: int, setting: ChannelsLast) -> Tensor:
    """Returns the map (B, C, *spatial) in the layout in which its convolution should run: a copy, a view, or itself.

    Args:
        x: the map.
        channels_out: those of the convolution.
        setting: "auto" follows the rule of the device; True and False override it. False leaves each map as it comes.
    """
    # The transforms of torch.func have no rule for a layout.
    if setting is False or x.dim() not in _FORMATS or in_transform():
        return x
    if setting != "auto":
        wanted = True
    elif x.device.type == "cuda":
        channels = x.shape[1]
        wanted = pays_on_cuda(autocast_dtype(x), channels, channels_out, x.numel() // max(channels, 1))
    else:
        wanted = pays_on_cpu(x)
    return channels_last(x) if wanted else x


def channels_last(x: Tensor) -> Tensor:
    """Returns the map (B, C, *spatial) with the channels last in memory."""
    layout = _FORMATS[x.dim()]
    if x.shape[1] == 1 and x.is_contiguous():
        # One channel lies in memory as both layouts have it; the strides tell convolutions which of them is meant.
        return x.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    if x.is_contiguous(memory_format=layout):
        return x
    if x.device.type == "cpu":
        y: Tensor = _ContiguousGradient.apply(x)
        return y
    return x.contiguous(memory_format=layout)


class _ContiguousGradient(torch.autograd.Function):
    """Copies a map to channels last, and its gradient back to contiguous memory.

    The gradient goes back because the CPU's instance norm of torch further up, at batch 1, computes wrong gradients
    from a channels-last one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=_FORMATS[x.dim()])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
