# SPDX-License-Identifier: Apache-2.0
"""Provides classical denoisers to compare with: non-local means, total variation and BM4D, each at its best strength.

A denoiser assumes noise of one standard deviation, but the noise of an OSEM image grows with the activity. So it
works on the square root or the inverse hyperbolic sine of the SUV, where the noise is nearly even, and its strength
is a multiple of the noise level that is estimated from each input. The denoised image D estimates the activity λ.
PET_T is predicted by D itself or, as t of its T seconds are known, by E[PET_T | PET_t] = (t·PET_t + (T − t)·λ) / T
with λ = D. Strength and choice of the two are searched for per exposure, by the mean MSE score against PET_T.

These MSE scores at the best strength tried, % (at most 33.3 at 60 s of 90 s), with λ = D, on training phantoms of 96
x 72 x 112 voxels of 4 mm, decided the defaults:

    SUV mapped by                    square root   asinh(SUV)   asinh(SUV/2)   asinh(SUV/0.5)
    nlm, four phantoms                      22.2         24.6           23.6             24.3
    tv, one round, four phantoms            19.3         17.2           18.5                –
    tv, two rounds, four phantoms           20.2         22.1              –                –
    bm4d, one, central 64 slices            27.1         27.1              –                –
"""

from __future__ import annotations

import abc
import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from medaccel.restoration.evaluation.metrics import Array, Mask, body_mask, mse, oracle, score, ssim_distance
from medaccel.restoration.methods.base import (
    Fitted,
    Method,
    Restoration,
    RestorationRequest,
    RestorationTask,
    check_volume,
)
from medaccel.restoration.settings import ClassicalSettings, NonLocalMeansSettings, TotalVariationSettings
from medaccel.restoration.study import load_study

# Each name has a map to the domain with even noise, and its inverse. Denoised values may fall below 0, SUV may not.
STABILISERS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "sqrt": (np.sqrt, lambda mapped: np.square(np.maximum(mapped, 0))),
    "asinh": (np.arcsinh, lambda mapped: np.sinh(np.maximum(mapped, 0))),
}
# If the best strength lies at the end of the grid, the end moves outward, this many times at most.
EXTENSIONS = 3


@dataclass(frozen=True)
class _Example:
    """Holds the data that the search needs of a study at one exposure; arrays (i, j, k), SUV."""

    image: Array
    target: Array
    mask: Mask
    spacing: tuple[float, float, float]
    distances: tuple[float, float]  # MSE and 1 − SSIM of the unrestored image against the target


