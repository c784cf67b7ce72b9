# SPDX-License-Identifier: Apache-2.0
"""Calibrates intervals from sampled restorations on validation studies, and checks them on others.

A method that draws samples of an image gives a mean and a standard deviation per voxel. mean ± 1.645·sd covers 90 %
of the voxels only if the errors are normal and the samples as wide as the errors; eight perfect samples would
already need ± 2.0·sd, since their mean and deviation are estimates themselves. Split conformal prediction (Vovk et
al. 2005; Angelopoulos and Bates 2023) replaces 1.645 by the quantile of |truth − mean|/sd on validation studies, one
factor per bin of predicted SUV, so that organs and hot lesions get their own.

The promise is for the average voxel of studies like the validation ones: a shifted test set, or a single patient,
may be covered more or less, which `coverage` shows. Voxels of one study are no independent samples, so intervals of
a coverage are taken over studies. A calibration states which truth it covers: the activity λ (in a simulation the
noise-free reconstruction), or the target PET_T, whose own noise widens the intervals.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medaccel.restoration.evaluation.metrics import Array, Mask, check_volumes
from medaccel.studies.statistics import Statistic, mean_statistic

LEVEL = 0.9
EDGES = (0.5, 1.0, 2.0, 4.0, 8.0)  # SUV; lung and fat lie below 1, most organs at 1–4, brain and bladder above
FLOOR = 1e-3  # SUV; identical samples claim a deviation of 0, which no factor can widen
LEAST_VOXELS = 1000
ACTIVITY, TARGET = "activity", "target"

# These kinds of interval are compared.
CALIBRATED, UNCALIBRATED, CONSTANT, BY_SUV = "calibrated", "uncalibrated", "constant", "by_suv"
KINDS = (CALIBRATED, UNCALIBRATED, CONSTANT, BY_SUV)

Item = tuple[Array, Array, Array, Mask]  # truth, mean, std, mask of one study

# Deviations are counted in bins of 0.5 %, which add up to tenths without a second pass.
_DEVIATION_EDGES = np.geomspace(1e-6, 1e3, 4096)
_TENTHS = 10


@dataclass(frozen=True)
class Calibration:
    """Holds the factors that make mean ± factor·sd an interval of the level; plain values only.

    Attributes:
        covers: the truth within the interval: "activity" (λ) or "target" (PET_T).
        level: the share of voxels meant to be covered.
        edges: B − 1 increasing SUV of the predicted mean, between B bins; the outer bins are open.
        factors: (B,), factors on the standard deviation.
        pooled: the factor of all bins together, which bins with too few voxels borrow.
        voxels: (B,), validation voxels per bin.
        constant: half the width, in SUV, of one interval for all voxels, which needs no sd.
        constants: (B,), the same by bin, which needs the SUV alone.
        floor: SUV; smaller standard deviations count as this one.
        studies: number of validation studies.

    Raises:
        ValueError: a value is not possible, or the lengths don't fit together.
    """

    covers: str
    level: float
    edges: tuple[float, ...]
    factors: tuple[float, ...]
    pooled: float
    voxels: tuple[int, ...]
    constant: float
    constants: tuple[float, ...]
    floor: float
    studies: int

    def __post_init__(self) -> None:
        _check_options(self.covers, self.level, self.edges, self.floor)
        bins = len(self.edges) + 1
        lengths = {"factors": len(self.factors), "voxels": len(self.voxels), "constants": len(self.constants)}
        if any(length != bins for length in lengths.values()):
            raise ValueError(f"calibration of {bins} SUV bins has {lengths}; expected one value per bin")
        widths = np.array([*self.factors, self.pooled, self.constant, *self.constants])
        if not (np.isfinite(widths).all() and (widths >= 0).all()):
            raise ValueError(f"calibration has factors or half-widths {widths.tolist()}; expected finite, >= 0")

    def bins(self, mean: Array) -> NDArray[np.intp]:
        """Returns the bin, from 0, of each predicted SUV; same shape."""
        return np.digitize(mean, self.edges)

    def half_width(self, mean: Array, std: Array) -> NDArray[np.float64]:
        """Returns half the width of the calibrated interval in SUV, from each voxel's mean and standard deviation in
        SUV.

        Raises:
            ValueError: the shapes differ.
        """
        if mean.shape != std.shape:
            raise ValueError(f"mean has shape {mean.shape}, std {std.shape}; expected the same")
        factors = np.asarray(self.factors)[self.bins(mean)]
        return np.asarray(factors * np.maximum(np.asarray(std, np.float64), self.floor))

    def to_json(self) -> str:
        """Returns the calibration as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Reads the text of `to_json`; raises ValueError if it is no calibration."""
        try:
            content: dict[str, Any] = json.loads(text)
            values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
            return cls(**values)
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not the JSON of a calibration ({error})") from error


@dataclass(frozen=True)
class IntervalQuality:
    """Describes one kind of interval on some voxels; the values are NaN if there are none.

    Attributes:
        coverage: the share of voxels whose truth lies within.
        width: mean width, SUV.
        score: mean `interval_score`, SUV; smaller is better.
    """

    coverage: float
    width: float
    score: float


@dataclass(frozen=True)
class CoverageRow:
    """Describes the voxels of a group.

    Attributes:
        group: "all"; "suv", a bin of predicted SUV; or "deviation", a tenth of the voxels by predicted deviation.
        label: the group's label: "all", "0.5–1", or "1" (the least deviation) to "10".
        voxels: their number.
        mean, deviation: the voxels' average predicted SUV, and average predicted standard deviation.
        intervals: the quality of each kind (see `KINDS`).
    """

    group: str
    label: str
    voxels: int
    mean: float
    deviation: float
    intervals: dict[str, IntervalQuality]

    def flat(self) -> dict[str, Any]:
        """Returns a flat row for CSV and JSON: `coverage_calibrated`, `width_constant`, …"""
        row = asdict(self)
        for kind, quality in row.pop("intervals").items():
            row |= {f"{key}_{kind}": value for key, value in quality.items()}
        return row


@dataclass(frozen=True)
class Coverage:
    """Says how much calibrated intervals cover; see `coverage`.

    Attributes:
        covers, level: the calibration's.
        rows: overall, then by SUV bin, then by tenth of predicted deviation.
        studies: each study's share of covered voxels.
    """

    covers: str
    level: float
    rows: tuple[CoverageRow, ...]
    studies: tuple[float, ...]

    @property
    def overall(self) -> CoverageRow:
        """Returns the row of all voxels."""
        return self.rows[0]

    def group(self, name: str) -> list[CoverageRow]:
        """Returns the rows of "all", "suv" or "deviation"."""
        return [row for row in self.rows if row.group == name]

    def statistic(self, *, seed: int = 0) -> Statistic:
        """Returns the mean of the studies' coverage with its bootstrap interval over studies."""
        return mean_statistic(self.studies, seed=seed)


