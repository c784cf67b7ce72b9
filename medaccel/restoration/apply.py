# SPDX-License-Identifier: Apache-2.0
"""Applies a fitted method to a user's own PET: the command `medaccel restoration apply`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from medaccel.data import (
    DicomSeries,
    SuvRule,
    check_output,
    is_nifti_name,
    load_series,
    make_nifti,
    open_series,
    read_dicom_series,
    read_nifti,
    resample,
    save_nifti,
    series_rule,
    voxel_spacing,
    write_derived_pet,
    write_text,
)
from medaccel.data._fields import optional
from medaccel.data.deidentify import check_deidentify
from medaccel.data.dicom_write import RESEARCH_ONLY, check_series_folder
from medaccel.data.files import beside, check_input
from medaccel.data.hounsfield import check_hu
from medaccel.data.nifti import is_nifti_input
from medaccel.data.suv import Kind
from medaccel.restoration.evaluation.metrics import body_mask
from medaccel.restoration.evaluation.training_range import SECONDS_MARGIN, TrainingRange
from medaccel.restoration.memory import expected_of_restoring, on_gpu
from medaccel.restoration.methods import load_method
from medaccel.restoration.methods.base import Method, RestorationRequest, check_volume
from medaccel.restoration.study import AIR_HU
from medaccel.restoration.uptake import check_suv, suv_per_bqml
from medaccel.studies.digest import file_sha256
from medaccel.training.memory import expect
from medaccel.weights import RESTORATION, find

if TYPE_CHECKING:
    from nibabel import Nifti1Image

TRAINING_RANGE = "training_range"  # key in a method's `fitted.parameters` whose value is `TrainingRange.plain`
_MISSING_CT = 0.2  # a greater share of the body without tissue in the CT can't be lungs and bowel


@dataclass(frozen=True)
class _Input:
    """Holds the image in SUV, the series if the input was DICOM, and the study's CT if it has one."""

    path: Path
    image: Nifti1Image
    series: DicomSeries | None = None
    ct: Path | None = None
    rule: SuvRule | None = None  # by which the series became SUV


