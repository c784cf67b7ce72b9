# SPDX-License-Identifier: Apache-2.0
"""Makes small nets, and their weights in each dialect that people publish them in."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from torch import Tensor, nn

from medaccel.nets import LoadReport, load_pretrained

SMALL: dict[str, Any] = {"feature_size": 12, "depths": (1, 1, 1, 1), "window_size": 2}
FLAT: dict[str, Any] = {**SMALL, "spatial_dims": 2}
State = dict[str, Tensor]


def filled(net: nn.Module) -> nn.Module:
    """The net with another number in every weight, so that a tensor in the wrong place is seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def flat_net(**options: Any) -> MonaiSwinUNETR:
    return filled(MonaiSwinUNETR(1, 2, **FLAT, **options))


def bare_transformer() -> SwinTransformer:
    return SwinTransformer(1, 12, (2, 2), (2, 2), (1, 1, 1, 1), (3, 6, 12, 24), spatial_dims=2)


def saved(folder: Path, content: Any) -> Path:
    path = folder / "weights.pt"
    torch.save(content, path)
    return path


def renamed(state: State, rename: Callable[[str], str], *, only: str = "") -> State:
    return {rename(key): value for key, value in state.items() if key.startswith(only)}


def quietly(model: nn.Module, path: Path) -> LoadReport:
    """`load_pretrained` where a warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_pretrained(model, path)


def assert_equal(state: State, expected: State) -> None:
    assert list(state) == list(expected)
    different = [key for key, value in state.items() if not torch.equal(value, expected[key])]
    assert different == []


def as_nvidia(state: State) -> dict[str, Any]:
    """model_swinvit.pt: the bare transformer of a DDP run, MLPs named fc1 and fc2, and a norm that nobody has."""
    encoder = renamed(
        state, lambda key: key.replace("swinViT", "module").replace(".mlp.linear", ".mlp.fc"), only="swin"
    )
    return {"state_dict": {**encoder, "module.norm.weight": torch.ones(96), "module.norm.bias": torch.zeros(96)}}


def as_nested_encoder(state: State) -> dict[str, Any]:
    """ssl_pretrained_weights.pth, with the tensors that MONAI's `filter_swinunetr` leaves out."""
    encoder = renamed(state, lambda key: key.replace("swinViT", "encoder"), only="swinViT.patch_embed")
    for stage in range(1, 5):
        stem = f"layers{stage}.0."
        encoder |= renamed(
            state, lambda key, stem=stem: key.replace(f"swinViT.{stem}", f"encoder.{stem}0."), only=f"swinViT.{stem}"
        )
    others = {f"encoder.{name}": torch.zeros(192) for name in ("mask_token", "norm.weight", "norm.bias")}
    return {"model": {**encoder, **others, "out.conv.conv.bias": state["out.conv.conv.bias"]}}


# name: (the file's content, from MONAI's state_dict; whether the tensors outside the transformer are in it)
DIALECTS: dict[str, tuple[Callable[[State], Any], bool]] = {
    "MONAI": (lambda state: state, True),
    "under state_dict": (lambda state: {"epoch": 7, "best_acc": np.float64(0.8), "state_dict": state}, True),
    "under model": (lambda state: {"model": state}, True),
    "under model_state_dict": (lambda state: {"model_state_dict": state}, True),
    "under net, twice": (lambda state: {"state_dict": {"net": state}}, True),
    "DDP": (lambda state: {"state_dict": renamed(state, lambda key: f"module.{key}")}, True),
    "a Lightning attribute": (lambda state: {"state_dict": renamed(state, lambda key: f"model.net.{key}")}, True),
    "compiled": (lambda state: renamed(state, lambda key: f"_orig_mod.{key}"), True),
    "backbone.swinViT": (lambda state: renamed(state, lambda key: f"backbone.{key}"), True),
    "backbone": (lambda state: renamed(state, lambda key: key.replace("swinViT", "backbone")), True),
    "module.backbone": (
        lambda state: renamed(state, lambda key: "module." + key.replace("swinViT", "backbone")),
        True,
    ),
    "encoder": (lambda state: renamed(state, lambda key: key.replace("swinViT", "encoder")), True),
    "swin_vit": (lambda state: {"state_dict": renamed(state, lambda key: key.replace("swinViT", "swin_vit"))}, True),
    "module.swin_vit": (
        lambda state: {"state_dict": renamed(state, lambda key: "module." + key.replace("swinViT", "swin_vit"))},
        True,
    ),
    "NVIDIA": (as_nvidia, False),
    "layers1.0.0": (as_nested_encoder, False),
    "a bare transformer": (
        lambda state: renamed(state, lambda key: key.removeprefix("swinViT."), only="swinViT."),
        False,
    ),
}
