# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Holds shifted-window attention's Triton kernels: forward, and a backward pass that recomputes the scores.

No score is stored. Forward, a program holds BLOCK_M queries of one head of one window and streams the window's keys
with an online softmax. Backward there are three such streams, so that every sum has one owner and a fixed order (no
atomics): one program per queries (dq, and delta = Σ do · o), one per keys (dk, dv), and one per tile of scores and
group of windows (the bias).

What would cost instructions for every score is done once a call, by `layout_kernel` (triton_layout.py): the bias of
every pair of a window's tokens, the tokens' places in the map, and the sides of the shift that they come from. Scores
are kept in base 2, as s · factor: a tile's product starts from the bias, and the factor is left to the exponential's
fused multiplication where FOLD says so.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = math.log2(math.e)
_LOG2E = tl.constexpr(LOG2E)
_MASKED = tl.constexpr(-100.0 * LOG2E)  # MONAI's −100 between the two sides of a cyclic shift
PADDED = tl.constexpr(-1)  # the place of a token that pads the map to whole windows
BEYOND = tl.constexpr(-2)  # the place of a token beyond the window: blocks are larger
SIDE_CHANNELS = tl.constexpr(16)

# Sizes that Triton must not build variants for: a network's stages share their kernels.
_SIZES = ["windows", "heads", "first_head", "head_count", "voxels", "threshold"]


# Windows whose programs run side by side: those of one tile of one head share the bias in an SM's first-level cache,
# and so many windows' keys and values lie in the second-level cache until every tile of every head has read them.
_GROUP = tl.constexpr(256)


@triton.jit
def _assigned(heads, tiles: tl.constexpr):
    """Returns a program's window, head and tile of tokens: in groups of windows, the window changes first."""
    of_all = heads * tiles
    all_windows = tl.num_programs(0) // of_all
    program = tl.program_id(0)
    first = program // (_GROUP * of_all) * _GROUP
    size = tl.minimum(all_windows - first, _GROUP)
    program -= first * of_all
    return first + program % size, program // size // tiles, program // size % tiles


