# SPDX-License-Identifier: Apache-2.0
"""Gathers the rows of all processes, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medaccel.ops._transforms import is_wrapped


class _Gather(torch.autograd.Function):
    """Gathers (n, C) of each process to (world · n, C) on all of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every process' loss depends on these rows: their gradients add up.
        return _Own.apply(grads[0], ctx.group), None


class _Own(torch.autograd.Function):
    """Maps (world · n, C) of each process to the sum, over processes, of this one's rows: the transpose of
    `_Gather`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = rows.contiguous().clone()
        dist.all_reduce(total, group=group)
        count = len(total) // dist.get_world_size(group)
        first = count * dist.get_rank(group)
        return total[first : first + count].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grads[0].contiguous(), ctx.group), None


def gather(name: str, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gathers (n, C) of each process to (world · n, C) on all of them, in the order of ranks; differentiable any
    number of times.

    Raises:
        ValueError: the processes' numbers of rows differ (raised on every process); or the call is under vmap,
            another transform of torch.func or forward-mode differentiation, which communication does not follow.
    """
    if is_wrapped(rows):
        raise ValueError(
            f"{name}: group is given under vmap, another transform of torch.func or forward-mode differentiation, "
            "which don't reach other processes; expected None there"
        )
    mine = torch.full((1,), len(rows), device=rows.device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, mine, group=group)
    sizes = [int(count) for count in counts]
    if len(set(sizes)) > 1:
        raise ValueError(f"{name}: the processes have {sizes} rows; expected the same number on each")
    gathered: Tensor = _Gather.apply(rows.contiguous(), group)
    return gathered
