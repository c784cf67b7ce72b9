# SPDX-License-Identifier: Apache-2.0
"""Calls pixel propagation's CPU kernels."""

import torch
from torch import Tensor

from medaccel._native import DTYPES, address, cpu_module


def pixel_propagation_forward(features: Tensor, values: Tensor, power: float) -> Tensor:
    """Sums the values (B, N, D) over all pixels with weights max(cos, 0)^power of features (B, N, C)."""
    cpu = cpu_module()
    x, v = features.contiguous(), values.contiguous()
    out = torch.empty_like(v)
    cpu.pixel_propagation_forward(
        x.data_ptr(), v.data_ptr(), out.data_ptr(), DTYPES[x.dtype], [*x.shape, v.shape[2]], power,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def pixel_propagation_backward(
    grad: Tensor, features: Tensor, values: Tensor, power: float, need_features: bool, need_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients to features and values, where needed."""
    cpu = cpu_module()
    g, x, v = grad.contiguous(), features.contiguous(), values.contiguous()
    grad_features = torch.empty_like(x) if need_features else None
    grad_values = torch.empty_like(v) if need_values else None
    cpu.pixel_propagation_backward(
        g.data_ptr(), x.data_ptr(), v.data_ptr(), address(grad_features), address(grad_values), DTYPES[x.dtype],
        [*x.shape, v.shape[2]], power, torch.get_num_threads(),
    )  # fmt: skip
    return grad_features, grad_values
