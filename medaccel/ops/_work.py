# SPDX-License-Identifier: Apache-2.0
"""Describes one call of an op with everything that it needs, so that it can be run in any way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """Holds one call of an op with everything that it needs; `run` does it forward and backward.

    Attributes:
        op: the public function's name.
        case: its name, for the report.
        reason: the reason why no kernel serves the tensors; None if one does.
        forward: maps `tensors` and then `others` to the op's output or outputs.
        tensors: the tensors that have the kernel's precision; each gets a gradient.
        sizes: sizes of the summed terms, one per output and gradient; a result's own largest value counts if it is
            larger.
        grads: the outputs' gradients; none for an output of one element.
        others: tensors that keep their dtype (coordinates, an index, scalars on the device); one that requires grad
            gets a gradient.
        reads_host: True if the call is given tensors on the host, which it has to copy: that waits for the device.
    """

    op: str
    case: str
    reason: str | None
    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: Sequence[Tensor]
    sizes: Sequence[float]
    grads: Sequence[Tensor] = ()
    others: Sequence[Tensor] = ()
    reads_host: bool = False

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def to(self, device: torch.device, dtype: torch.dtype) -> Work:
        """Returns the same work on another device and in another precision."""
        tensors, grads = ([t.to(device, dtype) for t in group] for group in (self.tensors, self.grads))
        others = [t.detach().to(device).requires_grad_(t.requires_grad) for t in self.others]
        return replace(self, tensors=tensors, grads=grads, others=others)

    def run(self) -> list[Tensor]:
        """Returns the outputs, and the gradients to the tensors and to those of the others that require grad."""
        leaves = [t.detach().requires_grad_() for t in self.tensors]
        others = [t.detach().requires_grad_(t.requires_grad) for t in self.others]
        result = self.forward(*leaves, *others)
        outputs = result if isinstance(result, tuple) else (result,)
        wanted = [*leaves, *(t for t in others if t.requires_grad)]
        grads = [g.to(y) for g, y in zip(self.grads, outputs, strict=True)] if self.grads else None
        gradients = torch.autograd.grad(outputs, wanted, grads, materialize_grads=True, allow_unused=True)
        return [*(y.detach() for y in outputs), *gradients]

    def output(self) -> tuple[Tensor, ...]:
        """Returns the outputs alone; nothing is recorded."""
        with torch.no_grad():
            result = self.forward(*self.tensors, *(t.detach() for t in self.others))
        return result if isinstance(result, tuple) else (result,)
