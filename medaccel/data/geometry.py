# SPDX-License-Identifier: Apache-2.0
"""Finds the order of the slices of a DICOM series, and one affine for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medaccel.data._fields import integer, label, numbers, optional, positive, source

if TYPE_CHECKING:
    from pydicom import Dataset

# Positions are often rounded to 0.1 mm: 5 % of the usual 2-5 mm spacing.
_UNIFORM = 0.05
_SAME_POSITION_MM = 1e-3
_LISTED = 4  # positions that a message lists besides the first
# Pixels of scanners measure 0.05 to 20 mm, and no scanner is 10 m long.
_PIXELS_MM = (1e-3, 1e3)
_FARTHEST_MM = 1e5


def stack(headers: Sequence[Dataset]) -> tuple[list[int], np.ndarray]:
    """Orders the slices of one series and places them in space.

    A slice's position is ImagePositionPatient along the normal, which is the cross product of the row and
    column directions (DICOM PS3.3 C.7.6.2.1.1).

    Args:
        headers: the slices' headers, in any order.

    Returns:
        The order (indices into `headers`, ascending position), and the (4, 4) affine from (column, row,
        slice) indices to RAS coordinates in mm.

    Raises:
        ValueError: a field of geometry is missing or invalid; sizes, spacings or orientations differ; slices share a
            position, are missing or are not evenly spaced; the stack isn't along the slices' normal (gantry tilt).
            The message names the files.
    """
    rows, columns, pixel_spacing = _in_plane(headers)
    normal = np.cross(rows, columns)
    positions = np.array([numbers(h, "ImagePositionPatient", 3) for h in headers])  # (n, 3), LPS mm
    for header, position in zip(headers, positions, strict=True):
        if np.abs(position).max() > _FARTHEST_MM:
            raise ValueError(
                f"{source(header)}: {label('ImagePositionPatient')} is {_position(header)} mm, expected at most "
                f"{_FARTHEST_MM:g} mm"
            )
    along = positions @ normal
    order = [int(k) for k in np.argsort(along, kind="stable")]
    ordered = [headers[k] for k in order]
    positions, along = positions[order], along[order]

    affine = np.eye(4)  # in LPS until the end
    affine[:3, 0] = rows * pixel_spacing[1]  # PixelSpacing is (between rows, between columns)
    affine[:3, 1] = columns * pixel_spacing[0]
    affine[:3, 3] = positions[0]
    if len(headers) == 1:
        affine[:3, 2] = normal * positive(headers[0], "SliceThickness", "mm")
    else:
        _check_spacing(ordered, along)
        _check_straight(ordered, positions, normal, min(pixel_spacing))
        affine[:3, 2] = (positions[-1] - positions[0]) / (len(headers) - 1)
    return order, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _in_plane(headers: Sequence[Dataset]) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Returns the directions of growing column and row index, and the pixel spacing, which all slices share."""
    first = headers[0]
    for keyword in ("Rows", "Columns"):
        for header in headers:
            _same_numbers(first, header, keyword, integer(first, keyword), integer(header, keyword), 0)
    spacing = numbers(first, "PixelSpacing", 2)
    orientation = numbers(first, "ImageOrientationPatient", 6)
    for header in headers[1:]:
        _same_numbers(first, header, "PixelSpacing", spacing, numbers(header, "PixelSpacing", 2), 1e-4)
        _same_numbers(
            first,
            header,
            "ImageOrientationPatient",
            orientation,
            numbers(header, "ImageOrientationPatient", 6),
            1e-3,
        )
    if not (_PIXELS_MM[0] <= min(spacing) and max(spacing) <= _PIXELS_MM[1]):
        raise ValueError(
            f"{source(first)}: {label('PixelSpacing')} is {spacing}, expected two positive numbers of mm, "
            f"{_PIXELS_MM[0]:g} to {_PIXELS_MM[1]:g}"
        )
    rows, columns = np.array(orientation[:3]), np.array(orientation[3:])
    if not np.allclose([rows @ rows, columns @ columns, rows @ columns], [1, 1, 0], atol=1e-3):
        raise ValueError(
            f"{source(first)}: {label('ImageOrientationPatient')} is {orientation}, expected two unit "
            "vectors at right angles"
        )
    return rows, columns, spacing


