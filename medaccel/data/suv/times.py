# SPDX-License-Identifier: Apache-2.0
"""Finds when the frames of a series were measured, and the time that a START series is decay-corrected to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import TYPE_CHECKING

from medaccel.data._fields import label, moment, optional, same, source
from medaccel.data.suv import vendors
from medaccel.data.suv.clock import SECOND, TOLERANCE, agree, average_time, frame_factor, full, percent
from medaccel.data.suv.findings import Findings

if TYPE_CHECKING:
    from pydicom import Dataset

_SERIES = ("SeriesDate", "SeriesTime")
# No scan is longer; a vendor's time that is further from the acquisition has another date, by anonymisation.
_LONGEST_SCAN = 12 * 3600.0
# Scans of long-lived nuclides may count from the injection, days before.
_LONGEST_OFFSET = 60 * 86400.0


@dataclass(frozen=True)
class Frames:
    """Holds a slice's time each: the start of its frame, its duration and frame reference time in seconds (None where
    the header lacks them)."""

    starts: list[datetime]
    acquired: list[datetime]  # the acquisition times as written
    durations: list[float | None]
    offsets: list[float | None]

    @property
    def first(self) -> datetime:
        return min(self.starts)

    @property
    def first_end(self) -> datetime:
        """Returns the end of the frame that ends first."""
        lengths = (timedelta(seconds=duration or 0) for duration in self.durations)
        return min(start + length for start, length in zip(self.starts, lengths, strict=True))


def read_frames(headers: Sequence[Dataset], half_life: float, findings: Findings) -> Frames:
    """Reads the frames' times.

    Some scanners, GE's for instance, write the start of the whole scan as every slice's acquisition time. It is known
    by frame reference times that differ nevertheless, or by being the series' time; then a frame's start follows from
    its frame reference time.
    """
    acquired = [acquisition(header, findings) for header in headers]
    durations = [_milliseconds(header, "ActualFrameDuration", 1e-3, _LONGEST_SCAN) for header in headers]
    offsets = [_milliseconds(header, "FrameReferenceTime", -_LONGEST_OFFSET, _LONGEST_OFFSET) for header in headers]
    starts = acquired
    whole_scan = len(set(offsets)) > 1 or _begins_with_series(headers[0], acquired[0])
    if len(set(acquired)) == 1 and None not in offsets and whole_scan:
        to_start = vendors.is_made_by(headers[0], "GE")
        into = [0.0 if to_start else average_time(duration or 0, half_life) for duration in durations]
        later = [max((offset or 0) - part, 0) for offset, part in zip(offsets, into, strict=True)]
        starts = [moment + timedelta(seconds=seconds) for moment, seconds in zip(acquired, later, strict=True)]
    return Frames(starts, acquired, durations, offsets)


def _begins_with_series(header: Dataset, acquired: datetime) -> bool:
    if any(optional(header, keyword) is None for keyword in _SERIES):
        return False
    return abs((moment(header, *_SERIES) - acquired).total_seconds()) <= SECOND


def acquisition(header: Dataset, findings: Findings) -> datetime:
    """Returns the start of a slice's acquisition: AcquisitionDate and AcquisitionTime, else AcquisitionDateTime."""
    whole = optional(header, "AcquisitionDateTime")
    parts = [optional(header, keyword) for keyword in ("AcquisitionDate", "AcquisitionTime")]
    if whole is not None and None in parts:
        return full(header, label("AcquisitionDateTime"), whole)
    found = moment(header, "AcquisitionDate", "AcquisitionTime")
    if whole is not None:
        other = full(header, label("AcquisitionDateTime"), whole)
        if abs((other - found).total_seconds()) > SECOND:
            findings.warn(
                f"{source(header)}: {label('AcquisitionDateTime')} is {other}, but {label('AcquisitionDate')} and "
                f"{label('AcquisitionTime')} are {found}; the latter are used",
                topic="AcquisitionDateTime",
            )
    return found


def _milliseconds(header: Dataset, keyword: str, least: float, most: float) -> float | None:
    """Returns a field in seconds; None if it is absent, not a number, or no length that a frame can have."""
    try:
        value = float(optional(header, keyword)) / 1000
    except (TypeError, ValueError):
        return None
    return value if least <= value <= most else None


