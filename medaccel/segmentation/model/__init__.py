# SPDX-License-Identifier: Apache-2.0
"""The segmentation network: presets, training, inference, checkpoints."""