def apply(
    checkpoint: Path | str | None,
    input: Path,
    output: Path,
    *,
    seconds: int | None = None,
    ct: Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    series_uid: str | None = None,
    frame: int | None = None,
    suv: Kind = "bw",
    unit: Literal["suv", "bqml"] = "suv",
    weight: float | None = None,
    dose: float | None = None,
    check_units: bool = True,
    deidentify: bool = False,
    force: bool = False,
    progress: bool = True,
) -> tuple[Path, ...]:
    """Restores one PET with a fitted method, or with the package's own weights. For research only.

    The output has the input's grid, in SUV. A warning names the ways in which the image differs from those that the
    method was fitted on: exposure, voxel size, noise.

    Args:
        checkpoint: the file of a fit, `checkpoints/<method>.pt` of a run; or the name of weights
            (`medaccel.weights`); None: the package's own for PET, `medaccel.weights.RESTORATION`.
        input: a .nii or .nii.gz file in SUV; a folder with a PET DICOM series; or a study folder with
            PET_<seconds>.nii.gz, of which the file of the exposure is taken.
        output: a .nii or .nii.gz file; or, for DICOM input, a folder for a derived DICOM series in the unit of the
            source, which keeps the patient's data (name, ID, birth date, comments) and is readable by its owner
            alone. Methods that draw samples also write their standard deviation, `<output>_std.nii.gz`, in SUV.
        seconds: the input's exposure, one that the method was fitted on; by default its primary one.
        ct: a .nii or .nii.gz file in HU, or the folder of a CT DICOM series, in the same space; by default the study
            folder's CT.nii.gz, if it exists. Methods that use no CT ignore it.
        samples: how many to draw, for methods that draw; by default their own setting.
        seed: the seed of the samples.
        series_uid: SeriesInstanceUID, if the DICOM folder has several series.
        frame: the frame to take of a dynamic or gated DICOM series, from 1.
        suv: what the output's SUV are normalised by, for DICOM input and NIfTI output: body weight (bw), lean body
            mass (lbm by Janmahasatian's formula, lbm_james by James's), body surface area (bsa) or ideal body weight
            (ibw). For DICOM input, the rule by which SUV were computed is written to <output>.suv.json.
        unit: the unit of a NIfTI input; bqml is converted to SUV with weight and dose.
        weight: the patient's weight, kg, for bqml.
        dose: the dose in Bq, decayed to the time that the image is decay-corrected to, for bqml.
        check_units: refuse an input that can't be in SUV, by the body's median, and a CT that doesn't look like HU.
        deidentify: remove the patient's data from a derived DICOM series by the standard's basic profile (PS3.15 E;
            the pixels stay as they are), and write it in SUV.
        force: overwrite an existing output, and restore an input that can't be in SUV all the same, with a warning.
        progress: show progress on stderr.

    Returns:
        The paths that were written; the restored image is the last.

    Raises:
        ValueError: the output's name has another format, or DICOM output is asked for without DICOM input; the
            checkpoint is damaged or has another format; the method wasn't fitted on the exposure; the input is
            damaged or not in SUV (negative, not finite, zero everywhere, one slice, in another unit); the CT is not
            in HU, or lies elsewhere; `samples` is given to a method that draws none; the work needs more memory than
            is free.
        OSError: input or checkpoint is missing; the output exists or can't be written, and an old one stays as it
            was.

    Warns:
        UserWarning: the image differs from those that the method was fitted on, or may not be in SUV; the CT lacks a
            part of the body.
    """
    input, output = Path(input), Path(output)
    _check_output(input, output, force)  # the output is checked before anything is read
    if deidentify:
        if is_nifti_name(output):
            raise ValueError(f"{output}: deidentify is for DICOM output; NIfTI holds no patient data")
        check_deidentify()
    checkpoint = find(RESTORATION if checkpoint is None else checkpoint)
    method = load_method(checkpoint)
    exposure = method.seconds(seconds)
    deviation = _deviation_path(output)
    if method.samples:
        check_output(deviation, force=force)
    if samples is not None and (samples < 1 or not method.samples):
        expected = "1 or more" if method.samples else f"none, as {method.name} draws no samples"
        raise ValueError(f"samples is {samples}; expected {expected}")
    per_unit = _factor(unit, weight, dose)
    read = _read(input, exposure, series_uid, frame, progress)
    factor, rule = _asked_for(read, suv, output)
    record = beside(output, ".suv.json")
    if deidentify:
        rule = None  # its times and dose are the patient's
    if rule is not None:
        check_output(record, force=force)
        if progress:
            print(f"medaccel: {read.path}: {rule.sentence}", file=sys.stderr)
    if seconds is None and method.any_exposure:
        exposure = _known_exposure(method, read, exposure)
    spacing = voxel_spacing(read.image)
    volume = np.asanyarray(read.image.dataobj).astype(np.float32, copy=False)
    if per_unit is not None:
        if read.series is not None:
            raise ValueError(f"{read.path}: unit is bqml, but a DICOM series says its unit itself; expected suv")
        volume = volume * np.float32(per_unit)
    check_volume(str(read.path), volume, spacing)
    if check_units:
        check_suv(volume, spacing, read.path, refuse=not force)
    for sentence in _unlike(method, read, volume, spacing, exposure):
        warnings.warn(f"{read.path}: {sentence}", stacklevel=2)
    ct = read.ct if ct is None else Path(ct)
    hounsfield = None if ct is None else _ct_on_grid(ct, read.image, volume, spacing, check_units, progress)
    more = {} if samples is None else {"samples": samples}
    needed = expect(
        f"{read.path}: restoring it",
        expected_of_restoring(method.name, {**method.settings, **more}, volume.size),
        gpu=on_gpu({method.name: method.settings}),
    )
    if progress:
        print(f"medaccel: {needed.sentence}", file=sys.stderr)
    restored = method.restore(
        RestorationRequest(
            volume, spacing, seconds=exposure, ct=hounsfield, samples=samples, seed=seed, progress=progress
        )
    )
    if progress and (placed := getattr(method, "placed", "")):  # a method with a network
        print(f"medaccel: {placed}", file=sys.stderr)
    del volume, hounsfield
    bad = int(np.count_nonzero(~np.isfinite(restored.volume)))
    if bad:
        raise ValueError(f"{read.path}: {method.name} gave {bad} voxels that are NaN or infinite; nothing is written")
    written = []
    if restored.std is not None:
        # The deviation is the activity's, for methods that predict it; the image is the measured part and the rest's
        # activity.
        share = 1.0 if restored.activity is None else 1 - restored.weight
        save_nifti(
            deviation, _image(restored.std * share * factor, read, f"std of {method.name}, uncalibrated"), force=force
        )
        written.append(deviation)
    what = f"{method.name}, {exposure} s to {method.task.target_seconds} s"
    if is_nifti_name(output) or read.series is None:
        save_nifti(output, _image(restored.volume * factor, read, what), force=force)
    else:
        derivation = f"Checkpoint with SHA-256 {file_sha256(checkpoint)}, seed {seed}."
        write_derived_pet(
            output,
            restored.volume,
            read.series,
            description=what,
            derivation=derivation,
            deidentify=deidentify,
            force=force,
        )
    if rule is not None:
        write_text(record, json.dumps(rule.plain(), indent=2) + "\n", force=force)
    return (*written, output)


