# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Holds shifted-window attention's Triton kernels: forward, and a backward pass that recomputes the scores.

No score is stored. Forward, a program holds BLOCK_M queries of one head of one window and streams the window's keys
with an online softmax. Backward there are three such streams, so that every sum has one owner and a fixed order (no
atomics): one program per queries (dq, and delta = Σ do · o), one per keys (dk, dv), and one per tile of scores and
group of windows (the bias). Scores are kept in base 2: score · log2(e), exp2.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_LOG2E = tl.constexpr(math.log2(math.e))
_MASKED = tl.constexpr(-100.0 * math.log2(math.e))  # MONAI's −100 between the two sides of a cyclic shift


# --- index arithmetic ----------------------------------------------------------------------------------------
@triton.jit
def _locate(token, window, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr):
    """Returns the places of a window's tokens in the map, whether they lie in it, and the side of the shift that they
    come from."""
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
    """Loads channels `column`… of the tokens, (tokens, BLOCK_D); for padding, those of pad_ptr."""
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
    """Returns a tile of scores in base 2; −∞ for keys beyond the window."""
    inside = (i < N)[:, None] & (j < N)[None, :]
    index = tl.load(index_ptr + i[:, None] * N + j[None, :], mask=inside, other=0)
    bias = tl.load(bias_ptr + index, mask=inside, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E) + bias * _LOG2E
    if SHIFTED:
        s += tl.where(side_i[:, None] != side_j[None, :], _MASKED, 0.0)
    return tl.where((j < N)[None, :], s, float("-inf"))


@triton.jit
def _kept(seed_ptr, threshold, i, j_start, head, sample, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Marks the weights of a tile that survive dropout (`reference.kept`): four keys share a Philox counter."""
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
        # If every score so far is −∞ (an overflow), ∞ − ∞ would make later, finite ones NaN.
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
    """Returns the softmax from its scores and log-sum-exp; 0 for padded queries, which have no output."""
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
    """Sums the scores' gradients over a group of windows, (groups, heads, tokens, tokens)."""
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
    """Computes one row of the table's gradient from the pairs that read it, in their order, over the groups in
    theirs."""
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
