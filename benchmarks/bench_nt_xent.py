# SPDX-License-Identifier: Apache-2.0
"""Times NT-Xent and InfoNCE, forward and backward, against plain PyTorch: `python -m benchmarks.bench_nt_xent
[--quick]`.

Embeddings are fp32 with 128 channels, on torch's threads. Plain PyTorch is the ops' reference: one matrix product and
a masked log-sum-exp of all scores. Each row is a ratio within one run: its median time / medaccel's.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness import Contender, against_reference, command
from medaccel.ops import info_nce_loss, nt_xent_loss
from medaccel.ops.nt_xent.cases import Case


def contenders(loss: Callable[..., Tensor], pairs: int) -> list[Contender]:
    """Computes the loss of so many pairs and its gradients."""
    case = Case("", pairs, 128)
    tensors = [t.requires_grad_() for t in case.tensors()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        value = loss(*tensors, temperature=case.temperature)
        return [value.detach(), *torch.autograd.grad(value, tensors)]

    return against_reference(run, tensors, 1e-4)


if __name__ == "__main__":
    works = {
        f"{loss.__name__}, {pairs} pairs": functools.partial(contenders, loss, pairs)
        for loss in (nt_xent_loss, info_nce_loss)
        for pairs in (512, 2048, 4096)
    }
    command(__doc__, works)
