# SPDX-License-Identifier: Apache-2.0
"""Lets a classical denoiser choose its strength by the noise in the image, as a blind user of it would.

A strength that is chosen for each exposure knows what a user of another scanner, dose or patient does not. Here the
noise σ to remove is a function of the noise s of √SUV that `root_noise` measures in the image alone: σ = factor ·
s^exponent. Both constants come from validation studies: each study at each exposure has a best σ (the vertex of a
parabola through three strengths' scores), and a line is fitted to log σ against log s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from medaccel.restoration.evaluation.metrics import Array
from medaccel.restoration.evaluation.training_range import root_noise
from medaccel.restoration.methods.base import Restoration, RestorationRequest, check_volume
from medaccel.restoration.methods.classical import EXTENSIONS, Classical
from medaccel.restoration.study import load_study

# Noise levels that differ by less than this factor tell nothing about the exponent, which is then 1.
LEAST_SPREAD = 1.2
# A line through a few noisy points can be too steep to be trusted on other images.
EXPONENTS = (0.0, 2.0)


class ClassicalByNoise(Classical):
    """Denoises with a strength that is a function of the measured noise; stands before a denoiser's own class.

    The setting `strengths` holds multiples of the measured noise, where the search starts.
    """

    any_exposure: ClassVar[bool] = True

    def seconds(self, seconds: int | None) -> int:
        """Returns the exposure that a request names, or the primary one; any below the target will do."""
        chosen = self.task.input_seconds[0] if seconds is None else seconds
        if not 0 < chosen < self.task.target_seconds:
            raise ValueError(
                f"{self.name}: seconds is {chosen}; expected more than 0 and fewer than {self.task.target_seconds}, "
                "the exposure to predict"
            )
        return chosen

    def at(self, seconds: int) -> ClassicalByNoise | None:
        return self if 0 < seconds < self.task.target_seconds else None

    def restore(self, request: RestorationRequest) -> Restoration:
        """Restores one PET; see `Method.restore`. The CT is not used and nothing is drawn.

        Raises:
            ValueError: the volume isn't in SUV; the method is not fitted yet, or not available.
        """
        self._check_available()
        volume = request.volume
        check_volume(self.name, volume, request.spacing)
        seconds = self.seconds(request.seconds)
        choice = self.fitted.choices
        if not choice:
            raise ValueError(f"{self.name}: not fitted yet (fit it, or load a fitted one)")
        try:
            measured = root_noise(volume, request.spacing)
        except ValueError:  # no noise to remove
            return Restoration(volume.astype(np.float32))
        denoised = self._denoised_by(volume, choice["factor"] * measured ** choice["exponent"])
        return self._restoration(volume, denoised, seconds, choice["combined"])

    def _choose(self, paths: Sequence[Path], bar: tqdm[Any]) -> None:
        """Chooses the two constants for all exposures of the task together."""
        examples, noise = [], []
        for seconds in self.task.input_seconds:
            for path in paths:
                study = load_study(path, [seconds])
                examples.append((seconds, self._example(path, seconds)))
                noise.append(root_noise(study.exposures[seconds], study.spacing))
        scores: dict[bool, dict[float, list[float]]] = {False: {}, True: {}}  # a list over the examples, by strength

        def attempt(strengths: Sequence[float]) -> None:
            bar.total = len(scores[True]) + len(strengths)
            for strength in strengths:
                found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
                for (seconds, example), level in zip(examples, noise, strict=True):
                    denoised = self._denoised_by(example.image, strength * level)
                    for combined, both in self._scores_of(example, denoised, seconds).items():
                        found[combined].append(both)
                for combined, rows in found.items():
                    scores[combined][strength] = [mse_score for mse_score, _ in rows]
                    words = f"{strength:.3g} times the noise, {'combined' if combined else 'direct'}"
                    mean = np.mean(rows, axis=0)
                    self.fitted.scores[words] = (float(mean[0]), float(mean[1]))
                bar.update()

        def best() -> tuple[float, float, bool]:
            return max((float(np.mean(v)), s, combined) for combined, by in scores.items() for s, v in by.items())

        attempt([float(strength) for strength in self.settings["strengths"]])
        for _ in range(EXTENSIONS):
            chosen, ends = best()[1], (min(scores[True]), max(scores[True]))
            if len(scores[True]) >= 3 and chosen not in ends:
                break
            attempt([chosen * 1.5 if chosen == ends[1] else chosen / 1.5])
        grid = sorted(scores[True])
        at = grid.index(best()[1])
        attempt([math.sqrt(a * b) for a, b in itertools.pairwise(grid[max(at - 1, 0) : at + 2])])
        combined = best()[2]
        strengths = sorted(scores[combined])
        curves = np.array([scores[combined][strength] for strength in strengths])  # (strengths, examples)
        sigma = [s * best_strength(strengths, curve) for s, curve in zip(noise, curves.T, strict=True)]
        factor, exponent = power_law(noise, sigma)
        self.fitted.choices = {"factor": factor, "exponent": exponent, "combined": combined}


def best_strength(strengths: Sequence[float], scores: Sequence[float] | Array) -> float:
    """Returns where the parabola through the highest score and its neighbours, over log strength, has its vertex.

    At an end of the grid the end itself is returned.
    """
    top = int(np.argmax(scores))
    if not 0 < top < len(strengths) - 1:
        return float(strengths[top])
    x = np.log(np.asarray(strengths[top - 1 : top + 2], dtype=np.float64))
    curvature, slope, _ = np.polyfit(x - x[1], np.asarray(scores[top - 1 : top + 2], dtype=np.float64), 2)
    if not curvature < 0:
        return float(strengths[top])
    return float(np.exp(np.clip(x[1] - slope / (2 * curvature), x[0], x[2])))


def power_law(noise: Sequence[float], sigma: Sequence[float]) -> tuple[float, float]:
    """Returns factor and exponent of σ = factor · noise^exponent, by least squares of the logarithms."""
    x, y = np.log(noise), np.log(sigma)
    exponent = 1.0
    if np.ptp(x) > math.log(LEAST_SPREAD):
        exponent = float(np.clip(np.polyfit(x, y, 1)[0], *EXPONENTS))
    return float(np.exp(np.mean(y) - exponent * np.mean(x))), exponent
