# SPDX-License-Identifier: Apache-2.0
"""Writes a processed PET as a derived DICOM series of the study that it came from.

Each slice has its source's header, in which the fields that are no longer true are replaced or left out:

- new: the UIDs of series and instances, series number and description, image type (DERIVED\\PRIMARY, as
  PS3.3 C.8.9.4 asks), derivation description and code, the source image that is referred to, content
  and creation times, pixels and their slope;
- kept: patient, study, frame of reference, geometry, units, tracer, dose and burned-in annotation. The times of
  series and acquisition are the source's too, since SUV is reckoned from them (`medaccel.data.suv`);
- left out: extremes of pixel values, padding, overlays, thumbnails, digital signatures, look-up tables, and private
  fields, of whose meaning for other pixels nobody can say; but not those that SUV depends on.

So patient data are kept: name, ID, birth date, comments. `deidentify` removes them by the standard's basic profile,
and writes SUV (unit GML), since weight, dose and times are among what is removed. Nobody but the owner may read the
files.
"""

from __future__ import annotations

import copy
import os
import warnings
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medaccel.data._fields import integer, label, optional, require, source
from medaccel.data.deidentify import check_deidentify
from medaccel.data.deidentify import deidentify as remove_identity
from medaccel.data.dicom import DicomSeries
from medaccel.data.files import atomic_folder, check_output_folder
from medaccel.data.pet_module import IMAGE_TYPE, complete
from medaccel.data.suv import suv_factors, vendors

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