def frame_averages(
    headers: Sequence[Dataset], frames: Frames, half_life: float, findings: Findings
) -> list[datetime]:
    """Returns for a series without decay correction the moments when the activity equals the pixels, one per slice.

    They lie T_ave after the frame's start. Decay from the injection to this moment is decay to the frame's start
    times λT / (1 - exp(-λT)), the factor from a frame's average to its start.
    """
    k = max(range(len(headers)), key=lambda k: frames.starts[k] - frames.acquired[k])
    if not agree(frames.starts[k], frames.acquired[k], half_life):
        findings.warn(
            f"{source(headers[k])}: its acquisition time, {frames.acquired[k]}, is that of all slices, but by "
            f"{label('FrameReferenceTime')} its frame began at {frames.starts[k]}, which is used"
        )
    moments = []
    for header, start, duration in zip(headers, frames.starts, frames.durations, strict=True):
        stated = optional(header, "FrameReferenceDateTime")
        if duration is None and stated is None:
            raise ValueError(
                f"{source(header)}: {label('ActualFrameDuration')} is missing, or isn't that of a scan in ms; since "
                f"{label('DecayCorrection')} is NONE, SUV depend on the decay during the frame"
            )
        computed = None if duration is None else start + timedelta(seconds=average_time(duration, half_life))
        if stated is None:
            moments.append(start if computed is None else computed)
            continue
        moments.append(full(header, label("FrameReferenceDateTime"), stated))
        if computed is not None and not agree(computed, moments[-1], half_life):
            findings.warn(
                f"{source(header)}: {label('FrameReferenceDateTime')} is {moments[-1]}, but the activity equals the "
                f"frame's average at {computed} by {label('FrameAcquisitionDateTime')} and its duration; the former "
                "is used",
                topic="FrameReferenceDateTime",
            )
    return moments


def scan_start(
    headers: Sequence[Dataset], frames: Frames, half_life: float, findings: Findings
) -> tuple[datetime, str]:
    """Returns the time that a START series is decay-corrected to, and where it was found.

    In this order: DecayCorrectionDateTime (enhanced PET); the vendor's private time; the series' time, if it isn't
    later than the first acquisition, as that of a derived series is; the frame reference times; the decay factor.

    Raises:
        ValueError: none of them is there, or they contradict each other and the decay factor doesn't decide.
    """
    stated = same(headers, label("DecayCorrectionDateTime"), lambda h: optional(h, "DecayCorrectionDateTime"))
    if stated is not None:
        return full(headers[0], label("DecayCorrectionDateTime"), stated), label("DecayCorrectionDateTime")
    name = f"{label(_SERIES[0])}, {label(_SERIES[1])}"
    series = _series_time(headers, name)
    tag = vendors.scan_time(headers)
    back = _from_frame_reference(headers, frames, half_life, findings)
    usable = series is not None and (series - min(frames.acquired)).total_seconds() <= SECOND
    if tag is not None:
        chosen, origin = _vendor_time(headers, tag, frames, series if usable else None, back, half_life, findings)
        if usable and series is not None and not agree(series, chosen, half_life):
            findings.warn(_disagree(headers, (name, series), (origin, chosen), half_life, "the latter is used"))
        if back and not any(agree(found, chosen, half_life) for found in back):
            other = (f"{label('FrameReferenceTime')} and the acquisition", back[0])
            findings.warn(_disagree(headers, other, (origin, chosen), half_life, "the latter is used"))
    elif usable and series is not None:
        chosen, origin = _series_or_frames(headers, frames, (name, series), back, half_life, findings)
    elif back:
        chosen = back[0]
        t_ave = "" if vendors.is_made_by(headers[0], "GE") else " + T_ave"
        origin = f"acquisition time{t_ave} - {label('FrameReferenceTime')}"
    elif (found := _from_decay_factor(headers, frames, half_life)) is not None:
        chosen, origin = found, f"{label('DecayFactor')}"
        findings.warn(f"{source(headers[0])}: the time of decay correction, {chosen}, was found from {origin} alone")
    else:
        if series is None:  # the message is about the field that is missing
            moment(headers[0], *_SERIES)
        raise ValueError(
            f"{source(headers[0])}: {name} is {series}, after the first acquisition at {frames.first} "
            f"(a derived series), and {vendors.GE_SCAN_TIME} is missing, as {label('FrameReferenceTime')} with "
            f"{label('ActualFrameDuration')} and {label('DecayFactor')} are: the time of decay correction is unknown"
        )
    check_decay_factor(headers, frames, [chosen] * len(headers), half_life, origin, findings)
    return chosen, origin


