# SPDX-License-Identifier: Apache-2.0
"""Calls the pixel consistency's CPU kernels."""

import torch
from torch import Tensor

from medaccel._native import DTYPES, address, cpu_module


def _size(query: Tensor, key: Tensor, axes: int) -> list[int]:
    return [query.shape[0], query.shape[1], key.shape[1], query.shape[2], axes]


def pixel_consistency_forward(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the sums (B, N) of cosines over each query's near keys, and their numbers; dtypes are the pixel
    contrast's."""
    cpu = cpu_module()
    q, k, r = query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k = query_coords.contiguous(), key_coords.contiguous()
    sums, counts = q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
    cpu.pixel_consistency_forward(
        q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(), sums.data_ptr(),
        counts.data_ptr(), DTYPES[q.dtype], DTYPES[r.dtype], _size(q, k, at_q.shape[2]),
        torch.get_num_threads(),
    )  # fmt: skip
    return sums, counts


def pixel_consistency_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients to query and key, where needed, from that of the sums."""
    cpu = cpu_module()
    g, q, k, r = grad.contiguous(), query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k = query_coords.contiguous(), key_coords.contiguous()
    grad_query = torch.empty_like(q) if need_query else None
    grad_key = torch.empty_like(k) if need_key else None
    cpu.pixel_consistency_backward(
        g.data_ptr(), q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(),
        address(grad_query), address(grad_key), DTYPES[q.dtype], DTYPES[r.dtype],
        _size(q, k, at_q.shape[2]), torch.get_num_threads(),
    )  # fmt: skip
    return grad_query, grad_key
