# SPDX-License-Identifier: Apache-2.0
"""Computes norm, residual and activation of MONAI's convolution blocks in one pass over memory."""

from typing import Any, ClassVar

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock as MonaiUnetBasicBlock
from monai.networks.blocks.dynunet_block import UnetResBlock as MonaiUnetResBlock
from torch import Tensor, nn

from medaccel.layers._bypass import Child, number, problem, warn_once
from medaccel.layers._memory_format import ChannelsLast, for_convolution
from medaccel.ops import instance_norm
from medaccel.ops._dispatch import exporting, refuse_scripting
from medaccel.ops.instance_norm import instance_norm_act

_RANKS = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


def _slope(activation: Any) -> float:
    return float(activation.negative_slope) if type(activation) is nn.LeakyReLU else 0.0


def _normalise(norm: Any, x: Tensor, residual: Tensor | None = None, slope: float | None = None) -> Tensor:
    return instance_norm_act(x, norm.weight, norm.bias, residual=residual, eps=norm.eps, negative_slope=slope)


def _norm_values(norm: Any) -> str | None:
    """Says what the op can't compute of this norm; returns None if it computes it."""
    if norm.track_running_stats or norm.running_mean is not None or norm.running_var is not None:
        return "keeps running statistics"
    # With a smaller eps, a constant channel would be 0 · ∞.
    return None if number(norm.eps) and norm.eps >= 1e-37 else f"has eps={norm.eps!r}; expected a number above 0"


def _slope_values(activation: Any) -> str | None:
    slope = getattr(activation, "negative_slope", 0.0)
    return (
        None if number(slope) else f"has negative_slope={slope!r}; expected a number, since a kernel has no gradient"
    )


_NORM = (tuple(_RANKS), "an instance norm of torch's", _norm_values)
_ACTIVATION = ((nn.LeakyReLU, nn.ReLU), "torch's LeakyReLU or ReLU", _slope_values)


def _served(block: Any, x: Tensor) -> bool:
    """Tells whether the op serves this call: stock children, batched input, no exporter, a device that has a
    kernel."""
    if exporting():  # asked first: an exporter shows children through classes of its own
        return False
    if (reason := block.unserved()) is not None:
        warn_once(block, reason)
        return False
    return x.dim() == _RANKS[type(block.norm1)] and instance_norm.unsupported(x) is None


def _unserved(block: Any, ours: Any, monais: type[nn.Module]) -> str | None:
    """Says why the kernels can't compute this block as it is now; returns None if they can."""
    if monais.forward is not ours._MONAI_FORWARD:
        return f"MONAI's {monais.__name__}.forward has been replaced"
    if (reason := problem(block, ours.BYPASSED)) is not None:
        return reason
    kinds = {type(block.norm1), type(block.norm2)}
    return None if len(kinds) == 1 else "its norms are of different ranks"


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Computes the convolution, in fp32 where torch's own in bf16 is wrong.

    On a CPU with AVX-512 BF16, torch 2.13's 3-D convolution of a map that is two slices deep leaves parts of its
    weight's gradient unwritten, so it holds whatever lay in that memory. A Swin UNETR's deepest map at 64³ is 2³.
    """
    if x.dim() == 5 and x.shape[2] == 2 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return torch.as_tensor(conv(x.float()))
    return torch.as_tensor(conv(x))


class UnetResBlock(MonaiUnetResBlock):
    """This class is a drop-in for `monai.networks.blocks.dynunet_block.UnetResBlock`, same constructor and
    state_dict.

    Each normalisation takes the residual and the activation along, in the memory layout that the convolution gave its
    result. Where convolutions are faster channels last (large fp32 maps on a CPU, bf16 and fp16 on a GPU), maps are
    brought to it; `channels_last` overrides the rule, as `accelerate` says. Where a bypassed child is not torch's
    own, it runs MONAI's forward and warns once.
    """

    channels_last: ChannelsLast = "auto"

    BYPASSED: ClassVar = (
        Child("norm1", *_NORM),
        Child("norm2", *_NORM),
        Child("norm3", *_NORM, optional=True),
        Child("lrelu", *_ACTIVATION),
    )
    _MONAI_FORWARD: ClassVar = MonaiUnetResBlock.forward
    __prepare_scriptable__ = refuse_scripting

    def unserved(self) -> str | None:
        """Says why the kernels can't compute this block as it is now; returns None if they can."""
        return _unserved(self, UnetResBlock, MonaiUnetResBlock)

    def forward(self, inp: Tensor) -> Tensor:
        """Maps (B, in_channels, *spatial) to (B, out_channels, *spatial / stride)."""
        if not _served(self, inp):
            return super().forward(inp)
        slope = _slope(self.lrelu)
        inp = for_convolution(inp, self.norm1.num_features, self.channels_last)
        y = _normalise(self.norm1, _convolve(self.conv1, inp), slope=slope)
        y = _convolve(self.conv2, for_convolution(y, self.norm2.num_features, self.channels_last))
        residual = self.conv3(inp) if hasattr(self, "conv3") else inp
        if hasattr(self, "norm3"):
            residual = _normalise(self.norm3, residual)
        return _normalise(self.norm2, y, residual, slope)


class UnetBasicBlock(MonaiUnetBasicBlock):
    """This class is a drop-in for `monai.networks.blocks.dynunet_block.UnetBasicBlock`, same constructor and
    state_dict.

    `channels_last` is that of `UnetResBlock`. Where a bypassed child is not torch's own, it runs MONAI's forward and
    warns once.
    """

    channels_last: ChannelsLast = "auto"
    BYPASSED: ClassVar = (Child("norm1", *_NORM), Child("norm2", *_NORM), Child("lrelu", *_ACTIVATION))
    _MONAI_FORWARD: ClassVar = MonaiUnetBasicBlock.forward

    def unserved(self) -> str | None:
        """Says why the kernels can't compute this block as it is now; returns None if they can."""
        return _unserved(self, UnetBasicBlock, MonaiUnetBasicBlock)

    __prepare_scriptable__ = refuse_scripting

    def forward(self, inp: Tensor) -> Tensor:
        """Maps (B, in_channels, *spatial) to (B, out_channels, *spatial / stride)."""
        if not _served(self, inp):
            return super().forward(inp)
        slope = _slope(self.lrelu)
        inp = for_convolution(inp, self.norm1.num_features, self.channels_last)
        y = _normalise(self.norm1, _convolve(self.conv1, inp), slope=slope)
        y = for_convolution(y, self.norm2.num_features, self.channels_last)
        return _normalise(self.norm2, _convolve(self.conv2, y), slope=slope)


def residual_block_unsupported(module: Any) -> str | None:
    """Says why `UnetResBlock` can't take the place of MONAI's; returns None if it can."""
    return UnetResBlock.unserved(module)


def basic_block_unsupported(module: Any) -> str | None:
    """Says why `UnetBasicBlock` can't take the place of MONAI's; returns None if it can."""
    return UnetBasicBlock.unserved(module)
