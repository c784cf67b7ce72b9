# SPDX-License-Identifier: Apache-2.0
"""Reads a folder of DICOM slices into a volume.

Arrays are (column, row, slice), slices ascending along the normal; affines map these indices to RAS
coordinates in mm (DICOM's own are LPS).
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from medaccel.data._fields import integer, label, optional, require, source
from medaccel.data._plausible import (
    Padding,
    check_identity,
    check_length,
    check_pixels,
    check_values,
    pixel_bytes,
    rescale,
)
from medaccel.data.decoding import check_decoder
from medaccel.data.geometry import stack
from medaccel.data.multiframe import choose_frame, frame_headers
from medaccel.data.nifti import make_nifti
from medaccel.data.suv import Kind, SuvRule, suv_rule

if TYPE_CHECKING:
    from nibabel import Nifti1Image
    from pydicom import Dataset

_T = TypeVar("_T")

# Exports and desktops leave these files beside the slices. Anything else must be DICOM: otherwise a slice cut short
# to nothing would be taken for a stray file, and missed only if it lies in the middle of the body.
_STRAY_NAMES = {"dicomdir", "license", "lockfile", "readme", "version", "thumbs.db", "desktop.ini"}
_STRAY_TEXT = {".csv", ".htm", ".html", ".inf", ".json", ".log", ".md", ".txt", ".xml", ".yaml", ".yml"}
_LONG = 1 << 16  # bytes; shorter reads needn't be looked at
_STRAY_SUFFIXES = _STRAY_TEXT | {".gif", ".gz", ".jpeg", ".jpg", ".nii", ".pdf", ".png", ".zip"}


@dataclass(frozen=True)
class DicomSeries:
    """Holds one series: the slices' headers without pixels, in order, and the paths of their files.

    The slices of a multi-frame file have headers of their own, with the attribute `frame_index`.
    """

    headers: list[Dataset]
    affine: np.ndarray  # (4, 4), maps (column, row, slice) to RAS, mm

    @property
    def modality(self) -> str:
        """Returns the series' modality: PT, CT, …"""
        return str(require(self.headers[0], "Modality"))


def open_series(
    folder: str | os.PathLike[str],
    *,
    series_uid: str | None = None,
    frame: int | None = None,
    progress: bool = False,
) -> DicomSeries:
    """Reads and checks the headers of the one series in a folder (not in its sub-folders).

    DICOMDIR, hidden files, and files named as text, pictures or archives are passed over; every other one
    must be whole DICOM.

    Args:
        folder: it holds the slices, one per file, under any names.
        series_uid: SeriesInstanceUID of the series to take where the folder has several.
        frame: the frame to take of a dynamic or gated series, from 1.
        progress: show a bar on stderr.

    Raises:
        FileNotFoundError, NotADirectoryError: `folder` is no folder.
        ValueError: the folder holds no DICOM, a file that isn't DICOM or is truncated, several series (each is
            named), no series of that UID, several frames at a position (they are listed), pixels for which no decoder
            is installed, or a geometry that is no volume (`medaccel.data.geometry.stack`).

    Warns:
        UserWarning: there are fewer slices than the header says the series has.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder of DICOM files, but this is a file")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not _is_stray(path))
    if not paths:
        has_folders = any(path.is_dir() for path in folder.iterdir())
        hint = "; name the sub-folder that has the series" if has_folders else ""
        raise ValueError(f"{folder}: no DICOM files in this folder{hint}")
    headers = [_read(path, pixels=False) for path in _with_progress(paths, progress, "headers")]
    series = _choose(folder, headers, series_uid)
    for header in series:
        samples = integer(header, "SamplesPerPixel")
        if samples != 1:
            raise ValueError(f"{source(header)}: {label('SamplesPerPixel')} is {samples}, expected 1 (no colours)")
        check_decoder(header)
    frames = [header for file in series for header in frame_headers(file)]
    for header in series:
        if integer(header, "NumberOfFrames", 1) > 1:  # a frame's own header doesn't know the file's length
            check_length(header)
    series = choose_frame(frames, frame)
    check_identity(series)
    order, affine = stack(series)
    check_pixels(series)
    _check_count(series)
    return DicomSeries([series[k] for k in order], affine)


def series_rule(series: DicomSeries, kind: Kind | Literal["bqml"] = "bw") -> SuvRule:
    """Returns the rule by which the values of an open series become SUV; `medaccel.data.suv_rule` has its errors.

    Raises:
        ValueError: besides, the series is no PET.
    """
    first = series.headers[0]
    if series.modality != "PT":
        raise ValueError(f"{source(first)}: {label('Modality')} is {series.modality}, expected PT (PET) for SUV")
    try:
        return suv_rule(series.headers, kind)
    except ValueError as error:
        if kind == "bqml" or str(optional(first, "Units")) != "BQML":
            raise
        raise ValueError(f"{error} (smooth --unit bqml reads the series in Bq/mL, without SUV)") from error


def load_series(
    series: DicomSeries, *, suv: bool | Kind | Literal["bqml"] | SuvRule = False, progress: bool = False
) -> Nifti1Image:
    """Reads the pixels of a series whose headers are open.

    Args:
        series: the result of `open_series`.
        suv: return SUV, for PET only: true for body weight (g/mL); a kind, or bqml, as `medaccel.data.suv_rule` has
            them; or its rule. False keeps the files' unit: HU for CT, Bq/mL (BQML) for most PET.
        progress: show a bar on stderr.

    Returns:
        An image of float32 (columns, rows, slices).

    Raises:
        ValueError: pixels are truncated, or compressed in a way that pydicom can't decode here; RescaleSlope
            or RescaleIntercept is missing (MR may lack both), or gives values that aren't finite; with `suv`, the
            series is no PET, or `medaccel.data.suv_rule` refuses it.
    """
    first = series.headers[0]
    factors, quantity = np.ones(len(series.headers)), ""
    if suv:
        rule = suv if isinstance(suv, SuvRule) else series_rule(series, "bw" if suv is True else suv)
        factors, quantity = rule.factors, rule.quantity
    read = (Path(), np.empty((0, 0, 0)))  # the last file, as frames of one file follow each other
    values, padding = np.empty((0, 0, 0), np.float32), Padding(series.headers)
    for k, header in enumerate(_with_progress(series.headers, progress, "slices")):
        # Each slice has its own slope: PET spreads 16 bits over the slice's range.
        slope, intercept = rescale(header)
        if Path(source(header)) != read[0]:
            read = Path(source(header)), _pixels(Path(source(header)))
        index = getattr(header, "frame_index", None)
        # A file of one frame has no axis for frames.
        pixels = (read[1] if index is None or read[1].ndim == 2 else read[1][index]).astype(np.float64)
        if k == 0:  # only now is it known that a slice holds what its header says
            values = np.empty((first.Columns, first.Rows, len(series.headers)), np.float32, order="F")
        rescaled = pixels * slope + intercept
        padding.replace(pixels, rescaled, header)
        values[:, :, k] = (rescaled * factors[k]).T
    padding.tell()
    check_values(values, series.headers)
    image = make_nifti(values, series.affine)
    image.header["descrip"] = quantity.encode()[:79]
    return image


def read_dicom_series(
    folder: str | os.PathLike[str],
    *,
    series_uid: str | None = None,
    frame: int | None = None,
    progress: bool = False,
) -> Nifti1Image:
    """Reads the one series in a folder, in its own unit; its arguments and errors are those of `open_series` and
    `load_series`."""
    series = open_series(folder, series_uid=series_uid, frame=frame, progress=progress)
    return load_series(series, progress=progress)


def read_pet_series(
    folder: str | os.PathLike[str],
    *,
    series_uid: str | None = None,
    frame: int | None = None,
    progress: bool = False,
) -> Nifti1Image:
    """Reads the one PET series in a folder as SUV; its arguments and errors are those of `open_series` and
    `load_series`."""
    series = open_series(folder, series_uid=series_uid, frame=frame, progress=progress)
    return load_series(series, suv=True, progress=progress)


class _Clipped(io.BufferedReader):
    """Reads no more from a file than the file has: Python allocates the length that a damaged header claims before it
    reads."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LONG:
            size = min(size, max(os.fstat(self.fileno()).st_size - self.tell(), 0))
        return super().read(size)