def fit_calibration(
    items: Iterable[Item],
    level: float = LEVEL,
    *,
    covers: str = ACTIVITY,
    edges: Sequence[float] = EDGES,
    floor: float = FLOOR,
    least_voxels: int = LEAST_VOXELS,
) -> Calibration:
    """Fits factors on validation studies: the ⌈(n + 1)·level⌉-th smallest of |truth − mean|/sd in each bin.

    Every voxel counts the same. Studies are taken one at a time; ten bytes per voxel are kept.

    Args:
        items: a study's truth, predicted mean and standard deviation in SUV, and body mask, all (i, j, k).
        level: the share to be covered.
        covers: the kind of truth, "activity" or "target".
        edges: limits between the bins of the predicted mean, SUV.
        floor: SUV; see `Calibration`.
        least_voxels: a bin with fewer takes the factor of all bins together.

    Raises:
        ValueError: there are no items, or too few voxels for the level; shapes differ, a value is not finite, a mask
            is empty, a standard deviation is negative; an option is not possible.
    """
    _check_options(covers, level, edges, floor)
    if least_voxels < 1:
        raise ValueError(f"least_voxels is {least_voxels}; expected at least 1")
    ratios, errors, bins = [], [], []
    for truth, mean, std in _inside(items):
        error = np.abs(truth - mean)
        errors.append(error.astype(np.float32))
        ratios.append((error / np.maximum(std, floor)).astype(np.float32))
        bins.append(np.digitize(mean, edges).astype(np.int16))
    studies = len(bins)
    if not studies:
        raise ValueError("fit_calibration got no items; expected at least one validation study")
    ratio, error, index = np.concatenate(ratios), np.concatenate(errors), np.concatenate(bins)
    pooled, constant = _conformal_quantile(ratio, level), _conformal_quantile(error, level)
    least = max(least_voxels, _least_count(level))
    factors, constants, voxels = [], [], []
    for number in range(len(edges) + 1):
        chosen = index == number
        count = int(np.count_nonzero(chosen))
        enough = count >= least
        factors.append(_conformal_quantile(ratio[chosen], level) if enough else pooled)
        constants.append(_conformal_quantile(error[chosen], level) if enough else constant)
        voxels.append(count)
    return Calibration(
        covers=covers,
        level=float(level),
        edges=tuple(float(edge) for edge in edges),
        factors=tuple(factors),
        pooled=pooled,
        voxels=tuple(voxels),
        constant=constant,
        constants=tuple(constants),
        floor=float(floor),
        studies=studies,
    )


