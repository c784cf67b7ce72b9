# SPDX-License-Identifier: Apache-2.0
"""Turns a scan into its label map: sliding windows on the network's grid, probabilities back on the scan's grid.

Probabilities of every class exist for a few planes at a time: windows are visited in MONAI's order, along the first
axis last, so that planes are finished one after the other, turned into labels and dropped. Memory grows with a
window's depth times the classes, not with the volume times the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from nibabel.nifti1 import Nifti1Image
from torch import Tensor, nn

from medaccel.data import make_nifti, resample
from medaccel.data.ct_transforms import canonical, window
from medaccel.segmentation.evaluation.metrics import largest_components
from medaccel.training.memory import place_of_sums

# The probabilities of so many planes exist at a time.
_PLANES = 16
# An axis of the network's grid may deviate so far from an axis of the scan, in voxels over the whole scan, and still
# count as parallel.
_PARALLEL = 1e-6


def probability_planes(
    network: nn.Module, image: MetaTensor, settings: Mapping[str, Any], *, progress: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yields class probabilities on the network's grid, a few planes at a time and in order.

    Args:
        network: maps (B, 1, i, j, k) to logits (B, classes, i, j, k); it lies on the device that computes.
        image: (1, i, j, k), HU, from `medaccel.data.ct_transforms.canonical`.
        settings: the result of `medaccel.segmentation.model.presets.make_settings`.
        progress: show a bar of windows.

    Yields:
        The first plane's number along the first axis, and (classes, planes, j, k), float32, on the CPU; they add up
        to 1.
    """
    for first, logits in logit_planes(network, image, settings, progress=progress):
        yield first, logits.softmax(dim=0).cpu()


