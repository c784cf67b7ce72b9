# SPDX-License-Identifier: Apache-2.0
"""Registers the sums over near pairs: schema, shapes without data, gradients, kernels per device.

It has no autocast rule, as in pixel_contrast/op.py: losses are computed in fp32.
"""

from typing import Any

import torch
from torch import Tensor

from medaccel.ops._registration import register_gradients
from medaccel.ops.pixel_consistency import native
from medaccel.ops.pixel_contrast.op import check_pixels, compute_dtype

_INPUTS = "Tensor query, Tensor key, Tensor query_coords, Tensor key_coords, Tensor radius"
_lib = torch.library.Library("medaccel", "FRAGMENT")
_lib.define(f"pixel_pair_similarity({_INPUTS}) -> (Tensor, Tensor)")
_lib.define(
    f"pixel_pair_similarity_backward(Tensor grad, {_INPUTS}, bool need_query, bool need_key) -> (Tensor, Tensor)"
)


def _forward_cpu(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    check_pixels("pixel_pair_similarity", query, key, query_coords, key_coords, radius)
    dtype = compute_dtype(query, key)
    return native.pixel_consistency_forward(query.to(dtype), key.to(dtype), query_coords, key_coords, radius)


def _backward_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    operands = check_pixels("pixel_pair_similarity_backward", query, key, query_coords, key_coords, radius)
    operands.tensor("grad", grad, query.shape[:2])
    dtype = compute_dtype(query, key)
    features = (query.to(dtype), key.to(dtype))
    grad_query, grad_key = native.pixel_consistency_backward(
        grad.to(dtype), *features, query_coords, key_coords, radius, need_query, need_key
    )
    return (
        query.new_empty(0) if grad_query is None else grad_query.to(query.dtype),
        key.new_empty(0) if grad_key is None else grad_key.to(key.dtype),
    )


def _forward_cuda(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    from medaccel.ops.pixel_consistency import triton  # only here: importing Triton takes a second

    check_pixels("pixel_pair_similarity", query, key, query_coords, key_coords, radius)
    return triton.forward(query, key, query_coords, key_coords, radius)


def _backward_cuda(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    from medaccel.ops.pixel_consistency import triton

    operands = check_pixels("pixel_pair_similarity_backward", query, key, query_coords, key_coords, radius)
    operands.tensor("grad", grad, query.shape[:2])
    return triton.backward(grad, query, key, query_coords, key_coords, radius, need_query, need_key)


_lib.impl("pixel_pair_similarity", _forward_cpu, "CPU")
_lib.impl("pixel_pair_similarity_backward", _backward_cpu, "CPU")
_lib.impl("pixel_pair_similarity", _forward_cuda, "CUDA")
_lib.impl("pixel_pair_similarity_backward", _backward_cuda, "CUDA")


@torch.library.register_fake("medaccel::pixel_pair_similarity", lib=_lib)
def _(query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    dtype, shape = compute_dtype(query, key), query.shape[:2]
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=dtype)


@torch.library.register_fake("medaccel::pixel_pair_similarity_backward", lib=_lib)
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty(query.shape if need_query else (0,)),
        key.new_empty(key.shape if need_key else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    need_query, need_key, *_others = ctx.needs_input_grad
    if grad is None or not (need_query or need_key):
        return (None,) * 5
    grads = torch.ops.medaccel.pixel_pair_similarity_backward(grad, *ctx.saved_tensors, need_query, need_key)
    grad_query, grad_key = (g if need else None for g, need in zip(grads, (need_query, need_key), strict=True))
    return grad_query, grad_key, None, None, None


register_gradients(
    _lib, "pixel_pair_similarity", of="pixel_consistency_loss", setup_context=_setup_context, backward=_backward
)
