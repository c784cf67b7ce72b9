# SPDX-License-Identifier: Apache-2.0
"""Stores a trained segmentation network in a file: settings, names of the labels, weights, and the range of its
training scans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medaccel.data.files import atomic_path
from medaccel.data.tensors import first_line, load_tensors
from medaccel.segmentation.model.presets import make_settings

KIND = "medaccel segmentation"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Holds the content of a file that `save` wrote.

    Args:
        settings: the result of `medaccel.segmentation.model.presets.make_settings`.
        labels: value to name, 0 the background.
        state_dict: the network's state_dict.
        seen: range of the training scans: "spacing_mm", the least and the largest voxel size along each axis, and
            "body_hu", those of the body's mean.
    """

    settings: Mapping[str, Any]
    labels: Mapping[int, str]
    state_dict: Mapping[str, Tensor]
    seen: Mapping[str, Any]

    def network(self) -> nn.Module:
        """Builds the network with its weights, for inference."""
        from medaccel.segmentation.model.training import make_network

        network = make_network(self.settings, len(self.labels), 0)
        network.load_state_dict(self.state_dict)
        return network.eval()


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint atomically, over an old one; `torch.load` reads it with `weights_only=True`."""
    content = {
        "kind": KIND,
        "format": FORMAT,
        "settings": dict(checkpoint.settings),
        "labels": dict(checkpoint.labels),
        "state_dict": dict(checkpoint.state_dict),
        "seen": dict(checkpoint.seen),
    }
    with atomic_path(path, force=True) as temporary:
        torch.save(content, temporary)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint without running any code in the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or has another kind or version.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected the best.pt of a segmentation's cell")
    content = load_tensors(path, what="a checkpoint")
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{path}: no segmentation network; expected the best.pt of a segmentation's cell")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: of format {content.get('format')!r}; this version reads format {FORMAT}")
    try:
        loaded = Checkpoint(
            make_settings(content["settings"]),
            _labels(content["labels"]),
            content["state_dict"],
            _seen(content["seen"]),
        )
        loaded.network()
    except Exception as error:  # settings or weights of another kind may raise anything
        raise ValueError(
            f"{path}: its settings, labels and weights don't fit together ({first_line(error)})"
        ) from error
    return loaded


def _labels(content: Mapping[Any, Any]) -> dict[int, str]:
    labels = {int(value): str(name) for value, name in content.items()}
    if sorted(labels) != list(range(len(labels))) or len(labels) < 2:
        raise ValueError(f"labels is {content!r}; expected names of 0, 1, … without a gap")
    return labels


def _seen(content: Mapping[str, Any]) -> dict[str, Any]:
    extent, body = content["spacing_mm"], content["body_hu"]
    pairs = [*extent, *([] if body is None else [body])]
    if len(extent) != 3 or any(len(pair) != 2 or not pair[0] <= pair[1] for pair in pairs):
        raise ValueError(
            f"seen is {content!r}; expected ranges of the voxel size along three axes, and of the body's HU"
        )
    return dict(content)
