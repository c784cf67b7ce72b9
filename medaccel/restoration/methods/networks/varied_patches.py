# SPDX-License-Identifier: Apache-2.0
"""Cuts random training patches from varied studies (`medaccel.restoration.simulation.varied`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medaccel.restoration.evaluation.metrics import Array

_LEAST_BODY = 0.05  # share of a patch
_JITTER = 0.05  # relative spread of the measured noise: the measurement is not exact
_AVERAGED = 0.15  # share of the patches that are means of two realisations, which stand for a longer exposure


class VariedPatches(torch.utils.data.Dataset):
    """Yields endless numbered patches of the files that `write_varied` wrote; item n depends on (seed, n) alone.

    Args:
        files: paths of the images.
        roi_size: voxels along each axis.
        seed: together with an item's number, it seeds all randomness of the item.
    """

    def __init__(self, files: Sequence[Path], roi_size: Sequence[int], seed: int = 0) -> None:
        self.files, self.roi_size, self.seed = list(files), tuple(roi_size), seed
        self.records = [json.loads(f.with_suffix(".json").read_text(encoding="utf-8")) for f in self.files]

    def __len__(self) -> int:
        return 1 << 62  # the dataset is endless

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        while True:
            patch = self._draw(rng)
            if patch["mask"].mean() >= _LEAST_BODY:
                return patch

    def _draw(self, rng: np.random.Generator) -> dict[str, Any]:
        number = int(rng.integers(len(self.files)))
        record = self.records[number]
        images = np.load(self.files[number], mmap_mode="r")  # only the patch is read
        place = []
        for size, side in zip(images.shape[1:], self.roi_size, strict=True):
            start = int(rng.integers(max(size - side, 0) + 1))
            place.append(slice(start, min(start + side, size)))
        where = tuple(place)

        def read(channel: int) -> Array:
            return np.asarray(images[channel][where], dtype=np.float32)

        seconds, noises = record["seconds"], record["noise"]
        first, second = (int(n) for n in rng.integers(len(seconds), size=2))
        volume, noise = read(1 + first), noises[first]
        if first != second and rng.random() < _AVERAGED:
            share = seconds[first] / (seconds[first] + seconds[second])
            volume = share * volume + (1 - share) * read(1 + second)
            noise = math.hypot(share * noise, (1 - share) * noises[second])
        stack = patch_of([volume, read(0)], read(-1), self.roi_size)
        tensors = torch.from_numpy(flipped(stack, rng))
        return {
            "input": tensors[:1],
            "noise_free": tensors[1:2],
            "mask": tensors[2:],
            "noise": torch.tensor(noise * math.exp(_JITTER * rng.standard_normal()), dtype=torch.float32),
            "spacing": torch.tensor(record["spacing"], dtype=torch.float32),
        }


def patch_of(images: Sequence[Array], mask: Array, roi_size: Sequence[int]) -> Array:
    """Stacks images and a mask, (channels, *roi_size), float32.

    Smaller ones are padded: images with their edge, the mask with zeros.
    """
    padding = [(0, side - n) for side, n in zip(roi_size, mask.shape, strict=True)]
    stack = np.pad(np.stack(images).astype(np.float32, copy=False), [(0, 0), *padding], mode="edge")
    return np.concatenate([stack, np.pad(mask, padding).astype(np.float32)[None]])


def flipped(stack: Array, rng: np.random.Generator) -> Array:
    """Mirrors a stack (channels, i, j, k) along random axes, and exchanges i and j where they are equally long."""
    stack = np.flip(stack, tuple(axis for axis in (1, 2, 3) if rng.random() < 0.5))
    if stack.shape[1] == stack.shape[2] and rng.random() < 0.5:
        stack = stack.transpose(0, 2, 1, 3)
    return np.ascontiguousarray(stack)
