# SPDX-License-Identifier: Apache-2.0
"""Checks and times the pixel contrast for `medaccel verify`."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops._dispatch import use_reference
from medaccel.ops.pixel_contrast import pixel_contrastive_loss, unsupported
from medaccel.ops.pixel_contrast.cases import Views, named

_CASES = (
    *("volume", "image", "finer_view", "coarser_view", "half_overlap", "no_overlap", "odd_channels", "many_channels"),
    *("sharp", "several_chunks", "empty_batch", "volume, radius a number", "volume, learnt temperature"),
)


_NUMBER, _LEARNT = ", radius a number", ", learnt temperature"


def _forward(case: Views) -> Callable[..., Tensor]:
    def forward(
        *tensors: Tensor, radius: Tensor | float = case.radius, temperature: Tensor | float = case.temperature
    ) -> Tensor:
        query, key, at_query, at_key, *scalars = tensors
        radius = scalars[0] if scalars else radius
        temperature = scalars[1] if len(scalars) > 1 else temperature
        return pixel_contrastive_loss(query, key, at_query, at_key, radius=radius, temperature=temperature)

    return forward


def work(device: torch.device, dtype: torch.dtype, name: str) -> _checks.Work:
    """Returns one loss: its value and the gradients to both views' features, and to a learnt temperature. The radius
    lies on the device, or is a number."""
    case = named(name.removesuffix(_NUMBER).removesuffix(_LEARNT))
    query, key, *others = (t.to(device) for t in case.tensors(dtype))
    # A gradient is a difference of two mean vectors of that size.
    terms = 1 / (case.temperature * max(1, query.shape[1]))
    sizes: tuple[float, ...] = (1 / case.temperature, terms, terms)
    if name.endswith(_NUMBER):
        others = others[:2]
    if name.endswith(_LEARNT):
        others.append(torch.tensor(case.temperature, device=device, requires_grad=True))
        sizes = (*sizes, 1 / case.temperature**2)
    parts = ("pixel_contrastive_loss", name, unsupported(query, key), _forward(case), [query, key], sizes)
    return _checks.Work(*parts, others=others)


def time_contrast(device: torch.device) -> _checks.Speed:
    """Times two maps of 12³ pixels on the CPU, of 24³ on a GPU; forward + backward."""
    size, dtype = (12, torch.float32) if device.type == "cpu" else (24, torch.bfloat16)
    case = Views("", (size,) * 3, 64, batch=1, radius=1.0)
    query, key, *place = (t.to(device) for t in case.tensors(dtype))
    call = _checks.Work("pixel_contrastive_loss", "", None, _forward(case), [query, key], (), others=place).run
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


VERIFIER = _checks.Verifier(_CASES, work, speeds, "production")
