# SPDX-License-Identifier: Apache-2.0
"""Checks the headers of a series before its pixels are read: what is missing, impossible or of two series is refused
with file and field, and nothing is allocated that a file does not hold."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

import numpy as np

from medaccel.data._fields import integer, label, numbers, optional, require, source
from medaccel.data.hounsfield import AIR_HU, HIGHEST_HU, ImageWarning, hu_remarks
from medaccel.data.nifti import available_memory

if TYPE_CHECKING:
    from pydicom import Dataset

# All slices of a series have the same; a slice without it is no proof of another patient.
_ONE_OF_A_SERIES = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality", "SOPClassUID")
_GREY = ("MONOCHROME1", "MONOCHROME2")
_BITS = (8, 16, 32)
# Slopes of scanners are 1e-6 (SUV) to 1e5 (Bq/mL of a syringe); integers times these fit in single precision.
_SLOPES = (1e-12, 1e12)
_INTERCEPT = 1e12
_PIXEL_DATA = (0x7FE0, 0x0010)
_UNDEFINED = 0xFFFFFFFF
# What a header would ask for is compared with the machine's memory: single precision, and one slice in double.
_BYTES_PER_VOXEL = 4
_NEAR_AIR = 24.0  # HU: padding of −1000 looks like air


def pixel_bytes(file: IO[bytes], header: Dataset) -> int | None:
    """Returns the bytes that a file has for its pixels; its position is where `dcmread` stopped before them.

    None stands for pixels whose length can't be told: they are compressed, or the file is deflated or has none.
    """
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None or syntax.is_compressed:
        return None
    start = file.tell()
    order = "<" if syntax.is_little_endian else ">"
    head = file.read(12)
    if len(head) < 8 or struct.unpack(order + "HH", head[:4]) != _PIXEL_DATA:
        return None
    if syntax.is_implicit_VR:
        length, begin = struct.unpack(order + "I", head[4:8])[0], start + 8
    elif len(head) == 12:
        length, begin = struct.unpack(order + "I", head[8:12])[0], start + 12
    else:
        return None
    end = file.seek(0, 2)
    return max(end - begin, 0) if length == _UNDEFINED else min(length, max(end - begin, 0))


def check_identity(headers: Sequence[Dataset]) -> None:
    """Refuses headers that aren't those of one patient and one series.

    Raises:
        ValueError: SOPInstanceUID is missing, or slices differ in patient, study, frame of reference, modality or
            class; the message names file and field.
    """
    for header in headers:
        require(header, "SOPInstanceUID")
    for keyword in _ONE_OF_A_SERIES:
        _check_one(headers, keyword)


def check_pixels(headers: Sequence[Dataset]) -> None:
    """Refuses headers whose pixels can't be read or would have impossible values.

    Raises:
        ValueError: slices aren't grey, have unusual bits, a scale that no scanner writes, or other pixels than their
            header says; the memory doesn't suffice. The message names file and field.

    Warns:
        UserWarning: slices of a PET have an intercept, slices of a CT different scales, or some are MONOCHROME1.
    """
    for header in headers:
        _check_scale(header)
        _check_bits(header)
        check_length(header)
    _check_memory(headers)
    _remark(headers)


def _check_one(headers: Sequence[Dataset], keyword: str) -> None:
    known = None
    for header in headers:
        value = optional(header, keyword)
        if value is None:
            continue
        if known is None:
            known = header
        elif str(value) != str(known.get(keyword)):
            raise ValueError(
                f"{source(header)}: {label(keyword)} is {value}, but {known.get(keyword)} in {source(known)}; "
                "expected one value in a series"
            )


def _check_scale(header: Dataset) -> None:
    slope, intercept = rescale(header)
    if not _SLOPES[0] <= slope <= _SLOPES[1]:
        raise ValueError(
            f"{source(header)}: {label('RescaleSlope')} is {slope:g}, expected {_SLOPES[0]:g} to {_SLOPES[1]:g}"
        )
    if abs(intercept) > _INTERCEPT:
        raise ValueError(
            f"{source(header)}: {label('RescaleIntercept')} is {intercept:g}, expected at most {_INTERCEPT:g}"
        )


def rescale(header: Dataset) -> tuple[float, float]:
    """Returns slope and intercept of a slice; MR may lack both."""
    absent = optional(header, "RescaleSlope") is None and optional(header, "RescaleIntercept") is None
    if absent and optional(header, "Modality") == "MR":
        return 1.0, 0.0
    return numbers(header, "RescaleSlope", 1)[0], numbers(header, "RescaleIntercept", 1)[0]


def _check_bits(header: Dataset) -> None:
    allocated = integer(header, "BitsAllocated")
    stored = integer(header, "BitsStored", allocated)
    high = integer(header, "HighBit", stored - 1)
    kind = str(optional(header, "Modality") or "")
    expected = _BITS[1:] if kind in ("PT", "CT") else _BITS  # eight bits are a picture of a PET, not its values
    if allocated not in expected:
        listed = " or ".join(map(str, expected))
        raise ValueError(f"{source(header)}: {label('BitsAllocated')} is {allocated}, expected {listed}")
    if not 1 <= stored <= allocated:
        raise ValueError(
            f"{source(header)}: {label('BitsStored')} is {stored}, expected 1 to {allocated} (BitsAllocated)"
        )
    if high != stored - 1:
        raise ValueError(
            f"{source(header)}: {label('HighBit')} is {high}, expected {stored - 1}, one less than "
            f"{label('BitsStored')}"
        )
    sign = integer(header, "PixelRepresentation")
    if sign not in (0, 1):
        raise ValueError(f"{source(header)}: {label('PixelRepresentation')} is {sign}, expected 0 or 1")
    grey = str(require(header, "PhotometricInterpretation"))
    if grey not in _GREY:
        raise ValueError(
            f"{source(header)}: {label('PhotometricInterpretation')} is {grey}, expected {' or '.join(_GREY)}"
        )


def check_length(header: Dataset) -> None:
    """Compares the bytes of the pixels, where `pixel_bytes` found them, with the size that the header states."""
    found = getattr(header, "pixel_bytes", None)
    if found is None:
        return
    rows, columns = integer(header, "Rows"), integer(header, "Columns")
    size = integer(header, "BitsAllocated") // 8
    expected = rows * columns * size * integer(header, "SamplesPerPixel") * integer(header, "NumberOfFrames", 1)
    if expected <= 0:
        raise ValueError(
            f"{source(header)}: {label('Rows')} is {rows} and {label('Columns')} {columns}, expected positive sizes"
        )
    # Writers pad to even lengths and a few to whole blocks; what is a row or a column more is another size.
    if expected <= found < expected + max(min(rows, columns) * size, 2):
        return
    stated = f"{label('Rows')} {rows} × {label('Columns')} {columns} of {8 * size} bits make {expected}"
    have = f"PixelData (7FE0,0010) has {found} bytes, where {stated}"
    if found < expected:
        raise ValueError(f"{source(header)}: the pixels can't be read; truncated? ({have})")
    raise ValueError(f"{source(header)}: {have}; expected as many bytes as the header says")


def _check_memory(headers: Sequence[Dataset]) -> None:
    first = headers[0]
    shape = integer(first, "Columns"), integer(first, "Rows"), len(headers)
    needed, free = math.prod(shape) * _BYTES_PER_VOXEL, available_memory()
    if needed > free:
        raise ValueError(
            f"{source(first)}: {label('Rows')} × {label('Columns')} × slices, {shape[1]} × {shape[0]} × {shape[2]}, "
            f"need {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        )


def _remark(headers: Sequence[Dataset]) -> None:
    first = headers[0]
    inverted = [h for h in headers if str(optional(h, "PhotometricInterpretation")) == "MONOCHROME1"]
    if inverted:
        warnings.warn(
            f"{source(inverted[0])}: {label('PhotometricInterpretation')} is MONOCHROME1 in {len(inverted)} of "
            f"{len(headers)} slices: it concerns the display alone, and the values are read as they are",
            stacklevel=4,
        )
    modality = str(optional(first, "Modality") or "")
    if modality == "PT":
        off = next((h for h in headers if rescale(h)[1] != 0), None)
        if off is not None:
            warnings.warn(
                f"{source(off)}: {label('RescaleIntercept')} is {rescale(off)[1]:g}, where a PET has 0; it is added",
                stacklevel=4,
            )
    if modality == "CT":
        expected = rescale(first)
        other = next((h for h in headers if rescale(h) != expected), None)
        if other is not None:
            warnings.warn(
                f"{source(other)}: {label('RescaleSlope')} and {label('RescaleIntercept')} are {rescale(other)}, but "
                f"{expected} in {source(first)}; a CT has one scale as a rule",
                stacklevel=4,
            )
        kind = optional(first, "RescaleType")
        if kind is not None and str(kind) != "HU":
            warnings.warn(f"{source(first)}: {label('RescaleType')} is {kind}, expected HU", stacklevel=4)


def check_values(values: np.ndarray, headers: Sequence[Dataset]) -> None:
    """Refuses a volume that isn't finite, and says of a CT what is no HU of a body.

    Raises:
        ValueError: a value is NaN or infinite; the file is named.

    Warns:
        ImageWarning: values of a CT lie outside of HU's usual range.
    """
    finite = np.isfinite(values)
    if not finite.all():
        k = int(np.flatnonzero(~finite.all(axis=(0, 1)))[0])
        raise ValueError(f"{source(headers[k])}: {int((~finite).sum())} voxels are NaN or infinite after rescaling")
    if str(optional(headers[0], "Modality")) == "CT":
        for sentence in hu_remarks(values):
            warnings.warn(f"{source(headers[0])}: {sentence}", ImageWarning, stacklevel=3)


class Padding:
    """Replaces the padding of a CT's slices by air, and counts it."""

    def __init__(self, headers: Sequence[Dataset]) -> None:
        self.headers, self.found, self.kept, self.most = headers, 0, 0, 0.0
        self.active = any("PixelPaddingValue" in header for header in headers)

    def replace(self, pixels: np.ndarray, values: np.ndarray, header: Dataset) -> None:
        """Puts air where a CT's pixels are padding; `values` are the pixels after rescaling."""
        limits = self._limits(header)
        if limits is None:
            return
        padded = (pixels >= limits[0]) & (pixels <= limits[1])
        count = int(padded.sum())
        if not count:
            return
        hounsfield = float(np.median(values[padded]))
        if not AIR_HU <= hounsfield < HIGHEST_HU:  # within this range it may be tissue
            values[padded] = AIR_HU
            self.found, self.most = self.found + count, hounsfield
        elif hounsfield > AIR_HU + _NEAR_AIR:
            self.kept, self.most = self.kept + count, hounsfield

    def tell(self) -> None:
        """Warns of padding that was replaced, and of padding that looks like tissue."""
        name = f"{source(self.headers[0])}: {label('PixelPaddingValue')}"
        if self.found:
            sentence = f"{name} stands for {self.most:g} HU in {self.found} voxels; they are read as {AIR_HU:g} HU"
            warnings.warn(sentence, ImageWarning, stacklevel=3)
        if self.kept:
            sentence = (
                f"{name} stands for {self.most:g} HU, which tissue has too; {self.kept} voxels with it are read as "
                "they are"
            )
            warnings.warn(sentence, ImageWarning, stacklevel=3)

    def _limits(self, header: Dataset) -> tuple[int, int] | None:
        if not self.active or str(optional(header, "Modality")) != "CT":
            return None
        if optional(header, "PixelPaddingValue") is None:
            return None
        value = _signed(header, "PixelPaddingValue")
        ranged = optional(header, "PixelPaddingRangeLimit") is not None
        limit = _signed(header, "PixelPaddingRangeLimit") if ranged else value
        return min(value, limit), max(value, limit)


def _signed(header: Dataset, keyword: str) -> int:
    """Returns a field that is of the pixels' type, which a file may state with the other sign: 63536 is −2000."""
    value, bits = integer(header, keyword), integer(header, "BitsAllocated")
    signed = integer(header, "PixelRepresentation") == 1
    if signed and value >= 1 << (bits - 1):
        return value - (1 << bits)
    return value + (1 << bits) if not signed and value < 0 else value
