# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Computes the pixel-level contrastive loss on GPUs: forward, and a backward pass that recomputes the scores.

The kernels take unit vectors: normalising, and its gradient, are linear in the pixels and left to PyTorch. Forward, a
program holds BLOCK_M queries and streams the keys with two online log-sum-exps, over all and over the positives. A
tile of pairs without any positive skips the latter. Backward there are two such streams, one program per queries and
one per keys, so that every sum has one owner and a fixed order (no atomics). Scores are kept in base 2.

Distances are compared in the coordinates' dtype, but the compiler may fuse a multiplication and an addition: a pair
whose distance is the radius to the last bit can fall on the other side than on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from medaccel.ops._precision import IEEE, TF32, TF32X3, dot_precision
from medaccel.ops._triton_rows import through_norm, unit_rows


@dataclass(frozen=True)
class Tile:
    """Holds queries and keys of a pass's tile of scores, and its programs' launch parameters."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# The tiles are static, without autotuning: results and CUDA graphs must not depend on timings. Their keys are
# arithmetic ("half": bf16 and fp16; else the precision of fp32 products, of which "ieee" runs on the ordinary cores
# and holds its operands in registers), padded number of channels, pass. They were chosen by the compiler's counts of
# registers, spills and shared memory on sm_80, sm_90 and sm_100, fp64 coordinates included; not timed.
TILES = {
    "half": {
        32: dict.fromkeys(("forward", "query", "key"), Tile(64, 64, 8, 2)),
        64: dict.fromkeys(("forward", "query", "key"), Tile(64, 64, 8, 2)),
        128: dict.fromkeys(("forward", "query", "key"), Tile(64, 64, 8, 2)),
        256: dict.fromkeys(("forward", "query", "key"), Tile(64, 32, 8, 1)),
    },
    IEEE: {
        32: dict.fromkeys(("forward", "query", "key"), Tile(32, 32, 4, 1)),
        64: dict.fromkeys(("forward", "query", "key"), Tile(32, 32, 8, 1)),
        128: dict.fromkeys(("forward", "query", "key"), Tile(16, 16, 8, 1)),
        256: dict.fromkeys(("forward", "query", "key"), Tile(16, 16, 8, 1)),
    },
}
TILES[TF32] = {
    32: dict.fromkeys(("forward", "query", "key"), Tile(64, 32, 4, 1)),
    64: dict.fromkeys(("forward", "query", "key"), Tile(64, 32, 8, 1)),
    128: dict.fromkeys(("forward", "query", "key"), Tile(32, 32, 8, 1)),
    256: {**dict.fromkeys(("forward", "key"), Tile(32, 32, 8, 1)), "query": Tile(16, 32, 8, 1)},
}
TILES[TF32X3] = {  # the parts of 256 channels don't fit in registers
    32: TILES[TF32][32],
    64: dict.fromkeys(("forward", "query", "key"), Tile(32, 32, 8, 1)),
    128: dict.fromkeys(("forward", "query", "key"), Tile(16, 32, 8, 1)),
    256: TILES[IEEE][256],
}


@triton.jit
def _rows(ptr, row, count, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads (rows, BLOCK_C); 0 beyond the rows and the channels."""
    channel = tl.arange(0, BLOCK_C)
    inside = (row < count)[:, None] & (channel < C)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * C + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _near(query_coords_ptr, key_coords_ptr, limit, i, j, N, M):
    """Tells for (queries, keys) whether two pixels, of three coordinates each, lie closer than the root of limit."""
    x = tl.load(query_coords_ptr + i * 3, mask=i < N, other=0.0)[:, None]
    d = x - tl.load(key_coords_ptr + j * 3, mask=j < M, other=0.0)[None, :]
    squared = d * d
    y = tl.load(query_coords_ptr + i * 3 + 1, mask=i < N, other=0.0)[:, None]
    d = y - tl.load(key_coords_ptr + j * 3 + 1, mask=j < M, other=0.0)[None, :]
    squared += d * d
    z = tl.load(query_coords_ptr + i * 3 + 2, mask=i < N, other=0.0)[:, None]
    d = z - tl.load(key_coords_ptr + j * 3 + 2, mask=j < M, other=0.0)[None, :]
    squared += d * d
    return (squared < limit) & (i < N)[:, None] & (j < M)[None, :]


@triton.jit
def _add(top, total, s):
    """Updates an online log-sum-exp, (rows,), by another tile of scores; −∞ scores add nothing."""
    higher = tl.maximum(top, tl.max(s, 1))
    # If every score so far is −∞, ∞ − ∞ would make the sum NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)