def logit_planes(
    network: nn.Module, image: MetaTensor, settings: Mapping[str, Any], *, progress: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yields the windows' blended logits as `probability_planes` does probabilities.

    They equal `monai.inferers.sliding_window_inference` over the whole scan bit for bit: the same windows, weighted
    by a Gaussian and added up in the same order. A smaller scan is padded with the darkest value. Windows are added
    up on the network's GPU, if a few planes of all classes fit there (`medaccel.training.memory.place_of_sums`), and
    the planes lie where they were added up.
    """
    shown = window(image.as_tensor().float(), settings["window"])[None]
    size, roi = tuple(shown.shape[2:]), tuple(settings["roi_size"])
    before = [max(r - n, 0) // 2 for n, r in zip(size, roi, strict=True)]
    after = [max(r - n, 0) - b for n, r, b in zip(size, roi, before, strict=True)]
    shown = F.pad(shown, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])
    i, j, k = (slice(b, b + n) for n, b in zip(size, before, strict=True))
    for first, logits in _blended_windows(network, shown, roi, settings, progress):
        low, high = max(first, i.start), min(first + logits.shape[1], i.stop)
        if low < high:
            yield low - i.start, logits[:, low - first : high - first, j, k]


def _blended_windows(
    network: nn.Module, shown: Tensor, roi: tuple[int, ...], settings: Mapping[str, Any], progress: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yields planes of a scan that is at least as large as a window, as soon as no remaining window touches them."""
    from tqdm import tqdm

    device = next(network.parameters()).device
    # On CPUs bf16 is too slow to be worth it.
    mixed = device.type == "cuda" and str(settings["precision"]).startswith("bf16")
    size = tuple(shown.shape[2:])
    steps = [r if r == n else max(int(r * (1 - settings["overlap"])), 1) for r, n in zip(roi, size, strict=True)]
    windows = dense_patch_slices(size, roi, steps)
    weight = compute_importance_map(roi, mode="gaussian", device=device, dtype=torch.float32)
    place, done = torch.device("cpu"), 0
    count = weight_there = total = torch.empty(0)  # sums of planes from `done` on; the first logits tell the classes
    batch = settings["sw_batch_size"]
    training = network.training
    network.eval()
    try:
        bar = tqdm(range(0, len(windows), batch), disable=not progress)
        for begin in bar:
            group = windows[begin : begin + batch]
            seen = torch.cat([shown[(slice(None), slice(None), *where)] for where in group]).to(device)
            with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
                logits = network(seen)
                logits *= weight
            if begin == 0:
                classes, area = logits.shape[1], size[1] * size[2]
                # Beside the sums: planes that are yielded, their probabilities, and the planes before them.
                needed = 4 * area * ((classes + 1) * roi[0] + 3 * classes * min(_PLANES, roi[0]))
                place, choice = place_of_sums(device, needed)
                bar.set_postfix_str(choice if device.type == "cuda" else "")
                count = torch.zeros(roi[0], *size[1:], device=place)
                total, weight_there = torch.zeros(classes, *count.shape, device=place), weight.to(place)
            for found, (planes, *across) in zip(logits.to(place), group, strict=True):
                if finished := planes.start - done:
                    yield from _blended(total, count, done, finished)
                    for held in (total, count[None]):
                        for plane in range(finished, roi[0]):
                            held[:, plane - finished] = held[:, plane]
                        held[:, -finished:] = 0
                    done = planes.start
                total[(slice(None), slice(None), *across)] += found
                count[(slice(None), *across)] += weight_there
        yield from _blended(total, count, done, roi[0])
    finally:
        network.train(training)


def _blended(total: Tensor, count: Tensor, first: int, planes: int) -> Iterator[tuple[int, Tensor]]:
    for at in range(0, planes, _PLANES):
        piece = slice(at, min(at + _PLANES, planes))
        yield first + at, total[:, piece] / count[piece]


def predict_labels(network: nn.Module, image: MetaTensor, settings: Mapping[str, Any]) -> np.ndarray:
    """Returns the likeliest class of a scan's voxels on the network's grid, (i, j, k); see `probability_planes`."""
    return np.concatenate([p.argmax(dim=0).numpy() for _, p in probability_planes(network, image, settings)])


def segment(
    network: nn.Module,
    scan: Nifti1Image,
    settings: Mapping[str, Any],
    *,
    keep_largest: int | None = None,
    progress: bool = False,
) -> Nifti1Image:
    """Computes the label map of a scan on its own grid.

    Probabilities, not labels, are brought to the scan's grid, trilinearly; then the likeliest class is taken. Voxels
    outside the body's box are background.

    Args:
        network, settings: those of `probability_planes`.
        scan: HU, any orientation.
        keep_largest: number of components to keep of each structure, 0 keeps all; by default the settings' number.
        progress: show a bar of windows.

    Returns:
        uint8.
    """
    image = canonical(scan, settings["spacing"])["image"]
    labels = to_grid(probability_planes(network, image, settings, progress=progress), image, scan)
    kept = settings["keep_largest"] if keep_largest is None else keep_largest
    if kept:
        for value in np.unique(labels[labels > 0]):
            mask = labels == value
            labels[mask & ~largest_components(mask, kept)] = 0
    return make_nifti(labels, scan.affine, scan)


def to_grid(planes: Iterator[tuple[int, Tensor]], image: MetaTensor, scan: Nifti1Image) -> np.ndarray:
    """Returns the likeliest class at a scan's voxels, uint8, from probabilities on an image's grid.

    Args:
        planes: the planes of `probability_planes`: first plane and (classes, planes, j, k), in order.
        image: (1, i, j, k), whose grid the planes are on.
        scan: a 3-D image.
    """
    affine, count = np.asarray(image.affine, dtype=np.float64), image.shape[1]
    labels = np.zeros(scan.shape, dtype=np.uint8)
    height = _Height(affine, scan)
    before: Tensor | None = None
    for first, found in planes:
        # Voxels between the last plane of one piece and the first of the next need both.
        known = found if before is None else torch.cat([before, found], dim=1)
        start = first if before is None else first - 1
        before = found[:, -1:].clone()
        end = first + found.shape[1]
        low = -np.inf if first == 0 else start
        high = np.inf if end == count else end - 1
        # The outermost voxels reach half a voxel beyond their centres, where interpolation ends.
        moved = affine.copy()
        moved[:3, 3] += affine[:3, :3] @ (start - 1, -1, -1)
        classes = (make_nifti(np.pad(p.numpy(), 1, mode="edge"), moved) for p in known)
        part = height.between(low, high)
        if part is None:
            continue
        piece = scan.slicer[part]
        best = np.asarray(resample(next(classes), piece, outside=1.0).dataobj, dtype=np.float32).copy()
        likeliest = np.zeros(best.shape, dtype=np.uint8)
        for value, volume in enumerate(classes, start=1):
            values = np.asarray(resample(volume, piece).dataobj, dtype=np.float32)
            likeliest[values > best] = value
            np.maximum(best, values, out=best)
        mine = height.mask(part, low, high)
        labels[part][mine] = likeliest[mine]
    return labels


class _Height:
    """Locates a scan's voxels along the first axis of the network's grid, in its voxels.

    Args:
        affine: the affine of the network's grid.
        scan: the scan, which may lie askew to the grid, as after a tilt of the gantry.
    """

    def __init__(self, affine: np.ndarray, scan: Nifti1Image) -> None:
        row = (np.linalg.inv(affine) @ np.asarray(scan.affine, dtype=np.float64))[0]
        self.axis = int(np.abs(row[:3] * scan.shape).argmax())
        steps = [row[axis] * np.arange(n) for axis, n in enumerate(scan.shape)]
        askew = sum(float(np.abs(s[-1])) for axis, s in enumerate(steps) if axis != self.axis)
        self.parallel = askew < _PARALLEL
        self.low = self.high = steps[self.axis] + row[3]
        self.steps, self.offset = steps, row[3]
        if not self.parallel:
            self.low = self.low + sum(float(s.min()) for axis, s in enumerate(steps) if axis != self.axis)
            self.high = self.high + sum(float(s.max()) for axis, s in enumerate(steps) if axis != self.axis)

    def between(self, low: float, high: float) -> tuple[slice, ...] | None:
        """Returns the part of the scan, as one slice per axis, that has voxels from `low` to below `high`, or
        None."""
        (found,) = np.nonzero((self.high >= low) & (self.low < high))
        if not len(found):
            return None
        part = [slice(None)] * 3
        part[self.axis] = slice(int(found[0]), int(found[-1]) + 1)
        return tuple(part)

    def mask(self, part: tuple[slice, ...], low: float, high: float) -> np.ndarray | slice:
        """Marks the voxels of a part that lie from `low` to below `high`."""
        if self.parallel:
            return np.s_[:]
        i, j, k = (step[where] for step, where in zip(self.steps, part, strict=True))
        heights = i[:, None, None] + j[:, None] + k + self.offset
        return (heights >= low) & (heights < high)
