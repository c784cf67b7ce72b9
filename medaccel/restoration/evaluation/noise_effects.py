# SPDX-License-Identifier: Apache-2.0
"""Relates noise to a restoration's success: how noisy each study was, how much was gained there, and what noise
remains.

The noise level of a study is that of its input. In the body it is taken from the difference of two nested exposures,
where the patient cancels out: Var(PET_t − PET_T) = λ·(1/t − 1/T), which is 1 − t/T of Var(PET_t) = λ/t; hot organs
weigh most, as in the MSE score. In the liver it is the coefficient of variation that readers of PET know, which lumpy
uptake raises.

The remaining noise is restored − PET_T. Its variance holds the target's own noise and any structure that was lost, so
that it never reaches 0; its correlation shows whether fine or coarse noise was removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medaccel.restoration.evaluation.lesions import coefficient_of_variation
from medaccel.restoration.evaluation.metrics import Array, Mask, check_volumes, mse_limit
from medaccel.restoration.evaluation.noise import NoiseAnalysis, analyse_noise
from medaccel.studies.statistics import Statistic, mean_statistic


@dataclass(frozen=True)
class NoiseLevel:
    """Holds an input image's standard deviation / mean, in the body and in the liver (NaN without one)."""

    body: float
    liver: float


@dataclass(frozen=True)
class NoiseShare:
    """Holds one study's noise in the input, and a method's share of the limit there (fraction)."""

    study: str
    noise: NoiseLevel
    share: float

    def flat(self) -> dict[str, Any]:
        """Returns a flat row for CSV and JSON: `study`, `noise_body`, `noise_liver`, `share`."""
        return {
            "study": self.study,
            "noise_body": self.noise.body,
            "noise_liver": self.noise.liver,
            "share": self.share,
        }


@dataclass(frozen=True)
class Trend:
    """Holds Spearman's rank correlation of the share with the noise level over `count` studies; NaN below three."""

    correlation: float
    p: float
    count: int


@dataclass(frozen=True)
class RemainingNoise:
    """Describes image − PET_T of one study, where the image is the input or a restored one.

    Attributes:
        bias, sd: mean and standard deviation inside the mask, SUV.
        analysis: the analysis of the same difference, divided by its local standard deviation.
    """

    bias: float
    sd: float
    analysis: NoiseAnalysis


@dataclass(frozen=True)
class NoiseChange:
    """Describes one method's remaining noise over studies.

    Attributes:
        method: its key.
        sd: the standard deviation over studies, SUV.
        ratio: sd / the input's sd, over studies: below 1 if noise was removed.
        correlation: ρ_d over studies, by (axis, d in voxels).
        variance: Var(D_d) of normalised noise, likewise.
        distance: d in mm, likewise; the first study's.
    """

    method: str
    sd: Statistic
    ratio: Statistic
    correlation: dict[tuple[int, int], Statistic]
    variance: dict[tuple[int, int], Statistic]
    distance: dict[tuple[int, int], float]

    def flat(self) -> dict[str, Any]:
        """Returns a flat row for CSV and JSON: means over studies, `rho_i1` for axis i at one voxel, …"""
        row: dict[str, Any] = {"method": self.method, "sd": self.sd.mean, "sd_ratio": self.ratio.mean}
        for name, table in (("rho", self.correlation), ("variance", self.variance)):
            row |= {f"{name}_{'ijk'[axis]}{d}": statistic.mean for (axis, d), statistic in table.items()}
        return row


def noise_level(
    image: Array,
    target: Array,
    mask: Mask,
    input_seconds: float,
    target_seconds: float,
    *,
    liver_core: Mask | None = None,
) -> NoiseLevel:
    """Measures how noisy an exposure is; see this module's docstring.

    Args:
        image, target: the nested exposures of t and T seconds, SUV.
        mask: the body.
        liver_core: the result of `lesions.organ_core`.

    Raises:
        ValueError: `metrics` would refuse shapes, mask or values; not 0 < t < T; the target's mean is not positive.
    """
    check_volumes(mask, image=image, target=target)
    limit = mse_limit(input_seconds, target_seconds)
    mean = float(target[mask].mean(dtype=np.float64))
    if not mean > 0:
        raise ValueError(f"target has a mean of {mean:g} SUV inside the mask; expected uptake")
    difference = image[mask].astype(np.float64) - target[mask]
    liver = math.nan if liver_core is None else coefficient_of_variation(image, liver_core)
    return NoiseLevel(float(difference.std()) / math.sqrt(limit) / mean, liver)


