# SPDX-License-Identifier: Apache-2.0
"""Checks the tensors that the diffusion step may write to: torch's own rules for ``out=``, and one about memory.

A kernel that writes through an address bypasses autograd and torch's checks of overlapping memory. So these checks
are made here, and are stricter: torch allows tensors whose overlap it can't determine.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medaccel.ops._arguments import check_floating, describe
from medaccel.ops._transforms import in_transform, is_wrapped
from medaccel.ops.diffusion_step import native
from medaccel.ops.diffusion_step.checks import NAMES, Coefficient, Tensors

_NAME = "diffusion_step"
_INPUTS = ("sample", "model_output", "previous", "noise", "guide", "mask")


def check_out(tensors: Tensors, coefficients: Sequence[Coefficient], out: Any) -> tuple[Tensor, Tensor | None]:
    """Returns the tensors for x′ and x0, or raises an error in a sentence."""
    sample = tensors[0]
    if isinstance(out, Tensor):
        out = (out, torch.empty_like(sample, memory_format=torch.contiguous_format))
    if not isinstance(out, tuple | list) or len(out) != 2 or not isinstance(out[0], Tensor):
        raise TypeError(f"{_NAME}: out is {describe(out)}; expected a tensor, or (x′, x0) where x0 may be None")
    x_next, x0 = out
    targets = {"out[0]": x_next} if x0 is None else {"out[0]": x_next, "out[1]": x0}
    check_floating(_NAME, **targets)
    if in_transform() and any(is_wrapped(t) for t in (*targets.values(), *tensors, *coefficients)):
        raise ValueError(
            f"{_NAME}: out is given under vmap, another transform of torch.func or forward-mode differentiation; "
            "expected no out there, as they don't follow what is written into memory"
        )
    inputs = {name: t for name, t in zip(_INPUTS, tensors, strict=True) if t is not None}
    _check_gradients(targets, inputs, dict(zip(NAMES, coefficients, strict=True)))
    for name, target in targets.items():
        if target.shape != sample.shape or target.dtype != sample.dtype or target.device != sample.device:
            raise ValueError(
                f"{_NAME}: {name} is {target.dtype} {tuple(target.shape)} on {target.device}; expected the sample's "
                f"{sample.dtype} {tuple(sample.shape)} on {sample.device}"
            )
    # A compiler's tensors have no addresses; its code for the copy into `out` follows torch's rules.
    if not torch.compiler.is_compiling():
        for name, target in targets.items():
            _check_memory(name, target, inputs)
        if x0 is not None and native.overlap(x_next, x0):
            raise ValueError(f"{_NAME}: out[0] and out[1] share memory; expected two tensors")
    return x_next, x0


def _check_gradients(targets: dict[str, Tensor], inputs: dict[str, Tensor], coefficients: dict[str, Any]) -> None:
    if torch.is_grad_enabled():
        for name, tensor in (*inputs.items(), *coefficients.items(), *targets.items()):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                what = f"{name} requires a gradient" if name in targets else f"an input requires a gradient ({name})"
                raise ValueError(f"{_NAME}: out is given and {what}; expected torch.no_grad() around it")


def _check_memory(name: str, target: Tensor, inputs: dict[str, Tensor]) -> None:
    if target.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{_NAME}: {name} was made in torch.inference_mode(), outside of which it is not to be written; expected "
            "a clone"
        )
    if target._is_zerotensor():
        raise ValueError(f"{_NAME}: {name} is one of torch's zero tensors, which have no memory; expected a clone")
    if _overlaps_itself(target):
        raise ValueError(
            f"{_NAME}: {name} has strides {target.stride()}, by which elements share memory; expected a tensor with "
            "an element's memory to itself (a clone)"
        )
    for argument, tensor in inputs.items():
        if tensor is not target and native.overlap(target, tensor) and not native.same_place(target, tensor):
            raise ValueError(
                f"{_NAME}: {name} shares memory with {argument} but lies differently there; expected {argument} "
                "itself, or other memory"
            )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Tells whether elements may share memory, because some axis steps less far than the axes within it reach."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 1
    for step, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step < reach:
            return True
        reach += (size - 1) * step
    return False