def coverage(calibration: Calibration, items: Iterable[Item]) -> Coverage:
    """Measures the coverage on studies that the calibration was not fitted on, beside three plainer kinds of
    interval.

    "uncalibrated" is mean ± z·sd (z = 1.645 at 90 %), "constant" has one width for all voxels and "by_suv" one per
    bin of predicted SUV, both as wide as the validation studies require. Samples are worth drawing if the calibrated
    score is below that of the constant widths. Studies are taken one at a time and summed up; tenths of predicted
    deviation are exact to 0.5 % of a deviation, all else is exact.

    Args:
        items: the items of `fit_calibration`, with the truth that the calibration covers.

    Raises:
        ValueError: there are no items, or `fit_calibration` would refuse one.
    """
    from scipy.stats import norm

    z = float(norm.ppf((1 + calibration.level) / 2))
    bins = len(calibration.edges) + 1
    sums = 3 + 3 * len(KINDS)  # voxels, SUV, deviation; for each kind: covered, width, score
    by_suv = np.zeros((sums, bins))
    by_deviation = np.zeros((sums, len(_DEVIATION_EDGES) + 1))
    studies = []
    for truth, mean, std in _inside(items):
        index = calibration.bins(mean)
        halves = {
            CALIBRATED: calibration.half_width(mean, std),
            UNCALIBRATED: z * std,
            CONSTANT: np.full(mean.shape, calibration.constant),
            BY_SUV: np.asarray(calibration.constants)[index],
        }
        columns: list[Array] = [np.ones(mean.shape), mean, std]
        for half in (halves[kind] for kind in KINDS):
            inside = np.abs(truth - mean) <= half
            columns += [inside, 2 * half, interval_score(truth, mean - half, mean + half, calibration.level)]
        by_suv += _sums(index, bins, columns)
        by_deviation += _sums(np.digitize(std, _DEVIATION_EDGES), len(_DEVIATION_EDGES) + 1, columns)
        studies.append(float(columns[3].mean()))
    if not studies:
        raise ValueError("coverage got no items; expected at least one study")
    tenths = _sums(_tenths(by_deviation[0]), _TENTHS, list(by_deviation))
    rows = [_row("all", "all", by_suv.sum(axis=1))]
    rows += [_row("suv", label, by_suv[:, n]) for n, label in enumerate(_bin_labels(calibration.edges))]
    rows += [_row("deviation", str(n + 1), tenths[:, n]) for n in range(_TENTHS)]
    return Coverage(calibration.covers, calibration.level, tuple(rows), tuple(studies))