@triton.jit
def forward_kernel(
    query_ptr, key_ptr, query_coords_ptr, key_coords_ptr, radius_ptr, loss_ptr, lse_ptr, positive_lse_ptr,
    N, M, scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ptr += sample * N * C
    key_ptr += sample * M * C
    query_coords_ptr += sample * N * 3
    key_coords_ptr += sample * M * 3
    radius = tl.load(radius_ptr + sample)
    q = _rows(query_ptr, i, N, C, BLOCK_C)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    positive_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    positive_total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, M, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = _rows(key_ptr, j, M, C, BLOCK_C)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where((j < M)[None, :], s, float("-inf"))
        top, total = _add(top, total, s)
        near = _near(query_coords_ptr, key_coords_ptr, radius * radius, i, j, N, M)
        if tl.sum(near.to(tl.int32)) > 0:
            positive_top, positive_total = _add(positive_top, positive_total, tl.where(near, s, float("-inf")))
    valid = positive_total != 0.0  # true of NaN
    lse = top + tl.log2(total)
    positive_lse = tl.where(valid, positive_top + tl.log2(tl.where(valid, positive_total, 1.0)), float("-inf"))
    above = lse - tl.where(valid, positive_lse, 0.0)
    above = tl.where(above < 0.0, 0.0, above)  # rounding may put the part above the whole; a NaN stays
    row = sample * N + i
    tl.store(loss_ptr + row, tl.where(valid, above * 0.6931471805599453, 0.0), mask=i < N)
    tl.store(lse_ptr + row, tl.where(valid, lse, 0.0), mask=i < N)
    tl.store(positive_lse_ptr + row, positive_lse, mask=i < N)


@triton.jit
def _slopes(
    q, k, weight_ptr, lse_ptr, positive_lse_ptr, query_coords_ptr, key_coords_ptr, limit, i, j, N, M, scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns a tile's gradients by the cosines, (queries, keys)."""
    weight = tl.load(weight_ptr + i, mask=i < N, other=0.0)
    lse = tl.load(lse_ptr + i, mask=i < N, other=float("inf"))
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    share = tl.exp2(s - lse[:, None])
    near = _near(query_coords_ptr, key_coords_ptr, limit, i, j, N, M)
    if tl.sum(near.to(tl.int32)) > 0:
        positive_lse = tl.load(positive_lse_ptr + i, mask=i < N, other=0.0)
        share -= tl.exp2(tl.where(near, s - positive_lse[:, None], float("-inf")))
    return tl.where((j < M)[None, :], share * weight[:, None], 0.0)


@triton.jit
def query_kernel(
    query_ptr, key_ptr, query_coords_ptr, key_coords_ptr, radius_ptr, weight_ptr, lse_ptr, positive_lse_ptr, grad_ptr,
    N, M, scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    query_coords_ptr += sample * N * 3
    key_coords_ptr += sample * M * 3
    radius = tl.load(radius_ptr + sample)
    q = _rows(query_ptr + sample * N * C, i, N, C, BLOCK_C)
    gradient = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, M, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = _rows(key_ptr + sample * M * C, j, M, C, BLOCK_C)
        slopes = _slopes(
            q, k, weight_ptr + sample * N, lse_ptr + sample * N, positive_lse_ptr + sample * N, query_coords_ptr,
            key_coords_ptr, radius * radius, i, j, N, M, scale, PRECISION,
        )  # fmt: skip
        gradient = tl.dot(slopes.to(k.dtype), k, gradient, input_precision=PRECISION)
    channel = tl.arange(0, BLOCK_C)
    inside = (i < N)[:, None] & (channel < C)[None, :]
    tl.store(grad_ptr + (sample * N + i)[:, None] * C + channel[None, :], gradient, mask=inside)


@triton.jit
def key_kernel(
    query_ptr, key_ptr, query_coords_ptr, key_coords_ptr, radius_ptr, weight_ptr, lse_ptr, positive_lse_ptr, grad_ptr,
    N, M, scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_N)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    query_coords_ptr += sample * N * 3
    key_coords_ptr += sample * M * 3
    radius = tl.load(radius_ptr + sample)
    k = _rows(key_ptr + sample * M * C, j, M, C, BLOCK_C)
    gradient = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, N, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        q = _rows(query_ptr + sample * N * C, i, N, C, BLOCK_C)
        slopes = _slopes(
            q, k, weight_ptr + sample * N, lse_ptr + sample * N, positive_lse_ptr + sample * N, query_coords_ptr,
            key_coords_ptr, radius * radius, i, j, N, M, scale, PRECISION,
        )  # fmt: skip
        gradient = tl.dot(tl.trans(slopes.to(q.dtype)), q, gradient, input_precision=PRECISION)
    channel = tl.arange(0, BLOCK_C)
    inside = (j < M)[:, None] & (channel < C)[None, :]
    tl.store(grad_ptr + (sample * M + j)[:, None] * C + channel[None, :], gradient, mask=inside)


# --- launches ------------------------------------------------------------------------------------------------
def padded_channels(channels: int) -> int:
    """Returns the number of channels in `TILES` that serves `channels`."""
    return max(32, triton.next_power_of_2(channels))


class _Problem:
    """Holds what all passes share: tensors in the layout that kernels read, their sizes, and their constants."""

    def __init__(
        self, query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor, temperature: float
    ):
        self.batch, self.queries, self.channels = query.shape
        self.keys = key.shape[1]
        (self.query, *self.query_length), (self.key, *self.key_length) = unit_rows(query), unit_rows(key)
        half = query.dtype == key.dtype and query.dtype in (torch.bfloat16, torch.float16)
        dtype = query.dtype if half else torch.float32
        self.precision = dot_precision(dtype)
        if self.precision == TF32X3 and self.channels > 128:
            self.precision = IEEE
        self.arithmetic = "half" if half else self.precision
        pad = 3 - query_coords.shape[2]
        self.tensors = (
            self.query.to(dtype).contiguous(),
            self.key.to(dtype).contiguous(),
            torch.nn.functional.pad(query_coords, (0, pad)).contiguous(),
            torch.nn.functional.pad(key_coords, (0, pad)).contiguous(),
            radius.contiguous(),
        )
        self.scale = 1 / (temperature * math.log(2.0))
        self.empty = 0 in (self.batch, self.queries, self.keys)

    def launch(self, kernel: Any, name: str, *others: Tensor) -> None:
        tile = TILES[self.arithmetic][padded_channels(self.channels)][name]
        blocks = triton.cdiv(self.keys, tile.block_n) if name == "key" else triton.cdiv(self.queries, tile.block_m)
        with torch.cuda.device_of(self.query):  # Triton launches on the current device
            kernel[(self.batch * blocks,)](
                *self.tensors, *others, self.queries, self.keys, self.scale,
                C=self.channels, BLOCK_C=padded_channels(self.channels), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                PRECISION=self.precision, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip


def forward(
    query: Tensor, key: Tensor, query_coords: Tensor, key_coords: Tensor, radius: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the op `pixel_contrastive_loss` for fp32, bf16 and fp16 features of up to 256 channels."""
    problem = _Problem(query, key, query_coords, key_coords, radius, temperature)
    loss, lse, positive_lse = (
        query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(3)
    )  # fmt: skip
    if problem.empty:
        return loss.zero_(), lse.zero_(), positive_lse.fill_(-torch.inf)
    problem.launch(forward_kernel, "forward", loss, lse, positive_lse)
    return loss, lse, positive_lse


def backward(
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
) -> tuple[Tensor, Tensor]:
    """Runs the op `pixel_contrastive_loss_backward`."""
    problem = _Problem(query, key, query_coords, key_coords, radius, temperature)
    valid = positive_lse != -torch.inf
    weight = torch.where(valid, grad.float() / temperature, 0.0).contiguous()
    # A row without a positive has no share in anything: 2^−∞.
    saved = (weight, torch.where(valid, lse, torch.inf).contiguous(), positive_lse.contiguous())
    grad_query, grad_key = query.new_empty(0), key.new_empty(0)
    if need_query:
        by_unit = torch.zeros_like(problem.query) if problem.empty else torch.empty_like(problem.query)
        if not problem.empty:
            problem.launch(query_kernel, "query", *saved, by_unit)
        grad_query = through_norm(by_unit, problem.query, *problem.query_length).to(query.dtype)
    if need_key:
        by_unit = torch.zeros_like(problem.key) if problem.empty else torch.empty_like(problem.key)
        if not problem.empty:
            problem.launch(key_kernel, "key", *saved, by_unit)
        grad_key = through_norm(by_unit, problem.key, *problem.key_length).to(key.dtype)
    return grad_query, grad_key
