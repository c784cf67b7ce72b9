# SPDX-License-Identifier: Apache-2.0
"""Holds networks on medaccel's layers, and loads the pretrained weights that others published for
them."""

from medaccel.nets.ssl_head import SSLHead
from medaccel.nets.swin_unetr import PatchMergingV090, SwinUNETR
from medaccel.nets.weights import LoadReport, load_pretrained

__all__ = ["LoadReport", "PatchMergingV090", "SSLHead", "SwinUNETR", "load_pretrained"]
