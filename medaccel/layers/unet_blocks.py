# SPDX-License-Identifier: Apache-2.0
"""MONAI's convolution blocks with norm, residual and activation in one pass over memory."""

from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock as MonaiUnetBasicBlock
from monai.networks.blocks.dynunet_block import UnetResBlock as MonaiUnetResBlock
from torch import Tensor, nn

from medaccel.layers._hooks import bypass_problem
from medaccel.ops import instance_norm
from medaccel.ops._dispatch import exporting, refuse_scripting
from medaccel.ops.instance_norm import instance_norm_act

_RANKS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


def _slope(activation: Any) -> float:
    return float(activation.negative_slope) if type(activation) is nn.LeakyReLU else 0.0


def _normalise(norm: Any, x: Tensor, residual: Tensor | None = None, slope: float | None = None) -> Tensor:
    return instance_norm_act(x, norm.weight, norm.bias, residual=residual, eps=norm.eps, negative_slope=slope)


def _served(block: Any, x: Tensor) -> bool:
    """Whether this call is the op's: batched, not for an exporter, and on a device that it has a kernel for."""
    return not exporting() and x.dim() == _RANKS[type(block.norm1)] and instance_norm.unsupported(x) is None


class _ChannelsLast(torch.autograd.Function):
    """Copies a map to channels last, and its gradient back.

    Back, because a torch instance norm further up, at batch 1, makes wrong gradients of a channels-last one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last_3d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _for_convolution(x: Tensor) -> Tensor:
    """The map in the layout that its convolution is fastest in, whose norm then stays in it.

    oneDNN's 3-D convolutions in fp32 take up to twice as long on contiguous maps. torch leaves small ones (the
    second condition is its own) to another routine, and for thin ones the copy costs what it saves.
    """
    handed_over = x.dim() == 5 and (x.shape[0] > 1 or x[0, :, :, :, 0].numel() > 20480)
    if not handed_over or x.dtype != torch.float32 or x.shape[1] < 12:
        return x
    if x.is_contiguous(memory_format=torch.channels_last_3d):
        return x
    y: Tensor = _ChannelsLast.apply(x)
    return y


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """The convolution, in fp32 where torch's own in bf16 is wrong.

    On a CPU with AVX-512 BF16, torch 2.13's 3-D convolution of a map that is two slices deep leaves parts of its
    weight's gradient unwritten: whatever lay in that memory. A Swin UNETR's deepest map at 64³ is 2³.
    """
    if x.dim() == 5 and x.shape[2] == 2 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return torch.as_tensor(conv(x.float()))
    return torch.as_tensor(conv(x))


class UnetResBlock(MonaiUnetResBlock):
    """Drop-in for `monai.networks.blocks.dynunet_block.UnetResBlock`, same constructor and state_dict.

    Each normalisation takes the residual and the activation along, in the memory layout that the convolution gave its
    result. Large fp32 maps are brought to channels last, where convolutions are faster.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward(self, inp: Tensor) -> Tensor:
        """(B, in_channels, *spatial) to (B, out_channels, *spatial / stride)."""
        if not _served(self, inp):
            return super().forward(inp)
        slope = _slope(self.lrelu)
        inp = _for_convolution(inp)
        y = _normalise(self.norm1, _convolve(self.conv1, inp), slope=slope)
        y = _convolve(self.conv2, _for_convolution(y))
        residual = _normalise(self.norm3, self.conv3(inp)) if self.downsample else inp
        return _normalise(self.norm2, y, residual, slope)


class UnetBasicBlock(MonaiUnetBasicBlock):
    """Drop-in for `monai.networks.blocks.dynunet_block.UnetBasicBlock`, same constructor and state_dict."""

    __prepare_scriptable__ = refuse_scripting

    def forward(self, inp: Tensor) -> Tensor:
        """(B, in_channels, *spatial) to (B, out_channels, *spatial / stride)."""
        if not _served(self, inp):
            return super().forward(inp)
        slope = _slope(self.lrelu)
        y = _normalise(self.norm1, _convolve(self.conv1, _for_convolution(inp)), slope=slope)
        return _normalise(self.norm2, _convolve(self.conv2, _for_convolution(y)), slope=slope)


def block_unsupported(module: Any) -> str | None:
    """None where our block may take the place of MONAI's; else why not."""
    norms = [name for name in ("norm1", "norm2", "norm3") if hasattr(module, name)]
    for name in norms:
        norm = getattr(module, name)
        if type(norm) not in _RANKS:
            return f"its {name} is a {type(norm).__qualname__}, not an instance norm of torch's"
        if norm.track_running_stats:
            return f"its {name} keeps running statistics"
    if type(module.lrelu) not in (nn.LeakyReLU, nn.ReLU):
        return f"its activation is a {type(module.lrelu).__qualname__}, not a (leaky) ReLU"
    problems = (bypass_problem(getattr(module, name), name) for name in (*norms, "lrelu"))
    return next((problem for problem in problems if problem), None)
