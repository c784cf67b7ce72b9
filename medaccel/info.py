# SPDX-License-Identifier: Apache-2.0
"""Says what a file or folder is and how it would be read: the command `medaccel info`."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medaccel.data import load_series, open_series, read_nifti, series_rule, voxel_spacing
from medaccel.data._fields import optional, source
from medaccel.data.dicom import DicomSeries
from medaccel.data.files import check_input
from medaccel.data.hounsfield import hu_remarks, judge
from medaccel.data.nifti import is_nifti_input

if TYPE_CHECKING:
    from nibabel import Nifti1Image

_META_IMAGE = (".mhd", ".mha")
_MODALITIES = {"PT": "PET", "CT": "CT", "MR": "MR", "NM": "nuclear medicine"}
_UNITS = {"BQML": "Bq/mL", "GML": "SUV (g/mL)", "CNTS": "counts"}
_AXES = (("L", "R"), ("P", "A"), ("I", "S"))


@dataclass
class Info:
    """Collects what is known of a path.

    Args:
        lines: facts by name, in the order in which they are shown.
        warnings: sentences that a user should read before trusting a result.
        refusal: the reason why the path can't be read; None if it can.
    """

    lines: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    refusal: str | None = None

    def __str__(self) -> str:
        rows = [*self.lines.items(), *(("warning", sentence) for sentence in self.warnings)]
        if self.refusal is not None:
            rows.append(("refused", self.refusal))
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name + ':':<{width + 1}} {text}" for name, text in rows)


def info(path: Path, *, series_uid: str | None = None, check_units: bool = True) -> Info:
    """Reads a file or folder as the commands would, and says what it found.

    Args:
        path: a NIfTI or MetaImage file, a folder with a DICOM series, or a study folder with PET_<seconds>.nii.gz.
        series_uid: SeriesInstanceUID, if the folder has several series.
        check_units: judge by the values whether a CT is in HU.
    """
    path, found = Path(path), Info()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _inspect(path, series_uid, check_units, found)
        except (ValueError, OSError) as error:
            found.refusal = str(error)
    # Several readers may say the same.
    found.warnings = list(dict.fromkeys([*found.warnings, *(str(w.message) for w in said)]))
    return found


def _inspect(path: Path, series_uid: str | None, check_units: bool, found: Info) -> None:
    found.lines["path"] = str(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        studies = sorted(path.glob("PET_[1-9]*.nii.gz"))
        if studies:
            found.lines["what"] = f"a study folder: {', '.join(p.name for p in sorted(path.glob('*.nii.gz')))}"
            _nifti(studies[0], check_units, found)
        else:
            found.lines["what"] = "a folder"
            _series(path, series_uid, check_units, found)
        return
    check_input(path)
    if is_nifti_input(path):
        found.lines["what"] = "a file by its name NIfTI"
        _nifti(path, check_units, found)
    elif path.suffix.lower() in _META_IMAGE:
        from medaccel.data.metaimage import read_metaimage

        found.lines["what"] = "a MetaImage file"
        _image(read_metaimage(path), path, found)
    else:
        with path.open("rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        found.lines["what"] = "a DICOM file" if is_dicom else "a file"
        expected = "the folder that has it" if is_dicom else "NIfTI, MetaImage, or the folder of a DICOM series"
        raise ValueError(
            f"{path}: is {'one DICOM file' if is_dicom else 'nothing that is read'}; expected {expected}"
        )


def _nifti(path: Path, check_units: bool, found: Info) -> None:
    image = read_nifti(path, ndim=(3, 4))
    version = 2 if int(image.header["sizeof_hdr"]) == 540 else 1
    kind = "a NIfTI pair" if path.suffix.lower() in (".hdr", ".img") else "a NIfTI file"
    if "study" not in found.lines["what"]:
        found.lines["what"] = f"{kind}, version {version}"
    found.lines["read as"] = str(path)
    codes = {name: int(image.header[f"{name}_code"]) for name in ("sform", "qform")}
    found.lines["affine"] = next((f"the {name}'s" for name, code in codes.items() if code > 0), "made of voxel sizes")
    values = _image(image, path, found)
    said = bytes(image.header["descrip"].item()).split(b"\0")[0].decode("latin-1").strip()
    if said:
        found.lines["description"] = said
    if values is not None and check_units:
        _judge(values, image, path, found)


def _image(image: Nifti1Image, path: Path, found: Info) -> np.ndarray | None:
    """Adds the facts on the grid and the values; returns the values if they are a finite volume."""
    found.lines["shape"] = " × ".join(map(str, image.shape)) + f", {image.get_data_dtype()}"
    steps = voxel_spacing(image)
    found.lines["spacing"] = f"{' × '.join(f'{s:.5g}' for s in steps)} mm"
    rotation = np.asarray(image.affine, np.float64)[:3, :3]
    letters, angle = _directions(rotation)
    handed = "right" if np.linalg.det(rotation) > 0 else "left"
    oblique = f", oblique by {angle:.3g}°" if angle > 0.1 else ""
    found.lines["orientation"] = f"{letters} (the way each axis goes), {handed}-handed{oblique}"
    values = np.asanyarray(image.dataobj)
    finite = np.isfinite(values)
    if not finite.all():
        found.warnings.append(f"{path}: {int((~finite).sum())} voxels are NaN or infinite")
    if finite.any():
        least, median, most = (float(v) for v in np.quantile(values[finite].astype(np.float64), (0, 0.5, 1)))
        found.lines["values"] = f"{least:.6g} to {most:.6g}, median {median:.6g}"
    return values if finite.all() and values.ndim == 3 and values.size else None


def _directions(rotation: np.ndarray) -> tuple[str, float]:
    """Returns the letters of the axes' directions, and the largest angle between an axis and the patient's."""
    from nibabel.orientations import io_orientation

    unit = rotation / np.linalg.norm(rotation, axis=0)
    affine = np.eye(4)
    affine[:3, :3] = unit
    letters = "".join(_AXES[int(axis)][int(sign > 0)] for axis, sign in io_orientation(affine))
    return letters, float(np.degrees(np.arccos(np.clip(np.abs(unit).max(axis=0), 0, 1))).max())


def _judge(values: np.ndarray, image: Nifti1Image, path: Path, found: Info) -> None:
    """Says which unit the values of a NIfTI seem to have; the header doesn't tell."""
    verdict = judge(values)
    if verdict.refusal is None and verdict.doubt is None and values.min() < -500:
        found.lines["unit"] = "HU, by its values"
        found.warnings += [f"{path}: {sentence}" for sentence in hu_remarks(values)]
        return
    if values.min() < 0 or "label map" in (verdict.refusal or ""):
        found.lines["unit"] = f"not known; {verdict.refusal or verdict.doubt or 'no values of a body in air'}"
        return
    try:
        from medaccel.restoration.uptake import body_median, check_suv

        spacing = voxel_spacing(image)
        median = body_median(values, spacing)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_suv(values, spacing, path)
        found.lines["unit"] = f"SUV is possible: the body's median is {median:.3g}"
    except ImportError:
        found.lines["unit"] = "not judged, as SciPy is not installed"
    except ValueError as error:
        found.lines["unit"] = f"not SUV: {str(error).partition(': ')[2]}"


