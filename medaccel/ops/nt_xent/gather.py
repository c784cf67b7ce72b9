# SPDX-License-Identifier: Apache-2.0
"""The rows of all processes, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every process' loss depends on these rows: their gradients add up.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        first = ctx.count * dist.get_rank(ctx.group)
        return total[first : first + ctx.count], None


def gather(name: str, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(n, C) of each process to (world · n, C) on all of them, in the order of ranks.

    Raises:
        ValueError: on every process, where their numbers of rows differ.
    """
    mine = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, mine, group=group)
    sizes = [int(count) for count in counts]
    if len(set(sizes)) > 1:
        raise ValueError(f"{name}: the processes have {sizes} rows; expected the same number on each")
    gathered: Tensor = _Gather.apply(rows.contiguous(), group)
    return gathered
