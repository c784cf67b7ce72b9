# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Launches shifted-window attention on GPUs: tiles, scratch memory and launches of the Triton kernels."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from medaccel.ops._precision import IEEE, TF32, TF32X3, dot_precision
from medaccel.ops.window_attention.reference import MASKED, dropout_threshold
from medaccel.ops.window_attention.triton_kernels import (
    LOG2E,
    bias_kernel,
    forward_kernel,
    key_kernel,
    query_kernel,
)
from medaccel.ops.window_attention.triton_layout import (
    PAD_CHANNELS,
    ROW_TILE,
    TILE,
    WINDOWS,
    layout_kernel,
    pad_kernel,
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
# architecture, arithmetic ("half": bf16 and fp16; else the precision of fp32 products, of which "ieee" runs on the
# ordinary cores and holds its operands in registers), padded head dimension, pass. They were chosen by the compiled
# code's instructions per score, registers, spills and shared memory; not timed.
_PASSES = ("forward", "query", "key", "bias")
_HALF = {
    16: dict.fromkeys(_PASSES, Tile(64, 64, 4, 2)),
    32: dict.fromkeys(_PASSES, Tile(64, 64, 4, 2)),
    64: dict.fromkeys(_PASSES, Tile(64, 64, 4, 2)),
}
_IEEE = {
    16: dict.fromkeys(_PASSES, Tile(32, 32, 4, 1)),
    32: {**dict.fromkeys(_PASSES, Tile(32, 32, 4, 1)), "key": Tile(32, 16, 4, 1)},
    64: {
        "forward": Tile(32, 16, 8, 1),
        "query": Tile(32, 32, 8, 1),
        "key": Tile(32, 32, 8, 1),
        "bias": Tile(32, 32, 4, 1),
    },
}
_TF32 = {
    16: {**dict.fromkeys(_PASSES, Tile(64, 32, 4, 1)), "key": Tile(32, 64, 4, 1)},
    32: {**dict.fromkeys(_PASSES, Tile(64, 32, 4, 1)), "key": Tile(32, 64, 4, 1)},
    64: {**dict.fromkeys(_PASSES, Tile(32, 32, 8, 1)), "forward": Tile(32, 32, 4, 1)},
}
_TF32X3 = {**_TF32, 64: {**_TF32[64], "key": Tile(32, 32, 4, 1)}}
TILES = {90: {"half": _HALF, IEEE: _IEEE, TF32: _TF32, TF32X3: _TF32X3}}
# sm_80's matrix units take all factors from registers, sm_100's keep sums in a memory of their own.
TILES[80] = {
    **TILES[90],
    "half": {
        16: _HALF[16],
        32: {**_HALF[32], "key": Tile(32, 64, 4, 2)},
        64: {**_HALF[64], "query": Tile(64, 32, 8, 2), "key": Tile(32, 32, 4, 2), "bias": Tile(32, 64, 8, 2)},
    },
    IEEE: {**_IEEE, 32: {**_IEEE[32], "forward": Tile(32, 16, 4, 1)}},
    TF32X3: {**_TF32X3, 32: {**_TF32X3[32], "key": Tile(16, 32, 4, 1)}},
}
TILES[100] = {
    **TILES[90],
    TF32X3: {
        16: _TF32X3[16],
        32: {**_TF32X3[32], "forward": Tile(64, 32, 8, 1), "key": Tile(16, 32, 4, 1)},
        64: {**_TF32X3[64], "bias": Tile(16, 32, 4, 1)},
    },
}
# The random words of dropout need registers of their own.
_DROPOUT_64 = dict.fromkeys(_PASSES, Tile(32, 32, 4, 2))
# So many programs in the bias's pass fill a large GPU; the number is constant, so that sums have the same order on
# every one.
_BIAS_PROGRAMS = 512
_TABLE_BLOCK = 64
_PAD_BLOCK = 256
_BIAS_BYTES = 2**28  # the bias of so many heads is expanded at a time; Swin UNETR's fit 50 times over
_FOLDED_SCALES = (2.0**-9, 2.0**9)  # for these, the mask over the scale fits in fp16


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


@functools.lru_cache(maxsize=256)
def standard_window(window: tuple[int, int, int], rows: int) -> tuple[int, int, int]:
    """Guesses the window that a table with so many rows was made for, (0, 0, 0) if none fits.

    Each offset between two tokens of a window has its row, so that there are prod(2 · size − 1). The window of a call
    may be a corner of that one, or its tokens in a row. The kernels check the guess against the index.
    """

    def sizes(least: Sequence[int], rows: int) -> tuple[int, ...] | None:
        if not least:
            return () if rows == 1 else None
        for size in range(least[0], (rows + 1) // 2 + 1):
            if rows % (2 * size - 1) == 0 and (others := sizes(least[1:], rows // (2 * size - 1))) is not None:
                return (size, *others)
        return None

    cube, square = ((round(rows ** (1 / axes)) + 1) // 2 for axes in (3, 2))
    tokens = math.prod(window)
    flat = window[0] == window[1] == 1
    for guess in (
        window,
        (cube, cube, cube) if not flat or cube**3 == tokens else None,
        (1, square, square) if window[0] == 1 else None,
        sizes(window, rows),
    ):
        if guess is not None and math.prod(2 * size - 1 for size in guess) == rows and math.prod(guess) >= tokens:
            return guess[0], guess[1], guess[2]
    return 0, 0, 0


def _half(value: float) -> float:
    """Returns the nearest number of fp16."""
    rounded: float = struct.unpack("e", struct.pack("e", value))[0]
    return rounded


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
        self.sizes, window = [1] * missing + sizes, [1] * missing + list(window_size)
        self.shift = [0] * missing + list(shift_size)
        grid = [triton.cdiv(size, w) for size, w in zip(self.sizes, window, strict=True)]
        self.windows, self.tokens = math.prod(grid), math.prod(window)
        self.table_rows = bias_table.shape[0]
        self.rows = triton.cdiv(self.tokens, ROW_TILE) * ROW_TILE
        self.padded = any(g * w > size for g, w, size in zip(grid, window, self.sizes, strict=True))
        # The copies are held here: the kernels run on them after the caller's last reference is gone.
        self.qkv = qkv.contiguous()
        self.table, self.index = bias_table.contiguous(), bias_index
        self.pad = pad_qkv.contiguous() if self.padded and pad_qkv is not None else None
        self.seed = dropout_seed if dropout_p > 0 else None
        self.scale = scale
        block_d = padded_head_dim(head_dim)
        precision = dot_precision(qkv.dtype)
        arithmetic = precision if qkv.dtype == torch.float32 else "half"
        self.fold = arithmetic != IEEE and _FOLDED_SCALES[0] <= scale <= _FOLDED_SCALES[1]
        self.window = {f"W{axis}": w for axis, w in enumerate(window)}
        standard = standard_window((window[0], window[1], window[2]), self.table_rows)
        self.standard = {f"F{axis}": size for axis, size in enumerate(standard)}
        self.dims = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
        self.scalars = (
            math.prod(self.sizes), scale, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p)
        )  # fmt: skip
        self.constants = {
            "N": self.tokens,
            "ROWS": self.rows,
            **self.dims,
            "SHIFTED": any(self.shift),
            "PAD": self.pad is not None,
            "DROPOUT": dropout_p > 0,
            "FOLD": self.fold,
            "PRECISION": precision,
        }
        self.tiles = TILES[arch or architecture(qkv.device)][arithmetic][block_d]
        if dropout_p > 0 and block_d == 64 and arithmetic == "half":
            self.tiles = _DROPOUT_64

    def parts(self, backward: bool) -> Iterator[_Part]:
        """Yields the heads in groups whose bias fits in memory, each with its layout computed."""
        copies = 2 if backward else 1
        count = max(1, min(self.heads, _BIAS_BYTES // (4 * copies * self.rows**2)))
        for first in range(0, self.heads, count):
            yield _Part(self, first, min(count, self.heads - first), backward)

    def options(self, use: str) -> dict[str, object]:
        tile = self.tiles[use]
        launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        return {**self.constants, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **launch}


class _Part:
    """Holds what the passes over some of the heads read, computed by one launch."""

    def __init__(self, problem: _Problem, first: int, count: int, backward: bool) -> None:
        p, self.count = problem, count
        square, device = p.rows * p.rows, p.qkv.device
        shifted, pad = p.constants["SHIFTED"], p.pad
        biases = torch.empty((2 if backward else 1, count * square), dtype=torch.float32, device=device)
        few = math.prod(p.sizes) < 2**31
        places = torch.empty(p.windows * p.rows, dtype=torch.int32 if few else torch.int64, device=device)
        classes = torch.empty(p.windows, dtype=torch.int32, device=device)
        sides = places  # a stand-in: nothing reads it where nothing is shifted
        if shifted:
            shape, kind = ((8, 2, p.rows, 16), torch.float16) if p.fold else ((8, p.rows), torch.int8)
            sides = torch.empty(shape, dtype=kind, device=device)
        own_pad = p.qkv if pad is None else torch.empty(p.qkv.shape[-1], dtype=p.qkv.dtype, device=device)
        self.entries = self.strange = places
        self.bias_tiles = (p.rows // TILE) ** 2
        if backward:
            self.entries = torch.empty(p.tokens**2, dtype=torch.int32, device=device)
            self.strange = torch.empty(self.bias_tiles, dtype=torch.int32, device=device)
        place_programs = triton.cdiv(p.windows, WINDOWS) * (p.rows // TILE)
        side_programs = 0 if not shifted else (16 if p.fold else 8) * p.rows // TILE
        pad_programs = 0 if pad is None else triton.cdiv(own_pad.numel(), PAD_CHANNELS)
        mask = MASKED / p.scale if p.fold else 0.0
        high = _half(mask)
        layout_kernel[(self.bias_tiles + place_programs + side_programs + pad_programs,)](
            p.table, p.index, p.qkv if pad is None else pad, biases, self.entries, self.strange, places, classes,
            sides, own_pad, *p.index.stride(), p.heads, first, count, p.windows, *p.sizes, *p.shift,
            place_programs, side_programs, 1 / p.scale if p.fold else LOG2E, high, mask - high,
            T=p.table_rows, **p.window, **p.standard, ROWS=p.rows, HEAD_DIM=p.dims["HEAD_DIM"], FOLD=p.fold,
            BACKWARD=backward, TILE=TILE, WINDOWS=WINDOWS, PAD_CHANNELS=PAD_CHANNELS,
        )  # fmt: skip
        others = (places, classes, sides, classes if p.seed is None else p.seed)
        self.inputs = (p.qkv, own_pad, biases, *others)
        self.transposed_inputs = (p.qkv, own_pad, biases[-1], *others)
        self.first = first
        voxels, *scalars = p.scalars
        self.scalars = (p.windows, p.heads, first, count, voxels, *scalars)

    def programs(self, problem: _Problem, block: int) -> int:
        """Returns the number of programs of a pass that has one per block of a window's tokens and head."""
        return problem.batch * problem.windows * self.count * triton.cdiv(problem.tokens, block)


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
    tokens), +∞ for padding.

    `arch` names a row of `TILES` instead of the device's.
    """
    problem = _Problem(
        qkv, bias_table, bias_index, pad_qkv, dropout_seed, window_size, shift_size, scale, dropout_p, arch
    )
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    lse = qkv.new_empty((problem.batch, problem.windows, problem.heads, problem.tokens), dtype=torch.float32)
    if out.numel():
        options = problem.options("forward")
        with torch.cuda.device_of(qkv):
            for part in problem.parts(backward=False):
                programs = part.programs(problem, problem.tiles["forward"].block_m)
                forward_kernel[(programs,)](*part.inputs, out, lse, *part.scalars, **options)
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
    if qkv.numel() == 0:
        grad_table = bias_table.new_zeros(bias_table.shape if need_table else 0)
        grad_pad = pad_like.new_zeros(qkv.shape[-1:] if need_pad else 0)
        return qkv.new_empty(qkv.shape if need_qkv else 0), grad_table, grad_pad
    problem = _Problem(
        qkv, bias_table, bias_index, pad_qkv, dropout_seed, window_size, shift_size, scale, dropout_p, arch
    )
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_table = bias_table.new_empty(bias_table.shape if need_table else (0,))
    sum_pad = need_pad and problem.padded
    grad_pad = pad_like.new_empty(qkv.shape[-1:] if need_pad else (0,))
    if need_pad and not sum_pad:
        grad_pad.zero_()
    grad, output, lse = grad.contiguous(), output.contiguous(), lse.contiguous()
    rows = lse.new_empty((*lse.shape[:-1], 2, problem.rows))  # lse and Σ do · o of each query
    with torch.cuda.device_of(qkv):
        for part in problem.parts(backward=True):
            options = problem.options("query")
            programs = part.programs(problem, problem.tiles["query"].block_m)
            query_kernel[(programs,)](
                *part.inputs, lse, output, grad, rows, grad_qkv, *part.scalars, **options
            )  # fmt: skip
            if need_qkv or need_pad:
                _grad_keys(problem, part, (rows, grad, grad_qkv), grad_pad if sum_pad else None)
            if need_table:
                _grad_table(problem, part, (rows, grad), grad_table)
    return grad_qkv if need_qkv else qkv.new_empty(0), grad_table, grad_pad


def _grad_keys(problem: _Problem, part: _Part, tensors: tuple[Tensor, ...], grad_pad: Tensor | None) -> None:
    """Launches the pass over the keys, and the sum over its programs of what the padding gets."""
    head_dim = problem.dims["HEAD_DIM"]
    programs = part.programs(problem, problem.tiles["key"].block_n)
    sums = torch.empty(1 if grad_pad is None else programs * 2 * head_dim, device=problem.qkv.device)
    key_kernel[(programs,)](
        *part.transposed_inputs, *tensors, sums, *part.scalars, GRAD_PAD=grad_pad is not None,
        **problem.options("key"),
    )  # fmt: skip
    if grad_pad is not None:
        pad_kernel[(2 * part.count,)](
            sums, grad_pad, problem.heads, part.first, programs // part.count, **problem.dims, BLOCK=_PAD_BLOCK
        )


def _grad_table(problem: _Problem, part: _Part, tensors: tuple[Tensor, ...], grad_table: Tensor) -> None:
    """Launches the pass over the bias, and the sum over the pairs of tokens that read an entry of the table."""
    tile, n, count = problem.tiles["bias"], problem.tokens, part.count
    all_windows = problem.batch * problem.windows
    tiles = triton.cdiv(n, tile.block_m) * triton.cdiv(n, tile.block_n)
    group = triton.cdiv(all_windows, max(1, min(all_windows, _BIAS_PROGRAMS // (tiles * problem.heads))))
    groups = triton.cdiv(all_windows, group)
    partial = torch.empty(groups, count, n, n, dtype=torch.float32, device=grad_table.device)
    bias_kernel[(groups * tiles * count,)](
        *part.inputs, *tensors, partial, all_windows, group, *part.scalars, **problem.options("bias")
    )  # fmt: skip
    table_kernel[(grad_table.shape[0],)](
        partial, part.entries, part.strange, grad_table, groups, problem.heads, part.first, count, part.bias_tiles,
        N=n, **problem.standard, BLOCK=_TABLE_BLOCK, BLOCK_HEADS=triton.next_power_of_2(count),
    )  # fmt: skip