def _series(path: Path, series_uid: str | None, check_units: bool, found: Info) -> None:
    series = open_series(path, series_uid=series_uid)
    first = series.headers[0]
    modality = series.modality
    found.lines["what"] = f"a DICOM series, {_MODALITIES.get(modality, modality)}"
    found.lines["read as"] = f"{len(series.headers)} slices, {Path(source(first)).name} the first one"
    for name, keyword in (
        ("description", "SeriesDescription"),
        ("series", "SeriesInstanceUID"),
        ("scanner", "Manufacturer"),
        ("date", "SeriesDate"),
    ):
        value = optional(first, keyword)
        if value is not None:
            found.lines[name] = str(value)
    syntax = getattr(getattr(first, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is not None:
        found.lines["encoding"] = getattr(syntax, "name", str(syntax))
    units = str(optional(first, "Units") or ("HU" if modality == "CT" else "unknown"))
    found.lines["unit"] = _UNITS.get(units, units)
    suv, refusal = False, None
    if modality == "PT":
        try:
            found.lines["SUV"] = _rule(series)
            suv = True
        except ValueError as error:  # the grid is worth telling all the same
            refusal = error
    image = load_series(series, suv=suv)
    values = _image(image, path, found)
    if modality == "PT":
        found.lines["values"] += " SUV" if suv else f" {found.lines['unit']}"
    if refusal is not None:
        raise refusal
    if modality == "CT" and check_units and values is not None and (doubt := judge(values).doubt) is not None:
        found.warnings.append(f"{path}: {doubt} (is it a CT in HU?)")


def _rule(series: DicomSeries) -> str:
    """Returns the sentence on how SUV are computed."""
    return series_rule(series).sentence
