# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Two small Triton ops that prove the harness, written as the package's Triton ops are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class TileConfig:
    """Holds tile sizes and launch parameters of the matrix product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# A static table, no autotuning: it would make results and CUDA graphs depend on timings. float32 has half the
# tile depth because `ieee` products run on the ordinary cores and hold their operands in registers.
TILES = {
    80: {
        torch.float32: TileConfig(32, 32, 16, num_warps=4, num_stages=2),
        torch.bfloat16: TileConfig(64, 64, 32, num_warps=4, num_stages=3),
        torch.float16: TileConfig(64, 64, 32, num_warps=4, num_stages=3),
    },
    90: {
        torch.float32: TileConfig(32, 32, 16, num_warps=4, num_stages=2),
        torch.bfloat16: TileConfig(64, 64, 32, num_warps=4, num_stages=3),
        torch.float16: TileConfig(64, 64, 32, num_warps=4, num_stages=3),
    },
    100: {
        torch.float32: TileConfig(32, 32, 16, num_warps=4, num_stages=2),
        torch.bfloat16: TileConfig(64, 64, 32, num_warps=4, num_stages=3),
        torch.float16: TileConfig(64, 64, 32, num_warps=4, num_stages=3),
    },
}
SCALE_BIAS_BLOCK = 1024


@triton.jit
def scale_bias_kernel(x_ptr, scale_ptr, bias_ptr, y_ptr, n_elements, channels, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_elements
    channel = offsets % channels
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    y = x * scale + bias
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def matmul_kernel(
    a_ptr,  # [m, k]
    b_ptr,  # [k, n]
    c_ptr,  # [m, n]
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        a_inside = (rows < m) & (depth[None, :] < k)
        b_inside = (depth[:, None] < k) & (columns < n)
        a = tl.load(a_ptr + rows.to(tl.int64) * k + depth[None, :], mask=a_inside, other=0.0)
        b = tl.load(b_ptr + depth[:, None].to(tl.int64) * n + columns, mask=b_inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    c = total.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + rows.to(tl.int64) * n + columns, c, mask=(rows < m) & (columns < n))


def scale_bias(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Computes x · scale + bias per channel, in float32: x (..., C), scale and bias (C,); keeps x's shape and
    dtype."""
    x = x.contiguous()
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), SCALE_BIAS_BLOCK),)
    scale_bias_kernel[grid](x, scale, bias, y, x.numel(), x.shape[-1], BLOCK=SCALE_BIAS_BLOCK)
    return y


def matmul(a: torch.Tensor, b: torch.Tensor, arch: int = 80) -> torch.Tensor:
    """Multiplies a (m, k) by b (k, n) of one dtype, accumulated in float32, with the tiles of an architecture: (m,
    n)."""
    a, b = a.contiguous(), b.contiguous()
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=a.dtype, device=a.device)
    tile = TILES[arch][a.dtype]
    grid = (triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n))
    matmul_kernel[grid](
        a,
        b,
        c,
        m,
        n,
        k,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return c
