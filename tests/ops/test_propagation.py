# SPDX-License-Identifier: Apache-2.0
"""Tests pixel propagation: every CPU implementation against the fp64 reference, its gradients, its properties."""

import contextlib
import math

import pytest
import torch
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import pixel_propagation
from medaccel.ops.propagation.cases import CASES, Case
from tests.ops.checks import EMULATED, IMPLEMENTATIONS, assert_twice_as_good, implementation, poisoned_memory

OP = torch.ops.medaccel.pixel_propagation.default
CPU = [name for name in IMPLEMENTATIONS if name not in EMULATED]
FLOOR = {torch.float64: 1e-14, torch.float32: 3e-7}


def with_gradients(x: Tensor, v: Tensor, g: Tensor, power: float) -> tuple[Tensor, ...]:
    wanted = (x.detach().requires_grad_(), v.detach().requires_grad_())
    y = pixel_propagation(*wanted, power=power)
    return y.detach(), *torch.autograd.grad(y, wanted, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 2.5])
@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_the_fp64_reference(case: Case, name: str, power: float, dtype: torch.dtype):
    x, v, g = case.tensors(dtype)
    with use_reference():
        truth = with_gradients(x.double(), v.double(), g.double(), power)
        plain = with_gradients(x, v, g, power)
    with implementation(name), poisoned_memory():
        ours = with_gradients(x, v, g, power)
    terms = 0.0
    if v.numel() > 0:
        # A feature's gradient is a sum of products g · v over the channels, over the vector's length; they cancel.
        terms = float((g.abs().amax() * v.abs().amax() * case.shape[3]) / x.norm(dim=-1).min())
    for actual, same, exact, scale in zip(ours, plain, truth, (1.0, terms, 1.0), strict=True):
        assert actual.dtype == dtype
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        assert_twice_as_good(actual, same, exact, FLOOR[dtype], max(largest, scale))


@pytest.mark.parametrize("name", CPU)
def test_three_pixels_by_hand(name: str):
    """Cosines 0.6 (weight 0.36) and −1 (no weight) with the first pixel."""
    x = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]]], dtype=torch.float64)
    v = torch.tensor([[[1.0], [10.0], [100.0]]], dtype=torch.float64)
    with implementation(name):
        y = pixel_propagation(x, v)
    torch.testing.assert_close(
        y.flatten(), torch.tensor([4.6, 10.36, 100.0], dtype=torch.float64), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("name", CPU)
def test_zero_vectors_take_nothing_and_a_nan_reaches_its_sample(name: str):
    x, v, g = Case("", (2, 50, 6, 5)).tensors(torch.float64)
    x[0, 7] = 0
    with implementation(name):
        y, grad_x, _ = with_gradients(x, v, g, 2.0)
        x[1, 3, 2] = torch.nan
        z = pixel_propagation(x, v)
    assert not y[0, 7].any()
    assert not grad_x[0, 7].any()
    assert torch.equal(z[0], y[0])
    assert z[1].isnan().all()


def test_the_number_of_threads_changes_no_bit():
    x, v, g = Case("", (2, 400, 24, 16)).tensors()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(x, v, g, 2.0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_fp32_and_rounded_once(dtype: torch.dtype):
    x, v, _ = Case("", (1, 60, 8, 8)).tensors(dtype)
    y = pixel_propagation(x, v)
    assert y.dtype == dtype
    assert torch.equal(y, pixel_propagation(x.float(), v.float()).to(dtype))


def test_non_contiguous_inputs_and_zero_stride_gradients_are_taken():
    x, v, _ = Case("", (2, 60, 8, 6)).tensors()
    views = (x.transpose(1, 2).contiguous().transpose(1, 2), v.expand(2, -1, -1)[:, :, ::2])
    dense = tuple(t.contiguous() for t in views)
    one = torch.ones(())
    for a, b in zip(
        with_gradients(*views, one.expand(2, 60, 3), 2.0),
        with_gradients(*dense, torch.ones(2, 60, 3), 2.0),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("power", [2.0, 3.5])
def test_gradients_pass_gradcheck(power: float):
    x, v, _ = Case("", (1, 6, 4, 3)).tensors(torch.float64)
    wanted = (x.requires_grad_(), v.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: pixel_propagation(a, b, power=power), wanted)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", [(2, 20, 5, 3), (0, 5, 4, 4)], ids=str)
def test_registration_passes_opcheck(shape, requires_grad: bool):
    x, v, _ = Case("", shape).tensors()
    torch.library.opcheck(OP, (x.requires_grad_(requires_grad), v.requires_grad_(requires_grad), 2.0))


def test_compiles_as_one_graph():
    x, v, _ = Case("", (1, 50, 8, 6)).tensors()
    wanted = (x.requires_grad_(), v.requires_grad_())
    call = lambda a, b: pixel_propagation(a * 2, b).square().sum()  # noqa: E731
    ours = torch.autograd.grad(torch.compile(call, fullgraph=True)(*wanted), wanted)
    for a, b in zip(ours, torch.autograd.grad(call(*wanted), wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_changes_nothing_and_double_backward_raises_a_sentence():
    x, v, _ = Case("", (1, 50, 8, 6)).tensors()
    expected = pixel_propagation(x, v)
    with torch.autocast("cpu", torch.bfloat16):
        y = pixel_propagation(x.requires_grad_(), v)
    assert torch.equal(y, expected)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"pixel_propagation: .*double backward"):
        g.sum().backward()


@pytest.mark.parametrize("forced", [False, True], ids=["native", "reference"])
def test_bad_input_is_refused_in_a_sentence(forced: bool):
    x, v, _ = Case("", (2, 5, 4, 3)).tensors()
    with use_reference() if forced else contextlib.nullcontext():
        with pytest.raises(ValueError, match=r"features has shape \(5, 4\); expected \(B, N, C\) with C >= 1"):
            pixel_propagation(x[0], v)
        with pytest.raises(ValueError, match=r"values has shape \(2, 4, 3\); expected \(2, 5, D\), a row per pixel"):
            pixel_propagation(x, v[:, 1:])
        with pytest.raises(TypeError, match=r"values is torch.int32; expected a floating-point tensor"):
            pixel_propagation(x, v.int())
        for power in (0.5, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"power is {power}; expected a finite number of at least 1"):
                pixel_propagation(x, v, power=power)
