# SPDX-License-Identifier: Apache-2.0
"""Measures how well each task was learnt, on scans that were never trained on, each figure with its chance level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medaccel.data.ct_transforms import window
from medaccel.data.hounsfield import BODY_HU
from medaccel.losses import default_radius, pixel_centres
from medaccel.pretraining.data import Volumes
from medaccel.pretraining.harmonic import harmonic_fill
from medaccel.pretraining.items import Items
from medaccel.pretraining.network import PretrainingNet
from medaccel.pretraining.tasks import PretextTask
from medaccel.pretraining.tasks.inpainting import Inpainting
from medaccel.pretraining.tasks.instance import Instance
from medaccel.pretraining.tasks.pixels import PixelContrast, PixPro
from medaccel.pretraining.tasks.rotation import Rotation

# Held-out items have numbers of their own.
_FIRST_ITEM = 1 << 40
PAIRS = 64
INPAINTED = 16
PIXEL_PAIRS = 16


@dataclass
class HeldOut:
    """Holds figures by task, as plain values, and pictures of one item.

    Args:
        figures: figures by task, each with the measurement, "chance" or another value to compare with, the study's
            "target", and "reached".
        pictures: arrays (i, j, k) by name.
    """

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def evaluate(
    net: PretrainingNet,
    tasks: Sequence[PretextTask],
    volumes: Volumes,
    *,
    windows: Sequence[Sequence[float]],
    roi_size: Sequence[int],
    views: Mapping[str, Any],
    seed: int = 0,
    pairs: int = PAIRS,
) -> HeldOut:
    """Computes each task's figure on held-out scans, seen in the first window; instance retrieval covers every
    window.

    Args:
        net: the trained network, on any device.
        tasks: its tasks.
        volumes: held-out scans.
        windows, roi_size, views: the training's.
        seed: seed of crops and views.
        pairs: number of pairs of views for instance retrieval. If there are fewer scans, some give several pairs, and
            a view from another pair of the same scan counts as wrong; the other figures use at most 16 scans or 64
            crops.
    """
    device = next(net.parameters()).device
    result = HeldOut()
    with _evaluating(net):
        for task in tasks:
            if isinstance(task, Rotation):
                result.figures[task.name] = rotation_accuracy(net, task, volumes, windows[0], seed, device)
            elif isinstance(task, Inpainting):
                result.figures[task.name], pictures = inpainting_error(net, task, volumes, windows[0], seed, device)
                result.pictures.update(pictures)
        retrieving = [task for task in tasks if isinstance(task, Instance | PixelContrast | PixPro)]
        if retrieving:
            # Views are those of training without the holes of inpainting, which isn't among the tasks here.
            options: Any = {"roi_size": roi_size, "views": views, "seed": seed}
            shown = windows if any(isinstance(task, Instance) for task in retrieving) else windows[:1]
            drawn = [_pairs(Items(volumes, retrieving, windows=[limits], **options), pairs, seed) for limits in shown]
            result.pictures.update({name: drawn[0][0][name][0].numpy() for name in ("view1", "view2")})
            for task in retrieving:
                if isinstance(task, Instance):
                    result.figures[task.name] = instance_retrieval(net, task, drawn, min(pairs, len(volumes)), device)
                else:
                    first = drawn[0][:PIXEL_PAIRS]
                    result.figures[task.name] = pixel_retrieval(net, task, first, windows[0], device)
    return result


def _pairs(items: Items, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Draws held-out items, the scans in turn."""
    numbered = ((n, np.random.default_rng([seed, _FIRST_ITEM + n])) for n in range(count))
    return [items.item(n % len(items.volumes), rng) for n, rng in numbered]


def rotation_accuracy(
    net: PretrainingNet, task: Rotation, volumes: Volumes, limits: Sequence[float], seed: int, device: torch.device
) -> dict[str, Any]:
    """Returns the share of right answers for a crop of each scan (of 64 at most), in all four rotations."""
    right = []
    for number in range(min(len(volumes), PAIRS)):
        rng = np.random.default_rng([seed, _FIRST_ITEM + number])
        crop = task.crop(window(volumes[number].as_tensor(), limits), rng)
        turned = torch.stack([task.turned(crop, turns) for turns in range(4)]).to(device)
        right.append((task.logits(net, turned).argmax(dim=1).cpu() == torch.arange(4)).float())
    accuracy = float(torch.cat(right).mean())
    return {
        "accuracy": accuracy,
        "chance": 0.25,
        "crops": 4 * len(right),
        "target": 0.9,
        "reached": accuracy >= 0.9,
    }


