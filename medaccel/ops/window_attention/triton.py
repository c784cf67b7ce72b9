# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Launches shifted-window attention on GPUs: the tiles and launches of the kernels in triton_kernels.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from medaccel.ops.window_attention.reference import dropout_threshold
from medaccel.ops.window_attention.triton_kernels import (
    bias_kernel,
    forward_kernel,
    key_kernel,
    query_kernel,
    table_kernel,
)


@dataclass(frozen=True)
class Tile:
    """Holds queries and keys of a pass's tile of scores, and its programs' launch parameters."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# The tiles are static, without autotuning: results and CUDA graphs must not depend on timings. Their keys are
# architecture, precision ("fp32" products run on the ordinary cores and hold their operands in registers), padded
# head dimension, pass. They were chosen by the compiler's counts of registers, spills and shared memory; not timed.
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
# So many programs in the bias's pass fill a large GPU; the number is constant, so that sums have the same order on
# every one.
_BIAS_PROGRAMS = 512
TABLE_BLOCK = 64


# --- launches ------------------------------------------------------------------------------------------------
def architecture(device: torch.device) -> int:
    """Returns the architecture's key in `TILES`. Consumer GPUs of any generation have sm_86's shared memory: sm_80's
    tiles fit them all."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return {(9, 0): 90, (10, 0): 100, (10, 3): 100}.get((major, minor), 80)


def padded_head_dim(head_dim: int) -> int:
    """Returns a head dimension that `tl.dot` can take: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


class _Problem:
    """Holds what all passes share: tensors in the layout that kernels read, their sizes, and their constants."""

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
        # The copies are held here: the kernels run on them after the caller's last reference is gone.
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
        """Returns the number of programs of a pass that has one per block of a window's tokens and head."""
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
    """Runs the op's kernel: returns (B, *spatial, C) and the rows' log-sum-exp in base 2, (B, windows, heads,
    tokens).

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
    """Returns the gradients to qkv, bias_table and pad_qkv, each an empty tensor if it isn't needed."""
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
    # A stable sort finds the pairs of tokens that read an entry, so that each sum has a fixed order.
    entries, order = problem.index.flatten().sort(stable=True)
    every = torch.arange(grad_table.shape[0] + 1, dtype=torch.int32, device=entries.device)
    starts = torch.searchsorted(entries.to(torch.int32), every, out_int32=True)
    table_kernel[(grad_table.shape[0],)](
        partial, order.to(torch.int32), starts, grad_table, groups, heads,
        PAIRS=n * n, BLOCK=TABLE_BLOCK, BLOCK_HEADS=triton.next_power_of_2(heads),
    )  # fmt: skip
