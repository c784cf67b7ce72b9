# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Computes the cosines of two views' near pixels on GPUs: forward and backward.

A program owns a block of consecutive pixels and walks over the other view's blocks. Pixels come in row-major order,
so a block fills a small box: a block whose box is too far away is passed over, before its features are read. Every
sum has one owner and a fixed order (no atomics), and memory is linear in the pixels.

The kernels take unit vectors in fp32 and multiply in fp32, whatever the features' dtype and torch's precision of
products: few pairs are near, so that arithmetic costs little. Products and sums are not contracted
(`enable_fp_fusion=False`), so that the distances, and with them the pairs, are those of the reference to the last
bit; a box's distance is computed step by step as a point's is, and rounding keeps the order of numbers: a box that is
passed over holds no near pixel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from medaccel.ops._triton_rows import aligned, load_rows, through_norm, unit_rows

# These are a block's pixels, in both views, the channels that a product takes at once, and the warps of a program;
# static, without autotuning, and chosen by the compiler's counts of registers and spills; not timed.
BLOCK, BLOCK_C, NUM_WARPS = 32, 32, 4


@triton.jit
def boxes_kernel(coords_ptr, boxes_ptr, N, AXES: tl.constexpr, BLOCK: tl.constexpr):
    """Stores each block's box: the lowest coordinates, then the highest. A NaN, which is near to nothing, counts not;
    a block of NaN alone has its ends the wrong way round and is far from everything."""
    blocks = tl.cdiv(N, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    boxes_ptr += tl.program_id(0).to(tl.int64) * 2 * AXES
    for axis in tl.static_range(AXES):
        x = tl.load(coords_ptr + (sample * N + i) * AXES + axis, mask=i < N, other=float("nan"))
        tl.store(boxes_ptr + axis, tl.min(tl.where(x == x, x, float("inf")), 0))
        tl.store(boxes_ptr + AXES + axis, tl.max(tl.where(x == x, x, float("-inf")), 0))


@triton.jit
def _apart(box_ptr, other_box_ptr, limit, AXES: tl.constexpr):
    """Tells whether two boxes' squared distance is limit or more."""
    squared = tl.zeros([], limit.dtype)
    for axis in tl.static_range(AXES):
        above = tl.load(box_ptr + axis) - tl.load(other_box_ptr + AXES + axis)
        below = tl.load(other_box_ptr + axis) - tl.load(box_ptr + AXES + axis)
        d = tl.maximum(tl.maximum(above, below), 0.0)
        squared += d * d
    return squared >= limit


@triton.jit
def _near(coords_ptr, other_coords_ptr, limit, i, j, N, M, AXES: tl.constexpr, BLOCK: tl.constexpr):
    """Tells for (pixels, others) whether they lie closer than the root of limit."""
    squared = tl.zeros([BLOCK, BLOCK], limit.dtype)
    for axis in tl.static_range(AXES):
        x = tl.load(coords_ptr + i * AXES + axis, mask=i < N, other=0.0)[:, None]
        d = x - tl.load(other_coords_ptr + j * AXES + axis, mask=j < M, other=0.0)[None, :]
        squared += d * d
    return (squared < limit) & (i < N)[:, None] & (j < M)[None, :]


@triton.jit
def forward_kernel(
    query_ptr, key_ptr, query_coords_ptr, key_coords_ptr, query_boxes_ptr, key_boxes_ptr, radius_ptr, sums_ptr,
    counts_ptr, N, M,
    C: tl.constexpr, AXES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    other_blocks = tl.cdiv(M, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    radius = tl.load(radius_ptr + sample)
    limit = radius * radius
    query_ptr += sample * N * C
    key_ptr += sample * M * C
    query_coords_ptr += sample * N * AXES
    key_coords_ptr += sample * M * AXES
    query_boxes_ptr += tl.program_id(0).to(tl.int64) * 2 * AXES
    key_boxes_ptr += sample * other_blocks * 2 * AXES
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for block in range(other_blocks):
        if not _apart(query_boxes_ptr, key_boxes_ptr + block * 2 * AXES, limit, AXES):
            j = block * BLOCK + tl.arange(0, BLOCK)
            near = _near(query_coords_ptr, key_coords_ptr, limit, i, j, N, M, AXES, BLOCK)
            if tl.sum(near.to(tl.int32)) > 0:
                cosines = tl.zeros([BLOCK, BLOCK], tl.float32)
                for start in range(0, C, BLOCK_C):
                    channel = start + tl.arange(0, BLOCK_C)
                    q = load_rows(query_ptr, i, N, channel, C)
                    k = load_rows(key_ptr, j, M, channel, C)
                    cosines = tl.dot(q, tl.trans(k), cosines, input_precision="ieee")
                total += tl.sum(tl.where(near, cosines, 0.0), 1)
                count += tl.sum(near.to(tl.int32), 1)
    tl.store(sums_ptr + sample * N + i, total, mask=i < N)
    tl.store(counts_ptr + sample * N + i, count.to(tl.float32), mask=i < N)


@triton.jit
def gradient_kernel(
    other_ptr, weight_ptr, coords_ptr, other_coords_ptr, boxes_ptr, other_boxes_ptr, radius_ptr, grad_ptr, N, M,
    OWN_WEIGHT: tl.constexpr, C: tl.constexpr, AXES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Stores Σ_j weight · other_j over the near j, for each own pixel and a chunk of channels.

    OWN_WEIGHT: whether the weight is that of the own pixel, or of the other one.
    """
    blocks = tl.cdiv(N, BLOCK)
    other_blocks = tl.cdiv(M, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    radius = tl.load(radius_ptr + sample)
    limit = radius * radius
    other_ptr += sample * M * C
    coords_ptr += sample * N * AXES
    other_coords_ptr += sample * M * AXES
    boxes_ptr += tl.program_id(0).to(tl.int64) * 2 * AXES
    other_boxes_ptr += sample * other_blocks * 2 * AXES
    total = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    poison = tl.zeros([BLOCK], tl.float32)
    for block in range(other_blocks):
        if not _apart(boxes_ptr, other_boxes_ptr + block * 2 * AXES, limit, AXES):
            j = block * BLOCK + tl.arange(0, BLOCK)
            near = _near(coords_ptr, other_coords_ptr, limit, i, j, N, M, AXES, BLOCK)
            if tl.sum(near.to(tl.int32)) > 0:
                if OWN_WEIGHT:
                    weight = tl.load(weight_ptr + sample * N + i, mask=i < N, other=0.0)[:, None]
                else:
                    weight = tl.load(weight_ptr + sample * M + j, mask=j < M, other=0.0)[None, :]
                x = load_rows(other_ptr, j, M, channel, C)
                # A NaN must reach those that are near to it, and no others through 0 · NaN.
                poison += tl.sum(tl.where(near, tl.sum(x * 0.0, 1)[None, :], 0.0), 1)
                x = tl.where(x == x, x, 0.0)
                total = tl.dot(tl.where(near, weight, 0.0), x, total, input_precision="ieee")
    inside = (i < N)[:, None] & (channel < C)[None, :]
    place = grad_ptr + (sample * N + i)[:, None] * C + channel[None, :]
    tl.store(place, total + poison[:, None], mask=inside)


# --- launches ------------------------------------------------------------------------------------------------
class _View:
    """Holds one view's pixels in the layout that kernels read: unit vectors, coordinates and the blocks' boxes."""

    def __init__(self, features: Tensor, coords: Tensor):
        self.batch, self.pixels, self.channels = features.shape
        self.axes = coords.shape[2]
        self.unit, *self.length = unit_rows(features)
        self.rows = aligned(self.unit)
        self.coords = coords.contiguous()
        self.blocks = triton.cdiv(self.pixels, BLOCK)
        self.boxes = coords.new_empty(self.batch, self.blocks, 2, self.axes)
        if self.boxes.numel() > 0:
            launch(boxes_kernel, (self.batch * self.blocks,), (self.coords, self.boxes, self.pixels), AXES=self.axes)


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
    """Runs a kernel on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
        kernel[grid](*arguments, **constants, BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=False)


def forward(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs the op `pixel_pair_similarity` for fp32, bf16 and fp16 features."""
    q, k = _View(query, query_coords), _View(key, key_coords)
    sums, counts = (query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(2))
    if sums.numel() == 0 or k.pixels == 0:
        return sums.zero_(), counts.zero_()
    tensors = (q.rows, k.rows, q.coords, k.coords, q.boxes, k.boxes, radius.contiguous(), sums, counts)
    launch(
        forward_kernel, (q.batch * q.blocks,), (*tensors, q.pixels, k.pixels),
        C=q.rows.shape[2], AXES=q.axes, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return sums, counts


def _gradient(own: _View, other: _View, weight: Tensor, radius: Tensor, own_weight: bool) -> Tensor:
    """Returns the gradient by one view's features, in fp32. weight: the sums' gradient; own_weight: whether its rows
    are this view's."""
    by_unit = torch.empty_like(own.rows)
    if own.batch * own.pixels * other.pixels == 0:
        return torch.zeros_like(own.unit)
    tensors = (other.rows, weight, own.coords, other.coords, own.boxes, other.boxes, radius, by_unit)
    launch(
        gradient_kernel, (own.batch * own.blocks, triton.cdiv(own.rows.shape[2], BLOCK_C)),
        (*tensors, own.pixels, other.pixels),
        OWN_WEIGHT=own_weight, C=own.rows.shape[2], AXES=own.axes, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return through_norm(by_unit[..., : own.channels], own.unit, *own.length)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    query_coords: Tensor,
    key_coords: Tensor,
    radius: Tensor,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """Runs the op `pixel_pair_similarity_backward`."""
    q, k = _View(query, query_coords), _View(key, key_coords)
    weight, radii = grad.float().contiguous(), radius.contiguous()
    grad_query, grad_key = query.new_empty(0), key.new_empty(0)
    if need_query:
        grad_query = _gradient(q, k, weight, radii, own_weight=True).to(query.dtype)
    if need_key:
        grad_key = _gradient(k, q, weight, radii, own_weight=False).to(key.dtype)
    return grad_query, grad_key
