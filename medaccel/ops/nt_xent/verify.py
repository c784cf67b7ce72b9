# SPDX-License-Identifier: Apache-2.0
"""Checks and times NT-Xent and InfoNCE for `medaccel verify`."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops._dispatch import use_reference
from medaccel.ops.nt_xent import info_nce_loss, nt_xent_loss, unsupported
from medaccel.ops.nt_xent.cases import CASES, Case, named

_Loss = Callable[..., Tensor]


def _gradients(loss: _Loss, case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    a, b = (t.detach().requires_grad_() for t in tensors)
    value = loss(a, b, temperature=case.temperature)
    return [value.detach(), *torch.autograd.grad(value, (a, b))]


def _check(loss: _Loss, device: torch.device, dtype: torch.dtype, name: str) -> _checks.Check:
    """Checks the loss and the gradients to both views' embeddings."""
    case = named(name)
    tensors = [t.to(device) for t in case.tensors(dtype)]
    run = functools.partial(_gradients, loss, case)
    # The log-sum-exp and the positive's cosine cancel: both are as large as 1 / temperature.
    sizes = (1 / case.temperature,) * 3
    return _checks.compare(loss.__name__, name, unsupported(tensors[0]), run, tensors, sizes)


def _speeds(loss: _Loss, products: int, device: torch.device) -> Iterator[_checks.Speed]:
    """Times a batch of 512 pairs on the CPU, of 2048 on a GPU; forward + backward."""
    case = Case("", 512 if device.type == "cpu" else 2048, 128)
    tensors = [t.to(device) for t in case.tensors()]
    call = functools.partial(_gradients, loss, case, tensors)
    ours = _checks.median_ms(call, device)
    with use_reference():
        plain = _checks.median_ms(call, device)
    # All pairs take one product forward and three backward.
    share = 4 * 2 * products * case.pairs**2 * case.channels / ours / _checks.product_rate(device, torch.float32)
    name = f"{case.pairs} pairs, fp32"
    yield _checks.Speed(loss.__name__, str(device), name, ours, plain, None, "matmul", share)


def _verifier(loss: _Loss, products: int) -> _checks.Verifier:
    speeds = functools.partial(_speeds, loss, products)
    return _checks.Verifier([case.name for case in CASES], functools.partial(_check, loss), speeds)


# products: the number of pairs × pairs that make up all the scores.
NT_XENT = _verifier(nt_xent_loss, 4)
INFO_NCE = _verifier(info_nce_loss, 1)