def _asked_for(read: _Input, suv: Kind, output: Path) -> tuple[np.float32, SuvRule | None]:
    """Returns the factor from SUV by body weight, which methods take, to those that are asked for, and their rule."""
    if read.series is None or read.rule is None:
        if suv != "bw":
            raise ValueError(f"{read.path}: suv is {suv}, which needs a DICOM series' height and sex; expected bw")
        return np.float32(1), None
    if suv == "bw":
        return np.float32(1), read.rule
    if not is_nifti_name(output):
        raise ValueError(f"{output}: suv is {suv}, but a derived DICOM series has its source's unit; expected bw")
    rule = series_rule(read.series, suv)
    return np.float32(rule.factors[0] / read.rule.factors[0]), rule


def _factor(unit: str, weight: float | None, dose: float | None) -> float | None:
    """Returns the factor to SUV; None if the input is in SUV."""
    if unit not in ("suv", "bqml"):
        raise ValueError(f"unit is {unit!r}; expected suv or bqml")
    if unit == "suv":
        if weight is not None or dose is not None:
            raise ValueError("weight and dose are for unit bqml; expected none of them, as unit is suv")
        return None
    if weight is None or dose is None:
        missing = " and ".join(name for name, value in (("weight", weight), ("dose", dose)) if value is None)
        raise ValueError(f"unit is bqml, and {missing} is missing; expected kg and Bq")
    return suv_per_bqml(weight, dose)


def _is_study(folder: Path) -> bool:
    return any(folder.glob("PET_[1-9]*.nii.gz"))


def _check_output(input: Path, output: Path, force: bool) -> None:
    """Refuses an output whose name, existing content or kind of input doesn't allow it."""
    if is_nifti_name(output):
        check_output(output, force=force)
        return
    if output.suffix and not output.is_dir():
        raise ValueError(
            f"{output}: the output's name must end in .nii or .nii.gz, or be a folder (no dot in its name) for DICOM"
        )
    if output.resolve() == input.resolve():
        raise ValueError(f"{output} is the input itself; expected another folder")
    check_series_folder(output, force=force)
    if input.exists() and (not input.is_dir() or _is_study(input)):
        raise ValueError(
            f"{output}: a DICOM series as output needs one as input, but {input} is none; expected an output that "
            "ends in .nii or .nii.gz"
        )


def _deviation_path(output: Path) -> Path:
    """Returns the path `pet_std.nii.gz` beside `pet.nii`, `pet.nii.gz` or the folder `pet`."""
    return beside(output, "_std.nii.gz")


