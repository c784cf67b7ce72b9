# SPDX-License-Identifier: Apache-2.0
"""Checks the diffusion step's arguments, and refuses wrong ones in a sentence."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medaccel.ops._arguments import (
    FLOATING,
    INTEGERS,
    check_floating,
    check_mask,
    describe,
    is_sequence,
    number,
    whole,
)

Coefficient = float | Tensor
NAMES = ("a", "b", "c", "d", "e", "f", "s", "guide_scale", "guide_std")
# sample, model_output, previous, noise, guide, mask
Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_NAME = "diffusion_step"


def check_tensors(
    sample: Tensor,
    model_output: Tensor | None,
    previous: Tensor | None,
    noise: Tensor | None,
    guide: Tensor | None,
    mask: Tensor | None,
) -> Tensors:
    """Returns the tensors, mask and guide expanded to the sample's shape; or raises an error in a sentence."""
    check_floating(_NAME, sample=sample)
    if sample.dim() == 0:
        raise ValueError(f"{_NAME}: sample has shape (); expected (B, …)")
    if (mask is None) != (guide is None):
        given, missing = ("mask", "guide") if guide is None else ("guide", "mask")
        raise ValueError(f"{_NAME}: {given} is given and {missing} is None; expected both or neither")
    for argument, tensor in (
        ("model_output", model_output),
        ("previous", previous),
        ("noise", noise),
        ("guide", guide),
        ("mask", mask),
    ):
        if tensor is None:
            continue
        if argument == "mask":
            check_mask(_NAME, argument, tensor)
        else:
            check_floating(_NAME, **{argument: tensor})
        if tensor.device != sample.device:
            raise ValueError(
                f"{_NAME}: {argument} is on {tensor.device} and sample on {sample.device}; expected the same device"
            )
        if (tensor.dtype == torch.float64) != (sample.dtype == torch.float64) and argument != "mask":
            raise ValueError(
                f"{_NAME}: {argument} is {tensor.dtype} and sample {sample.dtype}; expected the same (a half "
                "precision may go with float32)"
            )
        if argument in ("guide", "mask"):
            _check_broadcast(argument, tensor, sample)
        elif tensor.shape != sample.shape:
            raise ValueError(
                f"{_NAME}: {argument} has shape {tuple(tensor.shape)}; expected the sample's, {tuple(sample.shape)}"
            )
    if mask is not None and guide is not None:
        mask = (mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0).expand(sample.shape)
        guide = guide.expand(sample.shape)
    return sample, model_output, previous, noise, guide, mask


def _check_broadcast(argument: str, tensor: Tensor, sample: Tensor) -> None:
    sizes = (1,) * (sample.dim() - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != sample.dim() or any(n not in (1, m) for n, m in zip(sizes, sample.shape, strict=True)):
        raise ValueError(
            f"{_NAME}: {argument} has shape {tuple(tensor.shape)}; expected one that broadcasts to the "
            f"sample's, {tuple(sample.shape)}"
        )


def check_coefficients(names: tuple[str, ...], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the coefficients as Python floats or as tensors of real numbers; the guide's may be None."""
    checked = [
        value if type(value) is float else _coefficient(name, value)
        for name, value in zip(names, values, strict=True)
    ]
    return tuple(checked)


def _coefficient(argument: str, value: Any) -> Coefficient | None:
    if value is None and argument in NAMES[-2:]:
        return None
    expected = "a number, or a tensor of one per sample"
    if isinstance(value, Tensor):
        if value.dtype not in (*FLOATING, *INTEGERS) or value.layout is not torch.strided or value.is_nested:
            raise TypeError(f"{_NAME}: {argument} is {describe(value)}; expected {expected}")
        return value
    if (
        not isinstance(value, float | int)
        and getattr(value, "ndim", 0) > 0
        and getattr(value.dtype, "kind", "") in "fiu"
    ):  # a NumPy array
        return torch.as_tensor(value, dtype=torch.float64)
    return number(_NAME, argument, value, expected)


def check_clip(clip: Any) -> tuple[float, float] | None:
    """Returns the limits as floats."""
    if clip is None:
        return None
    expected = "(min, max) with min <= max, or None"
    if not is_sequence(clip):
        raise TypeError(f"{_NAME}: clip is {describe(clip)}; expected {expected}")
    limits = [number(_NAME, f"clip[{i}]", value) for i, value in enumerate(clip)]
    if len(limits) != 2 or not limits[0] <= limits[1]:
        raise ValueError(f"{_NAME}: clip is {clip}; expected {expected}")
    return limits[0], limits[1]


def check_place(place: Sequence[Any], batch: int) -> tuple[int | Tensor | None, int, int]:
    """Returns the seed (checked later), and offset and sample_offset as ints."""
    seed, offset, sample_offset = place
    offset, sample_offset = whole(_NAME, "offset", offset), whole(_NAME, "sample_offset", sample_offset)
    if not 0 <= offset < 2**63:
        raise ValueError(f"{_NAME}: offset is {offset}; expected 0 to 2^63 - 1")
    if not 0 <= sample_offset <= 2**32 - batch:
        raise ValueError(
            f"{_NAME}: sample_offset is {sample_offset} for {batch} samples; expected 0 to 2^32 - {batch}"
        )
    return seed, offset, sample_offset