RESEARCH_ONLY = "research only"
_MAX_LO = 64  # characters of a DICOM long string, such as the description of a series
_MAX_ST = 1024  # characters of a DICOM short text
_WORDS = {"OW": 2, "OL": 4, "OF": 4, "OD": 8, "OV": 8}  # bytes of a word in fields of these kinds
_SMOOTHING = ("113087", "Smoothing")  # the standard's derivation (CID 7203) that comes nearest to removing noise
_SOURCE_IMAGE = ("121322", "Source image for image processing operation")
_PROCESSING = ("109102", "Processing Equipment")
# These fields describe the source's pixels, not the new ones.
_LEFT_OUT = (
    *("SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "VOILUTSequence"),
    *("IconImageSequence", "DigitalSignaturesSequence", "MACParametersSequence"),
    *("InstanceCreatorUID", "SeriesDescriptionCodeSequence", "PixelDataProviderURL", "DataSetTrailingPadding"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)


def write_derived_pet(
    folder: str | os.PathLike[str],
    volume: np.ndarray,
    template: DicomSeries,
    *,
    description: str,
    derivation: str = "",
    series_number: int | None = None,
    deidentify: bool = False,
    force: bool = False,
) -> None:
    """Writes a PET volume as a DICOM series derived from another, one file per slice; the folder appears at once.

    Values go back to the source's unit by the inverse of each slice's SUV factor, as 16-bit integers with a slope of
    the slice's own: nothing is clipped, and a value is off by at most half a slope, which is 1/65534 of the slice's
    greatest magnitude (1/131070 of it where the source's pixels are unsigned and no value is negative). The
    intercept is 0, as PET requires.

    Args:
        folder: the folder to make; it may exist if it is empty.
        volume: SUV, (columns, rows, slices) of the template, as `load_series(template, suv=True)` gives them.
        template: the series that it was made from.
        description: the processing in words, ASCII; "research only" is put before it in SeriesDescription.
        derivation: further words for DerivationDescription.
        deidentify: remove what identifies the patient by the standard's basic profile (the pixels stay as they are),
            and write SUV; needs the package dicom-anonymizer.
        series_number: the series' number; by default the template's plus 1000.
        force: replace a folder that holds DICOM files and nothing else.

    Raises:
        ValueError: `deidentify` lacks its package; the volume has another shape than the template or values that are
            not finite; a template that is no PET or has no SUV; a description that is empty, too long or not ASCII;
            `folder` holds the template itself; with `force`, it holds anything but DICOM files.
        FileExistsError: the folder is not empty and `force` is False.
        OSError: the folder can't be written; its earlier content stays.
    """
    target = check_series_folder(folder, force=force)
    if deidentify:
        check_deidentify()
    if any(Path(os.path.realpath(source(h))).parent == target for h in template.headers):
        raise ValueError(f"{folder} holds the series that the new one is derived from; expected another folder")
    _check_text(description, derivation)
    headers = template.headers
    first = headers[0]
    expected = (integer(first, "Columns"), integer(first, "Rows"), len(headers))
    if volume.shape != expected:
        raise ValueError(f"{folder}: the volume has shape {volume.shape}, expected the series' {expected}")
    bad = int(np.count_nonzero(~np.isfinite(volume)))
    if bad:
        raise ValueError(f"{folder}: the volume has {bad} voxels that are NaN or infinite; expected SUV")
    if template.modality != "PT":
        raise ValueError(f"{source(first)}: {label('Modality')} is {template.modality}, expected PT (PET)")
    if hasattr(first, "frame_index"):
        raise ValueError(
            f"{source(first)} is a multi-frame file, which can't be a template for a series of single slices; "
            "expected an output that ends in .nii or .nii.gz"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller was warned when SUV was computed
        factors = np.ones(len(headers)) if deidentify else suv_factors(headers)
    signed = integer(first, "PixelRepresentation", 1) == 1 or bool(volume.min() < 0)
    number = integer(first, "SeriesNumber", 0) + 1000 if series_number is None else series_number
    series = _series_fields(description, number, len(headers))
    shared = _shared_uids()
    with atomic_folder(folder, force=force, private=True) as temporary:
        for k, header in enumerate(headers):
            values = volume[:, :, k].T.astype(np.float64) / factors[k]  # (rows, columns), the source's unit
            slope, pixels = _quantised(values, signed)
            derived = _without_stale_fields(header)
            derived.update(copy.deepcopy(series))
            _describe(derived, header, description, derivation, slope)
            complete(derived, k + 1, shared)
            if deidentify:
                derived.Units, derived.SUVType = "GML", "BW"
                remove_identity(derived)
                derived.update(copy.deepcopy(series))
                _describe(derived, None, description, derivation, slope)
            _set_pixels(derived, pixels, slope)
            path = temporary / f"IM{k + 1:05d}.dcm"
            derived.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=True)
            path.chmod(0o600)


def check_series_folder(folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Returns the folder that a series can be written to (links followed), or raises an error before any work.

    Raises:
        ValueError: with `force`, the folder holds anything but DICOM files: only an earlier series is replaced.
        FileExistsError: the folder is not empty and `force` is False.
        OSError: the folder can't be written.
    """
    target = check_output_folder(folder, force=force)
    for path in target.iterdir() if target.is_dir() else ():
        if not path.is_file() or not _is_dicom(path):
            raise ValueError(f"{path} is no DICOM file; only a folder of nothing but DICOM files is replaced")
    return target


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _check_text(description: str, derivation: str) -> None:
    length = _MAX_LO - len(f"{RESEARCH_ONLY}: ")
    if not description.strip() or len(description) > length:
        raise ValueError(f"description has {len(description)} characters; expected 1 to {length}")
    for name, text in (("description", description), ("derivation", derivation)):
        # A backslash separates values; other characters depend on the source's character set.
        if not text.isascii() or not text.isprintable() or "\\" in text:
            raise ValueError(f"{name} is {text!r}; expected printable ASCII without a backslash")


def _series_fields(description: str, number: int, slices: int) -> Dataset:
    """Returns the fields that all slices of the new series share."""
    from pydicom import Dataset
    from pydicom.uid import generate_uid

    now = datetime.now()
    fields = Dataset()
    fields.SeriesInstanceUID = generate_uid()
    fields.SeriesNumber = number
    fields.SeriesDescription = f"{RESEARCH_ONLY}: {description}"
    fields.ImageType = list(IMAGE_TYPE)
    fields.NumberOfSlices = slices
    fields.ContentDate = fields.InstanceCreationDate = f"{now:%Y%m%d}"
    fields.ContentTime = fields.InstanceCreationTime = f"{now:%H%M%S}"
    fields.DerivationCodeSequence = [_code(*_SMOOTHING)]
    return fields


def _equipment() -> Dataset:
    """Describes this package as the last equipment that contributed to the image."""
    from pydicom import Dataset

    from medaccel._version import __version__

    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [_code(*_PROCESSING)]
    item.Manufacturer = "medaccel"
    item.SoftwareVersions = __version__
    item.ContributionDateTime = f"{datetime.now():%Y%m%d%H%M%S}"
    return item


def _code(value: str, meaning: str) -> Dataset:
    from pydicom import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _without_stale_fields(header: Dataset) -> Dataset:
    """Copies a source slice's header without the fields that aren't true of other pixels."""
    from pydicom import Dataset

    kept = vendors.tags(header)

    def leave_out(item: Dataset, element: DataElement) -> None:
        overlay = element.tag.group >> 8 == 0x60 and element.tag.group % 2 == 0
        private = element.tag.is_private and element.tag not in kept
        if overlay or private or element.keyword in _LEFT_OUT:
            del item[element.tag]

    try:
        derived = copy.deepcopy(header)
        derived.walk(leave_out)
    except Exception as error:  # pydicom reads a value when it is asked for, and can stumble in any way
        raise ValueError(f"{source(header)}: a field can't be read ({error})") from error
    if header.original_encoding[1] is False:  # big-endian, which is retired: words are turned round
        derived.walk(_swap_bytes)
    # pydicom converts no dataset that remembers how its file was encoded.
    plain = Dataset()
    plain.update(derived)
    return plain


def _swap_bytes(_: Dataset, element: DataElement) -> None:
    size = _WORDS.get(element.VR)
    if size is not None and isinstance(element.value, bytes) and len(element.value) % size == 0:
        element.value = np.frombuffer(element.value, f"u{size}").byteswap().tobytes()


def _shared_uids() -> Dataset:
    from pydicom import Dataset
    from pydicom.uid import generate_uid

    shared = Dataset()
    shared.StudyInstanceUID, shared.FrameOfReferenceUID = generate_uid(), generate_uid()
    return shared


def _describe(derived: Dataset, header: Dataset | None, description: str, derivation: str, slope: float) -> None:
    from pydicom import Dataset
    from pydicom.uid import generate_uid

    if header is not None:
        image = Dataset()
        image.ReferencedSOPClassUID = require(header, "SOPClassUID")
        image.ReferencedSOPInstanceUID = require(header, "SOPInstanceUID")
        image.PurposeOfReferenceCodeSequence = [_code(*_SOURCE_IMAGE)]
        derived.SourceImageSequence = [image]
    earlier = optional(derived, "ContributingEquipmentSequence") or ()
    derived.ContributingEquipmentSequence = [*earlier, _equipment()]
    derived.SOPInstanceUID = generate_uid()
    text = f"For research only, not for diagnosis. {description}. {derivation}".strip()
    rounding = f" Stored in 16 bits: values are off by at most {slope / 2:.3g} {optional(derived, 'Units')}."
    derived.DerivationDescription = text[: _MAX_ST - len(rounding)] + rounding


def _quantised(values: np.ndarray, signed: bool) -> tuple[float, np.ndarray]:
    """Returns the slope, as the file will state it, and the integers."""
    from pydicom.valuerep import format_number_as_ds

    dtype = np.dtype(np.int16 if signed else np.uint16)
    peak = float(np.abs(values).max())
    # A slope has 16 characters in DICOM: the integers are computed with the number that these state.
    slope = float(format_number_as_ds(peak / np.iinfo(dtype).max)) if peak > 0 else 1.0
    return slope, np.rint(values / slope).astype(dtype)


def _set_pixels(derived: Dataset, pixels: np.ndarray, slope: float) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian
    from pydicom.valuerep import DSfloat

    derived.BitsAllocated = derived.BitsStored = 16
    derived.HighBit = 15
    derived.PixelRepresentation = int(pixels.dtype.kind == "i")
    derived.PhotometricInterpretation = "MONOCHROME2"
    derived.RescaleSlope, derived.RescaleIntercept = DSfloat(slope, auto_format=True), 0
    derived.add_new("PixelData", "OW", pixels.astype(pixels.dtype.newbyteorder("<")).tobytes())
    derived.file_meta = FileMetaDataset()
    derived.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    derived.file_meta.MediaStorageSOPClassUID = derived.SOPClassUID
    derived.file_meta.MediaStorageSOPInstanceUID = derived.SOPInstanceUID
    derived.preamble = bytes(128)