def open_clipped(path: Path) -> io.BufferedReader:
    """Opens a file for pydicom, which remembers its name."""
    return _Clipped(io.FileIO(os.fspath(path)))


def _is_stray(path: Path) -> bool:
    name = path.name.lower()
    return name.startswith(".") or name in _STRAY_NAMES or path.suffix.lower() in _STRAY_SUFFIXES


def _read(path: Path, *, pixels: bool) -> Dataset:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with open_clipped(path) as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=not pixels)
            if not pixels:
                dataset.pixel_bytes = pixel_bytes(file, dataset)
            return dataset
    except InvalidDicomError:
        size = path.stat().st_size
        state = "is empty (truncated?)" if size == 0 else "is not a DICOM file (no DICM at byte 128)"
        raise ValueError(f"{path} {state}; expected only the slices of a series in the folder") from None
    except PermissionError:
        raise
    except Exception as error:  # a parser of damaged bytes can stumble in any way
        raise ValueError(f"{path}: truncated or damaged DICOM file ({error})") from error


def _choose(folder: Path, headers: list[Dataset], series_uid: str | None) -> list[Dataset]:
    groups: dict[str, list[Dataset]] = {}
    for header in headers:
        groups.setdefault(str(require(header, "SeriesInstanceUID")), []).append(header)
    if series_uid is None and len(groups) == 1:
        return headers
    if series_uid in groups:
        return groups[series_uid]
    listed = "; ".join(
        f"{uid} ({optional(group[0], 'Modality') or '?'}, "
        f"{optional(group[0], 'SeriesDescription') or 'no description'}, "
        f"{len(group)} files, such as {Path(source(group[0])).name})"
        for uid, group in groups.items()
    )
    if series_uid is None:
        raise ValueError(f"{folder}: {len(groups)} series in this folder, expected one (or series_uid): {listed}")
    raise ValueError(f"{folder}: no series {series_uid} in this folder, which has {listed}")


def _check_count(headers: list[Dataset]) -> None:
    declared = integer(headers[0], "NumberOfSlices", 0)
    if len(headers) < declared:
        warnings.warn(
            f"{source(headers[0])}: {label('NumberOfSlices')} is {declared}, but the folder has "
            f"{len(headers)} slices of the series: those at an end of the body may be missing",
            stacklevel=3,
        )


def _pixels(path: Path) -> np.ndarray:
    """Reads a file's pixels, (rows, columns) or (frames, rows, columns)."""
    dataset = _read(path, pixels=True)
    try:
        pixels = dataset.pixel_array
    except Exception as error:  # a decoder of damaged bytes can stumble in any way
        raise ValueError(f"{path}: the pixels can't be read; truncated? ({error})") from error
    return pixels


def _with_progress(items: Iterable[_T], shown: bool, description: str) -> Iterable[_T]:
    if not shown:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=description, leave=False)
