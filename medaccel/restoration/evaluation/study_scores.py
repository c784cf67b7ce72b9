# SPDX-License-Identifier: Apache-2.0
"""Computes all metrics of one method on one study as a flat row, and a table's rows from those of many studies.

A row (`StudyEvaluator.evaluate`) has these keys; a value is NaN if the study doesn't allow it (no noise-free image,
no lesions, no liver):

    mse, psnr, ssim_distance[_range|_axial]            against the target
    score_mse, score_ssim[_range|_axial]               percent, 0 = the unrestored input
    share_of_limit, equivalent_seconds                 of the MSE score: fraction, seconds
    ceiling_score_ssim, ceiling_weight                 of the study: the best blend of input and truth
    share_of_ceiling                                   of the 1 − SSIM score: fraction
    truth_mse, truth_psnr, truth_ssim_distance         against the noise-free reconstruction
    truth_score_mse, truth_score_ssim                  percent, 0 = the unrestored input
    implied_truth_score                                truth_score_mse of `metrics.implied_truth`
    lesion_{large|small|cold}_count                    hot lesions of ≥ 10 mm, of < 10 mm; cold ones
    lesion_{large|small}_{suvmean|suvmax|suvpeak}_bias, _sd    percent of the noise-free value
    lesion_cold_suvmean_bias, _sd
    lesion_{large|small}_lost, hot_spots_{large|small}         counts
    lesion_{large|small}_lost_anew                             those of the lost that the input keeps
    liver_cov                                          fraction
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from medaccel.restoration.evaluation import lesions as lesion_metrics
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.lesions import LesionUptake
from medaccel.restoration.evaluation.metrics import Array, Mask
from medaccel.studies.statistics import Agreement, Statistic, agreement, mean_statistic, pool_agreement

GROUPS: dict[str, tuple[str, ...]] = {
    "large": ("suvmean", "suvmax", "suvpeak"),
    "small": ("suvmean", "suvmax", "suvpeak"),
    "cold": ("suvmean",),
}
TOTALS = (
    "lesion_large_count",
    "lesion_small_count",
    "lesion_cold_count",
    "lesion_large_lost",
    "lesion_small_lost",
    "lesion_large_lost_anew",
    "lesion_small_lost_anew",
    "hot_spots_large",
    "hot_spots_small",
)


CHECKED = ("suvmean", "suvmax")  # measures of `lesion_checks`
BIAS_LIMIT = 2.0  # percent


class StudyLike(Protocol):
    """Lists what `StudyEvaluator` reads of a study: arrays (i, j, k); exposures, noise_free in SUV, spacing in mm."""

    @property
    def name(self) -> str: ...
    @property
    def spacing(self) -> tuple[float, float, float]: ...
    @property
    def exposures(self) -> Mapping[int, Array]: ...  # seconds: image
    @property
    def noise_free(self) -> Array | None: ...
    @property
    def lesions(self) -> Array | None: ...  # instance labels, 0 is background
    @property
    def organs(self) -> Array | None: ...
    @property
    def organ_names(self) -> Mapping[str, int] | None: ...


class StudyEvaluator:
    """Holds what all methods share on one study: the mask, the input's distances, the lesions.

    Args:
        study: see `StudyLike`.
        input_seconds, target_seconds: two of the study's exposures.
        mask: the body; default `metrics.body_mask` of the target.

    Raises:
        ValueError: an exposure is missing, no body is found, shapes differ, or a volume is not finite.
    """

    def __init__(
        self, study: StudyLike, input_seconds: int, target_seconds: int, *, mask: Mask | None = None
    ) -> None:
        metrics.check_seconds(input_seconds, target_seconds)
        for seconds in (input_seconds, target_seconds):
            if seconds not in study.exposures:
                raise ValueError(f"study {study.name} has no {seconds} s exposure (it has {sorted(study.exposures)})")
        self.study = study
        self.input_seconds, self.target_seconds = input_seconds, target_seconds
        self.image, self.target = study.exposures[input_seconds], study.exposures[target_seconds]
        self.mask = metrics.body_mask(self.target, study.spacing) if mask is None else mask
        if not self.mask.any():
            raise ValueError(f"study {study.name}: no body was found in the {target_seconds} s image")
        metrics.check_volumes(self.mask, input=self.image, target=self.target)
        self._range = metrics.study_range(self.target, self.mask)
        self._input_distances = self._distances(self.image)
        self._ceiling = {"ceiling_score_ssim": math.nan, "ceiling_weight": math.nan}
        if study.noise_free is not None:
            metrics.check_volumes(self.mask, noise_free=study.noise_free)
            self._input_truth = self._truth_distances(self.image, study.noise_free)
            least, weight = metrics.ssim_ceiling(self.image, study.noise_free, self.target, self.mask)
            self._ceiling = {
                "ceiling_score_ssim": metrics.score(least, self._input_distances["ssim_distance"]),
                "ceiling_weight": weight,
            }
            self._prepare_lesions(study.noise_free)
        liver = (study.organ_names or {}).get("liver")
        self.liver_core: Mask | None = None
        if study.organs is not None and liver is not None:
            parenchyma = study.organs == liver
            if study.lesions is not None:
                parenchyma &= study.lesions == 0
            self.liver_core = lesion_metrics.organ_core(parenchyma, study.spacing)

    def evaluate(self, restored: Array) -> dict[str, float]:
        """Computes one method's row; this module's docstring lists the keys.

        Raises:
            ValueError: `restored` has another shape than the study, or is not finite.
        """
        metrics.check_volumes(self.mask, restored=restored)
        distances, before = self._distances(restored), self._input_distances
        score = metrics.score(distances["mse"], before["mse"])
        share = metrics.share_of_limit(score, self.input_seconds, self.target_seconds)
        row = distances | {
            "psnr": metrics.psnr(restored, self.target, self.mask),
            "score_mse": score,
            "score_ssim": metrics.score(distances["ssim_distance"], before["ssim_distance"]),
            "share_of_limit": share,
            "equivalent_seconds": metrics.equivalent_seconds(share, self.input_seconds),
        }
        for convention in ("range", "axial"):
            key = f"ssim_distance_{convention}"
            row[f"score_ssim_{convention}"] = metrics.score(distances[key], before[key])
        row |= self._ceiling | self._against_truth(restored) | self._lesion_row(restored)
        # If a blend with the truth hardly helps, a share of that help says nothing.
        row["share_of_ceiling"] = row["score_ssim"] / max(row["ceiling_score_ssim"], 1.0)
        row["liver_cov"] = math.nan
        if self.liver_core is not None:
            row["liver_cov"] = lesion_metrics.coefficient_of_variation(restored, self.liver_core)
        return row

    def _distances(self, restored: Array) -> dict[str, float]:
        target, mask = self.target, self.mask
        by_range = math.nan
        if self._range > 0:
            by_range = metrics.ssim_distance(restored, target, mask, data_range=self._range)
        return {
            "mse": metrics.mse(restored, target, mask),
            "ssim_distance": metrics.ssim_distance(restored, target, mask),
            "ssim_distance_range": by_range,
            "ssim_distance_axial": metrics.ssim_distance(restored, target, mask, axial=True),
        }

    def _truth_distances(self, restored: Array, noise_free: Array) -> dict[str, float]:
        return {
            "truth_mse": metrics.mse(restored, noise_free, self.mask),
            "truth_ssim_distance": metrics.ssim_distance(restored, noise_free, self.mask),
        }

    def _against_truth(self, restored: Array) -> dict[str, float]:
        noise_free = self.study.noise_free
        keys = ("truth_mse", "truth_ssim_distance", "truth_psnr", "truth_score_mse", "truth_score_ssim")
        if noise_free is None:
            return dict.fromkeys((*keys, "implied_truth_score"), math.nan)
        row, before = self._truth_distances(restored, noise_free), self._input_truth
        implied = metrics.implied_truth(restored, self.image, self.input_seconds, self.target_seconds)
        implied_mse = metrics.mse(implied, noise_free, self.mask)
        return row | {
            "truth_psnr": metrics.psnr(restored, noise_free, self.mask),
            "truth_score_mse": metrics.score(row["truth_mse"], before["truth_mse"]),
            "truth_score_ssim": metrics.score(row["truth_ssim_distance"], before["truth_ssim_distance"]),
            "implied_truth_score": metrics.score(implied_mse, before["truth_mse"]),
        }

    def _prepare_lesions(self, noise_free: Array) -> None:
        study = self.study
        self._regions = []
        if study.lesions is not None:
            self._regions = lesion_metrics.lesion_regions(study.lesions, self.mask, study.spacing)
        self._references = lesion_metrics.measure_lesions(noise_free, self._regions, study.spacing)
        inputs = lesion_metrics.measure_lesions(self.image, self._regions, study.spacing)
        self._kept_by_input = [
            not lesion_metrics.is_lost(*pair) for pair in zip(inputs, self._references, strict=True)
        ]
        self._hot_ceiling = lesion_metrics.hot_spot_ceiling(noise_free, self.mask, study.lesions, study.spacing)

    def _lesion_row(self, restored: Array) -> dict[str, float]:
        row = dict.fromkeys(TOTALS, math.nan)
        for group, measures in GROUPS.items():
            for measure in measures:
                row |= {f"lesion_{group}_{measure}_bias": math.nan, f"lesion_{group}_{measure}_sd": math.nan}
        if self.study.noise_free is None:
            return row
        created = lesion_metrics.created_hot_spots(restored, self._hot_ceiling, self.study.spacing)
        row["hot_spots_large"] = sum(d >= lesion_metrics.LARGE for d in created)
        row["hot_spots_small"] = sum(d < lesion_metrics.LARGE for d in created)
        if self.study.lesions is None:
            return row
        uptakes = lesion_metrics.measure_lesions(restored, self._regions, self.study.spacing)
        grouped: dict[str, list[tuple[LesionUptake, LesionUptake]]] = {group: [] for group in GROUPS}
        anew = {"large": 0, "small": 0}
        for region, uptake, reference, kept in zip(
            self._regions, uptakes, self._references, self._kept_by_input, strict=True
        ):
            group = "large" if region.diameter >= lesion_metrics.LARGE else "small"
            anew[group] += kept and lesion_metrics.is_lost(uptake, reference)
            grouped[group if lesion_metrics.is_hot(reference) else "cold"].append((uptake, reference))
        for group, pairs in grouped.items():
            row[f"lesion_{group}_count"] = len(pairs)
            if group != "cold":
                row[f"lesion_{group}_lost"] = sum(lesion_metrics.is_lost(*pair) for pair in pairs)
                row[f"lesion_{group}_lost_anew"] = anew[group]
            for measure in GROUPS[group]:
                result = agreement([_percent(uptake, ref, measure) for uptake, ref in pairs])
                row[f"lesion_{group}_{measure}_bias"] = result.bias
                row[f"lesion_{group}_{measure}_sd"] = result.sd
        return row


@dataclass(frozen=True)
class SummaryRow:
    """Summarises one method over all studies.

    Attributes:
        method: its key.
        studies: their number.
        metrics: mean over studies, standard deviation and bootstrap interval, by key of a row.
        agreement: bias and limits over all studies' lesions, %, by (group, measure), such as ("small", "suvmax").
        totals: sums over studies of lesions, lost lesions and created hot spots; NaN if unknown.
    """

    method: str
    studies: int
    metrics: dict[str, Statistic]
    agreement: dict[tuple[str, str], Agreement]
    totals: dict[str, float]

    def flat(self) -> dict[str, Any]:
        """Returns a flat row for CSV and JSON: `key`, `key_sd`, `key_low`, `key_high` for each."""
        row: dict[str, Any] = {"method": self.method, "studies": self.studies}
        for key, value in self.metrics.items():
            row |= {
                key: value.mean,
                f"{key}_sd": value.sd,
                f"{key}_low": value.low,
                f"{key}_high": value.high,
            }
        for (group, measure), limits in self.agreement.items():
            key = f"lesion_{group}_{measure}_bias"
            row |= {key: limits.bias, f"{key}_low": limits.low, f"{key}_high": limits.high}
        return row | self.totals


def summarize(per_study: Mapping[str, Sequence[Mapping[str, float]]], *, seed: int = 0) -> list[SummaryRow]:
    """Returns a row per method, in the order given, from each method's rows, one per study.

    Scores are the mean of the studies' scores (see `statistics`); lesions are pooled over studies.

    Raises:
        ValueError: a method has no study, or another number of studies than the first.
    """
    counts = {method: len(rows) for method, rows in per_study.items()}
    if not counts or len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"studies a method: {counts}; expected the same number, at least one, for each")
    table = []
    for method, rows in per_study.items():
        pooled = {
            (group, measure): pool_agreement(
                [(_finite(row[f"lesion_{group}_count"]), row[f"{prefix}_bias"], row[f"{prefix}_sd"]) for row in rows]
            )
            for group, measures in GROUPS.items()
            for measure in measures
            for prefix in [f"lesion_{group}_{measure}"]
        }
        lesion_keys = {f"lesion_{g}_{m}_{end}" for g, m in pooled for end in ("bias", "sd")}
        statistics = {
            key: mean_statistic([row[key] for row in rows], seed=seed)
            for key in rows[0]
            if key not in lesion_keys and key not in TOTALS
        }
        totals = {}
        for key in TOTALS:
            found = [row.get(key, math.nan) for row in rows]  # rows of earlier versions have fewer
            known = [value for value in found if math.isfinite(value)]
            totals[key] = float(sum(known)) if known else math.nan
        table.append(SummaryRow(method, len(rows), statistics, pooled, totals))
    return table


def lesion_checks(row: SummaryRow, before: SummaryRow, group: str) -> dict[str, Any]:
    """Tells whether a method leaves the lesions of a group as they are; None where it is unknown.

    Args:
        row, before: the method's row and the unrestored input's.
        group: "large" or "small".

    Returns:
        unbiased: both mean biases, of SUVmean and SUVmax, are below 2 %. width_suvmean, width_suvmax: width of the
        limits of agreement over the input's; no_wider: neither is above 1. none_lost: none that the input keeps.
        none_created: no hot spot of that size. passed: all of these.
    """
    found = {measure: (row.agreement[group, measure], before.agreement[group, measure]) for measure in CHECKED}
    widths = {m: (own.high - own.low) / (its.high - its.low) for m, (own, its) in found.items() if its.sd > 0}
    known = bool(row.agreement[group, "suvmean"].count) and len(widths) == len(found)
    checks: dict[str, Any] = {
        "unbiased": all(abs(own.bias) < BIAS_LIMIT for own, _ in found.values()) if known else None,
        "no_wider": all(width <= 1 for width in widths.values()) if known else None,
        "none_lost": _is_zero(row.totals[f"lesion_{group}_lost_anew"]),
        "none_created": _is_zero(row.totals[f"hot_spots_{group}"]),
    }
    passed = None if None in checks.values() else all(checks.values())
    return checks | {f"width_{m}": widths.get(m, math.nan) for m in CHECKED} | {"passed": passed}


def _is_zero(count: float) -> bool | None:
    return None if math.isnan(count) else count == 0


def _percent(uptake: LesionUptake, reference: LesionUptake, measure: str) -> float:
    attribute = {"suvmean": "mean", "suvmax": "maximum", "suvpeak": "peak"}[measure]
    expected = float(getattr(reference, attribute))
    return 100 * (getattr(uptake, attribute) / expected - 1) if expected > 0 else math.nan


def _finite(count: float) -> float:
    return count if np.isfinite(count) else 0.0
