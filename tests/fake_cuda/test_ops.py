# SPDX-License-Identifier: Apache-2.0
"""On a GPU no op makes the host wait, and each gives the CPU's shapes and dtypes, autocast and gradients included."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from medaccel import use_reference
from medaccel.ops._registry import OPS
from tests.fake_cuda.calls import CALLERS, WAYS, Call, calls_of
from tests.fake_cuda.device import CUDA, Watch, fake_gpu, on_gpu

pytestmark = [pytest.mark.fake_cuda, pytest.mark.slow]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AUTOCAST = (None, torch.bfloat16, torch.float16)


def tensors_of(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def autocast(device: str, dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def with_gradients(call: Call, tensors: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """The results, and the gradients to every tensor that has one."""

    def wanted(t: Any) -> Any:
        floating = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().requires_grad_(t.requires_grad or t.dim() > 2 or t.dim() == 2) if floating else t

    return _run(call, pytree.tree_map(wanted, tensors))


def _run(call: Call, tensors: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    results = tensors_of(call.run(tensors))
    leaves = [t for t in tensors_of(tensors) if t.requires_grad]
    total = [r for r in results if r.requires_grad]
    if not total:
        return results, []
    grads = torch.autograd.grad(total, leaves, [torch.ones_like(r) for r in total], allow_unused=True)
    return results, list(grads)


def kinds(tensors: list[Tensor | None]) -> list[Any]:
    return [None if t is None else (tuple(t.shape), t.dtype) for t in tensors]


def assert_as_on_the_cpu(
    call: Call, patch: pytest.MonkeyPatch, cast: torch.dtype | None = None, *, gradients: bool = True
) -> Watch:
    """The call waits for nothing, and its results and gradients are of the CPU's shapes and dtypes, on the GPU."""

    def run(tensors: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        if gradients:
            return with_gradients(call, tensors)
        return tensors_of(call.run(tensors)), []

    with autocast("cpu", cast):
        there = run(call.tensors)
    with fake_gpu(patch) as watch:
        tensors = on_gpu(call.tensors)
        with autocast("cuda", cast):
            here = run(tensors)
    patch.undo()
    for a, b in zip(here, there, strict=True):
        assert kinds(a) == kinds(b)
        assert {t.device for t in a if t is not None} <= {CUDA}
    assert watch.waits == []
    return watch


def test_every_op_is_called():
    assert set(CALLERS) == set(OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_case_of_an_op_waits_and_all_give_what_the_cpu_gives(
    op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    for call in calls_of(op, dtype):
        try:
            assert_as_on_the_cpu(call, monkeypatch)
        except Exception as error:
            raise AssertionError(f"{call}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("cast", AUTOCAST[1:], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_autocast_is_the_cpus(op: str, cast: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    for call in list(calls_of(op, torch.float32))[:4]:
        assert_as_on_the_cpu(call, monkeypatch, cast)


@pytest.mark.parametrize("way", WAYS)
def test_however_a_number_is_given_nothing_waits(way: str, monkeypatch: pytest.MonkeyPatch):
    assert_as_on_the_cpu(Call(way, *WAYS[way]), monkeypatch, gradients="in place" not in way)


@pytest.mark.parametrize("op", OPS)
def test_a_reference_waits_for_nothing_either(op: str, monkeypatch: pytest.MonkeyPatch):
    with use_reference():
        for call in list(calls_of(op, torch.float32))[:8]:
            if op != "gaussian_filter":  # its taps are as many as σ says
                assert_as_on_the_cpu(call, monkeypatch)
