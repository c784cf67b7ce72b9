# SPDX-License-Identifier: Apache-2.0
"""Provides the segmentation network: presets, training, inference, checkpoints."""
