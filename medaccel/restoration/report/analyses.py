# SPDX-License-Identifier: Apache-2.0
"""Runs the analyses that a report shows beside the scores: comparisons, coverage, resolution, noise, one patient's
spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.calibration import Calibration, Coverage, coverage
from medaccel.restoration.evaluation.comparison import PairedComparison, compare_methods
from medaccel.restoration.evaluation.hot_lesion import hot_lesion_kept
from medaccel.restoration.evaluation.noise_effects import (
    NoiseChange,
    RemainingNoise,
    compare_noise,
    remaining_noise,
)
from medaccel.restoration.evaluation.resolution import PointResponse, point_response
from medaccel.restoration.methods.base import Method, RestorationRequest
from medaccel.restoration.methods.names import IDENTITY, REFERENCES
from medaccel.restoration.scoring import EXAMPLES, Scored, Scorer
from medaccel.restoration.study import load_study
from medaccel.studies.statistics import Statistic, ratio_score

# A PET's resolution is measured with blobs of about the reconstruction's own width, well above the noise.
_BLOB_FWHM, _BLOB_AMPLITUDE = 8.0, 4.0
_BLOB_SAMPLES = 4  # samples that a drawing method draws for each blob: a response's width needs no fine average


@dataclass(frozen=True)
class Analyses:
    """Holds the analyses of one scoring. Keys are exposures in s unless said otherwise.

    Args:
        coverage: coverage of the intervals of the methods that draw samples, by method.
        comparisons: every method against the chosen one, by quantity ("share_of_limit", "share_of_ceiling").
        within_patient: intervals of one patient's scores, by method and distance; empty for several patients.
        responses: responses to blobs in the first study at the primary exposure, by method.
        noise_changes: noise before and after, at the primary exposure.
        hot_lesions: kept shares of small, very hot lesions in the first study, by method.
    """

    coverage: Mapping[int, Mapping[str, Coverage]]
    comparisons: Mapping[int, Mapping[str, Sequence[PairedComparison]]]
    within_patient: Mapping[int, Mapping[str, Mapping[str, Statistic]]]
    responses: Mapping[str, Sequence[PointResponse]]
    noise_changes: Sequence[NoiseChange]
    hot_lesions: Mapping[str, Sequence[float]] = field(default_factory=dict)


def analyse(
    scorer: Scorer, scored: Sequence[Scored], calibrations: Mapping[str, Mapping[str, Calibration]], best: str
) -> Analyses:
    """Runs the analyses of a scoring.

    Args:
        scorer: the scorer that made `scored`, which has one entry per exposure, the primary one first.
        calibrations: factors of the intervals, by method and seconds.
        best: the method chosen on validation.
    """
    covered = {
        one.seconds: {
            name: coverage(found[str(one.seconds)], items)
            for name, found in calibrations.items()
            if str(one.seconds) in found and (items := list(scorer.items(name, one.paths, one.seconds)))
        }
        for one in scored
    }
    remaining = _remaining(scorer, scored[0])
    responses, hot_lesions = _responses(scorer, scored[0])
    return Analyses(
        coverage=covered,
        comparisons={one.seconds: _compare(one, best) for one in scored},
        within_patient={one.seconds: _within_patient(one) for one in scored},
        responses=responses,
        hot_lesions=hot_lesions,
        noise_changes=compare_noise(remaining) if remaining else [],
    )


def _compare(one: Scored, best: str) -> dict[str, list[PairedComparison]]:
    """Compares every method with the one that validation chose, on the quantities that decide."""
    methods = [m for m in one.rows if m not in REFERENCES or m == IDENTITY]
    if best not in methods or len(methods) < 2:
        return {"share_of_limit": [], "share_of_ceiling": []}
    return {
        key: compare_methods({m: [row[key] for row in one.rows[m]] for m in methods}, best)
        for key in ("share_of_limit", "share_of_ceiling")
    }


def _responses(scorer: Scorer, one: Scored) -> tuple[dict[str, list[PointResponse]], dict[str, list[float]]]:
    """Measures each method's response to blobs, and to small, very hot lesions, in the first study."""
    study = load_study(one.paths[0], (one.seconds, one.target_seconds))
    image = study.exposures[one.seconds]
    mask = metrics.body_mask(study.exposures[one.target_seconds], study.spacing)
    request = RestorationRequest(image, study.spacing, one.seconds, study.ct, samples=_BLOB_SAMPLES)
    found, kept = {}, {}
    for name, method in scorer.methods.items():

        def restore(volume: np.ndarray, method: Method = method) -> np.ndarray:
            return method.restore(replace(request, volume=volume)).volume

        found[name] = point_response(
            restore,
            image,
            mask,
            study.spacing,
            amplitude=_BLOB_AMPLITUDE,
            fwhm_mm=_BLOB_FWHM,
            together=True,
        )
        kept[name] = hot_lesion_kept(restore, image, mask, study.spacing, blur=_BLOB_FWHM)
    return found, kept


def _remaining(scorer: Scorer, one: Scored) -> list[dict[str, RemainingNoise]]:
    """Analyses noise before and after, in the studies whose images were kept."""
    found = []
    for path in one.paths[:EXAMPLES]:
        study = load_study(path, (one.seconds, one.target_seconds))
        target = study.exposures[one.target_seconds]
        mask = metrics.body_mask(target, study.spacing)
        images = {IDENTITY: study.exposures[one.seconds], **scorer.volumes(path, one.seconds)}
        found.append(remaining_noise(images, target, mask, study.spacing))
    # A drawing method may have been applied to the first studies alone.
    common = set.intersection(*(set(study) for study in found))
    return [{name: noise for name, noise in study.items() if name in common} for study in found]


def _within_patient(one: Scored) -> dict[str, dict[str, Statistic]]:
    """Scores one patient over noise realisations and axial blocks; returns nothing if the studies are of several
    patients."""
    found: dict[str, dict[str, Statistic]] = {}
    for distance, sums in one.blocks.items():
        for name in one.rows:
            if name in REFERENCES or name not in sums:
                continue
            count = len(sums[name])  # a drawing method may have seen the first realisations alone
            found.setdefault(name, {})[distance] = ratio_score(sums[name], sums[IDENTITY][:count])
    return found
