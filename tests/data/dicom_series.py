# SPDX-License-Identifier: Apache-2.0
"""Small PET series on disk, whole or broken as a test wants them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

ROWS, COLUMNS, SLICES = 4, 5, 6
PIXEL_SPACING, SLICE_SPACING = (2.0, 3.0), 4.0  # (between rows, between columns), mm
WEIGHT_KG, DOSE_BQ, HALF_LIFE_S, ELAPSED_S = 70.0, 3.7e8, 6586.2, 3600.0
SUV_PER_BQML = 1000 * WEIGHT_KG / (DOSE_BQ * 2 ** (-ELAPSED_S / HALF_LIFE_S))

Edit = Callable[[Dataset, int], None]


def stored_pixels(k: int) -> np.ndarray:
    """Returns the int16 pixels of slice k, all different."""
    return (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) + 100 * k).astype(np.int16)


def slope(k: int) -> float:
    return 0.5 + k


def volume() -> np.ndarray:
    """Returns the series in Bq/mL, (columns, rows, slices)."""
    return np.stack([stored_pixels(k).T * slope(k) for k in range(SLICES)], axis=-1)


def pet_slice(k: int, series_uid: str) -> Dataset:
    """Makes a static FDG PET slice as scanners write it: injected at 10:00:00, scanned at 11:00:00."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = PositronEmissionTomographyImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid(entropy_srcs=[series_uid, str(k)])
    ds.SeriesInstanceUID = series_uid
    ds.SeriesDescription = "PET AC"
    ds.Modality = "PT"
    ds.Manufacturer = "SYNTHETIC"
    ds.SeriesDate = ds.AcquisitionDate = "20240229"
    ds.SeriesTime = "110000.00"
    ds.AcquisitionTime = "110000.00"
    ds.PatientWeight = WEIGHT_KG
    ds.Units = "BQML"
    ds.DecayCorrection = "START"
    ds.CorrectedImage = ["DECY", "ATTN", "SCAT", "RAN"]
    nuclide = Dataset()
    nuclide.CodeValue, nuclide.CodingSchemeDesignator, nuclide.CodeMeaning = "77004003", "SCT", "^18^Fluorine"
    item = Dataset()
    item.RadiopharmaceuticalStartTime = "100000.00"
    item.RadionuclideTotalDose = DOSE_BQ
    item.RadionuclideHalfLife = HALF_LIFE_S
    item.RadionuclideCodeSequence = [nuclide]
    ds.RadiopharmaceuticalInformationSequence = [item]
    ds.NumberOfSlices = SLICES
    ds.Rows, ds.Columns = ROWS, COLUMNS
    ds.PixelSpacing = list(PIXEL_SPACING)
    ds.SliceThickness = SLICE_SPACING
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [-10.0, -20.0, -30.0 + SLICE_SPACING * k]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit = 15
    ds.PixelRepresentation = 1
    ds.RescaleSlope, ds.RescaleIntercept = slope(k), 0
    ds.PixelData = stored_pixels(k).tobytes()
    return ds


def injection(ds: Dataset) -> Dataset:
    """The item that has dose, half-life and injection time."""
    return ds.RadiopharmaceuticalInformationSequence[0]


def slices(edit: Edit | None = None, *, count: int = SLICES, series_uid: str = "1.2.3") -> list[Dataset]:
    """Makes the slices of one series, in order, each changed by `edit(slice, k)`."""
    result = [pet_slice(k, series_uid) for k in range(count)]
    for k, ds in enumerate(result):
        if edit is not None:
            edit(ds, k)
    return result


def file_name(k: int) -> str:
    """A name whose order is not the slices' order."""
    return f"IM{(7 * k + 3) % 101:03d}.dcm"


def write_series(
    folder: Path,
    edit: Edit | None = None,
    *,
    leave_out: tuple[int, ...] = (),
    series_uid: str = "1.2.3",
    prefix: str = "",
    syntax: str = "explicit",
) -> Path:
    """Writes a series; its encoding is explicit or implicit, little-endian, or "big": explicit, big-endian."""
    folder.mkdir(exist_ok=True)
    for k, ds in enumerate(slices(edit, series_uid=series_uid)):
        if k in leave_out:
            continue
        if syntax == "implicit":
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        elif syntax == "big":
            ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
            ds["PixelData"].VR = "OW"
            ds.PixelData = np.frombuffer(ds.PixelData, "u1").reshape(-1, 2)[:, ::-1].tobytes()
        ds.save_as(folder / (prefix + file_name(k)), enforce_file_format=True)
    return folder
