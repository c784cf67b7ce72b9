# SPDX-License-Identifier: Apache-2.0
"""Calls the CPU kernels of NT-Xent and InfoNCE: log-sum-exps of cosine similarities."""

import torch
from torch import Tensor

from medaccel._native import DTYPES, address, cpu_module


def _size(query: Tensor, key: Tensor) -> list[int]:
    return [query.shape[0], query.shape[1], key.shape[1], query.shape[2]]


def similarity_lse_forward(query: Tensor, key: Tensor, temperature: float, self_offset: int) -> Tensor:
    """Returns the base-2 log-sum-exp (B, N) over the keys (B, M, C) of the cosines with query (B, N, C) over
    temperature."""
    cpu = cpu_module()
    q, k = query.contiguous(), key.contiguous()
    lse = q.new_empty(q.shape[:2])
    cpu.similarity_lse_forward(
        q.data_ptr(), k.data_ptr(), lse.data_ptr(), DTYPES[q.dtype], _size(q, k), self_offset,
        temperature, torch.get_num_threads(),
    )  # fmt: skip
    return lse


def similarity_lse_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    temperature: float,
    self_offset: int,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of the natural log-sum-exp to query and key, where needed."""
    cpu = cpu_module()
    g, q, k, rows = grad.contiguous(), query.contiguous(), key.contiguous(), lse.contiguous()
    grad_query = torch.empty_like(q) if need_query else None
    grad_key = torch.empty_like(k) if need_key else None
    cpu.similarity_lse_backward(
        g.data_ptr(), q.data_ptr(), k.data_ptr(), rows.data_ptr(), address(grad_query), address(grad_key),
        DTYPES[q.dtype], _size(q, k), self_offset, temperature, torch.get_num_threads(),
    )  # fmt: skip
    return grad_query, grad_key
