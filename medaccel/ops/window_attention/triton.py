# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Shifted-window attention for GPUs: forward, and a backward pass that recomputes the scores.

No score is stored. Forward, a program holds BLOCK_M queries of one head of one window and streams the window's keys
with an online softmax. Backward there are three such streams, so that every sum has one owner and a fixed order (no
atomics): one program per queries (dq, and delta = Σ do · o), one per keys (dk, dv), and one per tile of scores and
group of windows (the bias). Scores are kept in base 2: score · log2(e), exp2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from medaccel.ops.window_attention.reference import dropout_threshold

_LOG2E = tl.constexpr(math.log2(math.e))
_MASKED = tl.constexpr(-100.0 * math.log2(math.e))  # MONAI's −100 between the two sides of a cyclic shift


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a pass' tile of scores, and how its programs run."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Static, no autotuning: results and CUDA graphs must not depend on timings. Keys: architecture, precision ("fp32"
# products run on the ordinary cores and hold their operands in registers), padded head dimension, pass. Chosen by the
# compiler's counts of registers, spills and shared memory; not timed.
_HALF = {
    16: {"forward": Tile(64, 32, 4, 2), "query": Tile(64, 32, 4, 2), "key": Tile(32, 64, 8, 2)},
    32: {"forward": Tile(64, 32, 4, 2), "query": Tile(64, 32, 4, 2), "key": Tile(32, 64, 8, 2)},
    64: {"forward": Tile(64, 32, 8, 2), "query": Tile(64, 32, 8, 2), "key": Tile(32, 32, 4, 2)},
}
_FP32 = {
    16: dict.fromkeys(("forward", "query", "key", "bias"), Tile(32, 32, 4, 1)),
    32: {"forward": Tile(32, 32, 4, 1), "query": Tile(32, 32, 4, 1), "key": Tile(32, 16, 4, 1)},
    64: {"forward": Tile(32, 16, 8, 1), "query": Tile(32, 32, 8, 1), "key": Tile(32, 32, 8, 1)},
}
for _dims, _bias in ((_HALF, Tile(32, 64, 8, 2)), (_FP32, Tile(32, 32, 4, 1))):
    for _passes in _dims.values():
        _passes["bias"] = _bias
# On sm_100 the accumulators of the forward products lie in tensor memory.
_HALF_100 = {
    16: {**_HALF[16], "forward": Tile(64, 64, 8, 2)},
    32: _HALF[32],
    64: {**_HALF[64], "forward": Tile(64, 32, 4, 2)},
}
TILES = {
    80: {"half": _HALF, "fp32": _FP32},
    90: {"half": _HALF, "fp32": _FP32},
    100: {"half": _HALF_100, "fp32": _FP32},
}
# Enough programs in the bias' pass to fill a large GPU; a constant, so that sums have the same order on every one.
_BIAS_PROGRAMS = 512
TABLE_BLOCK = 64


# --- index arithmetic ----------------------------------------------------------------------------------------
@triton.jit
def _locate(token, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr):
    """Where the tokens of a window lie in the map, whether they do, and which side of the shift they are from."""
    grid1, grid2 = tl.cdiv(D1, W1), tl.cdiv(D2, W2)
    padded0, padded1, padded2 = tl.cdiv(D0, W0) * W0, grid1 * W1, grid2 * W2
    at0 = window // (grid1 * grid2) * W0 + token // (W1 * W2) + SHIFT0
    at1 = window // grid2 % grid1 * W1 + token // W2 % W1 + SHIFT1
    at2 = window % grid2 * W2 + token % W2 + SHIFT2
    side = (at0 >= padded0) * 4 + (at1 >= padded1) * 2 + (at2 >= padded2) * 1
    at0 = tl.where(at0 >= padded0, at0 - padded0, at0)
    at1 = tl.where(at1 >= padded1, at1 - padded1, at1)
    at2 = tl.where(at2 >= padded2, at2 - padded2, at2)
    real = (token < W0 * W1 * W2) & (at0 < D0) & (at1 < D1) & (at2 < D2)
    return (at0.to(tl.int64) * D1 + at1) * D2 + at2, real, side


