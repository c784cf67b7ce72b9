# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels of the ops on pixels: contrast, consistency, propagation, and the batch's log-sum-exp."""

import torch
from torch import Tensor

from medaccel._native import DTYPES, address, cpu_module


def _contrast_size(query: Tensor, key: Tensor, axes: int) -> list[int]:
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
    """The native loss of query (B, N, C) and key (B, M, C), and the base-2 log-sum-exps over all keys and over the
    positives, (B, N) each. Features of one dtype, coordinates (B, N, S), (B, M, S) and radius (B,) of one dtype.

    cull: skip blocks of pixels that are too far apart, which changes the time alone (the benchmark says how much).
    """
    cpu = cpu_module()
    q, k, r = query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k = query_coords.contiguous(), key_coords.contiguous()
    loss, lse, positive_lse = (q.new_empty(q.shape[:2]) for _ in range(3))
    cpu.pixel_contrast_forward(
        q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(), loss.data_ptr(), lse.data_ptr(),
        positive_lse.data_ptr(), DTYPES[q.dtype], DTYPES[r.dtype], _contrast_size(q, k, at_q.shape[2]), temperature,
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
    """The gradients to query and key, where needed, from what the forward kernel returned."""
    cpu = cpu_module()
    g, q, k, r = grad.contiguous(), query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k, all_keys, positives = (t.contiguous() for t in (query_coords, key_coords, lse, positive_lse))
    grad_query = torch.empty_like(q) if need_query else None
    grad_key = torch.empty_like(k) if need_key else None
    cpu.pixel_contrast_backward(
        g.data_ptr(), q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(),
        all_keys.data_ptr(), positives.data_ptr(), address(grad_query), address(grad_key), DTYPES[q.dtype],
        DTYPES[r.dtype], _contrast_size(q, k, at_q.shape[2]), temperature, torch.get_num_threads(),
    )  # fmt: skip
    return grad_query, grad_key


def similarity_lse_forward(query: Tensor, key: Tensor, temperature: float, self_offset: int) -> Tensor:
    """The base-2 log-sum-exp (B, N) over the keys (B, M, C) of the cosines with query (B, N, C) over temperature."""
    cpu = cpu_module()
    q, k = query.contiguous(), key.contiguous()
    lse = q.new_empty(q.shape[:2])
    cpu.similarity_lse_forward(
        q.data_ptr(), k.data_ptr(), lse.data_ptr(), DTYPES[q.dtype], _contrast_size(q, k, 0), self_offset,
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
    """The gradients of the natural log-sum-exp to query and key, where needed."""
    cpu = cpu_module()
    g, q, k, rows = grad.contiguous(), query.contiguous(), key.contiguous(), lse.contiguous()
    grad_query = torch.empty_like(q) if need_query else None
    grad_key = torch.empty_like(k) if need_key else None
    cpu.similarity_lse_backward(
        g.data_ptr(), q.data_ptr(), k.data_ptr(), rows.data_ptr(), address(grad_query), address(grad_key),
        DTYPES[q.dtype], _contrast_size(q, k, 0), self_offset, temperature, torch.get_num_threads(),
    )  # fmt: skip
    return grad_query, grad_key


def pixel_consistency_forward(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """The sums (B, N) of cosines over each query's near keys, and their numbers; dtypes as for the pixel contrast."""
    cpu = cpu_module()
    q, k, r = query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k = query_coords.contiguous(), key_coords.contiguous()
    sums, counts = q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
    cpu.pixel_consistency_forward(
        q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(), sums.data_ptr(),
        counts.data_ptr(), DTYPES[q.dtype], DTYPES[r.dtype], _contrast_size(q, k, at_q.shape[2]),
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
    """The gradients to query and key, where needed, from that of the sums."""
    cpu = cpu_module()
    g, q, k, r = grad.contiguous(), query.contiguous(), key.contiguous(), radius.contiguous()
    at_q, at_k = query_coords.contiguous(), key_coords.contiguous()
    grad_query = torch.empty_like(q) if need_query else None
    grad_key = torch.empty_like(k) if need_key else None
    cpu.pixel_consistency_backward(
        g.data_ptr(), q.data_ptr(), k.data_ptr(), at_q.data_ptr(), at_k.data_ptr(), r.data_ptr(),
        address(grad_query), address(grad_key), DTYPES[q.dtype], DTYPES[r.dtype],
        _contrast_size(q, k, at_q.shape[2]), torch.get_num_threads(),
    )  # fmt: skip
    return grad_query, grad_key


def pixel_propagation_forward(features: Tensor, values: Tensor, power: float) -> Tensor:
    """The values (B, N, D) summed up over all pixels with weights max(cos, 0)^power of features (B, N, C)."""
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
    """The gradients to features and values, where needed."""
    cpu = cpu_module()
    g, x, v = grad.contiguous(), features.contiguous(), values.contiguous()
    grad_features = torch.empty_like(x) if need_features else None
    grad_values = torch.empty_like(v) if need_values else None
    cpu.pixel_propagation_backward(
        g.data_ptr(), x.data_ptr(), v.data_ptr(), address(grad_features), address(grad_values), DTYPES[x.dtype],
        [*x.shape, v.shape[2]], power, torch.get_num_threads(),
    )  # fmt: skip
    return grad_features, grad_values
