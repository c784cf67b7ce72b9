# SPDX-License-Identifier: Apache-2.0
"""Tests instance norm with residual and activation: every implementation against the reference, and the
registration."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import instance_norm_act
from medaccel.ops.instance_norm.cases import CASES, Case, laid
from tests.ops.checks import EMULATED, IMPLEMENTATIONS, assert_twice_as_good, implementation, poisoned_memory

OP = torch.ops.medaccel.instance_norm_act.default
CPU = [name for name in IMPLEMENTATIONS if name not in EMULATED]
EVERYWHERE = [*CPU, EMULATED[0]]  # no argument lies on either device: the second emulation would be the first
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-7}


def with_gradients(case: Case, tensors: tuple, dtype: torch.dtype) -> list[Tensor]:
    """Checks the output and the gradients to input, weight, bias and residual, as far as they are given."""
    *given, grad = (None if t is None else t.detach().to(dtype) for t in tensors)
    wanted = [t.requires_grad_() for t in given if t is not None]
    x, weight, bias, residual = given
    y = instance_norm_act(x, weight, bias, residual=residual, negative_slope=case.slope)
    gradients = torch.autograd.grad(y, wanted, grad.to(y.dtype), materialize_grads=True, allow_unused=True)
    return [y.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_the_fp64_reference(case: Case, name: str, dtype: torch.dtype):
    tensors = case.tensors(dtype)
    with use_reference():
        truth = with_gradients(case, tensors, torch.float64)
        plain = with_gradients(case, tensors, dtype)
    with implementation(name), poisoned_memory():
        ours = with_gradients(case, tensors, dtype)
    # 1/σ multiplies differences from the mean: the rounded terms are as large as the input.
    with torch.no_grad():
        x = tensors[0].double()
        sigma = x.var(tuple(range(2, x.dim())), correction=0).sqrt().min() if x.numel() else x.new_ones(())
        size = float(x.abs().max() / sigma) if x.numel() else 1.0
    for actual, same_precision, exact in zip(ours, plain, truth, strict=True):
        assert actual.dtype == dtype
        scale = max(float(exact.abs().max()), 1.0) * size if exact.numel() else 1.0
        assert_twice_as_good(actual, same_precision, exact, FLOOR[dtype], scale)


@pytest.mark.parametrize("name", EVERYWHERE[1:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_strides_are_those_of_empty_like(case: Case, name: str):
    tensors = case.tensors(torch.float32)
    with implementation(name):
        y, grad_input, *_ = with_gradients(case, tensors, torch.float32)
    expected = torch.empty_like(tensors[0])
    assert y.stride() == expected.stride()
    assert grad_input.stride() == expected.stride()


@pytest.mark.parametrize("slope", [None, 0.2, -0.7])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_pass_gradcheck(slope: float | None, residual: bool):
    x, weight, bias, r, _ = Case("", (2, 3, 3, 4), affine=True, residual=residual).tensors(torch.float64)
    wanted = tuple(t.requires_grad_() for t in (x, weight, bias, r) if t is not None)

    def call(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor | None = None) -> Tensor:
        return instance_norm_act(x, weight, bias, residual=r, negative_slope=slope)

    assert torch.autograd.gradcheck(call, wanted)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_registration_passes_opcheck(number: int, requires_grad: bool):
    case = CASES[number]
    tensors = [t if t is None else t.detach().requires_grad_(requires_grad) for t in case.tensors(torch.float32)[:4]]
    torch.library.opcheck(OP, (*tensors, 1e-5, case.slope))


@pytest.mark.parametrize("wanted", range(4), ids=["input", "weight", "bias", "residual"])
def test_only_the_wanted_gradients_are_computed(wanted: int):
    case = Case("", (2, 5, 4, 5, 6), residual=True, affine=True)
    x, weight, bias, r, grad = case.tensors(torch.float32)
    tensors = [x, weight, bias, r]
    everything = with_gradients(case, (*tensors, grad), torch.float32)[1:]
    tensors[wanted].requires_grad_()
    instance_norm_act(x, weight, bias, residual=r, negative_slope=case.slope).backward(grad)
    for number, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (number == wanted)
    assert torch.equal(tensors[wanted].grad, everything[wanted])


def test_the_input_and_the_output_are_all_that_is_kept_for_backward():
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    x, r = torch.randn(2, 4, 8, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        instance_norm_act(x, negative_slope=0.1)
        assert sorted(sizes) == [8, 8, x.numel()]
        sizes.clear()
        instance_norm_act(x, residual=r, negative_slope=0.1)
        assert sorted(sizes) == [8, 8, x.numel(), x.numel()]


def test_double_backward_raises_a_sentence():
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(instance_norm_act(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not written.*use_reference"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_half_precision_is_computed_in_fp32_and_rounded_once(name: str, dtype: torch.dtype):
    x, _, _, r, _ = Case("", (2, 3, 5, 6, 7), residual=True).tensors(dtype)
    with implementation(name):
        y = instance_norm_act(x, residual=r, negative_slope=0.1)
        exact = instance_norm_act(x.float(), residual=r.float(), negative_slope=0.1)
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("name", CPU[1:])
@pytest.mark.parametrize("case", CASES[:9], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads_or_the_run(name: str, case: Case):
    shape = (*case.shape[:2], *(3 * s for s in case.shape[2:]))  # large enough for several threads
    tensors = Case("", shape, case.view, case.others, case.residual, case.affine, case.slope).tensors(torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            with implementation(name):
                results.append(with_gradients(case, tensors, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, again) for first, again in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("view", ["", "last"])
def test_a_nan_spreads_over_its_own_channel_of_its_own_sample(name: str, view: str):
    x = laid(torch.randn(2, 3, 4, 5, 6), view)
    x[1, 2, 0, 0, 0] = float("nan")
    with implementation(name):
        y = instance_norm_act(x, negative_slope=0.1)
    assert y[1, 2].isnan().all()
    assert y[0].isfinite().all()
    assert y[1, :2].isfinite().all()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_constant_channels_give_the_bias(name: str):
    x, bias = torch.full((1, 2, 9, 9, 9), 3.7), torch.tensor([0.5, -2.0])
    with implementation(name):
        y = instance_norm_act(x, torch.ones(2), bias)
    torch.testing.assert_close(y, bias.reshape(1, 2, 1, 1, 1).expand_as(y), rtol=0, atol=1e-3)


def test_an_outlier_does_not_spoil_the_variance():
    x = torch.randn(1, 1, 40, 40, 40, dtype=torch.float64)
    x[0, 0, 0, 0, 0] = 1e4
    truth = F.instance_norm(x)
    assert float((instance_norm_act(x.float()).double() - truth).abs().max()) < 2e-4 * float(truth.abs().max())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_it_is_torchs_norm_and_right_where_torchs_gradient_is_not(memory_format: torch.memory_format):
    x, grad = (torch.randn(1, 5, 6, 7, dtype=torch.float64) for _ in range(2))
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(instance_norm_act(x, None, bias), F.instance_norm(x, bias=bias))
    sums = grad.sum((0, 2, 3))
    grad = grad.to(memory_format=memory_format)
    for forced in (False, True):
        with use_reference() if forced else contextlib.nullcontext():
            (ours,) = torch.autograd.grad(instance_norm_act(x, None, bias), bias, grad)
        torch.testing.assert_close(ours, sums)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str):
    x, weight, bias, r, grad = Case("", (2, 3, 4, 5, 6), residual=True, affine=True).tensors(torch.float32)
    x.requires_grad_()
    call = lambda x: instance_norm_act(x * 2, weight, bias, residual=r, negative_slope=0.1) + 1  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    (expected,) = torch.autograd.grad(call(x), x, grad)
    y = compiled(x)
    torch.testing.assert_close(y, call(x))
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected)


def test_autocast_leaves_the_norms_dtype_to_its_input_as_torch_does():
    x = torch.randn(1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert instance_norm_act(x.to(dtype)).dtype == F.instance_norm(x.to(dtype)).dtype


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 2),
    st.sampled_from(["", "last", "sliced"]),
    st.booleans(),
    st.sampled_from([None, 0.0, 0.3, -1.5]),
)
def test_random_shapes_match_the_reference(
    sizes: list, channels: int, batch: int, view: str, residual: bool, slope: float | None
):
    if torch.Size(sizes).numel() == 1:
        sizes[0] = 2
    case = Case("", (batch, channels, *sizes), view, view, residual, True, slope)
    tensors = case.tensors(torch.float64)
    with use_reference():
        truth = with_gradients(case, tensors, torch.float64)
    for ours, exact in zip(with_gradients(case, tensors, torch.float64), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-8)


# --- bad input -----------------------------------------------------------------------------------------------
X = torch.randn(2, 3, 4, 5)
BAD = {
    "input is torch.int64": (lambda: instance_norm_act(torch.zeros(1, 2, 3, dtype=torch.int64)), TypeError),
    "input is list": (lambda: instance_norm_act([1.0]), TypeError),
    r"input has shape \(4, 5\); expected \(B, C, \*spatial\)": (lambda: instance_norm_act(X[0, 0]), ValueError),
    "more than 1 spatial element": (lambda: instance_norm_act(X[:, :, :1, :1]), ValueError),
    r"weight has shape \(2,\); expected \(3,\)": (lambda: instance_norm_act(X, torch.ones(2)), ValueError),
    r"bias has shape \(3, 1\); expected \(3,\)": (lambda: instance_norm_act(X, None, torch.ones(3, 1)), ValueError),
    r"residual has shape \(2, 3, 4\)": (lambda: instance_norm_act(X, residual=X[..., 0]), ValueError),
    "weight is on meta and input on cpu": (lambda: instance_norm_act(X, torch.ones(3, device="meta")), ValueError),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_in_a_sentence(words: str):
    call, error = BAD[words]
    with pytest.raises(error, match=words):
        call()


def test_a_single_element_raises_torchs_own_error():
    with pytest.raises(ValueError, match="Expected more than 1") as torchs:
        F.instance_norm(X[:, :, :1, :1])
    with pytest.raises(ValueError, match="Expected more than 1") as ours:
        instance_norm_act(X[:, :, :1, :1])
    assert str(ours.value) == str(torchs.value)
