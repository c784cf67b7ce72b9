# SPDX-License-Identifier: Apache-2.0
"""Instance normalisation, residual and leaky ReLU in plain PyTorch.

Not through torch's own instance norm: on the CPU, at batch 1 and with a channels-last gradient, that of torch 2.13
returns wrong gradients without a word (see tests/ops/test_instance_norm.py).
"""

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
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight.to(x.dtype).reshape(1, -1, *(1 for _ in axes))
    y = (x - mean) * scale
    if bias is not None:
        y = y + bias.to(x.dtype).reshape(1, -1, *(1 for _ in axes))
    if residual is not None:
        y = y + residual.to(x.dtype)
    if negative_slope is not None:
        y = F.leaky_relu(y, negative_slope)
    return y.to(input.dtype)
