# SPDX-License-Identifier: Apache-2.0
"""The watch finds what makes the host wait, and an op whose CUDA code differs from what its fake declares."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medaccel import ops
from medaccel.ops.gaussian import native
from tests.fake_cuda.device import CUDA, fake_gpu, on_gpu

pytestmark = [pytest.mark.fake_cuda, pytest.mark.slow]

ON_GPU = torch.ones(3)
WAITS: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda x: torch.tensor([1.0, 2.0], device=CUDA),
    "a number": lambda x: torch.as_tensor(1.0, device=CUDA),
    "an array": lambda x: torch.as_tensor(np.ones(3), device=CUDA),
    "to the GPU": lambda x: torch.ones(3).to(CUDA),
    "to the GPU, written into": lambda x: x.copy_(torch.ones(3)),
    "to the host": lambda x: x.cpu(),
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "truth": lambda x: bool((x > 0).all()),
    "equal": lambda x: torch.equal(x, x + 1),
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "filled there": lambda x: torch.full((3,), 2.0, device=CUDA) + x,
    "a number of the host's": lambda x: x * torch.tensor(2.0),
    "between dtypes": lambda x: x.double().half(),
    "the host's own": lambda x: torch.ones(3).sum().item(),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_is_found(what: str, monkeypatch: pytest.MonkeyPatch):
    with fake_gpu(monkeypatch) as watch:
        x = on_gpu(ON_GPU)
        with contextlib.suppress(RuntimeError):  # a fake has no numbers to give
            WAITS[what](x)
    assert watch.waits != []


@pytest.mark.parametrize("what", FREE)
def test_what_does_not_wait_is_let_pass(what: str, monkeypatch: pytest.MonkeyPatch):
    with fake_gpu(monkeypatch) as watch:
        FREE[what](on_gpu(ON_GPU))
    assert watch.waits == []


def test_backward_is_watched_too(monkeypatch: pytest.MonkeyPatch):
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.ones(3).to(CUDA)

    with fake_gpu(monkeypatch) as watch:
        x = on_gpu(ON_GPU).requires_grad_()
        Waits.apply(x).sum().backward()
        assert x.grad.device == CUDA
    assert watch.waits != []


def test_cuda_code_that_gives_another_dtype_is_found(monkeypatch: pytest.MonkeyPatch):
    right = native.gaussian_filter_gpu
    monkeypatch.setattr(native, "gaussian_filter_gpu", lambda *args, **options: right(*args, **options).double())
    with fake_gpu(monkeypatch), pytest.raises(AssertionError, match="its CUDA code gives"):
        ops.gaussian_filter(on_gpu(torch.ones(1, 1, 9)), 1.0)
