# SPDX-License-Identifier: Apache-2.0
"""Checks and times pixel propagation for `medaccel verify`."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops._dispatch import use_reference
from medaccel.ops.propagation import pixel_propagation, unsupported
from medaccel.ops.propagation.cases import CASES, Case, named


def _gradients(case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    features, values = (t.detach().requires_grad_() for t in tensors[:2])
    y = pixel_propagation(features, values, power=case.power)
    return [y.detach(), *torch.autograd.grad(y, (features, values), tensors[2].to(y))]


def check(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Check:
    """Checks the propagated values and the gradients to features and values."""
    case = named(name)
    x, v, g = tensors = [t.to(device) for t in case.tensors(dtype)]
    terms = 0.0
    if v.numel() > 0:
        # A feature's gradient is a sum of products g · v over the channels, over the vector's length; they cancel.
        terms = float(g.abs().max() * v.abs().max() * case.shape[3] / x.norm(dim=-1).min())

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        return _gradients(case, tensors)

    return _checks.compare("pixel_propagation", name, unsupported(x), run, tensors, (1.0, terms, 1.0))


def time_propagation(device: torch.device) -> _checks.Speed:
    """Times a map of 12³ pixels on the CPU, of 16³ on a GPU; forward + backward."""
    pixels = 12**3 if device.type == "cpu" else 16**3
    case = Case("", (1, pixels, 64, 64))
    tensors = [t.to(device) for t in case.tensors()]
    ours = _checks.median_ms(lambda: _gradients(case, tensors), device)
    with use_reference():
        plain = _checks.median_ms(lambda: _gradients(case, tensors), device)
    # There are two products forward; backward the scores again, their slopes in both directions, and two sums.
    operations = 7 * 2 * pixels**2 * 64
    share = operations / ours / _checks.product_rate(device, torch.float32)
    name = f"{pixels} pixels, fp32"
    return _checks.Speed("pixel_propagation", str(device), name, ours, plain, None, "matmul", share)


def speeds(device: torch.device) -> Iterator[_checks.Speed]:
    """Yields the speed on one map."""
    yield time_propagation(device)


VERIFIER = _checks.Verifier([case.name for case in CASES], check, speeds)
