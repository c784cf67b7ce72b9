# SPDX-License-Identifier: Apache-2.0
"""Says where a NIfTI header contradicts itself, and which of its statements counts."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nibabel import Nifti1Header, Nifti1Image

_APART = 0.1  # share of the smallest voxel; a quaternion in single precision is off by less
_SIZES = 0.01  # sizes of voxels that differ by a greater share aren't rounded


def scale_remarks(header: Nifti1Header) -> list[str]:
    """Returns what to say of a stored scale that is no number.

    Raises:
        ValueError: the scale is infinite.
    """
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    for name, value in (("scl_slope", slope), ("scl_inter", inter)):
        if np.isinf(value):
            raise ValueError(f"broken NIfTI header: {name} is {value}; expected a finite number")
    if np.isnan(slope):
        # nibabel and the NIfTI standard take 0 for "no scale"; a NaN means it too.
        return ["scl_slope is NaN: the voxels are taken as they are stored"]
    if slope == 0 and inter != 0:
        return [f"scl_slope is 0, which means no scale: scl_inter, {inter:g}, is not added"]
    return []


def geometry_remarks(image: Nifti1Image, stored: Nifti1Header) -> list[str]:
    """Returns what to say where qform, sform and voxel sizes disagree; the sform is the one that counts.

    Args:
        image: the image.
        stored: its header as it is in the file, with nothing mended.
    """
    from nibabel.spatialimages import HeaderDataError

    if int(stored["sform_code"]) <= 0:
        return []
    affine = np.asarray(image.affine, np.float64)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if int(stored["qform_code"]) > 0:
        try:
            qform = np.asarray(stored.get_qform(), np.float64)
        except (HeaderDataError, ValueError) as error:
            return [f"its qform is broken ({error}); the sform is taken"]
        corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in image.shape[:3]))])
        corners = corners if corners.shape[1] == 4 else np.zeros((1, 4))
        apart = float(np.linalg.norm((corners @ (qform - affine).T)[:, :3], axis=1).max())
        if not apart <= _APART * float(steps.min()):
            turned = np.linalg.det(qform[:3, :3]) * np.linalg.det(affine[:3, :3]) < 0
            mirrored = ", and they are mirror images of each other" if turned else ""
            return [f"qform and sform place its corners up to {apart:.4g} mm apart{mirrored}; the sform is taken"]
        return []
    sizes = np.abs(np.asarray(stored["pixdim"][1:4], np.float64))[: min(len(image.shape), 3)]
    expected = steps[: len(sizes)]
    if not np.isfinite(sizes).all() or (np.abs(sizes - expected) > _SIZES * expected).any():
        shown, taken = (" × ".join(f"{v:.4g}" for v in found) for found in (sizes, expected))
        return [f"pixdim has voxels of {shown} mm, and the sform of {taken} mm; the sform is taken"]
    return []
