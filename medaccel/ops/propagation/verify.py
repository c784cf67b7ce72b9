# SPDX-License-Identifier: Apache-2.0
"""Checks and times pixel propagation for `medaccel verify`."""

import functools
from collections.abc import Iterator

import torch

from medaccel.ops import _checks
from medaccel.ops._dispatch import use_reference
from medaccel.ops.propagation import pixel_propagation, unsupported
from medaccel.ops.propagation.cases import CASES, Case, named


def work(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Work:
    """Returns one propagation: the values and the gradients to features and values."""
    case = named(name)
    x, v, g = (t.to(device) for t in case.tensors(dtype))
    terms = 0.0
    if v.numel() > 0:
        # A feature's gradient is a sum of products g · v over the channels, over the vector's length; they cancel.
        terms = float(g.abs().max() * v.abs().max() * case.shape[3] / x.norm(dim=-1).min())
    forward = functools.partial(pixel_propagation, power=case.power)
    return _checks.Work("pixel_propagation", name, unsupported(x), forward, [x, v], (1.0, terms, 1.0), grads=[g])


def time_propagation(device: torch.device) -> _checks.Speed:
    """Times a map of 12³ pixels on the CPU, of 16³ on a GPU; forward + backward."""
    pixels = 12**3 if device.type == "cpu" else 16**3
    case = Case("", (1, pixels, 64, 64))
    x, v, g = (t.to(device) for t in case.tensors())
    forward = functools.partial(pixel_propagation, power=case.power)
    call = _checks.Work("pixel_propagation", "", None, forward, [x, v], (), grads=[g]).run
    ours = _checks.median_ms(call, device)
    with use_reference():
        plain = _checks.median_ms(call, device)
    # There are two products forward; backward the scores again, their slopes in both directions, and two sums.
    operations = 7 * 2 * pixels**2 * 64
    share = operations / ours / _checks.product_rate(device, torch.float32)
    name = f"{pixels} pixels, fp32"
    return _checks.Speed("pixel_propagation", str(device), name, ours, plain, None, "matmul", share)


def speeds(device: torch.device) -> Iterator[_checks.Speed]:
    """Yields the speed on one map."""
    yield time_propagation(device)


VERIFIER = _checks.Verifier([case.name for case in CASES], work, speeds, "production")
