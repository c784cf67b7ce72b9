# SPDX-License-Identifier: Apache-2.0
"""Losses for pretraining, as modules."""

from medaccel.losses.contrastive import ContrastiveLoss

__all__ = ["ContrastiveLoss"]
