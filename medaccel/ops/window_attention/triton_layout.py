# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Holds the Triton kernels around shifted-window attention: what its passes read, and what sums up their parts.

`layout_kernel` computes once a call what would otherwise cost instructions for every score. Nothing is kept between
calls: an index that was edited, copied or broadcast, in eager mode or between replays of a CUDA graph, is read anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medaccel.ops.window_attention.triton_kernels import BEYOND, LOG2E, PADDED, SIDE_CHANNELS

_LOG2E = tl.constexpr(LOG2E)
_SIDES = tl.constexpr(8)  # those of three axes
_PADDED = PADDED
_BEYOND = BEYOND
_SIDE_CHANNELS = SIDE_CHANNELS
ROW_TILE = 64  # the bias's rows and columns are a multiple of it, as the passes' tiles need
TILE = 32  # rows and columns of the bias that a program fills
WINDOWS = 16  # windows whose tokens' places a program fills
PAD_CHANNELS = 1024  # channels of the padding that a program casts

# Sizes that Triton must not build variants for: a network's stages share their kernels.
_SIZES = ["heads", "first_head", "head_count"]
_MAP = ["windows", "D0", "D1", "D2", "SHIFT0", "SHIFT1", "SHIFT2"]
_LAYOUT = [*_SIZES, *_MAP, "index_stride0", "index_stride1", "place_programs", "side_programs"]


@triton.jit
def _standard_entry(i, j, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr):
    """Returns the entry of the table that tokens i and j of a window of F0 × F1 × F2 read, by their difference."""
    d0 = i // (F1 * F2) - j // (F1 * F2) + F0 - 1
    d1 = i // F2 % F1 - j // F2 % F1 + F1 - 1
    d2 = i % F2 - j % F2 + F2 - 1
    return (d0 * (2 * F1 - 1) + d1) * (2 * F2 - 1) + d2


