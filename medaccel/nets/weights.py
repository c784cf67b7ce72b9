# SPDX-License-Identifier: Apache-2.0
"""Loads published Swin UNETR weights, whatever their dialect, into any model that holds MONAI's
SwinTransformer."""

import argparse
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformer
from torch import Tensor, nn

from medaccel.data.files import check_input
from medaccel.data.tensors import archive_fault
from medaccel.nets.swin_unetr import PatchMergingV090

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
# These names a model gives its transformer; anything else in front of the keys is a wrapper's name, and the heads
# beside the transformer have it too (module.layers1…, module.rotation_head…).
_TRANSFORMER_NAMES = ("swinViT", "swin_vit", "encoder", "backbone")
# The transformer's own tensors begin so. Other nets have a patch_embed too, so only a stage tells where it is.
_OWN = re.compile(r"(?:patch_embed|layers[1-4]c?)\.")
_STAGE = re.compile(r"(?:(.+?)\.)?layers[1-4]c?\.\d")
_NESTED_STAGE = re.compile(r"(layers[1-4]c?)\.0\.0\.")
_SHOWN = 8


@dataclass
class LoadReport:
    """Reports what `load_pretrained` did; it can be printed.

    Attributes:
        dialect: the file's way of naming tensors, and the merging order that it implies.
        loaded: the model's tensors that were filled.
        skipped: (a tensor's name in the file, why it was not loaded).
        missing: the model's other tensors, which keep their values.
    """

    dialect: str
    loaded: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing)
        lines = [f"medaccel: {len(self.loaded)} of the model's {total} tensors loaded ({self.dialect})"]
        reasons: dict[str, list[str]] = {}
        for key, reason in self.skipped:
            reasons.setdefault(reason, []).append(key)
        lines += [f"  skipped  {_grouped(keys)}: {reason}" for reason, keys in list(reasons.items())[:_SHOWN]]
        if len(reasons) > _SHOWN:
            lines.append(f"  skipped  … for {len(reasons) - _SHOWN} more reasons")
        if self.missing:
            lines.append(f"  missing  {_grouped(self.missing)}")
        return "\n".join(lines)


def _grouped(keys: list[str]) -> str:
    """Lists tensors by the module they belong to, with counts: "encoder1 (3), encoder2 (2)"."""
    parts = [key.split(".") for key in keys]
    shared = len(list(takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))))
    counts = Counter(".".join(part[: shared + 1]) for part in parts)
    return ", ".join(f"{group} ({count})" if count > 1 else group for group, count in counts.items())


def _plain_values() -> list[Any]:
    """Returns the plain types that the training scripts of 2022 pickled beside the weights (``best_acc`` and
    ``args``)."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes, argparse.Namespace]


def _read(path: Path) -> dict[str, Tensor]:
    """Reads the state_dict of a file without running any code in the file."""
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"load_pretrained: there is no file {path}")
    fault = archive_fault(check_input(path))
    if fault is not None:
        raise ValueError(f"load_pretrained: {path} is not a whole torch file of weights ({fault})")
    with path.open("rb") as stream:  # a file without read permission fails here, so it is not called broken
        try:
            with torch.serialization.safe_globals(_plain_values()):
                content = torch.load(stream, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own sentence starts with the advice to run the file's code.
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise ValueError(
                f"load_pretrained: {path} holds {found[1] if found else 'pickled objects'}; expected tensors and "
                "plain values, because reading more can run code. If you trust the file, save its state_dict alone "
                "to another"
            ) from error
        except Exception as error:  # torch's readers may raise anything on a broken file
            summary = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            raise ValueError(f"load_pretrained: {path} is not a whole torch file of weights ({summary})") from error
    while isinstance(content, Mapping):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"load_pretrained: {path} holds no named tensors, at its top or under {', '.join(_WRAPPERS)}; it is a "
            f"{type(content).__name__}"
        )
    return tensors


def _file_paths(path: Path, keys: Iterable[str], models_name: str) -> tuple[str, str] | None:
    """Finds the file's transformer and the module that holds it and its heads; returns None if the file has no
    transformer."""
    found = {match[1] or "" for key in keys if (match := _STAGE.match(key))}
    if len(found) > 1:
        raise ValueError(
            f"load_pretrained: {path} holds {len(found)} transformers, under {', '.join(map(repr, sorted(found)))}; "
            "expected one: save the one you mean to a file of its own"
        )
    if not found:
        return None
    transformer = found.pop()
    holder, _, last = transformer.rpartition(".")
    return transformer, holder if last in (*_TRANSFORMER_NAMES, models_name) else transformer


def _model_paths(model: nn.Module) -> tuple[SwinTransformer, str, str]:
    """Returns the model's transformer, its path, and the path of the module that holds it and its heads."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_pretrained: model is a {type(model).__name__}; expected a torch.nn.Module")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, SwinTransformer)]
    if len(found) != 1:
        names = ", ".join(repr(name) for name, _ in found) or "none"
        raise ValueError(
            f"load_pretrained: {type(model).__name__} holds {len(found)} of MONAI's SwinTransformers ({names}); "
            "expected one: pass the part of the model that is meant"
        )
    name, transformer = found[0]
    return transformer, name, name.rpartition(".")[0]


def _own_name(key: str, transformer: str, holder: str) -> str | None:
    """Returns a tensor's name within the transformer, or None if it belongs to another module."""
    inside = f"{transformer}." if transformer else ""
    own = key.removeprefix(inside)
    # Where the transformer has its holder's name, the heads' tensors begin like its own.
    return own if key.startswith(inside) and (transformer != holder or _OWN.match(own)) else None


