# SPDX-License-Identifier: Apache-2.0
"""Computes multi-head attention within the (shifted) windows of a map: the core of a Swin transformer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medaccel import _native
from medaccel.ops import _dispatch
from medaccel.ops._arguments import check_floating, check_integers, describe, finite, number, stays_tensor, wholes
from medaccel.ops.window_attention import op, reference


def unsupported(qkv: Tensor, head_dim: int = 0) -> str | None:
    """Says in a sentence why no kernel serves `qkv` and (if it is given) the head dimension; returns None if one
    does."""
    device = qkv.device
    if device.type == "cpu":
        return _native.cpu_problem
    if device.type == "cuda":
        return op.triton_problem(device.index, qkv.dtype, head_dim)
    return f"shifted_window_attention has no kernel for device {device.type!r}"


def shifted_window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    *,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    pad_qkv: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Attends within windows of a channels-last map that is neither rolled, padded nor partitioned.

    Between its qkv and its output projection, a Swin block pads the map to whole windows, rolls it by −shift, cuts it
    into windows, computes softmax(scale · q kᵀ + bias + mask) v in each, and undoes the other steps. Here all of it
    is one pass: a token's place is index arithmetic, and no score leaves the kernel, not even in the backward pass
    (which recomputes them from the rows' log-sum-exp).

    Args:
        qkv: (B, *spatial, 3·C) with 1-3 spatial axes: q, k and v side by side, each heads × head_dim, floating
            point. fp32 and fp64 are computed in their own precision, bf16 and fp16 in fp32.
        bias_table: (T, heads), added to the scores: entry ``bias_index[i, j]`` for query i and key j of a window.
        bias_index: (tokens, tokens) of any integer dtype and strides, with values in [0, T); tokens =
            prod(window_size), numbered in row-major order. Checked on the CPU, clamped on a GPU.
        window_size: tokens per axis. These are the effective sizes: if a map is smaller than the window, the caller
            has shrunk the window (and set the shift to 0), as MONAI does.
        shift_size: tokens per axis that the windows are shifted by, 0 ≤ shift < window. Tokens that only the cyclic
            roll brought together get −100 on their score, MONAI's mask.
        pad_qkv: (3·C,), q, k and v of a token that pads the map to whole windows (in a Swin block: the bias of the
            qkv projection). Such tokens are attended to. None: zeros.
        scale: factor on the products q·k. Default: head_dim ** -0.5. A tensor of one element may require grad and
            gets one (a learnt scale), at the cost of a scaled copy of `qkv`.
        dropout_p: probability in [0, 1) of dropping an attention weight; the kept ones grow by 1 / (1 − dropout_p).
        dropout_seed: one int64 element on the device of `qkv`, needed for dropout_p > 0: the same seed drops the
            same weights on every device, forward and backward (see `reference.kept`). It is read on the device, so
            a replayed CUDA graph may draw it anew.

    Returns:
        (B, *spatial, C), contiguous, in the dtype of `qkv`. Same bits whatever the number of threads, gradients
        included. A NaN stays within its window.

    Raises:
        TypeError: a dtype makes no sense.
        ValueError: a shape, value or device makes no sense.

    Scores are computed in fp32 (fp64 for fp64): beyond its range, 1e38, the result is not defined, as in PyTorch. A
    gradient loses the digits that the scores have before the point, all of them at about 1e6.

    Differentiable by `qkv`, `bias_table` and `pad_qkv`. Source: Liu et al., "Swin Transformer", ICCV 2021, as MONAI
    1.6 (``monai.networks.nets.swin_unetr``) computes it; the online softmax and its recomputing backward pass are
    those of Dao et al., "FlashAttention", NeurIPS 2022.

    >>> import torch, medaccel
    >>> index = torch.randint(0, 27, (8, 8))
    >>> medaccel.ops.shifted_window_attention(
    ...     torch.randn(1, 5, 6, 7, 24), torch.randn(27, 2), index, window_size=(2, 2, 2), shift_size=(1, 1, 1)
    ... ).shape
    torch.Size([1, 5, 6, 7, 8])
    """
    window, shift = _check(qkv, bias_table, bias_index, window_size, shift_size, pad_qkv)
    dropout_p = _check_dropout(qkv, dropout_p, dropout_seed)
    head_dim = qkv.shape[-1] // (3 * bias_table.shape[1])
    if stays_tensor(scale):
        qkv, pad_qkv = (None if t is None else _scaled_queries(t, scale) for t in (qkv, pad_qkv))  # type: ignore
        scale = 1.0
    factor = head_dim**-0.5 if scale is None else finite("shifted_window_attention", "scale", scale)
    seed = dropout_seed if dropout_p > 0 else None
    tensors = (qkv, bias_table, bias_index, pad_qkv, seed)
    if _dispatch.kernel_serves(qkv, bias_table, pad_qkv) and unsupported(qkv, head_dim) is None:
        return torch.ops.medaccel.shifted_window_attention(*tensors, window, shift, factor, dropout_p)[0]
    if not _dispatch.exporting():  # an exporter's tensors have no values
        op.check_index(bias_index, bias_table.shape[0])
    cast = qkv.to(_dispatch.autocast_dtype(qkv))  # autocast's rule is the kernel's: qkv alone is cast
    with _dispatch.without_autocast(qkv.device):
        return reference.shifted_window_attention(cast, *tensors[1:], window, shift, factor, dropout_p)


