# SPDX-License-Identifier: Apache-2.0
"""Stage 5, attention: each stage of a Swin UNETR at 96³, shifted or not, beside SDPA, FlexAttention and PyTorch.

Every contender does the whole work, from the map to the map: padding, rolling and cutting into windows belong to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_checks.context import Context, Item
from gpu_checks.speed import ROTATING, contenders, race
from medaccel.ops import _checks
from medaccel.ops.window_attention import reference, verify
from medaccel.ops.window_attention.cases import Case

# Size of the map, heads.
STAGES = ((48, 3), (24, 6), (12, 12), (6, 24))
WINDOW = 7


@dataclass(frozen=True)
class Configuration:
    """Describes one row: the stage's map, and the dtype."""

    case: Case
    dtype: torch.dtype
    compiled: bool  # whether FlexAttention and the compiled reference compete: each takes many seconds to compile

    def __str__(self) -> str:
        case = self.case
        shifted = "shifted" if any(case.shift) else "not shifted"
        return f"{case.sizes[0]}³, {case.heads} × {case.head_dim}, {shifted}, {_checks.dtype_name(self.dtype)}"


def configurations(context: Context) -> list[Configuration]:
    """Returns the rows, those that decide first."""
    found = []
    stages = ((8, 2), (6, 3)) if context.dry else STAGES
    for dtype, head_dim in [(torch.bfloat16, d) for d in (16, 8, 32)] + [(torch.float32, d) for d in (16, 8)]:
        for size, heads in stages:
            window = min(WINDOW, size)
            for shift in (3, 0) if size > WINDOW else (0,):
                sizes, windows = (size,) * 3, (window,) * 3
                case = Case("", sizes, windows, (shift,) * 3, heads, head_dim, full_window=(WINDOW,) * 3)
                compiled = not context.dry and dtype == torch.bfloat16 and head_dim == 16 and size >= 24
                found.append(Configuration(case, dtype, compiled))
    return found[:2] if context.dry else found


# --- peers ---------------------------------------------------------------------------------------------------------
Core = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def around(case: Case, core: Core) -> Callable[..., Tensor]:
    """Returns the op's function with another attention in its middle: core(q, k, v, table, index, sides)."""
    padding = [-s % w for s, w in zip(case.sizes, case.window, strict=True)]
    padded = [s + p for s, p in zip(case.sizes, padding, strict=True)]
    axes, shifted = tuple(range(1, len(case.sizes) + 1)), any(case.shift)
    after = [n for p in reversed(padding) for n in (0, p)]

    @functools.cache
    def constants(device: torch.device) -> tuple[Tensor, Tensor | None]:
        inside = F.pad(torch.ones(case.sizes, dtype=torch.bool), after)[..., None].to(device)
        sides = reference.region_ids(padded, case.window, case.shift).to(device) if shifted else None
        return inside, sides

    def forward(qkv: Tensor, table: Tensor, pad: Tensor, index: Tensor) -> Tensor:
        inside, sides = constants(qkv.device)
        x = torch.where(inside, F.pad(qkv, [0, 0, *after]), pad) if any(padding) else qkv
        x = torch.roll(x, [-s for s in case.shift], axes) if shifted else x
        windows = reference.partition(x, case.window)
        batch, count, n, _ = windows.shape
        q, k, v = windows.reshape(batch * count, n, 3, case.heads, case.head_dim).permute(2, 0, 3, 1, 4)
        y = core(q, k, v, table, index, sides).transpose(1, 2).reshape(batch, count, n, -1)
        y = reference.unpartition(y, padded, case.window)
        y = torch.roll(y, case.shift, axes) if shifted else y
        return y[tuple(slice(0, s) for s in (batch, *case.sizes))].contiguous()

    return forward


def _with_sdpa(backend: SDPBackend) -> Core:
    def core(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor, sides: Tensor | None) -> Tensor:
        n = q.shape[2]
        bias = table[index.reshape(-1)].reshape(n, n, -1).permute(2, 0, 1)[None].to(q.dtype)
        if sides is not None:
            apart = (sides[:, :, None] != sides[:, None, :]).to(q.dtype) * reference.MASKED
            bias = bias + apart.repeat(len(q) // len(sides), 1, 1)[:, None]
        # Efficient kernels want rows of the mask aligned to 16 bytes: a slice of a wider one.
        wide = -n % 16
        bias = F.pad(bias, [0, wide])[..., :n] if wide else bias
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(q), -1, -1, -1))

    return core


def _with_flex() -> Core:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)

    def core(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor, sides: Tensor | None) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            s = s + table[index[i, j], h]
            if sides is not None:
                window = b % len(sides)
                s = s + torch.where(sides[window, i] != sides[window, j], reference.MASKED, 0.0)
            return s

        return compiled(q, k, v, score_mod=score)

    return core


def _row(context: Context, row: Configuration, training: bool) -> Iterator[dict[str, Any]]:
    device = torch.device(context.device)
    works = [verify.work_of(row.case, device, row.dtype, str(row)) for _ in range(ROTATING)]
    ways = contenders(works[0], compiled=row.compiled)
    for name, backend in (
        ("SDPA, efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("SDPA, math", SDPBackend.MATH),
    ):
        if name == "SDPA, math" or not context.dry:
            ways[name] = around(row.case, _with_sdpa(backend))
    if row.compiled:
        ways["FlexAttention"] = around(row.case, _with_flex())
    windows = math.prod(math.ceil(s / w) for s, w in zip(row.case.sizes, row.case.window, strict=True))
    tokens = math.prod(row.case.window)
    operations = 2 * (7 if training else 2) * windows * row.case.heads * tokens**2 * row.case.head_dim
    share = None
    if not context.dry:
        share = lambda ms: operations / ms / _checks.product_rate(device, row.dtype)  # noqa: E731
    yield from race(context, f"attention, {row}", works, ways, training, share)


def items(context: Context) -> list[Item]:
    """Returns an item for each row, forward and forward + backward."""
    return [
        Item(
            f"{row}, {'forward + backward' if training else 'forward'}",
            lambda r=row, t=training: _row(context, r, t),  # type: ignore[misc]
        )
        for row in configurations(context)
        for training in (False, True)
    ]