def _read(path: Path, seconds: int, series_uid: str | None, frame: int | None, progress: bool) -> _Input:
    if path.is_dir() and _is_study(path):
        pet, ct = path / f"PET_{seconds}.nii.gz", path / "CT.nii.gz"
        if not os.path.lexists(pet):
            found = ", ".join(sorted(p.name for p in path.glob("PET_*.nii.gz")))
            raise FileNotFoundError(f"{pet}: missing exposure (the study has {found})")
        return _Input(pet, read_nifti(pet), ct=ct if os.path.lexists(ct) else None)
    if path.is_dir():
        series = open_series(path, series_uid=series_uid, frame=frame, progress=progress)
        rule = series_rule(series)
        return _Input(path, load_series(series, suv=rule, progress=progress), series, rule=rule)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    check_input(path)
    if not is_nifti_input(path):
        raise ValueError(
            f"{path}: expected a .nii or .nii.gz file, the folder of a PET DICOM series, or a study folder"
        )
    return _Input(path, read_nifti(path))


def _unlike(
    method: Method, read: _Input, volume: np.ndarray, spacing: tuple[float, float, float], seconds: int
) -> list[str]:
    """Returns the warnings that a user needs before trusting the result, a sentence each."""
    sentences = []
    measured = None if read.series is None else _frame_seconds(read.series)
    if measured is not None and abs(measured / seconds - 1) > SECONDS_MARGIN:
        sentences.append(
            f"ActualFrameDuration is {measured:g} s, but the method takes the image for one of {seconds} s"
        )
    plain = method.fitted.parameters.get(TRAINING_RANGE)
    if plain is None:
        sentences.append("the checkpoint doesn't say what images it was fitted on, so none can be compared with them")
        return sentences
    try:
        return sentences + TrainingRange.from_plain(plain).warnings(volume, spacing, seconds)
    except ValueError as error:
        return [*sentences, f"can't be compared with the images that the method was fitted on: {error}"]


def _known_exposure(method: Method, read: _Input, default: int) -> int:
    """Returns the exposure that the header tells; warns if there is none, or none that the method can use."""
    measured = None if read.series is None else _frame_seconds(read.series)
    if measured is None:
        if not read.path.name.startswith("PET_"):  # a study's file is named by its exposure
            warnings.warn(
                f"{read.path}: doesn't tell its exposure, which is taken to be {default} s; seconds names another",
                stacklevel=3,
            )
        return default
    try:
        return method.seconds(round(measured))
    except ValueError:
        warnings.warn(
            f"{read.path}: ActualFrameDuration is {measured:g} s, which {method.name} has nothing to add to; the "
            f"image is taken for one of {default} s",
            stacklevel=3,
        )
        return default


def _frame_seconds(series: DicomSeries) -> float | None:
    """Returns the duration in the first slice's header; None if it has none."""
    try:
        value = float(optional(series.headers[0], "ActualFrameDuration") or 0) / 1000
    except (TypeError, ValueError):
        return None
    return value if 0 < value < float("inf") else None


def _ct_on_grid(
    path: Path,
    pet: Nifti1Image,
    volume: np.ndarray,
    spacing: tuple[float, float, float],
    check_units: bool,
    progress: bool,
) -> np.ndarray:
    """Returns HU at the PET's voxels, float32, trilinear; air beyond the CT."""
    image = read_dicom_series(path, progress=progress) if path.is_dir() else read_nifti(path)
    values = np.asanyarray(image.dataobj).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: {int((~np.isfinite(values)).sum())} voxels are NaN or infinite; expected HU")
    if check_units:
        check_hu(values, path, stacklevel=3)
    moved = resample(image, pet, outside=AIR_HU)
    resampled = np.asanyarray(moved.dataobj).astype(np.float32, copy=False)
    if resampled.max() <= AIR_HU:
        raise ValueError(f"{path}: the CT has no tissue where the PET lies; expected one in HU, in the same space")
    body = body_mask(volume, spacing)
    missing = float((resampled[body] <= AIR_HU).mean()) if body.any() else 0.0
    if missing > _MISSING_CT:
        warnings.warn(f"{path}: the CT has no tissue in {missing:.0%} of the PET's body", stacklevel=3)
    return resampled


def _image(values: np.ndarray, read: _Input, what: str) -> Nifti1Image:
    image = make_nifti(values.astype(np.float32, copy=False), read.image.affine, like=read.image)
    image.header["descrip"] = f"{RESEARCH_ONLY}: {what}".encode()[:79]
    return image