def inpainting_error(
    net: PretrainingNet, task: Inpainting, volumes: Volumes, limits: Sequence[float], seed: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the mean |error| in HU on the hidden voxels of the body, the network's and the harmonic fill's.

    Crops are neither turned nor changed in intensity. The body is everything above −500 HU. Chance is the error of an
    untrained head, which leaves the smooth fill as it is.
    """
    width = float(limits[1]) - float(limits[0])
    cropper = _Crop(task.roi_size)
    errors: dict[str, list[float]] = {"network": [], "harmonic": [], "start": []}
    pictures: dict[str, np.ndarray] = {}
    for number in range(min(len(volumes), INPAINTED)):
        rng = np.random.default_rng([seed, _FIRST_ITEM + number])
        hu = cropper(volumes[number].as_tensor(), rng)
        truth = window(hu, limits)
        mask, view = task.hide(truth, rng)
        seen, hidden = view[None].to(device), mask[None].to(device)
        prediction = task.predict(net, net.features(seen, {task.level})[task.level], seen, hidden)
        filled = torch.where(mask, prediction[0].cpu(), truth)[0].numpy()
        harmonic = harmonic_fill(view[0].numpy(), mask[0].numpy())
        body = (mask & (hu > BODY_HU))[0].numpy()
        if not body.any():
            continue
        inside = truth[0].numpy()[body]
        start = task.fill(seen, hidden)[0, 0].cpu().numpy()
        for name, values in (("network", filled), ("harmonic", harmonic), ("start", start)):
            errors[name].append(width * float(np.abs(values[body] - inside).mean()))
        if not pictures:
            pictures = {
                "inpainting: input": view[0].numpy(),
                "inpainting: network": filled,
                "inpainting: harmonic": harmonic,
                "inpainting: truth": truth[0].numpy(),
            }
    network, harmonic_error, start_error = (float(np.mean(errors[name])) for name in errors)
    return {
        "error_hu": network,
        "harmonic_hu": harmonic_error,
        "chance": start_error,
        "better_in": int(np.sum(np.less(errors["network"], errors["harmonic"]))),
        "scans": len(errors["network"]),
        "target": harmonic_error,
        "reached": network < harmonic_error,
    }, pictures


def instance_retrieval(
    net: PretrainingNet,
    task: Instance,
    drawn: Sequence[Sequence[Mapping[str, Tensor]]],
    scans: int,
    device: torch.device,
) -> dict[str, Any]:
    """Measures how often the second view nearest to a first one is its own, and the reverse.

    Views of one window are compared, and the result is averaged over windows: views of different windows are told
    apart too easily. The head standardises among them, as it does among a step's views in training.
    """
    by_window = [_top1(net, task, pairs, device) for pairs in drawn]
    top1, pairs = float(np.mean(by_window)), len(drawn[0])
    return {
        "top1": top1,
        "top1_by_window": by_window,
        "chance": 1 / pairs,
        "pairs": pairs,
        "scans": scans,
        "target": 0.8,
        "reached": top1 >= 0.8,
    }


def _top1(net: PretrainingNet, task: Instance, pairs: Sequence[Mapping[str, Tensor]], device: torch.device) -> float:
    views = (torch.stack([item["view1"], item["view2"]]).to(device) for item in pairs)
    maps = [net.features(two, task.view_levels) for two in views]
    every = {level: torch.cat([m[level] for m in maps]) for level in task.view_levels}
    both = F.normalize(task.embed(net, every).float(), dim=1).cpu().unflatten(0, (-1, 2))  # (pairs, 2, C)
    cosines = both[:, 0] @ both[:, 1].T
    own = torch.arange(len(both))
    right = torch.stack([cosines.argmax(dim=1) == own, cosines.argmax(dim=0) == own]).float()
    return float(right.mean())


def pixel_retrieval(
    net: PretrainingNet,
    task: PixelContrast | PixPro,
    drawn: Sequence[Mapping[str, Tensor]],
    limits: Sequence[float],
    device: torch.device,
) -> dict[str, Any]:
    """Returns the share of pixels whose most similar pixel of the other view lies within the radius, in both
    directions.

    Only pixels that have a pixel within the radius count. "body" counts only those whose mean over the view's voxels
    is above −500 HU, which leaves out the air, where all places look alike.
    """
    level = (BODY_HU - float(limits[0])) / (float(limits[1]) - float(limits[0]))
    found: dict[str, list[Tensor]] = {"all": [], "body": [], "chance": []}
    for item in drawn:
        views = torch.stack([item["view1"], item["view2"]]).to(device)
        projected = task.project(net, net.features(views, {task.level})).float().cpu()
        affines = task.affines({key: item[key][None] for key in ("affine1", "affine2")}, projected)
        radius = float(default_radius(*affines)) if task.radius is None else task.radius
        size = (projected.shape[2], projected.shape[3], projected.shape[4])
        at = [pixel_centres(size, affine)[0] for affine in affines]
        rows = [F.normalize(p.flatten(1).T, dim=1) for p in projected]
        body = [F.adaptive_avg_pool3d(v[None].cpu(), size).flatten() > level for v in views]
        for a, b in ((0, 1), (1, 0)):
            near = (at[a][:, None] - at[b][None]).square().sum(dim=2) < radius**2
            counted = near.any(dim=1)
            nearest = (rows[a] @ rows[b].T).argmax(dim=1)
            right = near.gather(1, nearest[:, None])[:, 0].float()
            found["all"].append(right[counted])
            found["body"].append(right[counted & body[a]])
            found["chance"].append(near[counted & body[a]].float().mean(dim=1))
    every, inside, chance = (float(torch.cat(found[name]).mean()) for name in ("all", "body", "chance"))
    return {
        "share": every,
        "share_in_body": inside,
        "chance": chance,
        "pairs": len(drawn),
        "target": 0.6,
        "reached": inside >= 0.6,
    }


class _Crop:
    """Cuts the middle of a volume in a view's size, moved at random where there is room, and padded with air."""

    def __init__(self, roi_size: Sequence[int]) -> None:
        from monai.transforms import RandSpatialCrop, SpatialPad

        self.pad = SpatialPad(roi_size, mode="constant", value=-1024.0)
        self.crop = RandSpatialCrop(roi_size, random_size=False)

    def __call__(self, hu: Tensor, rng: np.random.Generator) -> Tensor:
        self.crop.set_random_state(seed=int(rng.integers(2**31)))
        return torch.as_tensor(self.crop(self.pad(hu))).as_subclass(Tensor)


@contextmanager
def _evaluating(net: torch.nn.Module) -> Iterator[None]:
    """Switches the network to evaluation without gradients, and restores its mode afterwards."""
    training = net.training
    net.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        net.train(training)