def _series_time(headers: Sequence[Dataset], name: str) -> datetime | None:
    absent = all(optional(h, keyword) is None for h in headers for keyword in _SERIES[1:])
    return None if absent else same(headers, name, lambda h: moment(h, *_SERIES))


def _disagree(
    headers: Sequence[Dataset],
    one: tuple[str, datetime],
    other: tuple[str, datetime],
    half_life: float,
    consequence: str,
) -> str:
    off = percent((one[1] - other[1]).total_seconds(), half_life)
    return (
        f"{source(headers[0])}: {one[0]} puts the time of decay correction at {one[1]}, but {other[0]} at {other[1]} "
        f"(SUV differ by {off}); {consequence}"
    )


def _vendor_time(
    headers: Sequence[Dataset],
    tag: tuple[str, datetime],
    frames: Frames,
    series: datetime | None,
    back: list[datetime],
    half_life: float,
    findings: Findings,
) -> tuple[datetime, str]:
    """Returns the vendor's time, on the acquisition's date if anonymisation has shifted the others' but not its."""
    name, found = tag
    distance = frames.first - found
    if -SECOND <= distance.total_seconds() <= _LONGEST_SCAN:
        return found, name
    days = timedelta(days=round(distance / timedelta(days=1)))
    others = [*back, *([] if series is None else [series])]
    if days and any(agree(found + days, other, half_life) for other in others):
        findings.warn(
            f"{source(headers[0])}: {name} is {found}, the first acquisition at {frames.first}: their dates differ, "
            "so only the former's time of day is used"
        )
        return found + days, name
    when = "after" if distance.total_seconds() < 0 else "long before"
    raise ValueError(
        f"{source(headers[0])}: {name} is {found}, {when} the first acquisition at {frames.first}: the time of decay "
        "correction is unknown"
    )


def _series_or_frames(
    headers: Sequence[Dataset],
    frames: Frames,
    series: tuple[str, datetime],
    back: list[datetime],
    half_life: float,
    findings: Findings,
) -> tuple[datetime, str]:
    """Returns the series' time where the frame reference times agree with it; else the decay factor decides."""
    if not back or any(agree(found, series[1], half_life) for found in back):
        return series[1], series[0]
    other = (f"{label('FrameReferenceTime')} and the acquisition", back[0])
    supported = [
        time
        for time in (series, other)
        if _decay_factors_fit(headers, frames, [time[1]] * len(headers), half_life) is True
    ]
    if len(supported) != 1:
        raise ValueError(
            _disagree(headers, series, other, half_life, f"{label('DecayFactor')} doesn't tell which is right")
        )
    findings.warn(
        _disagree(headers, series, other, half_life, f"{label('DecayFactor')} fits {supported[0][0]}, which is used")
    )
    return supported[0][1], supported[0][0]


