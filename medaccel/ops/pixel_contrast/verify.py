# SPDX-License-Identifier: Apache-2.0
"""Checks and times the pixel contrast for `medaccel verify`."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops._dispatch import use_reference
from medaccel.ops.pixel_contrast import pixel_contrastive_loss, unsupported
from medaccel.ops.pixel_contrast.cases import Views, named

_CASES = (
    *("volume", "image", "finer_view", "coarser_view", "half_overlap", "no_overlap", "odd_channels", "many_channels"),
    *("sharp", "several_chunks", "empty_batch"),
)


def _gradients(case: Views, place: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
    query, key = (t.detach().requires_grad_() for t in features)
    at_query, at_key, radius = (t.to(query.device) for t in place)
    loss = pixel_contrastive_loss(query, key, at_query, at_key, radius=radius, temperature=case.temperature)
    return [loss.detach(), *torch.autograd.grad(loss, (query, key))]


def check(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Check:
    """Checks the loss and the gradients to both views' features."""
    case = named(name)
    query, key, *place = (t.to(device) for t in case.tensors(dtype))
    # A gradient is a difference of two mean vectors of that size.
    terms = 1 / (case.temperature * max(1, query.shape[1]))
    sizes = (1 / case.temperature, terms, terms)
    run = functools.partial(_gradients, case, place)
    return _checks.compare("pixel_contrastive_loss", name, unsupported(query, key), run, (query, key), sizes)


def time_contrast(device: torch.device) -> _checks.Speed:
    """Times two maps of 12³ pixels on the CPU, of 24³ on a GPU; forward + backward."""
    size, dtype = (12, torch.float32) if device.type == "cpu" else (24, torch.bfloat16)
    case = Views("", (size,) * 3, 64, batch=1, radius=1.0)
    query, key, *place = (t.to(device) for t in case.tensors(dtype))
    call = functools.partial(_gradients, case, place, (query, key))
    ours = _checks.median_ms(call, device)
    with use_reference():
        plain = _checks.median_ms(call, device)
    operations = 4 * 2 * size**6 * 64
    share = operations / ours / _checks.product_rate(device, dtype)
    name = f"{size}³ pixels, {_checks.dtype_name(dtype)}"
    return _checks.Speed("pixel_contrastive_loss", str(device), name, ours, plain, None, "matmul", share)


def speeds(device: torch.device) -> Iterator[_checks.Speed]:
    """Yields the speed on one pair of maps."""
    yield time_contrast(device)


VERIFIER = _checks.Verifier(_CASES, check, speeds)
