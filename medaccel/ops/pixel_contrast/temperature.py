# SPDX-License-Identifier: Apache-2.0
"""Lets a temperature be learnt, for kernels whose temperature is a number."""

import torch
import torch.nn.functional as F
from torch import Tensor

from medaccel.ops.pixel_contrast.op import compute_dtype
from medaccel.ops.pixel_contrast.reference import unit

# The kernels get this temperature: far below any learnt one, and a power of two, which rounds nothing.
_CARRIED_TEMPERATURE = 2.0**-60


def carry_temperature(query: Tensor, key: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, float]:
    """Returns features and a number as temperature that give a kernel the same scores, with a gradient to
    `temperature`.

    A kernel normalises features and takes a number τ₀ as temperature. With one channel more, q′ = [r·q/|q|, √(1−r²)]
    and k′ = [k, 0] have cos(q′, k′) = r · cos(q, k); with r = τ₀/τ, that over τ₀ is cos(q, k)/τ. So the gradient to
    τ comes out of the kernel's gradient to q′, nothing of size N × M is made, and the host need not know τ.

    Args:
        query, key: (..., N, C) and (..., M, C).
        temperature: a scalar tensor.

    Returns:
        q′ (..., N, C + 1), k′ (..., M, C + 1), and τ₀.
    """
    dtype = compute_dtype(query, key)
    ratio = _CARRIED_TEMPERATURE / temperature.to(query.device, dtype)
    rest = (1 - ratio.square()).sqrt().expand(*query.shape[:-1], 1)
    return torch.cat([unit(query.to(dtype)) * ratio, rest], dim=-1), F.pad(key, (0, 1)), _CARRIED_TEMPERATURE