@triton.jit
def _bias(
    program, table_ptr, index_ptr, bias_ptr, entry_ptr, strange_ptr, index_stride0, index_stride1,
    heads, first_head, head_count, factor,
    T: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr,
    BACKWARD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Fills a tile of every head's bias, (ROWS, ROWS); for the backward pass its transpose and the entries too."""
    tiles: tl.constexpr = ROWS // TILE
    i = program // tiles * TILE + tl.arange(0, TILE)
    j = program % tiles * TILE + tl.arange(0, TILE)
    inside = (i < N)[:, None] & (j < N)[None, :]
    at = i.to(tl.int64)[:, None] * index_stride0 + j.to(tl.int64)[None, :] * index_stride1
    entry = tl.load(index_ptr + at, mask=inside, other=0).to(tl.int64)
    # An index outside the table must not become an address; nothing is read back to refuse it.
    entry = tl.minimum(tl.maximum(entry, 0), T - 1).to(tl.int32)
    for head in range(head_count):
        bias = tl.load(table_ptr + entry * heads + first_head + head, mask=inside, other=0.0).to(tl.float32)
        bias = tl.where((j < N)[None, :], bias * factor, float("-inf"))
        square = bias_ptr + tl.cast(head, tl.int64) * ROWS * ROWS
        tl.store(square + i[:, None] * ROWS + j[None, :], bias)
        if BACKWARD:
            square += tl.cast(head_count, tl.int64) * ROWS * ROWS
            tl.store(square + j[None, :] * ROWS + i[:, None], bias)
    if BACKWARD:
        tl.store(entry_ptr + i[:, None] * N + j[None, :], entry, mask=inside)
        strange = inside
        if F0 > 0:
            strange = inside & (entry != _standard_entry(i[:, None], j[None, :], F0, F1, F2))
        tl.store(strange_ptr + program, tl.max(tl.max(strange.to(tl.int32), 1), 0))


@triton.jit
def _places(
    program, place_ptr, class_ptr, windows, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Fills the places in the map of TILE tokens of WINDOWS windows, and the windows' classes: on which axes a window
    is the last and holds both sides of a shift."""
    blocks: tl.constexpr = ROWS // TILE
    token = (program % blocks * TILE + tl.arange(0, TILE))[None, :]
    window = (program // blocks * WINDOWS + tl.arange(0, WINDOWS))[:, None]
    grid0, grid1, grid2 = tl.cdiv(D0, W0), tl.cdiv(D1, W1), tl.cdiv(D2, W2)
    window0, window1, window2 = window // (grid1 * grid2), window // grid2 % grid1, window % grid2
    at0 = window0 * W0 + token // (W1 * W2) + SHIFT0
    at1 = window1 * W1 + token // W2 % W1 + SHIFT1
    at2 = window2 * W2 + token % W2 + SHIFT2
    at0 = tl.where(at0 >= grid0 * W0, at0 - grid0 * W0, at0)
    at1 = tl.where(at1 >= grid1 * W1, at1 - grid1 * W1, at1)
    at2 = tl.where(at2 >= grid2 * W2, at2 - grid2 * W2, at2)
    real = (at0 < D0) & (at1 < D1) & (at2 < D2)
    place = (at0.to(place_ptr.dtype.element_ty) * D1 + at1) * D2 + at2
    place = tl.where(real, place, _PADDED)
    place = tl.where(token < W0 * W1 * W2, place, _BEYOND)
    tl.store(place_ptr + window.to(tl.int64) * ROWS + token, place, mask=window < windows)
    last0 = (window0 == grid0 - 1) & (SHIFT0 > 0)
    last1 = (window1 == grid1 - 1) & (SHIFT1 > 0)
    last2 = (window2 == grid2 - 1) & (SHIFT2 > 0)
    window_class = last0.to(tl.int32) * 4 + last1.to(tl.int32) * 2 + last2.to(tl.int32)
    tl.store(class_ptr + window + token, window_class, mask=(window < windows) & (token == 0))


@triton.jit
def _side_tile(
    program, side_ptr, SHIFT0, SHIFT1, SHIFT2, mask_high, mask_low,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Fills TILE tokens' sides of the shift, in windows of one class.

    With FOLD, keys have a 1 in the channel of their side, queries the mask's value in every other one: their product
    is the mask. It is split into two numbers of 11 bits, in 8 channels each.
    """
    blocks: tl.constexpr = ROWS // TILE
    token = program % blocks * TILE + tl.arange(0, TILE)
    kind = program // blocks
    window_class = kind
    if FOLD:
        window_class = kind // 2
    side0 = (token // (W1 * W2) + SHIFT0 >= W0).to(tl.int32) * 4
    side1 = (token // W2 % W1 + SHIFT1 >= W1).to(tl.int32) * 2
    side2 = (token % W2 + SHIFT2 >= W2).to(tl.int32)
    side = (side0 + side1 + side2) & window_class
    if FOLD:
        channel = tl.arange(0, _SIDE_CHANNELS)
        same = side[:, None] == (channel % _SIDES)[None, :]
        mask = tl.where(channel < _SIDES, mask_high, mask_low)[None, :]
        value = tl.where(kind % 2 == 0, tl.where(same, 1.0, 0.0), tl.where(same, 0.0, mask))
        at = (kind * ROWS + token)[:, None] * _SIDE_CHANNELS + channel[None, :]
        tl.store(side_ptr + at, value.to(side_ptr.dtype.element_ty))
    else:
        tl.store(side_ptr + kind * ROWS + token, side.to(side_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=_LAYOUT)
def layout_kernel(
    table_ptr, index_ptr, given_pad_ptr, bias_ptr, entry_ptr, strange_ptr, place_ptr, class_ptr, side_ptr, pad_ptr,
    index_stride0, index_stride1, heads, first_head, head_count, windows, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2,
    place_programs, side_programs, bias_factor, mask_high, mask_low,
    T: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, F0: tl.constexpr, F1: tl.constexpr,
    F2: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, FOLD: tl.constexpr, BACKWARD: tl.constexpr,
    TILE: tl.constexpr, WINDOWS: tl.constexpr, PAD_CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (ROWS // TILE) * (ROWS // TILE)
    program = tl.program_id(0)
    if program < tiles:
        _bias(
            program, table_ptr, index_ptr, bias_ptr, entry_ptr, strange_ptr, index_stride0, index_stride1,
            heads, first_head, head_count, bias_factor, T, W0 * W1 * W2, ROWS, F0, F1, F2, BACKWARD, TILE,
        )  # fmt: skip
    elif program < tiles + place_programs:
        _places(
            program - tiles, place_ptr, class_ptr, windows, D0, D1, D2, SHIFT0, SHIFT1, SHIFT2, W0, W1, W2, ROWS,
            TILE, WINDOWS,
        )  # fmt: skip
    elif program < tiles + place_programs + side_programs:
        program -= tiles + place_programs
        _side_tile(
            program, side_ptr, SHIFT0, SHIFT1, SHIFT2, mask_high, mask_low, W0, W1, W2, ROWS, FOLD, TILE
        )  # fmt: skip
    else:  # the padding's channels, in the dtype of the map's
        channel = (program - tiles - place_programs - side_programs) * PAD_CHANNELS + tl.arange(0, PAD_CHANNELS)
        inside = channel < 3 * heads * HEAD_DIM
        pad = tl.load(given_pad_ptr + channel, mask=inside, other=0.0)
        tl.store(pad_ptr + channel, pad.to(pad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "groups", "tiles"])
def table_kernel(
    partial_ptr, entry_ptr, strange_ptr, grad_table_ptr, groups, heads, first_head, head_count, tiles,
    N: tl.constexpr, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Computes one row of the table's gradient: sums the pairs that read it in their order, and the groups in theirs.

    The pairs follow from the entry where the index is the standard one of F0 × F1 × F2 windows, which the layout's
    programs have checked; for any other index, all pairs are searched.
    """
    wanted = tl.program_id(0)
    strange = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        strange = tl.maximum(strange, tl.load(strange_ptr + at, mask=at < tiles, other=0))
    head = tl.arange(0, BLOCK_HEADS)
    total = tl.zeros([BLOCK_HEADS, BLOCK], tl.float32)
    if tl.max(strange, 0) == 0:
        if F0 > 0:
            d0 = wanted // ((2 * F1 - 1) * (2 * F2 - 1)) - F0 + 1
            d1 = wanted // (2 * F2 - 1) % (2 * F1 - 1) - F1 + 1
            d2 = wanted % (2 * F2 - 1) - F2 + 1
            for start in range(0, N, BLOCK):
                i = start + tl.arange(0, BLOCK)
                j0, j1, j2 = i // (F1 * F2) - d0, i // F2 % F1 - d1, i % F2 - d2
                j = (j0 * F1 + j1) * F2 + j2
                reads = (j0 >= 0) & (j0 < F0) & (j1 >= 0) & (j1 < F1) & (j2 >= 0) & (j2 < F2) & (i < N) & (j < N)
                inside = (head < head_count)[:, None] & reads[None, :]
                for group in range(groups):
                    row = (tl.cast(group, tl.int64) * head_count + head) * (N * N)
                    total += tl.load(partial_ptr + row[:, None] + (i * N + j)[None, :], mask=inside, other=0.0)
    else:
        for start in range(0, N * N, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            reads = tl.load(entry_ptr + pair, mask=pair < N * N, other=-1) == wanted
            if tl.max(reads.to(tl.int32), 0) > 0:
                inside = (head < head_count)[:, None] & reads[None, :]
                for group in range(groups):
                    row = (tl.cast(group, tl.int64) * head_count + head) * (N * N)
                    total += tl.load(partial_ptr + row[:, None] + pair[None, :], mask=inside, other=0.0)
    row = tl.sum(total, 1).to(grad_table_ptr.dtype.element_ty)
    tl.store(grad_table_ptr + wanted.to(tl.int64) * heads + first_head + head, row, mask=head < head_count)


@triton.jit(do_not_specialize=["heads", "first_head", "parts"])
def pad_kernel(
    part_ptr, grad_pad_ptr, heads, first_head, parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums the gradients of a head's padded keys or values over the key pass's programs; queries there have none."""
    program = tl.program_id(0)
    head, value = program // 2, program % 2
    channel = tl.arange(0, BLOCK_D)
    inside = channel < HEAD_DIM
    part_ptr += head.to(tl.int64) * parts * 2 * HEAD_DIM + value * HEAD_DIM
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        rows = part_ptr + part.to(tl.int64)[:, None] * (2 * HEAD_DIM) + channel[None, :]
        total += tl.load(rows, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
    to = grad_pad_ptr + (first_head + head) * HEAD_DIM + channel
    kind = grad_pad_ptr.dtype.element_ty
    tl.store(to + (1 + value) * heads * HEAD_DIM, tl.sum(total, 0).to(kind), mask=inside)
    tl.store(to, tl.zeros([BLOCK_D], kind), mask=inside & (channel < (1 - value) * HEAD_DIM))
