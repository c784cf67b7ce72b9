# SPDX-License-Identifier: Apache-2.0
"""From a scan to its label map: MONAI's sliding window on the network's grid, probabilities back on the scan's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.nifti1 import Nifti1Image
from torch import Tensor, nn

from medaccel.data import make_nifti, resample
from medaccel.data.ct_transforms import canonical, window
from medaccel.segmentation.metrics import largest_components

# Slices of the scan that are resampled at a time: what bounds the memory, whatever the scan's length.
_SLICES = 64


def predict_probabilities(
    network: nn.Module, image: MetaTensor, settings: Mapping[str, Any], *, progress: bool = False
) -> Tensor:
    """Class probabilities of a scan on the network's grid.

    Windows are weighted by a Gaussian and added up on the CPU; a scan that is smaller than one is padded with what
    is darkest.

    Args:
        network: (B, 1, i, j, k) to logits (B, classes, i, j, k); on the device that computes.
        image: (1, i, j, k), HU, of `medaccel.data.ct_transforms.canonical`.
        settings: of `medaccel.segmentation.presets.make_settings`.
        progress: show a bar of windows.

    Returns:
        (classes, i, j, k), float32, on the CPU; they add up to 1.
    """
    from monai.inferers import sliding_window_inference

    device = next(network.parameters()).device
    shown = window(image.as_tensor().float(), settings["window"])[None]
    # On CPUs bf16 is slower than it is worth.
    mixed = device.type == "cuda" and str(settings["precision"]).startswith("bf16")
    before = network.training
    network.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            logits = sliding_window_inference(
                shown,
                settings["roi_size"],
                settings["sw_batch_size"],
                network,
                overlap=settings["overlap"],
                mode="gaussian",
                sw_device=device,
                device="cpu",
                progress=progress,
            )
    finally:
        network.train(before)
    return torch.as_tensor(logits)[0].float().softmax(dim=0)


def segment(
    network: nn.Module,
    scan: Nifti1Image,
    settings: Mapping[str, Any],
    *,
    keep_largest: int | None = None,
    progress: bool = False,
) -> Nifti1Image:
    """The label map of a scan on its own grid.

    Probabilities, not labels, are brought to the scan's grid, trilinearly; then the likeliest class is taken. What
    is outside of the body's box is background.

    Args:
        network, settings: as `predict_probabilities`.
        scan: HU, any orientation.
        keep_largest: components that are kept of each structure, 0 is all; by default as the settings say.
        progress: show a bar of windows.

    Returns:
        uint8.
    """
    image = canonical(scan, settings["spacing"])["image"]
    labels = to_grid(predict_probabilities(network, image, settings, progress=progress), image, scan)
    kept = settings["keep_largest"] if keep_largest is None else keep_largest
    if kept:
        for value in np.unique(labels[labels > 0]):
            mask = labels == value
            labels[mask & ~largest_components(mask, kept)] = 0
    return make_nifti(labels, scan.affine, scan)


def to_grid(probabilities: Tensor, image: MetaTensor, scan: Nifti1Image) -> np.ndarray:
    """The likeliest class at a scan's voxels, uint8, of probabilities (classes, i, j, k) on an image's grid."""
    affine = np.asarray(image.affine, dtype=np.float64).copy()
    # The outermost voxels reach half a voxel beyond their centres, where interpolation ends.
    affine[:3, 3] -= affine[:3, :3].sum(axis=1)
    classes = [make_nifti(np.pad(p.numpy(), 1, mode="edge"), affine) for p in probabilities]
    labels = np.zeros(scan.shape, dtype=np.uint8)
    for start in range(0, scan.shape[2], _SLICES):
        slab = scan.slicer[:, :, start : start + _SLICES]
        best = np.asarray(resample(classes[0], slab, outside=1.0).dataobj, dtype=np.float32).copy()
        for value, volume in enumerate(classes[1:], start=1):
            found = np.asarray(resample(volume, slab).dataobj, dtype=np.float32)
            labels[:, :, start : start + _SLICES][found > best] = value
            np.maximum(best, found, out=best)
    return labels
