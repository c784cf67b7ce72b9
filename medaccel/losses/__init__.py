# SPDX-License-Identifier: Apache-2.0
"""Holds losses for pretraining, as modules."""

from medaccel.losses.contrastive import ContrastiveLoss
from medaccel.losses.pixels import PixelConsistencyLoss, PixelContrastiveLoss, default_radius, pixel_centres

__all__ = ["ContrastiveLoss", "PixelConsistencyLoss", "PixelContrastiveLoss", "default_radius", "pixel_centres"]