def _same_numbers(
    first: Dataset, other: Dataset, keyword: str, expected: object, found: object, tolerance: float
) -> None:
    if not np.allclose(np.asarray(expected), np.asarray(found), rtol=0, atol=tolerance):
        raise ValueError(
            f"{source(other)}: {label(keyword)} is {found}, but {expected} in {source(first)}; expected one "
            "geometry in a series"
        )


def _check_spacing(ordered: Sequence[Dataset], along: np.ndarray) -> None:
    gaps = np.diff(along)
    doubled = np.flatnonzero(gaps < _SAME_POSITION_MM)
    if doubled.size:
        a, b = ordered[doubled[0]], ordered[doubled[0] + 1]
        times = {str(optional(h, "FrameReferenceTime") or optional(h, "AcquisitionTime")) for h in (a, b)}
        hint = "; their times differ: frames of a dynamic series are not supported" if len(times) > 1 else ""
        raise ValueError(
            f"{source(a)} and {source(b)} have the same position, {label('ImagePositionPatient')} {_position(a)}, "
            f"expected one slice a position{_more(ordered, doubled)}{hint}"
        )
    # The lower median makes the smaller of two gaps count as the spacing.
    spacing = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    wide = np.flatnonzero(gaps > 1.5 * spacing)
    if wide.size:
        k = int(wide[0])
        a, b = ordered[k], ordered[k + 1]
        raise ValueError(
            f"{source(a)} and {source(b)} are {gaps[k]:.4g} mm apart, where the spacing is {spacing:.4g} mm: "
            f"{max(round(gaps[k] / spacing) - 1, 1)} slice(s) missing between them, between the positions "
            f"{_position(a)} and {_position(b)}, {label('ImagePositionPatient')}{_more(ordered, wide)}"
        )
    even = np.linspace(along[0], along[-1], len(along))
    k = int(np.argmax(np.abs(along - even)))
    if abs(along[k] - even[k]) > _UNIFORM * spacing:
        raise ValueError(
            f"{source(ordered[k])}: {label('ImagePositionPatient')} {_position(ordered[k])} is "
            f"{abs(along[k] - even[k]):.4g} mm off an even spacing of {spacing:.4g} mm; expected at most "
            f"{_UNIFORM:.0%} of it"
        )


def _position(header: Dataset) -> str:
    return f"({', '.join(f'{value:g}' for value in numbers(header, 'ImagePositionPatient', 3))})"


def _more(ordered: Sequence[Dataset], found: np.ndarray) -> str:
    """Lists the positions after the first one where something is wrong."""
    if len(found) < 2:
        return ""
    listed = ", ".join(_position(ordered[k]) for k in found[1 : _LISTED + 1])
    return f"; {len(found) - 1} more such places after {listed}{', …' if len(found) > _LISTED + 1 else ''}"


def _check_straight(ordered: Sequence[Dataset], positions: np.ndarray, normal: np.ndarray, pixel: float) -> None:
    """Checks that all slices lie above one another; half a pixel is tolerated, because directions are rounded."""
    offsets = positions - positions[0]
    aside = offsets - np.outer(offsets @ normal, normal)
    far = np.linalg.norm(aside, axis=1)
    k = int(np.argmax(far))
    if far[k] <= 0.5 * pixel:
        return
    # A stack that leans everywhere alike is a tilted one; else a slice lies elsewhere.
    leaning = np.linspace(0, 1, len(offsets))[:, None] * aside[-1]
    if np.linalg.norm(aside - leaning, axis=1).max() > 0.5 * pixel:
        raise ValueError(
            f"{source(ordered[k])}: {label('ImagePositionPatient')} {_position(ordered[k])} is {far[k]:.4g} mm aside "
            "of the first slice's normal, and not in one line with the others; expected slices straight above one "
            "another"
        )
    angle = np.degrees(np.arctan2(far[-1], abs(offsets[-1] @ normal)))
    raise ValueError(
        f"{source(ordered[k])}: {label('ImagePositionPatient')} is {far[k]:.4g} mm aside of the first normal: "
        f"the stack leans by {angle:.3g}° (a tilted gantry, or a sheared volume), expected slices straight above one "
        "another; dcm2niix, for instance, resamples such a series"
    )