def _canonical(key: str, transformer: str, holder: str) -> str | None:
    """Returns a tensor's name as in MONAI's SwinUNETR, where the transformer is ``swinViT``; None for one outside the
    holder."""
    own = _own_name(key, transformer, holder)
    if own is not None:
        return "swinViT." + _NESTED_STAGE.sub(r"\1.0.", own).replace(".mlp.fc", ".mlp.linear")
    outside = f"{holder}." if holder else ""
    return key.removeprefix(outside) if key.startswith(outside) else None


def _dialect(tensors: Mapping[str, Tensor], paths: tuple[str, str] | None) -> tuple[str, bool, bool]:
    """Returns the dialect in words, whether it implies the old merging order, and whether only its encoder is to be
    loaded."""
    if paths is None:
        return "no Swin transformer in the file", False, False
    own = [name for key in tensors if (name := _own_name(key, *paths)) is not None]
    where = f"transformer under {paths[0]!r}" if paths[0] else "no prefix"
    nested = any(_NESTED_STAGE.match(name) for name in own)
    if any(".mlp.fc1." in name for name in own):
        kind = "NVIDIA 2022, mlp.fc1"
    elif nested:
        kind = "encoder of 2022, layers1.0.0"
    elif paths[0].rpartition(".")[2] == "swin_vit":  # the pretraining code's name until August 2022
        kind = "pretraining code of 2022, swin_vit"
    else:
        return f"MONAI; {where}; its names do not tell the merging order", False, False
    return f"{kind}; {where}; merging order of MONAI before 1.5", True, nested


def _merges_in_the_new_order(transformer: nn.Module) -> bool:
    return any(
        isinstance(module, PatchMergingV2)
        and not isinstance(module, PatchMergingV090)
        and module.reduction.in_features == 8 * module.dim  # 3-D: in 2-D the order never changed
        for module in transformer.modules()
    )


def _examples(tensors: Mapping[str, Tensor]) -> str:
    weights = [key for key in tensors if key.endswith("weight")] or list(tensors)
    return ", ".join(f"{key} {list(tensors[key].shape)}" for key in weights[:3])


def load_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Fills a Swin UNETR, an SSLHead or a bare Swin transformer from a file of published (or own) weights.

    Known dialects: a state_dict at the file's top or under "state_dict", "model", "model_state_dict" or "net"; the
    transformer under any prefix (``module.``, ``swin_vit.``, ``swinViT.``, ``backbone.``, ``encoder.``, a
    LightningModule's attribute) or none; ``mlp.fc1`` / ``fc2`` (NVIDIA's ``model_swinvit.pt``) for ``mlp.linear1`` /
    ``linear2``; ``encoder.layers1.0.0`` (``ssl_pretrained_weights.pth``), of which only the encoder is taken, as
    MONAI's `filter_swinunetr` does. Tensors whose shape differs are left out, and reported.

    These dialects of 2022 imply the merging order of MONAI before 1.5 (`PatchMergingV090`), and so does the name
    ``swin_vit``. A file with MONAI's own names does not show its order: models trained with MONAI before 1.5 (BTCV
    and BraTS of 2022) need ``downsample="merging_v090"`` too, and no warning can say so.

    No code in the file is run. The model is changed only after everything has been checked.

    Args:
        model: any module that holds one MONAI SwinTransformer, ours or MONAI's, wrapped (DDP, Lightning) or not, on
            any device and of any floating dtype.
        path: the file.

    Returns:
        What was loaded, skipped and missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another kind, holds more than tensors and plain values, or holds several
            transformers; or the model does not hold exactly one.
        TypeError: `model` is not a module.
        RuntimeError: not one weight of the file fits.

    Warns:
        UserWarning: the file is from 2022, when the merging order was different, and the model merges in today's
            order.
    """
    path = Path(path)
    module, transformer, holder = _model_paths(model)
    tensors = _read(path)
    paths = _file_paths(path, tensors, transformer.rpartition(".")[2])
    dialect, old_order, encoder_only = _dialect(tensors, paths)
    report = LoadReport(dialect)

    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    targets = {name: key for key in state if (name := _canonical(key, transformer, holder)) is not None}
    pairs: list[tuple[Tensor, Tensor]] = []
    for key, value in tensors.items():
        name = _canonical(key, *paths) if paths else key
        target = state[targets[name]] if name is not None and name in targets else None
        if name is None:
            report.skipped.append((key, "it is outside the net that holds the transformer"))
        elif encoder_only and not name.startswith("swinViT."):
            report.skipped.append((key, "of this dialect only the encoder is taken"))
        elif target is None:
            report.skipped.append((key, "the model has no such tensor"))
        elif value.shape != target.shape:
            report.skipped.append((key, f"its shape is {list(value.shape)}, the model's {list(target.shape)}"))
        elif value.is_floating_point() != target.is_floating_point():
            report.skipped.append((key, f"its dtype is {value.dtype}, the model's {target.dtype}"))
        else:
            pairs.append((target, value))
            report.loaded.append(targets[name])
    loaded = set(report.loaded)
    report.missing = [key for key in state if key not in loaded]

    # Index tables and bias tables fit a net of any width; a file fits if a weight does.
    if not any(key.endswith(".weight") for key in report.loaded):
        raise RuntimeError(
            f"load_pretrained: no weight of {path} fits the model, which is unchanged.\n"
            f"  the file has   {_examples(tensors)}\n"
            f"  the model has  {_examples(state)}"
        )
    if old_order and _merges_in_the_new_order(module):
        warnings.warn(
            f"load_pretrained: {path.name} is of a dialect of 2022 ({dialect}); this model merges in today's order "
            'and will compute something else with it. Build the model with downsample="merging_v090" (MONAI\'s own '
            "with downsample=medaccel.nets.PatchMergingV090).",
            stacklevel=2,
        )
    with torch.no_grad():
        for target, value in pairs:
            target.copy_(value)
    return report
