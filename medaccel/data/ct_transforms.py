# SPDX-License-Identifier: Apache-2.0
"""Brings CT scans into the form that networks see: axes to the right, the front and up, one voxel size, only the
body, a window of HU.

MONAI's transforms do the work and carry the affine along, so that a network's result can go back to the scan's grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import CropForeground, Orientation, Spacing
from nibabel.nifti1 import Nifti1Image
from torch import Tensor

from medaccel.data.hounsfield import BODY_HU


def canonical(
    image: Nifti1Image,
    spacing: Sequence[float],
    *,
    label: Nifti1Image | None = None,
    foreground: bool = True,
    margin: int = 2,
) -> dict[str, MetaTensor]:
    """Resamples a scan, and its label map, to a grid of the given voxel size.

    Args:
        image: the scan, HU.
        spacing: mm, along the axes to the right, the front and up.
        label: whole numbers, on the image's grid; nearest neighbours are taken.
        foreground: crop to the body and the table, that is to all voxels above −500 HU. If there are none, nothing is
            cropped.
        margin: voxels kept around the body, if the scan has them.

    Returns:
        "image", and "label" where one was given: (1, i, j, k), float32, with `affine` to RAS, mm.

    Raises:
        ValueError: spacing isn't three numbers above 0.
    """
    steps = [float(step) for step in spacing]
    if len(steps) != 3 or not all(0 < step < np.inf for step in steps):
        raise ValueError(f"spacing is {tuple(spacing)}; expected three numbers of mm above 0")
    orient = Orientation(axcodes="RAS", labels=None)
    result = {}
    for name, scan, mode in (("image", image, "bilinear"), ("label", label, "nearest")):
        if scan is not None:
            values = torch.from_numpy(np.asarray(scan.dataobj, dtype=np.float32))[None]
            oriented = orient(MetaTensor(values, affine=torch.from_numpy(np.asarray(scan.affine, dtype=np.float64))))
            result[name] = Spacing(steps, mode=mode, padding_mode="border", dtype=np.float32)(oriented)
    if foreground and bool((result["image"] > BODY_HU).any()):
        crop = CropForeground(select_fn=lambda x: x > BODY_HU, margin=margin, allow_smaller=True)
        start, end = crop.compute_bounding_box(result["image"])
        result = {name: crop.crop_pad(volume, start, end) for name, volume in result.items()}
    return result


def window(hu: Tensor, limits: Sequence[float]) -> Tensor:
    """Maps HU to 0 … 1 between two limits, clipped; shape and type stay.

    Raises:
        ValueError: limits aren't two increasing numbers.
    """
    if len(limits) != 2 or not limits[0] < limits[1]:
        raise ValueError(f"window is {list(limits)}; expected two increasing numbers of HU")
    low, high = float(limits[0]), float(limits[1])
    return ((hu - low) / (high - low)).clamp(0.0, 1.0)
