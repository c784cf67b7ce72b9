# SPDX-License-Identifier: Apache-2.0
"""Registers the log-sum-exp of cosine similarities: schema, shapes without data, gradients, CPU kernel.

It has no autocast rule, as in pixel_contrast/op.py: losses are computed in fp32.
"""

import math
from typing import Any

import torch
from torch import Tensor

from medaccel.ops._operands import Operands
from medaccel.ops._registration import register_gradients
from medaccel.ops.nt_xent import native
from medaccel.ops.pixel_contrast.op import compute_dtype

_SETTINGS = "float temperature, int self_offset"
_lib = torch.library.Library("medaccel", "FRAGMENT")
# The second output is the first in base 2, which the backward kernel takes: converting back would round it again.
_lib.define(f"similarity_lse(Tensor query, Tensor key, {_SETTINGS}) -> (Tensor, Tensor)")
_lib.define(
    f"similarity_lse_backward(Tensor grad, Tensor query, Tensor key, Tensor lse, {_SETTINGS}, bool need_query, "
    "bool need_key) -> (Tensor, Tensor)"
)


def _check(name: str, query: Tensor, key: Tensor, temperature: float, self_offset: int) -> Operands:
    """Checks everything that the kernels' memory accesses rely on."""
    operands = Operands(name, "query", query)
    operands.rank("query", query, (3,), "(B, N, C)")
    operands.rank("key", key, (3,), "(B, M, C)")
    operands.tensor("key", key, (query.shape[0], key.shape[1], query.shape[2]))
    operands.number("temperature", temperature, torch.finfo(torch.float32).tiny)
    operands.number("self_offset", self_offset, -1, key.shape[1])
    return operands


def _forward_cpu(query: Tensor, key: Tensor, temperature: float, self_offset: int) -> tuple[Tensor, Tensor]:
    _check("similarity_lse", query, key, temperature, self_offset)
    dtype = compute_dtype(query, key)
    base2 = native.similarity_lse_forward(query.to(dtype), key.to(dtype), temperature, self_offset)
    return base2 * math.log(2.0), base2


def _backward_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    temperature: float,
    self_offset: int,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    operands = _check("similarity_lse_backward", query, key, temperature, self_offset)
    dtype = compute_dtype(query, key)
    operands.tensor("grad", grad, query.shape[:2])
    operands.tensor("lse", lse, query.shape[:2], (dtype,))
    grad_query, grad_key = native.similarity_lse_backward(
        grad.to(dtype), query.to(dtype), key.to(dtype), lse, temperature, self_offset, need_query, need_key
    )
    return (
        query.new_empty(0) if grad_query is None else grad_query.to(query.dtype),
        key.new_empty(0) if grad_key is None else grad_key.to(key.dtype),
    )


_lib.impl("similarity_lse", _forward_cpu, "CPU")
_lib.impl("similarity_lse_backward", _backward_cpu, "CPU")


@torch.library.register_fake("medaccel::similarity_lse", lib=_lib)
def _(query: Tensor, key: Tensor, temperature: float, self_offset: int) -> tuple[Tensor, Tensor]:
    dtype, shape = compute_dtype(query, key), query.shape[:2]
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=dtype)


@torch.library.register_fake("medaccel::similarity_lse_backward", lib=_lib)
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    temperature: float,
    self_offset: int,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty(query.shape if need_query else (0,)),
        key.new_empty(key.shape if need_key else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, ctx.temperature, ctx.self_offset = inputs
    ctx.save_for_backward(query, key, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    need_query, need_key, *_others = ctx.needs_input_grad
    if grad is None or not (need_query or need_key):
        return (None,) * 4
    grads = torch.ops.medaccel.similarity_lse_backward(
        grad, *ctx.saved_tensors, ctx.temperature, ctx.self_offset, need_query, need_key
    )
    grad_query, grad_key = (g if need else None for g, need in zip(grads, (need_query, need_key), strict=True))
    return grad_query, grad_key, None, None


register_gradients(
    _lib, "similarity_lse", of="nt_xent_loss or info_nce_loss", setup_context=_setup_context, backward=_backward
)
