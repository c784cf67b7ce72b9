# SPDX-License-Identifier: Apache-2.0
"""Smooths an image file with a Gaussian: the command `medaccel smooth`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from medaccel.data import (
    SuvRule,
    check_output,
    is_nifti_name,
    load_series,
    make_nifti,
    open_series,
    read_nifti,
    save_nifti,
    series_rule,
    voxel_spacing,
    write_text,
)
from medaccel.data.files import beside
from medaccel.data.nifti import is_nifti_input
from medaccel.data.suv import Kind
from medaccel.ops import gaussian_filter

if TYPE_CHECKING:
    from nibabel import Nifti1Image

Wanted = bool | Kind | Literal["bqml"]
Width = float | tuple[float, float, float]  # one width for all axes, or one each for i, j and k

SIGMA_PER_FWHM = 1 / (2 * math.sqrt(2 * math.log(2)))


def smooth(
    input: Path,
    output: Path,
    *,
    sigma: Width | None = None,
    fwhm: Width | None = None,
    unit: Literal["mm", "voxel", "bqml"] = "mm",
    mode: Literal["reflect", "nearest", "mirror", "wrap", "constant"] = "reflect",
    approx: Literal["erf", "sampled", "scalespace"] = "erf",
    truncated: float = 4.0,
    suv: bool | Kind = True,
    series_uid: str | None = None,
    frame: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Nifti1Image:
    """Smooths an image with a Gaussian.

    Examples:

        medaccel smooth pet.nii.gz smooth.nii.gz --fwhm 5 medaccel smooth ct.nii ct_smooth.nii.gz --sigma "[1, 1, 2]"
        medaccel smooth dicom_folder/ suv_smooth.nii.gz --sigma 2 --unit voxel --force

    The output keeps the input's affine and header (sform and qform codes, units, description, NIfTI version). Its
    voxels are float32 or float64 if the input's are; integers of 8 and 16 bits become float32, wider ones float64
    (float32 can't hold them all). Each frame of a 4-D image is smoothed by itself. A NaN spreads as far as the kernel
    reaches (4 σ by default), and no farther.

    Args:
        input: a .nii or .nii.gz file, 3-D or 4-D, or a folder with one DICOM series.
        output: a .nii or .nii.gz file.
        sigma: standard deviation of the Gaussian: one number, or three for the axes i, j, k of the NIfTI array
            (DICOM: column, row, slice). 0 leaves an axis as it is. Give either sigma or fwhm.
        fwhm: full width at half maximum instead: 2·sqrt(2·ln 2) σ = 2.3548 σ.
        unit: unit of sigma and fwhm; mm are divided by the voxel spacing of each axis. "bqml" says that the widths
            are in mm, and that a PET DICOM series is read in Bq/mL, without SUV, for which weight or dose may be
            missing.
        mode: assumption about the voxels beyond the border. The default reflects the image (d c b a | a b c d): the
            sum of all voxels, hence the total uptake, is kept, and a constant image stays constant. "constant" means
            zeros, which darken a PET's first and last slices and brighten a CT's (air is -1000 HU).
        approx: how the Gaussian is made discrete: "erf" integrates it over each voxel, "sampled" takes its value at
            the voxels' centres (SciPy), "scalespace" is Lindeberg's discrete Gaussian, whose variance is exact even
            where σ is under a voxel. The kernel's sum is 1.
        truncated: where the kernel ends, in σ.
        suv: convert PET DICOM series to SUV by body weight (true or bw), lean body mass (lbm by Janmahasatian's
            formula, lbm_james by James's), body surface area (bsa) or ideal body weight (ibw); the rule is written to
            <output>.suv.json. False keeps the files' unit, as a rule Bq/mL.
        series_uid: SeriesInstanceUID, if the DICOM folder has several series.
        frame: the frame to take of a dynamic or gated DICOM series, from 1.
        force: overwrite the output where it exists.
        progress: show progress on stderr.

    Returns:
        The image that was written.

    Raises:
        ValueError: both or none of sigma and fwhm are given; a width is negative, not finite or not 1 or 3 numbers;
            the input is damaged or incomplete (see `medaccel.data`); the output's name has another format.
        OSError: the input is missing; the output exists or can't be written, and an old file there stays as it was.
    """
    input, output = Path(input), Path(output)
    widths = _sigmas(sigma, fwhm)  # widths are refused before anything is read
    if unit not in ("mm", "voxel", "bqml"):
        raise ValueError(f"smooth: unit is {unit!r}, expected 'mm' or 'voxel' (or 'bqml')")
    if unit == "bqml" and suv not in (True, False):
        raise ValueError(f"smooth: suv is {suv!r} and unit is 'bqml', expected one of them")
    if not is_nifti_name(output):
        raise ValueError(f"{output}: the output's name must end in .nii or .nii.gz")
    check_output(output, force=force)

    wanted: Wanted = "bqml" if unit == "bqml" else suv
    image, rule = _read(input, wanted, series_uid=series_uid, frame=frame, progress=progress)
    record = beside(output, ".suv.json")
    if rule is not None:
        check_output(record, force=force)
    spacing = voxel_spacing(image) if unit != "voxel" else (1.0, 1.0, 1.0)
    sigma_voxels = [width / step for width, step in zip(widths, spacing, strict=True)]
    values = np.asanyarray(image.dataobj)
    values = np.require(values, _floating(values.dtype), ["F", "W"])  # torch warns of read-only arrays
    smoothed = np.empty_like(values, order="F")
    # NIfTI's first axis is contiguous, torch's last is: transposed views filter without a copy.
    frames = values.T if values.ndim == 4 else values.T[None]  # (t, k, j, i)
    results = smoothed.T if values.ndim == 4 else smoothed.T[None]
    for t in _with_progress(len(frames), progress):
        one = torch.from_numpy(frames[t])[None, None]  # (1, 1, k, j, i)
        result = gaussian_filter(
            one, sigma_voxels[::-1], truncated=truncated, approx=approx, mode=mode, normalize=True
        )
        results[t] = result[0, 0].numpy()
    written = make_nifti(smoothed, image.affine, like=image)
    save_nifti(output, written, force=force)
    if rule is not None:
        write_text(record, json.dumps(rule.plain(), indent=2) + "\n", force=force)
    return written


def _sigmas(sigma: Width | None, fwhm: Width | None) -> list[float]:
    """Returns σ of the three axes, in the unit of the arguments."""
    if sigma is not None and fwhm is None:
        name, width, scale = "sigma", sigma, 1.0
    elif fwhm is not None and sigma is None:
        name, width, scale = "fwhm", fwhm, SIGMA_PER_FWHM
    else:
        given = "neither is" if sigma is None else "both are"
        raise ValueError(f"smooth: expected one of sigma and fwhm, but {given} given")
    values = list(width) if isinstance(width, Sequence) else [width] * 3
    if len(values) != 3:
        raise ValueError(f"smooth: {name} has {len(values)} values, expected 1, or 3 for the axes i, j, k")
    if not all(math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(f"smooth: {name} is {width}, expected finite numbers of 0 or more")
    return [v * scale for v in values]


def _read(
    path: Path, wanted: Wanted, *, series_uid: str | None, frame: int | None, progress: bool
) -> tuple[Nifti1Image, SuvRule | None]:
    """Returns the image, and the rule of its SUV if it is a PET series that was converted."""
    if not path.is_dir():
        if path.exists() and not is_nifti_input(path):
            raise ValueError(f"{path}: expected a .nii or .nii.gz file, or the folder of a DICOM series")
        if frame is not None or wanted not in (True, False):
            option = "frame" if frame is not None else "unit bqml" if wanted == "bqml" else f"suv {wanted}"
            raise ValueError(f"{path}: {option} is for DICOM series, whose headers say what it needs")
        return read_nifti(path, ndim=(3, 4)), None
    series = open_series(path, series_uid=series_uid, frame=frame, progress=progress)
    if wanted is False or (series.modality != "PT" and wanted is True):
        return load_series(series, progress=progress), None
    rule = series_rule(series, "bw" if wanted is True else wanted)
    if progress:
        print(f"medaccel: {path}: {rule.sentence}", file=sys.stderr)
    return load_series(series, suv=rule, progress=progress), rule


def _floating(dtype: np.dtype) -> np.dtype:
    if dtype.kind == "f":
        return dtype
    return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


def _with_progress(frames: int, shown: bool) -> Iterable[int]:
    if not shown or frames == 1:
        return range(frames)
    from tqdm import trange

    return trange(frames, desc="smooth", unit="frame", leave=False)
