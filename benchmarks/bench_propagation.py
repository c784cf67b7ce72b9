# SPDX-License-Identifier: Apache-2.0
"""Times pixel propagation, forward and backward, against plain PyTorch: `python -m benchmarks.bench_propagation
[--quick]`.

Maps are fp32 with 64 channels, on torch's threads. Plain PyTorch is the op's reference, with all weights in memory.
Each row is a ratio within one run: its median time / medaccel's.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.harness import Contender, against_reference, command
from medaccel.ops import pixel_propagation
from medaccel.ops.propagation.cases import Case


def contenders(size: int) -> list[Contender]:
    """Computes the propagated values of a map with size³ pixels, and the gradients to features and values."""
    case = Case("", (1, size**3, 64, 64))
    features, values, grad = case.tensors()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        y = pixel_propagation(*tensors, power=case.power)
        return [y.detach(), *torch.autograd.grad(y, tensors, grad)]

    return against_reference(run, [features.requires_grad_(), values.requires_grad_()], 1e-4)


if __name__ == "__main__":
    command(__doc__, {f"{size}³ pixels": functools.partial(contenders, size) for size in (12, 16, 20)})