class Classical(Method):
    """Denoises with a strength that is searched for; subclasses define how."""

    Settings: ClassVar[type[ClassicalSettings]] = ClassicalSettings

    def __init__(self, task: Any, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, settings)
        strengths = self.settings["strengths"]
        if not strengths or strengths[0] <= 0 or any(b <= a for a, b in itertools.pairwise(strengths)):
            raise ValueError(f"{self.name}: strengths is {strengths}; expected increasing positive numbers")

    @classmethod
    def unavailable(cls) -> str | None:
        """Says why the method can't run here; returns None if it can."""
        return None

    @abc.abstractmethod
    def denoise(self, mapped: Array, noise: float) -> Array:
        """Removes noise of the standard deviation `noise` from `mapped` (i, j, k); the unit stays."""

    def fit(
        self,
        studies: Sequence[Path],
        validation: Sequence[Path],
        *,
        folder: Path,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Searches on the validation studies, or on the training ones if there are none; nothing is random.

        Raises:
            ValueError: there are no studies, or one has an input that equals its target within the body.
            ValueError: the method is not available.
        """
        self._check_available()
        if not studies:
            raise ValueError(f"{self.name}: no training studies")
        start = time.monotonic()
        self.fitted = Fitted()
        self._prepare(studies)
        paths = list(validation or studies)[: self.settings["search_studies"]]
        bar = tqdm(desc=f"{self.name}: search", total=0, unit="candidate", disable=not progress, leave=False)
        with bar:
            self._choose(paths, bar)
        self.fitted.seconds = time.monotonic() - start

    def restore(self, request: RestorationRequest) -> Restoration:
        """Restores one PET; see `Method.restore`. The CT is not used and nothing is drawn.

        Raises:
            ValueError: the volume isn't in SUV or has fewer than three slices; the exposure was not fitted.
            ValueError: the method is not available.
        """
        self._check_available()
        volume, spacing = request.volume, request.spacing
        check_volume(self.name, volume, spacing)
        seconds = self.seconds(request.seconds)
        choice = self.fitted.choices.get(str(seconds))
        if choice is None:
            raise ValueError(f"{self.name}: not fitted to {seconds} s yet (fit it, or load a fitted one)")
        lengths = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
        denoised = self.denoised(volume, body_mask(volume, lengths), choice["strength"])
        return self._restoration(volume, denoised, seconds, choice["combined"])

    def state(self) -> dict[str, Any]:
        return {"choices": self.fitted.choices}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.fitted.choices = dict(state["choices"])

    def _check_available(self) -> None:
        reason = self.unavailable()
        if reason is not None:
            raise ValueError(f"{self.name}: {reason}")

    def _prepare(self, studies: Sequence[Path]) -> None:
        """Learns the quantities that the denoiser needs before the search."""

    def denoised(self, volume: Array, mask: Mask, strength: float) -> Array:
        """Returns D, SUV, float32; the noise level is estimated within `mask`."""
        forward, _ = STABILISERS[self.settings["stabiliser"]]
        level = noise_level(forward(volume.astype(np.float32)), mask)
        return self._denoised_by(volume, strength * level)

    def at(self, seconds: int) -> Classical | None:
        """Returns the method for another exposure: with the strength of the nearest fitted one, which is a multiple
        of the noise that each image has."""
        if not 0 < seconds < self.task.target_seconds or not self.fitted.choices:
            return None
        nearest = min(self.fitted.choices, key=lambda fitted: abs(math.log(int(fitted) / seconds)))
        other = copy.copy(self)
        other.task = RestorationTask((seconds,), self.task.target_seconds)
        other.fitted = replace(self.fitted, choices={str(seconds): self.fitted.choices[nearest]})
        return other

    def _denoised_by(self, volume: Array, noise: float) -> Array:
        """Returns D, SUV, float32, with the standard deviation of the noise to remove in the stabilised unit."""
        if noise == 0:  # no noise to remove
            return volume.astype(np.float32)
        forward, backward = STABILISERS[self.settings["stabiliser"]]
        mapped = forward(volume.astype(np.float32))
        return np.asarray(backward(self.denoise(mapped, noise)), dtype=np.float32)

    def _restoration(self, volume: Array, denoised: Array, seconds: int, combined: bool) -> Restoration:
        if not combined:
            return Restoration(denoised)
        weight = seconds / self.task.target_seconds
        return Restoration(self._combined(volume, denoised, seconds), activity=denoised, weight=weight)

    def _combined(self, volume: Array, denoised: Array, seconds: int) -> Array:
        return oracle(volume, denoised, seconds, self.task.target_seconds).astype(np.float32)

    def _example(self, path: Path, seconds: int) -> _Example:
        target_seconds = self.task.target_seconds
        study = load_study(path, [seconds, target_seconds])
        mask = body_mask(study.exposures[target_seconds], study.spacing)
        count = self.settings["search_slices"] or mask.shape[2]
        first = max((mask.shape[2] - count) // 2, 0)
        slices = slice(first, first + count)
        mask = mask[:, :, slices]
        image, target = (np.ascontiguousarray(study.exposures[t][:, :, slices]) for t in (seconds, target_seconds))
        if not mask.any() or not np.any((image != target)[mask]):
            raise ValueError(
                f"study {study.name}: input and target do not differ within a body; nothing to search by"
            )
        distances = mse(image, target, mask), ssim_distance(image, target, mask)
        return _Example(image, target, mask, study.spacing, distances)

    def _choose(self, paths: Sequence[Path], bar: tqdm[Any]) -> None:
        """Chooses a strength for each exposure of the task."""
        for seconds in self.task.input_seconds:
            self._search(seconds, [self._example(path, seconds) for path in paths], bar)

    def _search(self, seconds: int, examples: Sequence[_Example], bar: tqdm[Any]) -> None:
        """Tries the grid, extends it if the best strength is at its end, and then halves the steps about the best."""
        tried: dict[float, float] = {}
        best = (-math.inf, 0.0, False)

        def attempt(strengths: Sequence[float]) -> None:
            nonlocal best
            bar.total = len(self.fitted.scores) // 2 + len(strengths)  # two scores per candidate
            for strength in strengths:
                found = self._scores(seconds, examples, strength)
                for combined, (mse_score, ssim_score) in found.items():
                    label = f"{seconds} s, strength {strength:.3g}, {'combined' if combined else 'direct'}"
                    self.fitted.scores[label] = (mse_score, ssim_score)
                    best = max(best, (mse_score, strength, combined))
                tried[strength] = max(mse_score for mse_score, _ in found.values())
                bar.update()

        attempt([float(strength) for strength in self.settings["strengths"]])
        for _ in range(EXTENSIONS):
            ends = (min(tried), max(tried))
            if best[1] not in ends:
                break
            attempt([best[1] * 1.5 if best[1] == ends[1] else best[1] / 1.5])
        at = sorted(tried).index(best[1])
        around = sorted(tried)[max(at - 1, 0) : at + 2]
        attempt([math.sqrt(a * b) for a, b in itertools.pairwise(around)])
        self.fitted.choices[str(seconds)] = {"strength": best[1], "combined": best[2]}

    def _scores(self, seconds: int, examples: Sequence[_Example], strength: float) -> dict[bool, tuple[float, float]]:
        """Returns the mean MSE and 1 − SSIM score over the examples, %, for D combined with the PET (True) or alone
        (False)."""
        rows: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for example in examples:
            denoised = self.denoised(example.image, body_mask(example.image, example.spacing), strength)
            for combined, scores in self._scores_of(example, denoised, seconds).items():
                rows[combined].append(scores)
        means = {combined: np.mean(results, axis=0) for combined, results in rows.items()}
        return {combined: (float(mean[0]), float(mean[1])) for combined, mean in means.items()}

    def _scores_of(self, example: _Example, denoised: Array, seconds: int) -> dict[bool, tuple[float, float]]:
        """Returns the MSE and the 1 − SSIM score of one example, %, for D combined with the PET or alone."""
        found = {}
        for combined in (False, True):
            result = self._combined(example.image, denoised, seconds) if combined else denoised
            found[combined] = (
                score(mse(result, example.target, example.mask), example.distances[0]),
                score(ssim_distance(result, example.target, example.mask), example.distances[1]),
            )
        return found


class NonLocalMeans(Classical):
    """Denoises by non-local means (Buades et al. 2005) with cubic patches, in scikit-image's fast mode."""

    name = "nlm"
    Settings = NonLocalMeansSettings

    def denoise(self, mapped: Array, noise: float) -> Array:
        from skimage.restoration import denoise_nl_means

        return np.asarray(
            denoise_nl_means(
                mapped,
                patch_size=self.settings["patch_size"],
                patch_distance=self.settings["patch_distance"],
                h=noise,
                fast_mode=True,
            )
        )


class TotalVariation(Classical):
    """Denoises by total variation (Rudin, Osher and Fatemi 1992) with Chambolle's projections, by scikit-image.

    It takes contrast from small hot structures. Bregman's iteration (Osher et al. 2005) gives it back: the part that
    a round removed is added to the next one's input.
    """

    name = "tv"
    Settings = TotalVariationSettings

    def denoise(self, mapped: Array, noise: float) -> Array:
        from skimage.restoration import denoise_tv_chambolle

        removed = np.zeros_like(mapped)
        for _ in range(self.settings["rounds"]):
            denoised = denoise_tv_chambolle(
                mapped + removed,
                weight=noise,
                eps=self.settings["tolerance"],
                max_num_iter=self.settings["iterations"],
            )
            removed += mapped - denoised
        return np.asarray(denoised)


def noise_level(mapped: Array, mask: Mask) -> float:
    """Estimates the standard deviation of the noise of a volume (i, j, k) within a mask, in its unit.

    The estimate is the median size of second differences along the axial direction, where PET noise correlates least
    and smooth anatomy cancels; edges are too few to move a median. The noise is taken as white, so correlated noise
    (0.2 between neighbours) comes out a sixth too low, the same for all inputs of a scanner.

    Raises:
        ValueError: the volume has fewer than three slices.
    """
    if mapped.shape[2] < 3:
        raise ValueError(f"volume has shape {mapped.shape}; expected at least three slices")
    differences = np.abs(np.diff(mapped, 2, axis=2))
    inside = mask[:, :, 1:-1]
    sizes = differences[inside] if inside.any() else differences
    return 1.4826 * float(np.median(sizes)) / math.sqrt(6)
