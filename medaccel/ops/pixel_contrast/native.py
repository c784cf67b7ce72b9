# SPDX-License-Identifier: Apache-2.0
"""Calls the pixel contrast's CPU kernels."""

import torch
from torch import Tensor

from medaccel._native import DTYPES, address, cpu_module


def _size(query: Tensor, key: Tensor, axes: int) -> list[int]:
    return [query.shape[0], query.shape[1], key.shape[1], query.shape[2], axes]


def pixel_contrast_forward(
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    temperature: float,
    *,
    cull: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the native loss of query (B, N, C) and key (B, M, C), and the base-2 log-sum-exps over all keys and
    over the positives, (B, N) each. Features have one dtype; coordinates (B, N, S), (B, M, S) and radius (B,) have
    one, too.

    cull: skip blocks of pixels that are too far apart, which changes the time alone (the benchmark says how much).
    """
    cpu = cpu_module()
    q, k, r = query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k = query_coords.contiguous(), key_coords.contiguous()
    loss, lse, positive_lse = (q.new_empty(q.shape[:2]) for _ in range(3))
    cpu.pixel_contrast_forward(
        q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(), loss.data_ptr(), lse.data_ptr(),
        positive_lse.data_ptr(), DTYPES[q.dtype], DTYPES[r.dtype], _size(q, k, at_q.shape[2]), temperature,
        cull, torch.get_num_threads(),
    )  # fmt: skip
    return loss, lse, positive_lse


def pixel_contrast_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    lse: Tensor,
    positive_lse: Tensor,
    temperature: float,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients to query and key, where needed, from the forward kernel's results."""
    cpu = cpu_module()
    g, q, k, r = grad.contiguous(), query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k, all_keys, positives = (t.contiguous() for t in (query_coords, key_coords, lse, positive_lse))
    grad_query = torch.empty_like(q) if need_query else None
    grad_key = torch.empty_like(k) if need_key else None
    cpu.pixel_contrast_backward(
        g.data_ptr(), q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(),
        all_keys.data_ptr(), positives.data_ptr(), address(grad_query), address(grad_key), DTYPES[q.dtype],
        DTYPES[r.dtype], _size(q, k, at_q.shape[2]), temperature, torch.get_num_threads(),
    )  # fmt: skip
    return grad_query, grad_key