# --- tiles ---------------------------------------------------------------------------------------------------
@triton.jit
def _rows(ptr, pad_ptr, place, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAD: tl.constexpr):
    """Loads the tokens' channels, (tokens, BLOCK_D): those of pad_ptr for padding if PAD, else zeros."""
    channel = tl.arange(0, BLOCK_D)
    rows = ptr + place.to(tl.int64) * stride
    known = place >= 0
    if PAD:
        rows = tl.where(known, rows, pad_ptr)  # an address instead of a choice for every channel
        known = place >= PADDED
    mask = known[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (channel < HEAD_DIM)[None, :]
    return tl.load(rows[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _sides(side_ptr, token):
    """Loads what a product of two sides needs, (tokens, SIDE_CHANNELS)."""
    return tl.load(side_ptr + token[:, None] * SIDE_CHANNELS + tl.arange(0, SIDE_CHANNELS)[None, :])


@triton.jit
def _product(
    a, b, bias, side_a, side_b, scale,
    SHIFTED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns a tile of scores in units of the factor, a·bᵀ; −∞ for keys beyond the window."""
    if FOLD:
        if SHIFTED:  # the mask comes out of the matrix unit: 0 on the same side, exactly
            bias = tl.dot(side_a, tl.trans(side_b), bias)
        s = tl.dot(a, tl.trans(b), bias, input_precision=PRECISION)
    else:
        s = tl.dot(a, tl.trans(b), input_precision=PRECISION) * (scale * _LOG2E) + bias
        if SHIFTED:
            s += tl.where(side_a[:, None] != side_b[None, :], _MASKED, 0.0)
    return s


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


@triton.jit
def _queries_sides(side_ptr, window_class, token, ROWS: tl.constexpr, FOLD: tl.constexpr):
    """Returns the sides of a tile's queries; `_keys_sides` those of its keys: their product is the mask."""
    if FOLD:
        side = _sides(side_ptr + (window_class * 2 + 1) * ROWS * SIDE_CHANNELS, token)
    else:
        side = tl.load(side_ptr + window_class * ROWS + token)
    return side


@triton.jit
def _keys_sides(side_ptr, window_class, token, ROWS: tl.constexpr, FOLD: tl.constexpr):
    if FOLD:
        side = _sides(side_ptr + window_class * 2 * ROWS * SIDE_CHANNELS, token)
    else:
        side = tl.load(side_ptr + window_class * ROWS + token)
    return side


# --- forward -------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    qkv_ptr, pad_ptr, bias_ptr, place_ptr, class_ptr, side_ptr, seed_ptr, out_ptr, lse_ptr,
    windows, heads, first_head, head_count, voxels, scale, threshold, kept_scale,
    N: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTED: tl.constexpr, PAD: tl.constexpr, DROPOUT: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    number, head, tile = _assigned(head_count, tiles)
    window, sample = number % windows, number // windows
    head += first_head
    channels, voxels = heads * HEAD_DIM, tl.cast(voxels, tl.int64)
    qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    pad_ptr += head * HEAD_DIM
    place_ptr += window.to(tl.int64) * ROWS
    bias_ptr += (head - first_head).to(tl.int64) * ROWS * ROWS
    factor = scale * _LOG2E if FOLD else 1.0

    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at_i = tl.load(place_ptr + i)
    q = _rows(qkv_ptr, pad_ptr, at_i, 3 * channels, HEAD_DIM, BLOCK_D, False)
    window_class, side_i = 0, 0
    if SHIFTED:
        window_class = tl.load(class_ptr + window)
        side_i = _queries_sides(side_ptr, window_class, i, ROWS, FOLD)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at_j = tl.load(place_ptr + j)
        k = _rows(qkv_ptr + channels, pad_ptr + channels, at_j, 3 * channels, HEAD_DIM, BLOCK_D, PAD)
        side_j = 0
        if SHIFTED:
            side_j = _keys_sides(side_ptr, window_class, j, ROWS, FOLD)
        bias = tl.load(bias_ptr + i[:, None] * ROWS + j[None, :])
        s = _product(q, k, bias, side_i, side_j, scale, SHIFTED, FOLD, PRECISION)
        higher = tl.maximum(highest, tl.max(s, 1))
        # If every score so far is −∞ (an overflow), ∞ − ∞ would make later, finite ones NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * factor - (base * factor)[:, None])
        shrink = tl.exp2((highest - base) * factor)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            keep = _kept(seed_ptr, threshold, i, start, window * heads + head, sample, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p * kept_scale, 0.0)
        v = _rows(qkv_ptr + 2 * channels, pad_ptr + 2 * channels, at_j, 3 * channels, HEAD_DIM, BLOCK_D, PAD)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision=PRECISION)
        highest = higher
    channel = tl.arange(0, BLOCK_D)
    out_ptr += sample * voxels * channels + head * HEAD_DIM
    y = (y / total[:, None]).to(out_ptr.dtype.element_ty)
    inside = (at_i >= 0)[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(out_ptr + at_i.to(tl.int64)[:, None] * channels + channel[None, :], y, mask=inside)
    # Padded queries have no output: with +∞ their weights are 0 in the backward pass.
    lse = tl.where(at_i >= 0, highest * factor + tl.log2(total), float("inf"))
    row = number.to(tl.int64) * heads + head
    tl.store(lse_ptr + row * N + i, lse, mask=i < N)


# --- backward ------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=_SIZES)
def query_kernel(
    qkv_ptr, pad_ptr, bias_ptr, place_ptr, class_ptr, side_ptr, seed_ptr, lse_ptr, out_ptr, grad_ptr, row_ptr,
    grad_qkv_ptr,
    windows, heads, first_head, head_count, voxels, scale, threshold, kept_scale,
    N: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTED: tl.constexpr, PAD: tl.constexpr, DROPOUT: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    number, head, tile = _assigned(head_count, tiles)
    window, sample = number % windows, number // windows
    head += first_head
    channels, voxels = heads * HEAD_DIM, tl.cast(voxels, tl.int64)
    qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    out_ptr += sample * voxels * channels + head * HEAD_DIM
    grad_ptr += sample * voxels * channels + head * HEAD_DIM
    pad_ptr += head * HEAD_DIM
    place_ptr += window.to(tl.int64) * ROWS
    bias_ptr += (head - first_head).to(tl.int64) * ROWS * ROWS
    row = number.to(tl.int64) * heads + head
    factor = scale * _LOG2E if FOLD else 1.0

    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at_i = tl.load(place_ptr + i)
    q = _rows(qkv_ptr, pad_ptr, at_i, 3 * channels, HEAD_DIM, BLOCK_D, False)
    y = _rows(out_ptr, pad_ptr, at_i, channels, HEAD_DIM, BLOCK_D, False)
    dy = _rows(grad_ptr, pad_ptr, at_i, channels, HEAD_DIM, BLOCK_D, False)
    lse = tl.load(lse_ptr + row * N + i, mask=i < N, other=float("inf"))
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    row_ptr += row * 2 * ROWS + i  # for the other passes, which need no masks then
    tl.store(row_ptr, lse)
    tl.store(row_ptr + ROWS, delta)
    window_class, side_i = 0, 0
    if SHIFTED:
        window_class = tl.load(class_ptr + window)
        side_i = _queries_sides(side_ptr, window_class, i, ROWS, FOLD)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at_j = tl.load(place_ptr + j)
        k = _rows(qkv_ptr + channels, pad_ptr + channels, at_j, 3 * channels, HEAD_DIM, BLOCK_D, PAD)
        v = _rows(qkv_ptr + 2 * channels, pad_ptr + 2 * channels, at_j, 3 * channels, HEAD_DIM, BLOCK_D, PAD)
        side_j = 0
        if SHIFTED:
            side_j = _keys_sides(side_ptr, window_class, j, ROWS, FOLD)
        bias = tl.load(bias_ptr + i[:, None] * ROWS + j[None, :])
        s = _product(q, k, bias, side_i, side_j, scale, SHIFTED, FOLD, PRECISION)
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = _kept(seed_ptr, threshold, i, start, window * heads + head, sample, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        ds = tl.exp2(s * factor - lse[:, None]) * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    channel = tl.arange(0, BLOCK_D)
    grad_qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    dq = (dq * scale).to(grad_qkv_ptr.dtype.element_ty)
    inside = (at_i >= 0)[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(grad_qkv_ptr + at_i.to(tl.int64)[:, None] * (3 * channels) + channel[None, :], dq, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def key_kernel(
    qkv_ptr, pad_ptr, bias_ptr, place_ptr, class_ptr, side_ptr, seed_ptr, row_ptr, grad_ptr, grad_qkv_ptr,
    grad_pad_ptr,
    windows, heads, first_head, head_count, voxels, scale, threshold, kept_scale,
    N: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTED: tl.constexpr, PAD: tl.constexpr, DROPOUT: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, GRAD_PAD: tl.constexpr,
):  # fmt: skip
    """Computes dk and dv from transposed tiles, (keys, queries): bias_ptr holds the transposed bias."""
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    number, head, tile = _assigned(head_count, tiles)
    window, sample = number % windows, number // windows
    head += first_head
    channels, voxels = heads * HEAD_DIM, tl.cast(voxels, tl.int64)
    qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    grad_ptr += sample * voxels * channels + head * HEAD_DIM
    pad_ptr += head * HEAD_DIM
    place_ptr += window.to(tl.int64) * ROWS
    bias_ptr += (head - first_head).to(tl.int64) * ROWS * ROWS
    row_ptr += (number.to(tl.int64) * heads + head) * 2 * ROWS
    factor = scale * _LOG2E if FOLD else 1.0

    first = tile * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    at_j = tl.load(place_ptr + j)
    k = _rows(qkv_ptr + channels, pad_ptr + channels, at_j, 3 * channels, HEAD_DIM, BLOCK_D, PAD)
    v = _rows(qkv_ptr + 2 * channels, pad_ptr + 2 * channels, at_j, 3 * channels, HEAD_DIM, BLOCK_D, PAD)
    window_class, side_j = 0, 0
    if SHIFTED:
        window_class = tl.load(class_ptr + window)
        side_j = _keys_sides(side_ptr, window_class, j, ROWS, FOLD)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        at_i = tl.load(place_ptr + i)
        q = _rows(qkv_ptr, pad_ptr, at_i, 3 * channels, HEAD_DIM, BLOCK_D, False)
        dy = _rows(grad_ptr, pad_ptr, at_i, channels, HEAD_DIM, BLOCK_D, False)
        lse, delta = tl.load(row_ptr + i), tl.load(row_ptr + ROWS + i)
        side_i = 0
        if SHIFTED:
            side_i = _queries_sides(side_ptr, window_class, i, ROWS, FOLD)
        bias = tl.load(bias_ptr + j[:, None] * ROWS + i[None, :])
        s = _product(k, q, bias, side_j, side_i, scale, SHIFTED, FOLD, PRECISION)
        p = tl.exp2(s * factor - lse[None, :])
        dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        dropped = p
        if DROPOUT:
            keep = _kept(seed_ptr, threshold, i, first, window * heads + head, sample, BLOCK_M, BLOCK_N)
            keep = tl.trans(keep)
            dp = tl.where(keep, dp * kept_scale, 0.0)
            dropped = tl.where(keep, p * kept_scale, 0.0)
        dv = tl.dot(dropped.to(dy.dtype), dy, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk *= scale
    channel = tl.arange(0, BLOCK_D)
    inside = (at_j >= 0)[:, None] & (channel < HEAD_DIM)[None, :]
    grad_qkv_ptr += sample * voxels * 3 * channels + head * HEAD_DIM
    to = grad_qkv_ptr + at_j.to(tl.int64)[:, None] * (3 * channels) + channel[None, :]
    tl.store(to + channels, dk.to(grad_qkv_ptr.dtype.element_ty), mask=inside)
    tl.store(to + 2 * channels, dv.to(grad_qkv_ptr.dtype.element_ty), mask=inside)
    if GRAD_PAD:  # (head, sample and window and tile, k and v, channel)
        padded = (at_j == PADDED)[:, None]
        parts = tl.num_programs(0) // head_count
        part = number.to(tl.int64) * tiles + tile
        grad_pad_ptr += ((head - first_head).to(tl.int64) * parts + part) * 2 * HEAD_DIM
        tl.store(grad_pad_ptr + channel, tl.sum(tl.where(padded, dk, 0.0), 0), mask=channel < HEAD_DIM)
        grad_pad_ptr += HEAD_DIM
        tl.store(grad_pad_ptr + channel, tl.sum(tl.where(padded, dv, 0.0), 0), mask=channel < HEAD_DIM)


@triton.jit(do_not_specialize=[*_SIZES, "all_windows", "group"])
def bias_kernel(
    qkv_ptr, pad_ptr, bias_ptr, place_ptr, class_ptr, side_ptr, seed_ptr, row_ptr, grad_ptr, partial_ptr,
    all_windows, group, windows, heads, first_head, head_count, voxels, scale, threshold, kept_scale,
    N: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTED: tl.constexpr, PAD: tl.constexpr, DROPOUT: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums the scores' gradients over a group of windows, (groups, heads, tokens, tokens)."""
    tiles: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    head = program // (tiles * columns) % head_count
    first = program // (tiles * columns) // head_count * group
    partial_ptr += (program // (tiles * columns)).to(tl.int64) * N * N
    bias_ptr += head.to(tl.int64) * ROWS * ROWS
    head += first_head
    channels, voxels = heads * HEAD_DIM, tl.cast(voxels, tl.int64)
    pad_ptr += head * HEAD_DIM
    factor = scale * _LOG2E if FOLD else 1.0
    i = program // columns % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    start = program % columns * BLOCK_N
    j = start + tl.arange(0, BLOCK_N)
    bias = tl.load(bias_ptr + i[:, None] * ROWS + j[None, :])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(first, tl.minimum(first + group, all_windows)):
        window, sample = number % windows, number // windows
        places = place_ptr + window.to(tl.int64) * ROWS
        at_i, at_j = tl.load(places + i), tl.load(places + j)
        base = qkv_ptr + sample * voxels * 3 * channels + head * HEAD_DIM
        q = _rows(base, pad_ptr, at_i, 3 * channels, HEAD_DIM, BLOCK_D, False)
        k = _rows(base + channels, pad_ptr + channels, at_j, 3 * channels, HEAD_DIM, BLOCK_D, PAD)
        v = _rows(base + 2 * channels, pad_ptr + 2 * channels, at_j, 3 * channels, HEAD_DIM, BLOCK_D, PAD)
        grads = grad_ptr + sample * voxels * channels + head * HEAD_DIM
        dy = _rows(grads, pad_ptr, at_i, channels, HEAD_DIM, BLOCK_D, False)
        rows = row_ptr + (tl.cast(number, tl.int64) * heads + head) * 2 * ROWS + i
        lse, delta = tl.load(rows), tl.load(rows + ROWS)
        side_i, side_j = 0, 0
        if SHIFTED:
            window_class = tl.load(class_ptr + window)
            side_i = _queries_sides(side_ptr, window_class, i, ROWS, FOLD)
            side_j = _keys_sides(side_ptr, window_class, j, ROWS, FOLD)
        s = _product(q, k, bias, side_i, side_j, scale, SHIFTED, FOLD, PRECISION)
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = _kept(seed_ptr, threshold, i, start, window * heads + head, sample, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        total += tl.exp2(s * factor - lse[:, None]) * (dp - delta[:, None])
    inside = (i < N)[:, None] & (j < N)[None, :]
    tl.store(partial_ptr + i[:, None] * N + j[None, :], total, mask=inside)
