# SPDX-License-Identifier: Apache-2.0
"""Reads and writes a study on disk: one folder with the exposures of one patient and further data.

    PET_30.nii.gz, PET_60.nii.gz, …   exposures in SUV, named by their duration in s
    CT.nii.gz                         optional, HU
    lesions.nii.gz                    optional, instance labels, 0 is none
    noise_free.nii.gz                 simulated studies: the noise-free reconstruction, SUV
    activity.nii.gz                   simulated studies: the true activity, SUV
    organs.nii.gz                     simulated studies: labels, named in study.json
    study.json                        durations, organ names, parameters; written by `save_study`

All volumes lie on one grid, except the CT, which is resampled to it when it is read. A folder with nothing but PET
files is a study too. `save_study` marks the folder incomplete before it writes and complete when it is done, so that
interrupted writing is noticed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.data import make_nifti, read_nifti, resample, save_nifti, voxel_spacing
from medaccel.data.files import read_json
from medaccel.studies.tables import write_json

STUDY_JSON = "study.json"
FORMAT = 1
AIR_HU = -1000.0
_PET_NAME = re.compile(r"PET_([1-9]\d*)\.nii\.gz")
# Attribute of PETStudy -> file, values >= 0, whole numbers.
_OPTIONAL = {
    "ct": ("CT.nii.gz", False, False),
    "lesions": ("lesions.nii.gz", True, True),
    "noise_free": ("noise_free.nii.gz", True, False),
    "activity": ("activity.nii.gz", True, False),
    "organs": ("organs.nii.gz", True, True),
}
# Affines of one grid may differ by the rounding of float32 headers, mm.
_AFFINE_TOLERANCE = 1e-2


@dataclass
class PETStudy:
    """Holds one patient's study; all arrays (i, j, k) on one grid.

    Args:
        name: the study's name, which is its folder's.
        spacing: voxel size, mm.
        affine: (4, 4), maps voxel indices to RAS, mm.
        exposures: duration in s -> SUV, float32, in increasing order.
        ct: HU, float32.
        lesions: instance labels, uint16, 0 is none.
        noise_free: noise-free reconstruction, SUV, float32.
        activity: true activity, SUV, float32.
        organs: labels, uint16, 0 is outside the body.
        organ_names: name -> label.
        parameters: how the study was made, plain JSON values.
    """

    name: str
    spacing: tuple[float, float, float]
    affine: np.ndarray
    exposures: dict[int, np.ndarray]
    ct: np.ndarray | None = None
    lesions: np.ndarray | None = None
    noise_free: np.ndarray | None = None
    activity: np.ndarray | None = None
    organs: np.ndarray | None = None
    organ_names: dict[str, int] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


def load_study(folder: str | Path, durations: Sequence[int] | None = None) -> PETStudy:
    """Reads and checks a study.

    Args:
        folder: see the module.
        durations: exposures in s that must be there; None: those that study.json names, if it exists.

    Raises:
        FileNotFoundError: the folder, all exposures, or a required one are missing.
        ValueError: the writing was interrupted, a file is damaged, a grid differs from the others', or values are not
            possible (SUV negative, not finite or zero everywhere; one slice; labels that are not whole numbers).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such study folder")
    record = _read_record(folder)
    if not record.get("complete", True):
        raise ValueError(f"{folder}: the writing of this study was interrupted (write it again)")
    found = durations_of(folder)
    if not found:
        raise FileNotFoundError(f"{folder}: no exposures; expected files PET_<seconds>.nii.gz, as PET_60.nii.gz")
    required = record.get("durations_s", []) if durations is None else durations
    for seconds in required:
        if seconds not in found:
            names = ", ".join(f"PET_{t}.nii.gz" for t in found)
            raise FileNotFoundError(f"{folder / f'PET_{seconds}.nii.gz'}: missing exposure (the study has {names})")

    first = read_nifti(folder / f"PET_{found[0]}.nii.gz")
    study = PETStudy(
        name=folder.resolve().name,
        spacing=voxel_spacing(first),
        affine=np.asarray(first.affine, dtype=np.float64),
        exposures={},
        organ_names=record.get("organs"),
        parameters=record.get("parameters", {}),
    )
    for seconds in found:
        path = folder / f"PET_{seconds}.nii.gz"
        image = first if seconds == found[0] else read_nifti(path)
        array = _checked(image, path, first, not_negative=True, labels=False)
        if not array.any():
            raise ValueError(f"{path}: zero everywhere; expected SUV")
        study.exposures[seconds] = array
    for attribute, (name, not_negative, labels) in _OPTIONAL.items():
        path = folder / name
        if path.exists() and attribute == "ct":  # scanners have finer voxels for it
            study.ct = _checked(resample(read_nifti(path), first, outside=AIR_HU), path, first, not_negative, labels)
        elif path.exists():
            setattr(study, attribute, _checked(read_nifti(path), path, first, not_negative, labels))
    return study