def share_against_noise(
    studies: Sequence[str], levels: Sequence[NoiseLevel], rows: Sequence[Mapping[str, float]]
) -> list[NoiseShare]:
    """Joins a method's share of the limit in each study to the study's noise level.

    Args:
        rows: the method's rows of `StudyEvaluator.evaluate`, one per study.

    Raises:
        ValueError: there is no study, or levels and rows are not one per study.
    """
    if not studies or not len(studies) == len(levels) == len(rows):
        raise ValueError(
            f"{len(studies)} studies, {len(levels)} noise levels and {len(rows)} rows; expected one of each per "
            "study, at least one"
        )
    return [
        NoiseShare(study, level, float(row["share_of_limit"]))
        for study, level, row in zip(studies, levels, rows, strict=True)
    ]


def noise_trend(points: Sequence[NoiseShare], *, where: str = "body") -> Trend:
    """Measures whether a method's share rises or falls with noise in "body" or "liver"; studies without a value drop
    out.

    The trend is NaN where all shares or all noise levels are the same.

    Raises:
        ValueError: `where` is neither.
    """
    from scipy.stats import spearmanr

    pairs = np.array([(_level(point, where), point.share) for point in points]).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) < 3 or (np.ptp(pairs, axis=0) == 0).any():
        return Trend(math.nan, math.nan, len(pairs))
    result = spearmanr(pairs[:, 0], pairs[:, 1])
    return Trend(float(result.statistic), float(result.pvalue), len(pairs))


def remaining_noise(
    images: Mapping[str, Array],
    target: Array,
    mask: Mask,
    spacing: tuple[float, float, float],
    *,
    distances: Sequence[int] = (1, 2, 3),
) -> dict[str, RemainingNoise]:
    """Analyses image − target for each image of one study: the input, and the methods' restorations of it.

    Args:
        images: (i, j, k), SUV, by method; the input is one of them, as "identity" in the report.
        target: PET_T.
        distances: distances in voxels.

    Raises:
        ValueError: there are no images; `noise.analyse_noise` would refuse one, for instance one that equals the
            target.
    """
    if not images:
        raise ValueError("remaining_noise got no images; expected the input and at least one restored")
    found = {}
    for name, image in images.items():
        analysis = analyse_noise(image, target, mask, spacing, distances=distances)
        difference = image[mask].astype(np.float64) - target[mask]
        found[name] = RemainingNoise(float(difference.mean()), float(difference.std()), analysis)
    return found


def compare_noise(
    studies: Sequence[Mapping[str, RemainingNoise]], *, before: str = "identity", seed: int = 0
) -> list[NoiseChange]:
    """Summarises each method's remaining noise over studies, in the order of the first study's, beside the input's.

    Args:
        studies: a result of `remaining_noise` per study.
        before: the input's name.
        seed: seed of the bootstrap intervals.

    Raises:
        ValueError: there are no studies, one lacks the input, or one has other methods or distances than the first.
    """
    if not studies or before not in studies[0]:
        raise ValueError(f"studies hold {[list(s) for s in studies]}; expected at least one, with {before!r} in each")
    keys = [[(d.axis, d.voxels) for d in noise.analysis.differences] for s in studies for noise in s.values()]
    if any(study.keys() != studies[0].keys() for study in studies) or any(key != keys[0] for key in keys):
        raise ValueError("studies hold different methods or distances; expected the same in all")
    changes = []
    for method in studies[0]:
        noises = [study[method] for study in studies]
        ratios = [study[method].sd / study[before].sd for study in studies]
        by_pair = {
            key: [noise.analysis.differences[n] for noise in noises] for n, key in enumerate(keys[0])
        }  # (axis, d): one difference per study
        changes.append(
            NoiseChange(
                method=method,
                sd=mean_statistic([noise.sd for noise in noises], seed=seed),
                ratio=mean_statistic(ratios, seed=seed),
                correlation={k: mean_statistic([d.correlation for d in v], seed=seed) for k, v in by_pair.items()},
                variance={k: mean_statistic([d.variance for d in v], seed=seed) for k, v in by_pair.items()},
                distance={k: v[0].distance for k, v in by_pair.items()},
            )
        )
    return changes


def _level(point: NoiseShare, where: str) -> float:
    levels: dict[str, float] = asdict(point.noise)
    if where not in levels:
        raise ValueError(f"where is {where!r}; expected 'body' or 'liver'")
    return levels[where]
