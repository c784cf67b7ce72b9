# SPDX-License-Identifier: Apache-2.0
"""Holds what the tests of the diffusion step share: its implementations, and its calls with and without gradients."""

from typing import Any

import torch
from torch import Tensor

from medaccel.ops import diffusion_step
from medaccel.ops.diffusion_step.cases import Case
from tests.ops.checks import EMULATED, IMPLEMENTATIONS

OP = torch.ops.medaccel.diffusion_step.default
KERNELS = IMPLEMENTATIONS[1:]
CPU = [name for name in KERNELS if name not in EMULATED]
FLOOR = {torch.float64: 2e-15, torch.float32: 1e-6}


def run(case: Case, tensors: dict[str, Tensor], **changes: Any) -> tuple[Tensor, Tensor]:
    return diffusion_step(**tensors, **{**case.options(), **changes})


def with_gradients(case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
    """x′, x0 and the gradients to every tensor that has one."""
    tensors = {name: t.detach() for name, t in tensors.items()}
    wanted = [t.requires_grad_() for name, t in tensors.items() if name != "mask"]
    outputs = run(case, tensors)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, wanted, grads))