def _check(
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    pad_qkv: Tensor | None,
) -> tuple[list[int], list[int]]:
    """Returns the sizes as lists, or raises an error in a sentence; nothing here waits for a device."""
    name = "shifted_window_attention"
    check_floating(name, qkv=qkv, bias_table=bias_table, **({} if pad_qkv is None else {"pad_qkv": pad_qkv}))
    check_integers(name, "bias_index", bias_index)
    spatial = qkv.dim() - 2
    if not 1 <= spatial <= 3:
        raise ValueError(
            f"{name}: qkv has shape {tuple(qkv.shape)}; expected (B, *spatial, 3·C) with 1-3 spatial axes"
        )
    window = wholes(name, "window_size", window_size, f"{spatial} whole numbers, one per axis")
    shift = wholes(name, "shift_size", shift_size, f"{spatial} whole numbers, one per axis")
    if len(window) != spatial or min(window) < 1:
        raise ValueError(f"{name}: window_size is {tuple(window)}; expected {spatial} sizes >= 1, one per axis")
    if len(shift) != spatial or any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(
            f"{name}: shift_size is {tuple(shift)}; expected {spatial} values >= 0, each smaller than the window, "
            f"{tuple(window)}"
        )
    if bias_table.dim() != 2 or bias_table.shape[1] < 1:
        raise ValueError(f"{name}: bias_table has shape {tuple(bias_table.shape)}; expected (T, heads)")
    heads = bias_table.shape[1]
    if qkv.shape[-1] % (3 * heads) or qkv.shape[-1] == 0:
        raise ValueError(
            f"{name}: qkv has {qkv.shape[-1]} channels and bias_table {heads} heads; expected 3 · heads · head_dim "
            "channels"
        )
    tokens = math.prod(window)
    if tuple(bias_index.shape) != (tokens, tokens):
        raise ValueError(
            f"{name}: bias_index has shape {tuple(bias_index.shape)}; expected ({tokens}, {tokens}) for window_size "
            f"{tuple(window)}"
        )
    if pad_qkv is not None and tuple(pad_qkv.shape) != (qkv.shape[-1],):
        raise ValueError(f"{name}: pad_qkv has shape {tuple(pad_qkv.shape)}; expected ({qkv.shape[-1]},)")
    for argument, tensor in (("bias_table", bias_table), ("bias_index", bias_index), ("pad_qkv", pad_qkv)):
        if tensor is not None and tensor.device != qkv.device:
            raise ValueError(
                f"{name}: {argument} is on {tensor.device} and qkv on {qkv.device}; expected the same device"
            )
    return window, shift


def _scaled_queries(qkv: Tensor, scale: Tensor) -> Tensor:
    """Returns [q | k | v] with q · scale, in the dtype of `qkv`: a learnt scale gets its gradient here."""
    if scale.numel() != 1 or not scale.is_floating_point():
        raise TypeError(
            f"shifted_window_attention: scale is {describe(scale)} of shape {tuple(scale.shape)}; expected a number, "
            "or a floating-point tensor of one element"
        )
    channels = qkv.shape[-1] // 3
    of_queries = torch.arange(3 * channels, device=qkv.device) < channels
    factors = torch.where(of_queries, scale.reshape(1).to(qkv.device), 1.0)  # no cat: autocast on the CPU has no fp16
    return (qkv * factors).to(qkv.dtype)


def _check_dropout(qkv: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> float:
    """Returns the probability as a number, or raises an error in a sentence."""
    name = "shifted_window_attention"
    p = number(name, "dropout_p", dropout_p, "a probability in [0, 1)")
    if not 0 <= p < 1:
        raise ValueError(f"{name}: dropout_p is {dropout_p}; expected a probability in [0, 1)")
    if p == 0:
        return p
    if dropout_seed is None:
        raise ValueError(f"{name}: dropout_seed is None; expected one int64 element where dropout_p > 0")
    if not isinstance(dropout_seed, Tensor):
        raise TypeError(
            f"{name}: dropout_seed is {describe(dropout_seed)}; expected one int64 element on {qkv.device}"
        )
    dense = dropout_seed.layout is torch.strided and not dropout_seed.is_nested
    one = dense and dropout_seed.dtype == torch.int64 and dropout_seed.numel() == 1
    if not one or dropout_seed.device != qkv.device:
        shape = f" of shape {tuple(dropout_seed.shape)}" if dense else ""
        raise ValueError(
            f"{name}: dropout_seed is {describe(dropout_seed)}{shape} on {dropout_seed.device}; expected one int64 "
            f"element on {qkv.device}"
        )
    return p
