# SPDX-License-Identifier: Apache-2.0
"""Times PixPro's loss, forward and backward, against plain PyTorch.

`python -m benchmarks.bench_pixel_consistency [--quick]`: fp32, 64 channels, on torch's threads. Plain PyTorch is the
op's reference: all cosines and all distances. Each row is a ratio within one run: its median time / medaccel's.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.harness import Contender, against_reference, command
from medaccel.ops import pixel_consistency_loss
from medaccel.ops.pixel_consistency.cases import Views


def contenders(size: int) -> list[Contender]:
    """Computes the loss of two views with size³ pixels each, and its gradients."""
    query, key, *place = Views("", (size,) * 3, 64, batch=1, radius=1.0).tensors()
    at_query, at_key, radius = place

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        loss = pixel_consistency_loss(*tensors, at_query, at_key, radius=radius)
        return [loss.detach(), *torch.autograd.grad(loss, tensors)]

    return against_reference(run, [query.requires_grad_(), key.requires_grad_()], 1e-4)


if __name__ == "__main__":
    command(__doc__, {f"{size}³ pixels": functools.partial(contenders, size) for size in (12, 16, 20)})
