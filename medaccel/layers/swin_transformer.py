# SPDX-License-Identifier: Apache-2.0
"""Runs the stages of MONAI's Swin transformer without the copies of the map that it makes between them."""

from typing import Any, ClassVar

from monai.networks.blocks import UnetrBasicBlock
from monai.networks.nets.swin_unetr import BasicLayer as MonaiBasicLayer
from monai.networks.nets.swin_unetr import SwinTransformer as MonaiSwinTransformer
from torch import Tensor, nn

from medaccel.layers._memory_format import ChannelsLast, for_convolution
from medaccel.layers.swin import BasicLayer
from medaccel.ops._dispatch import exporting, refuse_scripting


class SwinTransformer(MonaiSwinTransformer):
    """This class is a drop-in for `monai.networks.nets.swin_unetr.SwinTransformer`, same constructor and state_dict.

    A stage works on channels-last maps and returns one. MONAI copies each to contiguous memory, and the next stage
    copies it back; here it is handed on. `channels_last` is that of `UnetResBlock`, for the first convolution.
    """

    channels_last: ChannelsLast = "auto"
    _MONAI_FORWARD: ClassVar = MonaiSwinTransformer.forward
    __prepare_scriptable__ = refuse_scripting

    def forward(self, x: Tensor, normalize: bool = True) -> list[Tensor]:
        """Maps (B, in_channels, *spatial) to the maps before and after each of the four stages."""
        if exporting() or MonaiSwinTransformer.forward is not SwinTransformer._MONAI_FORWARD:
            maps: list[Tensor] = super().forward(x, normalize)
            return maps
        x = self.pos_drop(self.patch_embed(for_convolution(x, self.embed_dim, self.channels_last)))
        outputs = [self.proj_out(x, normalize)]
        for number in (1, 2, 3, 4):
            children: Any = self._modules
            if self.use_v2:
                convolutions = children[f"layers{number}c"][0]
                x = convolutions(_handed_on(x, convolutions))
            stage = children[f"layers{number}"][0]
            x = stage(_handed_on(x, stage))
            outputs.append(self.proj_out(x, normalize))
        return outputs


def _handed_on(x: Tensor, module: nn.Module) -> Tensor:
    """Returns the map as `module` expects it: in contiguous memory, unless it is known to take any."""
    kind = type(module)
    if kind in (BasicLayer, MonaiBasicLayer) or (kind is UnetrBasicBlock and x.device.type == "cuda"):
        return x
    return x.contiguous()


def transformer_unsupported(module: Any) -> str | None:
    """Says why `SwinTransformer` can't take the place of MONAI's; returns None, since it always can."""
    replaced = MonaiSwinTransformer.forward is not SwinTransformer._MONAI_FORWARD
    return "MONAI's SwinTransformer.forward has been replaced" if replaced else None
