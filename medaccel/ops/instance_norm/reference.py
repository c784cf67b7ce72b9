# SPDX-License-Identifier: Apache-2.0
"""Instance normalisation, residual and leaky ReLU in plain PyTorch.

Not through torch's own instance norm: on the CPU, at batch 1 and with a channels-last gradient, that of torch 2.13
returns wrong gradients without a word (see tests/ops/test_instance_norm.py).
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
    """`medaccel.ops.instance_norm_act` for checked arguments. bf16 and fp16 are computed in fp32."""
    half = input.dtype in (torch.bfloat16, torch.float16)
    x = input.float() if half else input
    if x.numel() == 0:
        return input.clone()
    axes = tuple(range(2, x.dim()))
    # In units of a power of two near the largest number, which rounds nothing: squares neither overflow nor vanish.
    size = x.detach().abs().amax(axes, keepdim=True).clamp(min=math.sqrt(eps))
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
    variance, mean = torch.var_mean(x / unit, axes, correction=0, keepdim=True)
    # An eps that vanishes beside the numbers still makes 0 of an instance without deviation.
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
