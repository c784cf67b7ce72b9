# SPDX-License-Identifier: Apache-2.0
"""Holds drop-ins for MONAI's layers: same constructors, attributes and state_dict, but a faster forward
and backward."""

from medaccel.layers.gaussian import GaussianFilter
from medaccel.layers.swin import BasicLayer, SwinTransformerBlock, WindowAttention
from medaccel.layers.swin_transformer import SwinTransformer
from medaccel.layers.unet_blocks import UnetBasicBlock, UnetResBlock

__all__ = [
    "BasicLayer",
    "GaussianFilter",
    "SwinTransformer",
    "SwinTransformerBlock",
    "UnetBasicBlock",
    "UnetResBlock",
    "WindowAttention",
]
