# SPDX-License-Identifier: Apache-2.0
"""BM4D among the classical denoisers, and the spectrum of the correlated noise that it is told of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medaccel.restoration.evaluation.metrics import Array, Mask, body_mask
from medaccel.restoration.evaluation.noise import normalised_noise
from medaccel.restoration.methods.by_noise import ClassicalByNoise
from medaccel.restoration.methods.classical import STABILISERS, Classical
from medaccel.restoration.settings import BM4DByNoiseSettings, BM4DSettings
from medaccel.restoration.study import load_study

LAGS = 5  # voxels; further apart, the noise of these scanners' images is uncorrelated (0.02 and less)


class BM4D(Classical):
    """Denoises by block matching and 4-D collaborative filtering (Maggioni et al. 2013), given the noise's
    correlation.

    The noise's autocorrelation comes from PET_t − PET_T of training studies, in voxels: it holds for inputs on their
    grid. It gains little: told of white noise, BM4D scores the same (27.3 and 27.2 %) at 2.2 times the strength.
    Needs the package `bm4d`, which is free for non-commercial use only and so is no dependency of this one. It runs
    on one thread, since its results vary with their number.
    """

    name = "bm4d"
    Settings = BM4DSettings

    def __init__(self, task: Any, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, settings)
        self.correlation: Array | None = None  # (2·LAGS + 1,)*3, 1 in the middle

    @classmethod
    def unavailable(cls) -> str | None:
        try:
            import bm4d  # noqa: F401
        except (ImportError, OSError) as error:  # OSError: its library can't be loaded
            return f"the package bm4d can't be imported ({error}); pip install bm4d, if its licence allows your use"
        return None

    def _prepare(self, studies: Sequence[Path]) -> None:
        forward, _ = STABILISERS[self.settings["stabiliser"]]
        times = (self.task.input_seconds[0], self.task.target_seconds)
        found = []
        for path in list(studies)[: self.settings["search_studies"]]:
            study = load_study(path, times)
            image, target = (forward(study.exposures[t]) for t in times)
            mask = body_mask(study.exposures[times[1]], study.spacing)
            found.append(autocorrelation(normalised_noise(image - target, mask), mask))
        self.correlation = np.mean(found, axis=0)

    def denoise(self, mapped: Array, noise: float) -> Array:
        import bm4d
        from bm4d.profiles import BM4DProfile

        if min(mapped.shape) < min(BM4DProfile.bs_wiener):
            raise ValueError(
                f"{self.name}: volume has shape {mapped.shape}; expected at least 5 voxels along each axis"
            )
        assert self.correlation is not None
        profile = BM4DProfile()
        profile.num_threads = 1
        profile.lambda_thr, profile.mu2 = self.settings["threshold"], self.settings["wiener"]
        profile.search_window_ht = profile.search_window_wiener = (self.settings["search_window"],) * 3
        profile.max_stack_size_wiener = 16  # as in bm4d's profile of low complexity
        profile.k = self.settings["variance_layers"]
        spectrum = noise**2 * power_spectrum(self.correlation, mapped.shape)
        return np.asarray(bm4d.bm4d(mapped, spectrum, profile))

    def state(self) -> dict[str, Any]:
        assert self.correlation is not None
        return super().state() | {"correlation": torch.from_numpy(self.correlation)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.correlation = state["correlation"].numpy()


class BM4DByNoise(ClassicalByNoise, BM4D):
    """Denoises as `BM4D` does, with a strength that is a function of the noise measured in the image."""

    name = "bm4d_noise"
    Settings = BM4DByNoiseSettings


def autocorrelation(noise: Array, mask: Mask, lags: int = LAGS) -> Array:
    """Returns the autocorrelation of noise (i, j, k) that is 0 outside the mask: (2·lags + 1,)*3, 1 in the middle."""
    axes = (0, 1, 2)
    padded = [n + lags for n in noise.shape]  # padded, so that the far ends do not meet
    near = np.ix_(*[np.arange(-lags, lags + 1)] * 3)

    def products(values: Array) -> Array:
        spectrum = np.fft.rfftn(values, padded, axes)
        return np.asarray(np.fft.irfftn(np.abs(spectrum) ** 2, padded, axes)[near])

    # A lag's sum is divided by the number of voxel pairs that it has within the mask.
    result = products(noise) / np.maximum(products(mask.astype(np.float64)), 1)
    return np.asarray(result / result[lags, lags, lags])


def power_spectrum(correlation: Array, shape: Sequence[int]) -> Array:
    """Returns the power spectral density of noise of variance 1 with such an autocorrelation, on a grid; its mean is
    the size.

    A Hann window fades the lags out: an autocorrelation that is cut off has a spectrum with negative values.
    """
    side = correlation.shape[0]
    hann = np.hanning(side + 2)[1:-1]
    tapered = correlation * hann[:, None, None] * hann[None, :, None] * hann[None, None, :]
    kernel = np.zeros(shape)
    lags = np.arange(side) - side // 2
    # Lags wrap around, even more than once on a grid that is smaller than their range.
    where = np.meshgrid(*[lags % n for n in shape], indexing="ij")
    np.add.at(kernel, tuple(where), tapered)
    spectrum = np.maximum(np.fft.fftn(kernel).real, 1e-3)
    return np.asarray(spectrum * (kernel.size / spectrum.mean()))
