# SPDX-License-Identifier: Apache-2.0
"""Computes instance normalisation, residual and leaky ReLU in plain PyTorch.

It avoids torch's own instance norm: on the CPU, at batch 1 and with a channels-last gradient, that of torch 2.13
silently returns wrong gradients (see tests/ops/test_instance_norm.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def instance_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    negative_slope: float | None,
) -> Tensor:
    """Computes `medaccel.ops.instance_norm_act` for checked arguments. bf16 and fp16 are computed in fp32."""
    half = input.dtype in (torch.bfloat16, torch.float16)
    x = input.float() if half else input
    axes = tuple(range(2, x.dim()))
    if x.numel() == 0:
        y = x.clone()  # nothing to normalise; the others still get gradients, of zeros
    else:
        # The unit is a power of two near the largest number, which rounds nothing: squares neither overflow nor
        # vanish.
        size = x.detach().abs().amax(axes, keepdim=True).clamp(min=math.sqrt(eps))
        unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
        variance, mean = torch.var_mean(x / unit, axes, correction=0, keepdim=True)
        # Even an eps that vanishes beside the numbers makes an instance without deviation 0.
        squared = (variance + eps / unit / unit).clamp(min=torch.finfo(x.dtype).tiny)
        y = (x / unit - mean) * torch.rsqrt(squared)
    if weight is not None:
        y = y * weight.to(x.dtype).reshape(1, -1, *(1 for _ in axes))
    if bias is not None:
        y = y + bias.to(x.dtype).reshape(1, -1, *(1 for _ in axes))
    if residual is not None:
        y = y + residual.to(x.dtype)
    if negative_slope is not None:
        y = F.leaky_relu(y, negative_slope)
    return y.to(input.dtype)