@triton.jit
def _rows(
    ptr, pad_ptr, position, token, real, stride, column,
    N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Channels `column`… of the tokens, (tokens, BLOCK_D); of the padding: pad_ptr's."""
    channel = tl.arange(0, BLOCK_D)
    inside = channel < HEAD_DIM
    x = tl.load(
        ptr + position[:, None] * stride + column + channel[None, :],
        mask=real[:, None] & inside[None, :],
        other=0.0,
    )
    if PAD:
        pad = tl.load(pad_ptr + column + channel, mask=inside, other=0.0)
        x = tl.where(((token < N) & ~real)[:, None], pad[None, :], x)
    return x


@triton.jit
def _scores(q, k, bias_ptr, index_ptr, i, j, side_i, side_j, scale, N: tl.constexpr, SHIFTED: tl.constexpr):
    """A tile of scores in base 2; −∞ for keys beyond the window."""
    inside = (i < N)[:, None] & (j < N)[None, :]
    index = tl.load(index_ptr + i[:, None] * N + j[None, :], mask=inside, other=0)
    bias = tl.load(bias_ptr + index, mask=inside, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E) + bias * _LOG2E
    if SHIFTED:
        s += tl.where(side_i[:, None] != side_j[None, :], _MASKED, 0.0)
    return tl.where((j < N)[None, :], s, float("-inf"))


@triton.jit
def _kept(seed_ptr, threshold, i, j_start, head, sample, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a tile survive dropout (`reference.kept`): four keys share a Philox counter."""
    quad = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    words = tl.philox(
        tl.load(seed_ptr),
        quad + j_start // 4 + tl.arange(0, BLOCK_N // 4)[None, :],
        quad + i[:, None],
        quad + head,
        quad + sample,
    )
    even, odd = tl.join(words[0], words[2]), tl.join(words[1], words[3])
    return tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_N]) >= tl.cast(threshold, tl.uint32)


# --- forward -------------------------------------------------------------------------------------------------
@triton.jit
def forward_kernel(
    qkv_ptr, pad_ptr, bias_ptr, index_ptr, seed_ptr, out_ptr, lse_ptr,
    windows, heads, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, scale, threshold, kept_scale,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, T: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHIFTED: tl.constexpr, PAD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = W0 * W1 * W2
    tiles: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    row = program // tiles  # (sample, window, head) as one number: lse's rows
    head, window, sample = row % heads, row // heads % windows, row // heads // windows
    channels = heads * HEAD_DIM
    voxels = tl.cast(D0, tl.int64) * D1 * D2
    qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    pad_ptr += head * HEAD_DIM
    bias_ptr += head * T

    i = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    at_i, real_i, side_i = _locate(i, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0, W1, W2)
    q = _rows(qkv_ptr, pad_ptr, at_i, i, real_i, 3 * channels, 0, N, HEAD_DIM, BLOCK_D, PAD)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at_j, real_j, side_j = _locate(j, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0, W1, W2)
        k = _rows(qkv_ptr, pad_ptr, at_j, j, real_j, 3 * channels, channels, N, HEAD_DIM, BLOCK_D, PAD)
        s = _scores(q, k, bias_ptr, index_ptr, i, j, side_i, side_j, scale, N, SHIFTED)
        higher = tl.maximum(highest, tl.max(s, 1))
        # Where every score so far is −∞ (an overflow), ∞ − ∞ would make later, finite ones NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            keep = _kept(seed_ptr, threshold, i, start, window * heads + head, sample, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p * kept_scale, 0.0)
        v = _rows(qkv_ptr, pad_ptr, at_j, j, real_j, 3 * channels, 2 * channels, N, HEAD_DIM, BLOCK_D, PAD)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        highest = higher
    channel = tl.arange(0, BLOCK_D)
    out_ptr += sample * voxels * channels + head * HEAD_DIM
    y = (y / total[:, None]).to(out_ptr.dtype.element_ty)
    inside = real_i[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(out_ptr + at_i[:, None] * channels + channel[None, :], y, mask=inside)
    lse = tl.where(real_i, highest + tl.log2(total), 0.0)
    tl.store(lse_ptr + row.to(tl.int64) * N + i, lse, mask=i < N)


# --- backward ------------------------------------------------------------------------------------------------
@triton.jit
def _weights(s, lse, real_i):
    """The softmax from its scores and log-sum-exp; 0 for padded queries, which have no output."""
    return tl.where(real_i[:, None], tl.exp2(s - lse[:, None]), 0.0)


@triton.jit
def query_kernel(
    qkv_ptr, pad_ptr, bias_ptr, index_ptr, seed_ptr, lse_ptr, out_ptr, grad_ptr, delta_ptr, grad_qkv_ptr,
    windows, heads, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, scale, threshold, kept_scale,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, T: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHIFTED: tl.constexpr, PAD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = W0 * W1 * W2
    tiles: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    row = program // tiles
    head, window, sample = row % heads, row // heads % windows, row // heads // windows
    channels = heads * HEAD_DIM
    voxels = tl.cast(D0, tl.int64) * D1 * D2
    qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    out_ptr += sample * voxels * channels + head * HEAD_DIM
    grad_ptr += sample * voxels * channels + head * HEAD_DIM
    pad_ptr += head * HEAD_DIM
    bias_ptr += head * T

    i = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    at_i, real_i, side_i = _locate(i, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0, W1, W2)
    q = _rows(qkv_ptr, pad_ptr, at_i, i, real_i, 3 * channels, 0, N, HEAD_DIM, BLOCK_D, PAD)
    y = _rows(out_ptr, pad_ptr, at_i, i, real_i, channels, 0, N, HEAD_DIM, BLOCK_D, False)
    dy = _rows(grad_ptr, pad_ptr, at_i, i, real_i, channels, 0, N, HEAD_DIM, BLOCK_D, False)
    lse = tl.load(lse_ptr + row.to(tl.int64) * N + i, mask=i < N, other=0.0)
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(delta_ptr + row.to(tl.int64) * N + i, delta, mask=i < N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at_j, real_j, side_j = _locate(j, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0, W1, W2)
        k = _rows(qkv_ptr, pad_ptr, at_j, j, real_j, 3 * channels, channels, N, HEAD_DIM, BLOCK_D, PAD)
        v = _rows(qkv_ptr, pad_ptr, at_j, j, real_j, 3 * channels, 2 * channels, N, HEAD_DIM, BLOCK_D, PAD)
        s = _scores(q, k, bias_ptr, index_ptr, i, j, side_i, side_j, scale, N, SHIFTED)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            keep = _kept(seed_ptr, threshold, i, start, window * heads + head, sample, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        ds = _weights(s, lse, real_i) * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    channel = tl.arange(0, BLOCK_D)
    grad_qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    dq = (dq * scale).to(grad_qkv_ptr.dtype.element_ty)
    inside = real_i[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(grad_qkv_ptr + at_i[:, None] * (3 * channels) + channel[None, :], dq, mask=inside)


@triton.jit
def key_kernel(
    qkv_ptr, pad_ptr, bias_ptr, index_ptr, seed_ptr, lse_ptr, grad_ptr, delta_ptr, grad_qkv_ptr, grad_pad_ptr,
    windows, heads, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, scale, threshold, kept_scale,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, T: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHIFTED: tl.constexpr, PAD: tl.constexpr, DROPOUT: tl.constexpr, GRAD_PAD: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = W0 * W1 * W2
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    row = program // tiles
    head, window, sample = row % heads, row // heads % windows, row // heads // windows
    channels = heads * HEAD_DIM
    voxels = tl.cast(D0, tl.int64) * D1 * D2
    qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    grad_ptr += sample * voxels * channels + head * HEAD_DIM
    lse_ptr += row.to(tl.int64) * N
    delta_ptr += row.to(tl.int64) * N
    pad_ptr += head * HEAD_DIM
    bias_ptr += head * T

    first = program % tiles * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    at_j, real_j, side_j = _locate(j, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0, W1, W2)
    k = _rows(qkv_ptr, pad_ptr, at_j, j, real_j, 3 * channels, channels, N, HEAD_DIM, BLOCK_D, PAD)
    v = _rows(qkv_ptr, pad_ptr, at_j, j, real_j, 3 * channels, 2 * channels, N, HEAD_DIM, BLOCK_D, PAD)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        at_i, real_i, side_i = _locate(i, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0, W1, W2)
        q = _rows(qkv_ptr, pad_ptr, at_i, i, real_i, 3 * channels, 0, N, HEAD_DIM, BLOCK_D, PAD)
        dy = _rows(grad_ptr, pad_ptr, at_i, i, real_i, channels, 0, N, HEAD_DIM, BLOCK_D, False)
        lse = tl.load(lse_ptr + i, mask=i < N, other=0.0)
        delta = tl.load(delta_ptr + i, mask=i < N, other=0.0)
        s = _scores(q, k, bias_ptr, index_ptr, i, j, side_i, side_j, scale, N, SHIFTED)
        p = _weights(s, lse, real_i)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dropped = p
        if DROPOUT:
            keep = _kept(seed_ptr, threshold, i, first, window * heads + head, sample, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * kept_scale, 0.0)
            dropped = tl.where(keep, p * kept_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dv = tl.dot(tl.trans(dropped.to(dy.dtype)), dy, dv, input_precision="ieee")
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    dk *= scale
    channel = tl.arange(0, BLOCK_D)
    inside = real_j[:, None] & (channel < HEAD_DIM)[None, :]
    grad_qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    to = grad_qkv_ptr + at_j[:, None] * (3 * channels) + channel[None, :]
    tl.store(to + channels, dk.to(grad_qkv_ptr.dtype.element_ty), mask=inside)
    tl.store(to + 2 * channels, dv.to(grad_qkv_ptr.dtype.element_ty), mask=inside)
    if GRAD_PAD:
        padded = ((j < N) & ~real_j)[:, None]
        grad_pad_ptr += program.to(tl.int64) * 2 * HEAD_DIM
        tl.store(grad_pad_ptr + channel, tl.sum(tl.where(padded, dk, 0.0), 0), mask=channel < HEAD_DIM)
        grad_pad_ptr += HEAD_DIM
        tl.store(grad_pad_ptr + channel, tl.sum(tl.where(padded, dv, 0.0), 0), mask=channel < HEAD_DIM)


@triton.jit
def bias_kernel(
    qkv_ptr, pad_ptr, bias_ptr, index_ptr, seed_ptr, lse_ptr, grad_ptr, delta_ptr, partial_ptr,
    all_windows, group, windows, heads, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, scale, threshold, kept_scale,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, T: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHIFTED: tl.constexpr, PAD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Σ of the scores' gradients over a group of windows, (groups, heads, tokens, tokens)."""
    N: tl.constexpr = W0 * W1 * W2
    rows: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    head = program // (rows * columns) % heads
    first = program // (rows * columns) // heads * group
    channels = heads * HEAD_DIM
    voxels = tl.cast(D0, tl.int64) * D1 * D2
    bias_ptr += head * T
    pad_ptr += head * HEAD_DIM
    i = program // columns % rows * BLOCK_M + tl.arange(0, BLOCK_M)
    start = program % columns * BLOCK_N
    j = start + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(first, tl.minimum(first + group, all_windows)):
        window, sample = number % windows, number // windows
        at_i, real_i, side_i = _locate(i, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0, W1, W2)
        at_j, real_j, side_j = _locate(j, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0, W1, W2)
        base = qkv_ptr + sample * voxels * 3 * channels + head * HEAD_DIM
        q = _rows(base, pad_ptr, at_i, i, real_i, 3 * channels, 0, N, HEAD_DIM, BLOCK_D, PAD)
        k = _rows(base, pad_ptr, at_j, j, real_j, 3 * channels, channels, N, HEAD_DIM, BLOCK_D, PAD)
        v = _rows(base, pad_ptr, at_j, j, real_j, 3 * channels, 2 * channels, N, HEAD_DIM, BLOCK_D, PAD)
        grads = grad_ptr + sample * voxels * channels + head * HEAD_DIM
        dy = _rows(grads, pad_ptr, at_i, i, real_i, channels, 0, N, HEAD_DIM, BLOCK_D, False)
        row = (tl.cast(number, tl.int64) * heads + head) * N
        lse = tl.load(lse_ptr + row + i, mask=i < N, other=0.0)
        delta = tl.load(delta_ptr + row + i, mask=i < N, other=0.0)
        s = _scores(q, k, bias_ptr, index_ptr, i, j, side_i, side_j, scale, N, SHIFTED)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            keep = _kept(seed_ptr, threshold, i, start, window * heads + head, sample, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        total += _weights(s, lse, real_i) * (dp - delta[:, None])
    partial_ptr += (program // (rows * columns)).to(tl.int64) * N * N
    inside = (i < N)[:, None] & (j < N)[None, :]
    tl.store(partial_ptr + i[:, None] * N + j[None, :], total, mask=inside)


@triton.jit
def table_kernel(
    partial_ptr, order_ptr, start_ptr, grad_table_ptr, groups, heads,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """One row of the table's gradient: the pairs that read it, in their order, over the groups in theirs."""
    entry = tl.program_id(0)
    first, last = tl.load(start_ptr + entry), tl.load(start_ptr + entry + 1)
    head = tl.arange(0, BLOCK_HEADS)
    total = tl.zeros([BLOCK_HEADS, BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        pair = tl.load(order_ptr + at, mask=at < last, other=0)
        inside = (head < heads)[:, None] & (at < last)[None, :]
        for group in range(groups):
            row = (tl.cast(group, tl.int64) * heads + head) * PAIRS
            total += tl.load(partial_ptr + row[:, None] + pair[None, :], mask=inside, other=0.0)
    row = tl.sum(total, 1).to(grad_table_ptr.dtype.element_ty)
    tl.store(grad_table_ptr + entry.to(tl.int64) * heads + head, row, mask=head < heads)


# --- launches ------------------------------------------------------------------------------------------------
def architecture(device: torch.device) -> int:
    """The row of `TILES`. Consumer GPUs of any generation have sm_86's shared memory: sm_80's tiles fit them all."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return {(9, 0): 90, (10, 0): 100, (10, 3): 100}.get((major, minor), 80)


def padded_head_dim(head_dim: int) -> int:
    """What `tl.dot` can take: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


class _Problem:
    """What all passes share: tensors in the layout that kernels read, their sizes, and their constants."""

    def __init__(
        self,
        qkv: Tensor,
        bias_table: Tensor,
        bias_index: Tensor,
        pad_qkv: Tensor | None,
        dropout_seed: Tensor | None,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        scale: float,
        dropout_p: float,
        arch: int | None,
    ) -> None:
        self.batch, *sizes, channels = qkv.shape
        self.heads = bias_table.shape[1]
        head_dim = channels // (3 * self.heads)
        missing = 3 - len(sizes)
        sizes, window = [1] * missing + sizes, [1] * missing + list(window_size)
        shift = [0] * missing + list(shift_size)
        grid = [triton.cdiv(size, w) for size, w in zip(sizes, window, strict=True)]
        self.windows, self.tokens, rows = math.prod(grid), math.prod(window), bias_table.shape[0]
        padded = any(g * w > size for g, w, size in zip(grid, window, sizes, strict=True))
        pad = padded and pad_qkv is not None
        # Held here: the kernels run on these copies after the caller's last reference is gone.
        self.qkv = qkv.contiguous()
        self.pad = pad_qkv.to(qkv.dtype).contiguous() if pad and pad_qkv is not None else self.qkv
        self.bias = bias_table.t().to(torch.float32).contiguous()  # (heads, T): a head's entries side by side
        # An index outside the table must not become an address; nothing is read back to refuse it.
        narrow = torch.int16 if rows <= 2**15 else torch.int32
        self.index = bias_index.to(torch.int32).clamp(0, rows - 1).to(narrow).contiguous()
        self.seed = dropout_seed if dropout_p > 0 and dropout_seed is not None else self.index
        self.inputs = (self.qkv, self.pad, self.bias, self.index, self.seed)
        factor = 1.0 / (1.0 - dropout_p)
        self.scalars = (self.windows, self.heads, *sizes, *shift, scale, dropout_threshold(dropout_p), factor)
        block_d = padded_head_dim(head_dim)
        self.constants = {
            **{f"W{axis}": w for axis, w in enumerate(window)},
            "T": rows,
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d,
            "SHIFTED": any(shift),
            "PAD": pad,
            "DROPOUT": dropout_p > 0,
        }
        precision = "fp32" if qkv.dtype == torch.float32 else "half"
        self.tiles = TILES[arch or architecture(qkv.device)][precision][block_d]
        self.padded = padded

    def rows(self, block: int) -> int:
        """Programs of a pass that has one per block of a window's tokens and head."""
        return self.batch * self.windows * self.heads * triton.cdiv(self.tokens, block)

    def options(self, use: str) -> dict[str, int]:
        tile = self.tiles[use]
        launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        return {**self.constants, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **launch}


def forward(
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    dropout_p: float,
    arch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The op's kernel: output (B, *spatial, C) and the rows' log-sum-exp in base 2, (B, windows, heads, tokens).

    `arch` names a row of `TILES` instead of the device's.
    """
    problem = _Problem(
        qkv, bias_table, bias_index, pad_qkv, dropout_seed, window_size, shift_size, scale, dropout_p, arch
    )
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    lse = qkv.new_empty((problem.batch, problem.windows, problem.heads, problem.tokens), dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(qkv):
            options = problem.options("forward")
            grid = (problem.rows(options["BLOCK_M"]),)
            forward_kernel[grid](*problem.inputs, out, lse, *problem.scalars, **options)
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    pad_qkv: Tensor | None,
    dropout_seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    dropout_p: float,
    need_qkv: bool,
    need_table: bool,
    need_pad: bool,
    arch: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to qkv, bias_table and pad_qkv, each an empty tensor where it isn't needed."""
    pad_like = qkv if pad_qkv is None else pad_qkv
    grad_table = bias_table.new_zeros(bias_table.shape if need_table else (0,))
    grad_pad = pad_like.new_zeros(qkv.shape[-1:] if need_pad else (0,))
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if qkv.numel() == 0:
        return grad_qkv if need_qkv else qkv.new_empty(0), grad_table, grad_pad
    problem = _Problem(
        qkv, bias_table, bias_index, pad_qkv, dropout_seed, window_size, shift_size, scale, dropout_p, arch
    )
    grad, output, lse = grad.contiguous(), output.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(qkv):
        options = problem.options("query")
        grid = (problem.rows(options["BLOCK_M"]),)
        query_kernel[grid](
            *problem.inputs, lse, output, grad, delta, grad_qkv, *problem.scalars, **options
        )  # fmt: skip
        if need_qkv or need_pad:
            options = problem.options("key")
            programs = problem.rows(options["BLOCK_N"])
            sum_pad = need_pad and problem.padded
            shape = (programs // triton.cdiv(problem.tokens, options["BLOCK_N"]), -1, 2, options["HEAD_DIM"])
            parts = lse.new_empty(programs * 2 * options["HEAD_DIM"] if sum_pad else 1)
            tensors = (*problem.inputs, lse, grad, delta, grad_qkv, parts)
            key_kernel[(programs,)](*tensors, *problem.scalars, GRAD_PAD=sum_pad, **options)
            if sum_pad:  # rows are (sample, window, head); the queries of the padding have no output and no gradient
                by_head = parts.view(shape).sum(1).view(-1, problem.heads, 2, options["HEAD_DIM"]).sum(0)
                grad_pad.view(3, problem.heads, -1)[1:] = by_head.movedim(1, 0)
        if need_table:
            _grad_table(problem, (lse, grad, delta), grad_table)
    return grad_qkv if need_qkv else qkv.new_empty(0), grad_table, grad_pad


def _grad_table(problem: _Problem, tensors: tuple[Tensor, Tensor, Tensor], grad_table: Tensor) -> None:
    options = problem.options("bias")
    n, heads, all_windows = problem.tokens, problem.heads, problem.batch * problem.windows
    tiles = triton.cdiv(n, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"]) * heads
    group = triton.cdiv(all_windows, max(1, min(all_windows, _BIAS_PROGRAMS // tiles)))
    groups = triton.cdiv(all_windows, group)
    partial = torch.empty(groups, heads, n, n, dtype=torch.float32, device=grad_table.device)
    bias_kernel[(groups * tiles,)](
        *problem.inputs, *tensors, partial, all_windows, group, *problem.scalars, **options
    )  # fmt: skip
    # Which pairs of tokens read an entry: a stable sort, so that each sum has a fixed order.
    entries, order = problem.index.flatten().sort(stable=True)
    every = torch.arange(grad_table.shape[0] + 1, dtype=torch.int32, device=entries.device)
    starts = torch.searchsorted(entries.to(torch.int32), every, out_int32=True)
    table_kernel[(grad_table.shape[0],)](
        partial, order.to(torch.int32), starts, grad_table, groups, heads,
        PAIRS=n * n, BLOCK=TABLE_BLOCK, BLOCK_HEADS=triton.next_power_of_2(heads),
    )  # fmt: skip
