# SPDX-License-Identifier: Apache-2.0
"""Computes the diffusion step in plain PyTorch: differentiable, readable, slow. The kernels are held to it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medaccel.ops._philox import philox_4x32_10

_MASK = 0xFFFFFFFF


def normals(shape: Sequence[int], key: Tensor, of_guide: bool = False) -> Tensor:
    """Returns standard normals (B, …) in float64 on the key's device; key: int64 seed, offset, sample_offset.

    Element i (row-major) of sample n takes lane i mod 4 of Philox' words with key `seed` and counter
    (⌊i / 4⌋, sample_offset + n, offset's low half, its high half); the guide's noise has the offset's top bit set. A
    word w is the uniform number (w + ½) · 2⁻³², and Box–Muller makes normals of the pairs (0, 1) and (2, 3).
    """
    seed, offset, first = key.reshape(3)
    size = math.prod(shape[1:])
    group = torch.arange((size + 3) // 4, device=key.device)
    sample = (torch.arange(shape[0], device=key.device) + first)[:, None]
    high = (offset >> 32) & _MASK
    if of_guide:
        high = high | 0x80000000
    words = philox_4x32_10(seed, (group, sample, offset & _MASK, high))
    uniform = [(w.double() + 0.5) * 2.0**-32 for w in words]  # exact; (B, groups) each
    pairs = []
    for u0, u1 in (uniform[:2], uniform[2:]):
        radius = (-2 * torch.where(u0 > 0.5, torch.log1p(u0 - 1), torch.log(u0))).sqrt()
        pairs += [radius * torch.cos(2 * torch.pi * u1), radius * torch.sin(2 * torch.pi * u1)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :size].reshape(tuple(shape))


def diffusion_step(
    sample: Tensor,
    model_output: Tensor | None,
    previous: Tensor | None,
    noise: Tensor | None,
    guide: Tensor | None,
    mask: Tensor | None,
    coefficients: Tensor,
    key: Tensor,
    low: float | None,
    high: float | None,
) -> tuple[Tensor, Tensor]:
    """Computes `medaccel.ops.diffusion_step` for checked arguments; coefficients: (9, B) or (9, 1), a … guide_std."""
    compute = torch.float64 if sample.dtype == torch.float64 else torch.float32
    shape = (-1, *[1] * (sample.dim() - 1))
    a, b, c, d, e, f, s, guide_scale, guide_std = (
        row.to(sample.device, compute).reshape(shape) for row in coefficients.unbind()
    )
    x = sample.to(compute)
    x0, x_next = a * x, d * x
    if model_output is not None:
        m = model_output.to(compute)
        x0, x_next = x0 + b * m, x_next + e * m
    if low is not None and high is not None:
        x0 = x0.clamp(low, high)
    x_next = x_next + c * x0
    if previous is not None:
        x_next = x_next + f * previous.to(compute)
    z = normals(sample.shape, key.to(sample.device)) if noise is None else noise
    # If s is 0, the noise is ignored: otherwise a NaN in it would count.
    x_next = torch.where(s == 0, x_next, x_next + s * z.to(compute))
    if mask is not None and guide is not None:
        held = guide_scale * guide.to(compute)
        again = normals(sample.shape, key.to(sample.device), of_guide=True)
        held = held + guide_std * again.to(compute)
        x_next = torch.where(mask.bool(), x_next, held)
    return x_next.to(sample.dtype).contiguous(), x0.to(sample.dtype).contiguous()
