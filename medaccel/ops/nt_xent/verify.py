# SPDX-License-Identifier: Apache-2.0
"""Checks and times NT-Xent and InfoNCE for `medaccel verify`."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from medaccel.ops import _checks
from medaccel.ops._dispatch import use_reference
from medaccel.ops.nt_xent import info_nce_loss, nt_xent_loss, unsupported
from medaccel.ops.nt_xent.cases import CASES, Case, named

_Loss = Callable[..., Tensor]


_LEARNT = ", learnt temperature"


def _work(loss: _Loss, device: torch.device, dtype: torch.dtype, name: str) -> _checks.Work:
    """Returns one loss: its value and the gradients to both views' embeddings, and to a learnt temperature."""
    case = named(name.removesuffix(_LEARNT))
    tensors = [t.to(device) for t in case.tensors(dtype)]
    learnt = torch.tensor(case.temperature, dtype=torch.float32, device=device, requires_grad=True)

    def forward(a: Tensor, b: Tensor, temperature: Tensor | float = case.temperature) -> Tensor:
        return loss(a, b, temperature=temperature)

    # The log-sum-exp and the positive's cosine cancel: both are as large as 1 / temperature.
    sizes: tuple[float, ...] = (1 / case.temperature,) * 3
    if not name.endswith(_LEARNT):
        return _checks.Work(loss.__name__, name, unsupported(tensors[0]), forward, tensors, sizes)
    sizes = (*sizes, 1 / case.temperature**2)
    return _checks.Work(loss.__name__, name, unsupported(tensors[0]), forward, tensors, sizes, others=[learnt])


def _speeds(loss: _Loss, products: int, device: torch.device) -> Iterator[_checks.Speed]:
    """Times a batch of 512 pairs on the CPU, of 2048 on a GPU; forward + backward."""
    case = Case("", 512 if device.type == "cpu" else 2048, 128)
    tensors = [t.to(device) for t in case.tensors()]
    forward = functools.partial(loss, temperature=case.temperature)
    call = _checks.Work(loss.__name__, "", None, forward, tensors, ()).run
    ours = _checks.median_ms(call, device)
    with use_reference():
        plain = _checks.median_ms(call, device)
    # All pairs take one product forward and three backward.
    share = 4 * 2 * products * case.pairs**2 * case.channels / ours / _checks.product_rate(device, torch.float32)
    name = f"{case.pairs} pairs, fp32"
    yield _checks.Speed(loss.__name__, str(device), name, ours, plain, None, "matmul", share)


def _verifier(loss: _Loss, products: int) -> _checks.Verifier:
    speeds = functools.partial(_speeds, loss, products)
    cases = [*(case.name for case in CASES), *(f"{name}{_LEARNT}" for name in ("odd_sizes", "sharp"))]
    return _checks.Verifier(cases, functools.partial(_work, loss), speeds, "production")


# products: the number of pairs × pairs that make up all the scores.
NT_XENT = _verifier(nt_xent_loss, 4)
INFO_NCE = _verifier(info_nce_loss, 1)
