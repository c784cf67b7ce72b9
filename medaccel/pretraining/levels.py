# SPDX-License-Identifier: Apache-2.0
"""Computes the feature maps of a Swin UNETR by name, and knows their strides and channels."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from medaccel.nets import SwinUNETR

#: Maps have these names and strides: the transformer's stages, then the U-Net's blocks from the deepest on.
STRIDES: Mapping[str, int] = {
    "encoder0": 2,
    "encoder1": 4,
    "encoder2": 8,
    "encoder3": 16,
    "encoder4": 32,
    "decoder4": 16,
    "decoder3": 8,
    "decoder2": 4,
    "decoder1": 2,
    "decoder0": 1,
}
# A decoder level has its own block, the block of its skip connection (None: the hidden state as it is), and the
# number of that hidden state.
_DECODER: Mapping[str, tuple[str, str | None, int | None]] = {
    "decoder4": ("decoder5", None, 3),
    "decoder3": ("decoder4", "encoder4", 2),
    "decoder2": ("decoder3", "encoder3", 1),
    "decoder1": ("decoder2", "encoder2", 0),
    "decoder0": ("decoder1", "encoder1", None),  # the skip connection starts at the image itself
}


def check_level(name: str, level: Any) -> str:
    """Returns the level, if one has that name.

    Raises:
        ValueError: no level has that name; `name` says which setting asked for it.
    """
    if level not in STRIDES:
        raise ValueError(f"{name} is {level!r}; expected one of {', '.join(STRIDES)}")
    return str(level)


def channels(level: str, feature_size: int) -> int:
    """Returns the number of channels of a level's map."""
    if level.startswith("encoder"):
        return feature_size * 2 ** int(level[-1])
    return {"decoder4": 8, "decoder3": 4, "decoder2": 2}.get(level, 1) * feature_size


def elements(level: str, feature_size: int, roi_size: Sequence[int]) -> int:
    """Returns the number of elements of a level's map of one view: channels times pixels."""
    return channels(level, feature_size) * math.prod(n // STRIDES[level] for n in roi_size)


def features(backbone: SwinUNETR, x: Tensor, levels: Collection[str]) -> dict[str, Tensor]:
    """Computes feature maps of a Swin UNETR, and nothing that none of them needs.

    A map of the transformer costs only the stages up to it, and one of the decoder costs no block of finer
    resolution, which are the expensive ones.

    Args:
        backbone: the net; its `out` is not used.
        x: (B, in_channels, *spatial), sizes multiples of 32, one at least 64.
        levels: names in `STRIDES`.

    Returns:
        Maps (B, channels(level), *(spatial / STRIDES[level])) by name.

    Raises:
        ValueError: a level is unknown, or a size is no multiple of 32.
    """
    for level in levels:
        check_level("levels", level)
    backbone._check_input_size(x.shape[2:])
    decoded = [level for level in _DECODER if level in levels]
    # A decoder level needs the coarser ones, and the last stage.
    depth = 4 if decoded else max((int(level[-1]) for level in levels), default=-1)
    hidden = _stages(backbone, x, depth)
    maps = {level: hidden[int(level[-1])] for level in levels if level.startswith("encoder")}
    if decoded:
        current = backbone.encoder10(hidden[4])
        for level, (block, skip, number) in _DECODER.items():
            state = x if number is None else hidden[number]
            current = getattr(backbone, block)(current, getattr(backbone, skip)(state) if skip else state)
            if level in levels:
                maps[level] = current
            if level == decoded[-1]:
                break
    return maps


def _stages(backbone: SwinUNETR, x: Tensor, depth: int) -> list[Tensor]:
    """Returns the transformer's hidden states 0 … depth, as its own forward gives them."""
    vit = backbone.swinViT
    hidden: list[Tensor] = []
    if depth < 0:
        return hidden
    x = vit.pos_drop(vit.patch_embed(x))
    hidden.append(vit.proj_out(x, backbone.normalize))
    for number in range(1, depth + 1):
        if vit.use_v2:
            x = getattr(vit, f"layers{number}c")[0](x.contiguous())
        x = getattr(vit, f"layers{number}")[0](x.contiguous())
        hidden.append(vit.proj_out(x, backbone.normalize))
    return hidden


def parts_for(levels: Collection[str]) -> set[str]:
    """Returns the names of the backbone's modules that the maps of these levels need."""
    decoded = [level for level in _DECODER if level in levels]
    depth = 4 if decoded else max((int(level[-1]) for level in levels), default=-1)
    parts = {"swinViT.patch_embed"} if depth >= 0 else set()
    parts |= {f"swinViT.layers{n}{v2}" for n in range(1, depth + 1) for v2 in ("", "c")}
    if decoded:
        parts.add("encoder10")
        for level, (block, skip, _) in _DECODER.items():
            parts |= {block, skip} if skip else {block}
            if level == decoded[-1]:
                break
    return parts


def within(name: str, parts: Collection[str]) -> bool:
    """Tells whether a parameter, by its name, belongs to one of these modules."""
    return any(name.startswith(f"{part}.") for part in parts)