def interval_score(truth: ArrayLike, low: ArrayLike, high: ArrayLike, level: float) -> NDArray[np.float64]:
    """Returns Gneiting and Raftery's (2007, eq. 43) score of an interval: its width, plus 2/α times the truth's
    distance outside it.

    α is 1 − level. Smaller is better; the true quantiles have the smallest expected score, so neither too wide nor
    too narrow an interval pays. The score is elementwise, in the unit of the truth.

    Raises:
        ValueError: `level` is not within (0, 1).
    """
    _check_level(level)
    x, lower, upper = (np.asarray(values, dtype=np.float64) for values in (truth, low, high))
    outside = np.maximum(lower - x, 0) + np.maximum(x - upper, 0)
    return np.asarray(upper - lower + 2 / (1 - level) * outside)


def _inside(items: Iterable[Item]) -> Iterator[tuple[NDArray[np.float64], ...]]:
    """Yields each item's truth, mean and std inside its mask, checked, (voxels,)."""
    for number, (truth, mean, std, mask) in enumerate(items):
        try:
            check_volumes(mask, truth=truth, mean=mean, std=std)
        except ValueError as error:
            raise ValueError(f"item {number}: {error}") from error
        values = tuple(volume[mask].astype(np.float64) for volume in (truth, mean, std))
        if values[2].min() < 0:
            raise ValueError(f"item {number}: std has a least value of {values[2].min():g}; expected >= 0")
        yield values


def _conformal_quantile(values: NDArray[np.float32], level: float) -> float:
    least = _least_count(level)
    if len(values) < least:
        raise ValueError(f"{len(values)} voxels in all; expected at least {least} for level={level}")
    rank = _rank(len(values), level)
    found = np.partition(values, rank - 1)[rank - 1]
    # The next larger number is taken: values were rounded to float32, and the one at the quantile must itself be
    # covered.
    return float(np.nextafter(found, np.float32(np.inf)))


def _rank(count: int, level: float) -> int:
    return math.ceil((count + 1) * level - 1e-9)  # 1e-9: 10·0.9 may come out a bit above 9


def _least_count(level: float) -> int:
    """Returns the least number of values among which one can be the quantile."""
    return math.ceil(level / (1 - level) - 1e-9)


def _sums(index: NDArray[Any], size: int, columns: Sequence[Array]) -> NDArray[np.float64]:
    """Sums each column by index: (columns, size)."""
    return np.stack([np.bincount(index, weights=column, minlength=size) for column in columns])


def _tenths(counts: NDArray[np.float64]) -> NDArray[np.intp]:
    """Returns the tenth, from 0, that the middle of each of increasing bins with these counts falls into."""
    middle = (np.cumsum(counts) - counts / 2) / counts.sum()
    return np.minimum((_TENTHS * middle).astype(np.intp), _TENTHS - 1)


def _row(group: str, label: str, sums: NDArray[np.float64]) -> CoverageRow:
    voxels = int(sums[0])
    means = [float(value) / voxels if voxels else math.nan for value in sums[1:]]
    qualities = {kind: IntervalQuality(*means[2 + 3 * n : 5 + 3 * n]) for n, kind in enumerate(KINDS)}
    return CoverageRow(group, label, voxels, means[0], means[1], qualities)


def _bin_labels(edges: Sequence[float]) -> list[str]:
    if not edges:
        return ["any"]
    between = [f"{low:g}–{high:g}" for low, high in itertools.pairwise(edges)]
    return [f"below {edges[0]:g}", *between, f"{edges[-1]:g} and more"]


def _check_options(covers: str, level: float, edges: Sequence[float], floor: float) -> None:
    if covers not in (ACTIVITY, TARGET):
        raise ValueError(f"covers is {covers!r}; expected {ACTIVITY!r} or {TARGET!r}")
    _check_level(level)
    if not (np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
        raise ValueError(f"edges is {tuple(edges)}; expected increasing SUV")
    if not (math.isfinite(floor) and floor > 0):
        raise ValueError(f"floor is {floor}; expected a positive SUV")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a fraction between 0 and 1, such as 0.9")
