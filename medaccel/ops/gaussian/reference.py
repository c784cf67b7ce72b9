# SPDX-License-Identifier: Apache-2.0
"""Computes the Gaussian filter in plain PyTorch: differentiable, readable, slow. The kernels are held to it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def radius(sigma: float, truncated: float) -> int:
    """Returns the taps' reach in voxels to each side (MONAI's rule); σ = 0 is the identity and needs none."""
    return int(max(truncated * sigma, 0.5) + 0.5) if sigma > 0 else 0


def taps(sigma: Tensor, truncated: float, approx: str, normalize: bool, largest: float | None = None) -> Tensor:
    """Returns the taps of one axis, (2 · radius + 1,) in float64, differentiable by `sigma` (a scalar tensor,
    voxels).

    largest: the value of `sigma`, if it is known; under vmap, which hides it, the largest of all samples' σ. All
    samples then have taps up to the largest reach, with zeros beyond their own.
    """
    s = sigma.double()
    value = float(sigma.detach()) if largest is None else largest
    r = radius(value, truncated)
    if r == 0:
        return torch.ones(1, dtype=torch.float64, device=sigma.device)
    k = torch.arange(-r, r + 1, dtype=torch.float64, device=sigma.device)
    smooths = s > 0  # False only for a σ of 0 among others
    s = torch.where(s < 1e-100, 1e-100, s)  # the middle tap has all, whatever σ is; derivatives would be 0 · ∞
    if approx == "erf":
        t = 0.5 * (torch.erf((k + 0.5) / (s * math.sqrt(2))) - torch.erf((k - 0.5) / (s * math.sqrt(2))))
    elif approx == "sampled":
        t = torch.exp(-0.5 * (k / s) ** 2) / (s * math.sqrt(2 * math.pi))
    else:
        # e^{−σ²} I_k(σ²) is the k-th Fourier coefficient of exp(σ² (cos θ − 1)). The mean over n equidistant θ gives
        # it up to the coefficients n ± k, which n puts far beyond the Gaussian's tail.
        n = 2 * (r + int(10 * value) + 40)
        theta = 2 * math.pi / n * torch.arange(n, dtype=torch.float64, device=sigma.device)
        t = (torch.exp(s * s * (torch.cos(theta) - 1)) * torch.cos(k[:, None] * theta)).mean(dim=1)
    t = torch.where(k.abs() <= torch.floor((truncated * s).clamp(min=0.5) + 0.5), t, 0.0)
    t = torch.where(smooths, t, (k == 0).double())
    return t / t.sum() if normalize else t


def extended_index(size: int, r: int, mode: str, device: torch.device | None = None) -> Tensor:
    """Returns, for positions −r … size − 1 + r, the index that each reads under a border mode (not "constant")."""
    p = torch.arange(-r, size + r, device=device)
    if mode == "nearest" or size == 1:
        return p.clamp(0, size - 1)
    if mode == "wrap":
        return p % size
    if mode == "reflect":  # d c b a | a b c d | d c b a
        q = p % (2 * size)
        return torch.minimum(q, 2 * size - 1 - q)
    q = p % (2 * size - 2)  # mirror: d c b | a b c d | c b a
    return torch.minimum(q, 2 * size - 2 - q)


def gaussian_filter(
    input: Tensor,
    sigma: Tensor,
    truncated: float,
    approx: str,
    mode: str,
    normalize: bool,
    largest: Sequence[float] | None = None,
) -> Tensor:
    """Computes `medaccel.ops.gaussian_filter` for checked arguments.

    input (B, C, *spatial), sigma (spatial,); largest: that of `taps`, one per axis. bf16 and fp16 are computed in
    fp32.
    """
    half = input.dtype in (torch.bfloat16, torch.float16)
    x = input.float() if half else input
    for axis in range(2, x.dim()):
        value = None if largest is None else largest[axis - 2]
        t = taps(sigma[axis - 2], truncated, approx, normalize, value).to(x)
        size, r = x.shape[axis], len(t) // 2
        if r == 0 or x.numel() == 0:
            continue
        if mode == "constant":
            before_after = [0, 0] * (x.dim() - 1 - axis) + [r, r]
            extended = torch.nn.functional.pad(x, before_after)
        else:
            extended = x.index_select(axis, extended_index(size, r, mode, x.device))
        filtered = torch.zeros_like(x)
        for k in range(2 * r + 1):
            filtered = filtered + t[k] * extended.narrow(axis, k, size)
        x = filtered
    if x is input:
        return input.clone()
    return x.to(input.dtype)
