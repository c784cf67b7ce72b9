# SPDX-License-Identifier: Apache-2.0
"""Measures how much a frozen backbone's features tell by themselves: one linear layer on them, trained on a few
labelled scans."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.transforms import DivisiblePad
from torch import Tensor, nn

from medaccel.data.ct_transforms import canonical, window
from medaccel.data.msd import Case, MSDDataset, load_case
from medaccel.nets import SwinUNETR
from medaccel.pretraining.levels import check_level, features
from medaccel.segmentation.evaluation.metrics import dice

#: Settings have these defaults.
PROBE: Mapping[str, Any] = {
    "spacing": [6.0, 6.0, 6.0],  # mm
    "window": [-160.0, 240.0],  # HU
    "levels": ["encoder1", "encoder2", "encoder3", "encoder4", "decoder4", "decoder3", "decoder2"],
    "steps": 150,
    "learning_rate": 0.05,
    "weight_decay": 1e-3,
}
_LEAST = 64  # least voxels of the longest side that the network takes


class LinearProbe(nn.Module):
    """Applies one linear layer to maps of several strides, all brought to the image's grid.

    A linear layer and an interpolation of channels can change places, so the layer is applied to each map on its own
    grid, and only the few channels of its result are brought to the image's grid: the numbers are the same, without a
    map of hundreds of channels.

    Args:
        maps: maps of one scan, by level; the first ones seen say how many channels each has.
        classes: number of classes, background included.
    """

    def __init__(self, maps: Mapping[str, Tensor], classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({level: nn.Conv3d(m.shape[1], classes, 1) for level, m in maps.items()})
        for layer in self.layers.values():
            assert isinstance(layer, nn.Conv3d)
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, maps: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
        """Maps feature maps (1, C, …) by level to logits (1, classes, *size)."""
        logits = [
            F.interpolate(layer(maps[level]), size=tuple(size), mode="trilinear", align_corners=False)
            for level, layer in self.layers.items()
        ]
        return torch.stack(logits).sum(dim=0)


def linear_probe(
    backbone: SwinUNETR,
    dataset: MSDDataset,
    train_cases: Collection[str],
    test_cases: Collection[str],
    settings: Mapping[str, Any] | None = None,
) -> float:
    """Trains a linear layer on a backbone's frozen features and scores it.

    Scans are seen whole, at one spacing, cropped to the body; features are standardised by the training scans'
    channels. Dice is computed on that grid; it is 1 if both masks are empty.

    Args:
        backbone: the network that gives the features; it stays as it is. Its `out` is not used.
        dataset: the labelled cases.
        train_cases, test_cases: names of its cases.
        settings: settings that differ from `PROBE`.

    Returns:
        The mean Dice, 0 … 1, over the foreground classes and test cases.

    Raises:
        ValueError: settings are unknown, there are no cases, the dataset lacks a name, or `load_case` refuses a case.
    """
    unknown = set(settings or {}) - set(PROBE)
    if unknown:
        raise ValueError(f"probe: settings {sorted(unknown)} are unknown; expected some of {', '.join(PROBE)}")
    s = copy.deepcopy({**PROBE, **(settings or {})})
    levels = [check_level("probe: levels", level) for level in s["levels"]]
    known = {case.name: case for case in dataset.cases}
    for title, names in (("train_cases", train_cases), ("test_cases", test_cases)):
        missing = [name for name in names if name not in known]
        if missing or not names:
            raise ValueError(
                f"probe: {title} is {sorted(names)}; expected names of {dataset.name}'s cases, such as "
                f"{', '.join(list(known)[:3])}"
            )
    device = next(backbone.parameters()).device
    training = [_seen(backbone, dataset, known[name], levels, s, device) for name in sorted(train_cases)]
    scales = {level: _statistics([maps[level] for maps, _ in training]) for level in levels}
    values = sorted(dataset.labels)
    probe = LinearProbe(training[0][0], len(values)).to(device)
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=s["learning_rate"], weight_decay=s["weight_decay"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(s["steps"]):
            optimizer.zero_grad()
            for maps, label in training:
                logits = probe(_standard(maps, scales), label.shape[1:])
                (loss(logits, _classes(label, values)[None].to(device)) / len(training)).backward()
            optimizer.step()
    scores = []
    with torch.no_grad():
        for name in sorted(test_cases):
            maps, label = _seen(backbone, dataset, known[name], levels, s, device)
            found = probe(_standard(maps, scales), label.shape[1:]).argmax(dim=1)[0].cpu().numpy()
            truth = _classes(label, values)[0].numpy()
            scores += [dice(found == number, truth == number) for number in range(1, len(values))]
    return float(np.mean(scores))


def _seen(
    backbone: SwinUNETR,
    dataset: MSDDataset,
    case: Case,
    levels: Sequence[str],
    settings: Mapping[str, Any],
    device: torch.device,
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns a case's feature maps (1, C, …), and its label map (1, i, j, k) on the grid that the network saw."""
    image, label = load_case(dataset, case)
    volumes = canonical(image, settings["spacing"], label=label)
    pad = DivisiblePad(32, mode="constant", value=-1024.0)
    hu, truth = pad(volumes["image"]), DivisiblePad(32, mode="constant", value=0.0)(volumes["label"])
    if max(hu.shape[1:]) < _LEAST:
        more = (0, _LEAST - hu.shape[3])
        hu, truth = F.pad(hu.as_tensor(), more, value=-1024.0), F.pad(truth.as_tensor(), more)
    x = window(torch.as_tensor(hu).as_subclass(Tensor), settings["window"])[None].to(device)
    training = backbone.training
    backbone.eval()
    with torch.no_grad():
        maps = features(backbone, x, levels)
    backbone.train(training)
    return {level: m.float() for level, m in maps.items()}, torch.as_tensor(truth).as_subclass(Tensor)


def _classes(label: Tensor, values: Sequence[int]) -> Tensor:
    """Replaces labels by their positions among `values`."""
    numbers = torch.zeros_like(label, dtype=torch.long)
    for number, value in enumerate(values):
        numbers[label == value] = number
    return numbers


def _statistics(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns mean and deviation of each channel over all pixels, (1, C, 1, 1, 1)."""
    pixels = torch.cat([m.flatten(2) for m in maps], dim=2)
    mean, deviation = pixels.mean(dim=2), pixels.std(dim=2).clamp(min=1e-5)
    return mean[..., None, None, None], deviation[..., None, None, None]


def _standard(maps: Mapping[str, Tensor], scales: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {level: (m - scales[level][0]) / scales[level][1] for level, m in maps.items()}