def save_study(folder: str | Path, study: PETStudy, *, force: bool = False) -> None:
    """Writes a study, each file atomically; the folder is made if missing.

    Files of an interrupted writing are replaced. `force` replaces a complete study as well.

    Raises:
        FileExistsError: the folder holds a study that was not left by an interrupted writing.
        OSError: writing failed; the folder is then marked incomplete.
    """
    folder = Path(folder)
    occupied = folder.is_dir() and (
        is_complete(folder) or (durations_of(folder) and not (folder / STUDY_JSON).exists())
    )
    if occupied and not force:
        raise FileExistsError(f"{folder}: holds a study (force=True replaces it)")
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray | None] = {f"PET_{t}.nii.gz": image for t, image in study.exposures.items()}
    arrays |= {name: getattr(study, attribute) for attribute, (name, _, _) in _OPTIONAL.items()}
    record: dict[str, Any] = {
        "format": FORMAT,
        "complete": False,
        "name": study.name,
        "durations_s": sorted(study.exposures),
        "organs": study.organ_names,
        "parameters": study.parameters,
        "files": [name for name, array in arrays.items() if array is not None],
    }
    _write_record(folder, record)
    for name, array in arrays.items():
        if array is not None:
            save_nifti(folder / name, make_nifti(array, study.affine), force=True)
        else:  # a file of the replaced study
            (folder / name).unlink(missing_ok=True)
    for seconds in set(durations_of(folder)) - set(study.exposures):
        (folder / f"PET_{seconds}.nii.gz").unlink()
    _write_record(folder, record | {"complete": True})


def is_complete(folder: str | Path) -> bool:
    """Tells whether `save_study` has finished here and its files still exist."""
    folder = Path(folder)
    try:
        record = _read_record(folder)
    except ValueError:
        return False
    return bool(record.get("complete")) and all((folder / name).is_file() for name in record.get("files", []))


def read_parameters(folder: str | Path) -> dict[str, Any]:
    """Returns how a study was made, from its study.json; empty without one. Raises ValueError if the file is
    damaged."""
    parameters: dict[str, Any] = _read_record(Path(folder)).get("parameters", {})
    return parameters


def find_studies(folder: str | Path) -> list[Path]:
    """Lists the study folders directly under ``folder``, sorted by name; or ``folder`` alone if it is a study itself.

    It warns of studies whose writing was interrupted, and leaves them out.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no study.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if durations_of(folder):
        candidates = [folder]
    else:
        candidates = sorted(path for path in folder.iterdir() if path.is_dir() and durations_of(path))
    studies = []
    for path in candidates:
        if _read_record(path).get("complete", True):
            studies.append(path)
        else:
            warnings.warn(f"{path}: left out, the writing of this study was interrupted", stacklevel=2)
    if not studies:
        raise FileNotFoundError(f"{folder}: no studies; expected folders with files PET_<seconds>.nii.gz")
    return studies


def durations_of(folder: Path) -> list[int]:
    """Returns the seconds of the exposures in a folder, increasing."""
    matches = (_PET_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _read_record(folder: Path) -> dict[str, Any]:
    """Returns the content of study.json, empty if there is none."""
    path = folder / STUDY_JSON
    if not path.exists():
        return {}
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path}: not a study of format {FORMAT}")
    return record


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / STUDY_JSON, record, indent=2)


def _checked(image: Any, path: Path, first: Any, not_negative: bool, labels: bool) -> np.ndarray:
    """Returns the image's voxels as float32, or as uint16 for labels."""
    array = np.asarray(image.dataobj)
    if min(array.shape) < 2:
        raise ValueError(f"{path}: shape {array.shape}; expected at least two voxels along each axis")
    if array.shape != first.shape:
        raise ValueError(f"{path}: shape {array.shape} differs from the exposures' {first.shape}; expected one grid")
    if not np.allclose(image.affine, first.affine, rtol=0.0, atol=_AFFINE_TOLERANCE):
        raise ValueError(
            f"{path}: lies on another grid than the exposures, affine {np.round(image.affine, 3).tolist()} "
            f"(expected {np.round(first.affine, 3).tolist()})"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {int((~np.isfinite(array)).sum())} voxels are NaN or infinite")
    if not_negative and array.min() < 0:
        raise ValueError(f"{path}: the least value is {array.min():g}; expected >= 0")
    if not labels:
        return array.astype(np.float32)
    result = array.astype(np.uint16)
    if not np.array_equal(result, array):
        raise ValueError(f"{path}: has labels that are not whole numbers of 0 to 65535")
    return result