def _from_frame_reference(
    headers: Sequence[Dataset], frames: Frames, half_life: float, findings: Findings
) -> list[datetime]:
    """Returns the scan's start by the frame reference times, first by the vendor's convention, then by the other;
    nothing if they are absent or contradict each other.

    The frame reference time runs from the time of decay correction to the frame: on GE's scanners to its start, on
    others to the moment when the activity equals its average over the frame.
    """
    if any(offset is None for offset in frames.offsets):
        return []
    conventions = []
    for to_average in (False, True):
        if to_average and any(duration is None for duration in frames.durations):
            continue
        found = [
            start + timedelta(seconds=(average_time(duration or 0, half_life) if to_average else 0.0) - (offset or 0))
            for start, duration, offset in zip(frames.starts, frames.durations, frames.offsets, strict=True)
        ]
        earliest, latest = found.index(min(found)), found.index(max(found))
        if not agree(found[earliest], found[latest], half_life):
            findings.warn(
                f"{source(headers[earliest])} and {source(headers[latest])}: by {label('FrameReferenceTime')} and "
                f"the acquisition, their times of decay correction are {found[earliest]} and {found[latest]}; "
                "expected one"
            )
            return []
        seconds = median((time - found[0]).total_seconds() for time in found)
        conventions.append((to_average, found[0] + timedelta(seconds=seconds)))
    to_start = vendors.is_made_by(headers[0], "GE")
    if not to_start and len(conventions) == 1 and frames.offsets[0] != 0:
        # Without the frame's duration the moment of the average is unknown.
        return []
    return [time for _, time in sorted(conventions, key=lambda pair: pair[0] == to_start)]


def decay_factors(headers: Sequence[Dataset]) -> list[float] | None:
    """Returns the slices' decay factors; None if one is absent or not positive."""
    found = []
    for header in headers:
        try:
            found.append(float(optional(header, "DecayFactor")))
        except (TypeError, ValueError):
            return None
    return found if all(math.isfinite(factor) and factor > 0 for factor in found) else None


def _expected_factors(frames: Frames, k: int, reference: datetime, half_life: float) -> list[float]:
    """Returns the factors that decay-correct the k-th frame's start, or its average, to the reference time."""
    factors = []
    for start in (frames.acquired[k], frames.starts[k]):
        decay = 2 ** (min((start - reference).total_seconds() / half_life, 1000))
        factors += [decay, decay * frame_factor(frames.durations[k] or 0, half_life)]
    return factors


def _decay_factors_fit(
    headers: Sequence[Dataset], frames: Frames, references: Sequence[datetime], half_life: float
) -> bool | None:
    """Tells whether all decay factors fit the times of decay correction; None if there are none."""
    factors = decay_factors(headers)
    if factors is None:
        return None
    return all(
        any(
            abs(factor / expected - 1) <= TOLERANCE for expected in _expected_factors(frames, k, reference, half_life)
        )
        for k, (factor, reference) in enumerate(zip(factors, references, strict=True))
    )


def check_decay_factor(
    headers: Sequence[Dataset],
    frames: Frames,
    references: Sequence[datetime],
    half_life: float,
    origin: str,
    findings: Findings,
) -> None:
    """Warns where the decay factors, with which the scanner says to have multiplied, don't fit the times chosen."""
    factors = decay_factors(headers)
    if factors is None or _decay_factors_fit(headers, frames, references, half_life):
        return
    wrong, all_expected = [], []
    for k, factor in enumerate(factors):
        expected = _expected_factors(frames, k, references[k], half_life)
        all_expected.append(expected[-1])
        if all(abs(factor / e - 1) > TOLERANCE for e in expected):
            wrong.append(k)
    k = wrong[0]
    findings.warn(
        f"{source(headers[k])}: {label('DecayFactor')} is {factors[k]:g}, but a decay correction to {references[k]} "
        f"(from {origin}) has {all_expected[k]:.5g}; so have {len(wrong)} of {len(headers)} slices; the time is used"
    )


def _from_decay_factor(headers: Sequence[Dataset], frames: Frames, half_life: float) -> datetime | None:
    """Returns the time of decay correction that the decay factors tell; None if they are absent, all 1, or tell
    different ones."""
    factors = decay_factors(headers)
    if factors is None or all(factor == 1 for factor in factors) or None in frames.durations:
        return None
    found = [
        start - timedelta(seconds=math.log2(factor / frame_factor(duration or 0, half_life)) * half_life)
        for start, duration, factor in zip(frames.starts, frames.durations, factors, strict=True)
    ]
    if not agree(min(found), max(found), half_life) or max(found) > frames.first + timedelta(minutes=1):
        return None
    return found[0] + timedelta(seconds=median((time - found[0]).total_seconds() for time in found))
