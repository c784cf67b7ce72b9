# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Computes pixel propagation on GPUs: forward, and a backward pass that recomputes the weights.

A program holds BLOCK_M pixels' sums and streams all pixels past them; no N × N tensor is made. A weight is the same
in both directions. So the values' gradient is the forward pass applied to the output's gradient, and the features'
gradient is one sum too, over what flows from a pixel to another and back: every sum has one owner and a fixed order
(no atomics). With unit vectors u, their cosines s, the weights w and the output's gradient g:

    values:   dv_i = Σ_j w(s_ij) · g_j
    features: du_i = Σ_j w'(s_ij) · (g_i · v_j + g_j · v_i) · u_j

Normalising, and its gradient, are linear in the pixels and left to PyTorch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from medaccel.ops._precision import dot_precision
from medaccel.ops._triton_rows import aligned, load_rows, through_norm, unit_rows
from medaccel.ops.pixel_contrast.triton import padded_channels


@dataclass(frozen=True)
class Tile:
    """Holds the own and the other pixels of a pass's tile, the channels that a product takes at once, and its
    programs' launch parameters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# The tiles are static, without autotuning: results and CUDA graphs must not depend on timings. Their keys are the
# products' precision ("half": of bf16 or fp16; else fp32's), the padded number of channels (the larger of features'
# and values'), pass. They were chosen by the compiler's counts of instructions, registers and spills; not timed.
TILES = {
    "half": {
        32: {"sum": Tile(64, 64, 32, 4, 2), "features": Tile(64, 64, 32, 4, 2)},
        64: {"sum": Tile(64, 64, 64, 4, 2), "features": Tile(64, 64, 64, 4, 2)},
        128: {"sum": Tile(64, 64, 64, 4, 2), "features": Tile(64, 32, 64, 4, 1)},
        256: {"sum": Tile(64, 32, 64, 8, 1), "features": Tile(64, 32, 64, 8, 1)},
    },
    "tf32": {
        32: {"sum": Tile(64, 64, 32, 8, 1), "features": Tile(64, 32, 32, 8, 1)},
        64: {"sum": Tile(64, 64, 32, 8, 1), "features": Tile(64, 32, 32, 8, 1)},
        128: {"sum": Tile(32, 32, 32, 8, 1), "features": Tile(32, 32, 32, 8, 1)},
        256: {"sum": Tile(32, 32, 32, 8, 1), "features": Tile(32, 32, 32, 8, 1)},
    },
    "tf32x3": {
        32: {"sum": Tile(32, 32, 32, 4, 1), "features": Tile(16, 32, 32, 4, 1)},
        64: {"sum": Tile(32, 32, 64, 4, 1), "features": Tile(16, 32, 64, 4, 1)},
    },
    "ieee": {
        32: {"sum": Tile(32, 32, 32, 4, 1), "features": Tile(32, 32, 32, 4, 1)},
        64: {"sum": Tile(32, 32, 32, 4, 1), "features": Tile(32, 32, 32, 4, 1)},
        128: {"sum": Tile(32, 16, 32, 8, 1), "features": Tile(32, 16, 32, 8, 1)},
        256: {"sum": Tile(32, 16, 32, 8, 1), "features": Tile(32, 16, 32, 8, 1)},
    },
}


@triton.jit
def _weight(s, power, POWER: tl.constexpr):
    """Returns max(s, 0)^power; a NaN stays. POWER is 1 or 2 if `power` is that, else 0."""
    s = tl.where(s < 0.0, 0.0, s)
    if POWER == 1:
        return s
    if POWER == 2:
        return s * s
    return tl.exp2(power * tl.log2(s))


@triton.jit
def _slope(s, power, POWER: tl.constexpr):
    """Returns the derivative of `_weight` by s, which is 0 at 0."""
    s = tl.where(s < 0.0, 0.0, s)
    if POWER == 1:
        return tl.where(s > 0.0, 1.0, s)
    if POWER == 2:
        return 2.0 * s
    return power * tl.exp2((power - 1.0) * tl.log2(s))


@triton.jit
def _products(a_ptr, b_ptr, i, j, N, sums, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the products of rows i of a and rows j of b to sums (i, j), some channels at a time."""
    for start in range(0, WIDTH, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        a, b = load_rows(a_ptr, i, N, channel, WIDTH), load_rows(b_ptr, j, N, channel, WIDTH)
        sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
    return sums


@triton.jit
def sum_kernel(
    unit_ptr, value_ptr, sums_ptr, N, power,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK)
    unit_ptr += sample * N * C
    value_ptr += sample * N * D
    total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        cosines = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        cosines = _products(unit_ptr, unit_ptr, i, j, N, cosines, C, BLOCK_K, PRECISION)
        value = load_rows(value_ptr, j, N, channel, D)
        total = tl.dot(_weight(cosines, power, POWER).to(value.dtype), value, total, input_precision=PRECISION)
    inside = (i < N)[:, None] & (channel < WIDTH)[None, :]
    place = sums_ptr + (sample * N + i)[:, None] * WIDTH + channel[None, :]
    tl.store(place, total.to(sums_ptr.dtype.element_ty), mask=inside)


@triton.jit
def features_kernel(
    unit_ptr, value_ptr, grad_ptr, sums_ptr, N, power,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK)
    unit_ptr += sample * N * C
    value_ptr += sample * N * D
    grad_ptr += sample * N * D
    total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        flow = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        flow = _products(grad_ptr, value_ptr, i, j, N, flow, D, BLOCK_K, PRECISION)
        flow = _products(value_ptr, grad_ptr, i, j, N, flow, D, BLOCK_K, PRECISION)
        cosines = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        cosines = _products(unit_ptr, unit_ptr, i, j, N, cosines, C, BLOCK_K, PRECISION)
        flow *= _slope(cosines, power, POWER)
        other = load_rows(unit_ptr, j, N, channel, C)
        if other.dtype == tl.float16:
            # What flows may lie beyond fp16's range. TF32 has as many digits as fp16, and the range of fp32.
            total = tl.dot(flow, other.to(tl.float32), total, input_precision="tf32")
        else:
            total = tl.dot(flow.to(other.dtype), other, total, input_precision=PRECISION)
    inside = (i < N)[:, None] & (channel < WIDTH)[None, :]
    tl.store(sums_ptr + (sample * N + i)[:, None] * WIDTH + channel[None, :], total, mask=inside)


# --- launches ------------------------------------------------------------------------------------------------
class _Problem:
    """Holds what all passes share: tensors in the layout that kernels read, their sizes, and their constants."""

    def __init__(self, features: Tensor, values: Tensor, power: float):
        self.batch, self.pixels, _ = features.shape
        half = features.dtype == values.dtype and features.dtype in (torch.bfloat16, torch.float16)
        self.dtype = features.dtype if half else torch.float32
        self.unit, *self.length = unit_rows(features)
        self.rows = self._rows(self.unit)
        self.power = ctypes.c_float(power).value  # as the kernels get it
        self.width = padded_channels(max(features.shape[2], values.shape[2]))
        self.precision = dot_precision(self.dtype)
        if self.precision == "tf32x3" and (self.width not in TILES["tf32x3"] or self.power not in (1, 2)):
            self.precision = "ieee"  # more exact still, and no slower where three products take too many registers
        self.tiles = TILES["half" if half else self.precision][self.width]
        self.empty = values.numel() == 0

    def _rows(self, x: Tensor) -> Tensor:
        return aligned(x.to(self.dtype))

    def _launch(self, kernel: Any, name: str, *tensors: Tensor) -> None:
        channels, value_channels = self.rows.shape[2], tensors[0].shape[2]
        tile = self.tiles[name]
        with torch.cuda.device_of(self.rows):  # Triton launches on the current device
            kernel[(self.batch * triton.cdiv(self.pixels, tile.block_m),)](
                self.rows, *tensors, self.pixels, self.power,
                C=channels, D=value_channels, WIDTH=tensors[-1].shape[2], BLOCK=padded_channels(tensors[-1].shape[2]),
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
                POWER=int(self.power) if self.power in (1, 2) else 0, PRECISION=self.precision,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip

    def sums(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns Σ_j w_ij · values_j."""
        out = values.new_empty(values.shape, dtype=dtype)
        self._launch(sum_kernel, "sum", self._rows(values), out)
        return out

    def features_gradient(self, values: Tensor, grad: Tensor) -> Tensor:
        """Returns the gradient by the features, in fp32."""
        by_unit = torch.empty_like(self.unit)
        self._launch(features_kernel, "features", self._rows(values), self._rows(grad), by_unit)
        return through_norm(by_unit, self.unit, *self.length)


def forward(features: Tensor, values: Tensor, power: float) -> Tensor:
    """Runs the op `pixel_propagation` for fp32, bf16 and fp16 tensors of up to 256 channels."""
    problem = _Problem(features, values, power)
    return values.new_zeros(values.shape) if problem.empty else problem.sums(values, values.dtype)


def backward(
    grad: Tensor, features: Tensor, values: Tensor, power: float, need_features: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    """Runs the op `pixel_propagation_backward`."""
    problem = _Problem(features, values, power)
    grad_features, grad_values = features.new_empty(0), values.new_empty(0)
    if need_features:
        empty = problem.empty
        by_features = torch.zeros_like(problem.unit) if empty else problem.features_gradient(values, grad)
        grad_features = by_features.to(features.dtype)
    if need_values:
        grad_values = values.new_zeros(values.shape) if problem.empty else problem.sums(grad, values.dtype)
    return grad_features, grad_values
