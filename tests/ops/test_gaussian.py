# SPDX-License-Identifier: Apache-2.0
"""Tests the Gaussian filter: every implementation against the fp64 reference, its gradients, and its properties."""

import contextlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import gaussian_filter
from medaccel.ops.gaussian import reference
from medaccel.ops.gaussian.cases import APPROX, CASES, MODES, Case
from tests.ops.checks import (
    EMULATED,
    IMPLEMENTATIONS,
    assert_twice_as_good,
    implementation,
    max_error,
    poisoned_memory,
)

OP = torch.ops.medaccel.gaussian_filter.default
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def run(x: Tensor, sigma: Tensor, options: dict) -> Tensor:
    return gaussian_filter(x, sigma, **options)


def with_gradients(x: Tensor, sigma: Tensor, grad: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    x, sigma = x.detach().requires_grad_(), sigma.detach().requires_grad_()
    y = run(x, sigma, options)
    gradients = torch.autograd.grad(y, (x, sigma), grad.to(y.dtype), materialize_grads=True)
    return y.detach(), *gradients


def implementations_and_dtypes() -> list[tuple[str, torch.dtype, str]]:
    """Every implementation with every dtype and border. An emulated GPU takes a second a case, so where σ lies on the
    device, which changes nothing but what is launched, one plain and one folding border must do."""
    everything = itertools.product(IMPLEMENTATIONS, (torch.float32, torch.float64), MODES)
    few = [(torch.float32, "constant"), (torch.float32, "mirror"), (torch.float64, "wrap")]
    return [(name, dtype, mode) for name, dtype, mode in everything if name != EMULATED[1] or (dtype, mode) in few]


@pytest.mark.parametrize(("name", "dtype", "mode"), implementations_and_dtypes())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_match_the_fp64_reference(name: str, case: Case, mode: str, dtype: torch.dtype):
    x = case.input(dtype)
    sigma = torch.tensor(case.sigma, dtype=torch.float64)
    grad = torch.randn(case.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for approx in APPROX if mode == "constant" and name not in EMULATED else APPROX[:1]:
        options = {**case.options, "mode": mode, "approx": approx}
        with use_reference():
            truth = with_gradients(x.double(), sigma, grad, options)
            plain = with_gradients(x, sigma, grad, options)
        with implementation(name), poisoned_memory():
            ours = with_gradients(x, sigma, grad, options)
        # The gradient to sigma is a dot product of the gradient with a filtered input: terms of that size cancel.
        scales = (None, None, float(grad.norm() * x.double().norm()))
        for actual, same_precision, exact, scale in zip(ours, plain, truth, scales, strict=True):
            assert_twice_as_good(actual, same_precision, exact, FLOOR[dtype], scale)
        assert ours[0].dtype == ours[1].dtype == dtype
        assert ours[0].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_half_precision_is_computed_in_fp32_and_rounded_once(name: str, dtype: torch.dtype):
    x = CASES[4].input(dtype)
    with implementation(name):
        y = gaussian_filter(x, 1.5)
        assert torch.equal(y, gaussian_filter(x.float(), 1.5).to(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("approx", APPROX)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_to_input_and_sigma_pass_gradcheck(mode: str, approx: str, normalize: bool):
    x = torch.randn(2, 1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.7, 0.9, 1.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: OP(x, s, 2.0, approx, mode, normalize), (x, sigma))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["image", "channels_last", "sliced", "empty_batch", "transposed"])
def test_registration_passes_opcheck(name: str, requires_grad: bool):
    case = next(c for c in CASES if c.name == name)
    x = case.input().detach().requires_grad_(requires_grad)
    sigma = torch.tensor(case.sigma, requires_grad=requires_grad)
    torch.library.opcheck(OP, (x, sigma, 4.0, "erf", "reflect", False))


@pytest.mark.parametrize(("x_grad", "s_grad"), [(True, False), (False, True), (True, True)])
def test_only_the_wanted_gradients_are_computed(x_grad: bool, s_grad: bool):
    x = torch.randn(1, 1, 8, 8, 8, requires_grad=x_grad)
    sigma = torch.tensor([1.0, 1.0, 1.0], requires_grad=s_grad)
    gaussian_filter(x, sigma).sum().backward()
    assert (x.grad is not None, sigma.grad is not None) == (x_grad, s_grad)


def test_the_input_is_kept_for_backward_only_where_sigma_needs_it():
    for s_grad in (False, True):
        saved: list[torch.Size] = []
        x = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
        sigma = torch.ones(3, requires_grad=s_grad)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.shape), lambda t: t):
            gaussian_filter(x, sigma)
        assert (x.shape in saved) == s_grad


def test_double_backward_raises_a_sentence():
    x = torch.randn(1, 1, 6, requires_grad=True)
    (g,) = torch.autograd.grad(gaussian_filter(x, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_zero_stride_gradient_is_taken():
    x = torch.randn(1, 2, 6, 7, 8, requires_grad=True)
    gaussian_filter(x, 1.0, mode="reflect").sum().backward()  # sum's gradient is expanded from one number
    with use_reference():
        (truth,) = torch.autograd.grad(gaussian_filter(x, 1.0, mode="reflect").sum(), x)
    torch.testing.assert_close(x.grad, truth)


# --- peers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("mode", ["reflect", "nearest", "mirror", "wrap"])
def test_sampled_and_normalised_is_scipys_filter(mode: str, sigma: float):
    x = torch.randn(24, 40, 33, dtype=torch.float64)
    expected = scipy.ndimage.gaussian_filter(x.numpy(), sigma, mode=mode)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        y = gaussian_filter(x.to(dtype)[None, None], sigma, approx="sampled", normalize=True, mode=mode)
        assert np.abs(y[0, 0].double().numpy() - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("approx", APPROX)
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 4.0])
def test_constant_border_is_monais_filter(sigma: float, approx: str):
    from monai.networks.layers import GaussianFilter

    x = torch.randn(1, 2, 20, 24, 28)
    expected = GaussianFilter(3, sigma, approx=approx)(x)
    y = gaussian_filter(x, sigma, approx=approx)
    assert max_error(y, expected) <= 1e-6 * float(expected.abs().max())


def test_a_vanishing_sigma_is_the_identity():
    x = torch.randn(1, 1, 9, dtype=torch.float64)
    for approx in ("erf", "scalespace"):
        assert torch.equal(gaussian_filter(x, 1e-200, approx=approx), x)


def test_scalespace_stays_finite_where_monais_bessel_functions_overflow():
    taps = reference.taps(torch.tensor(20.0), 4.0, "scalespace", False)
    assert taps.isfinite().all()
    assert float(taps.sum()) == pytest.approx(1.0, abs=1e-4)
    impulse = torch.zeros(1, 1, 201, dtype=torch.float64)
    impulse[..., 100] = 1
    torch.testing.assert_close(gaussian_filter(impulse, 20.0, approx="scalespace")[0, 0, 20:181], taps)


# --- properties ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
def test_filter_is_linear_and_commutes_with_flips(mode: str):
    a, b = torch.randn(2, 1, 1, 9, 10, 11, dtype=torch.float64)
    f = lambda x: gaussian_filter(x, (1.0, 2.0, 0.5), mode=mode)  # noqa: E731
    torch.testing.assert_close(f(2 * a - 3 * b), 2 * f(a) - 3 * f(b))
    torch.testing.assert_close(f(a.flip(2, 4)), f(a).flip(2, 4))


@pytest.mark.parametrize("mode", ["reflect", "nearest", "mirror", "wrap"])
def test_normalised_filter_keeps_a_constant(mode: str):
    x = torch.full((1, 1, 7, 8, 9), 3.0, dtype=torch.float64)
    torch.testing.assert_close(gaussian_filter(x, 2.0, mode=mode, normalize=True), x)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 41), (1, 1, 30, 31), (1, 1, 20, 21, 40)], ids=str)
def test_a_nan_spreads_exactly_as_far_as_the_taps(name: str, shape: tuple[int, ...]):
    x = torch.randn(shape)
    spot = tuple(s // 2 for s in shape[2:])
    x[(0, 0, *spot)] = torch.nan
    with implementation(name):
        y = gaussian_filter(x, 1.0)
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[(0, 0, *(slice(max(0, c - 4), c + 5) for c in spot))] = True  # radius int(4·1 + 0.5)
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n.startswith("cpu")])
@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_the_number_of_threads_or_the_run(name: str, mode: str):
    x = torch.randn(1, 2, 40, 50, 70, requires_grad=True)
    sigma = torch.tensor([1.5, 2.0, 1.0], requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            with implementation(name):
                y = gaussian_filter(x, sigma, mode=mode)
                results.append((y, *torch.autograd.grad(y.square().sum(), (x, sigma))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


def test_direct_call_and_dispatched_call_give_the_same_bits():
    x = torch.randn(1, 2, 9, 10, 11)
    direct = gaussian_filter(x, 1.5)
    assert torch.equal(direct, OP(x, torch.full((3,), 1.5, dtype=torch.float64), 4.0, "erf", "constant", False))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    sigma=st.just(0.0) | st.floats(0.01, 5.0),
    mode=st.sampled_from(MODES),
    approx=st.sampled_from(APPROX),
)
def test_random_shapes_and_sigmas_match_the_reference(shape: list[int], sigma: float, mode: str, approx: str):
    x = torch.randn(1, 2, *shape, dtype=torch.float64)
    y = gaussian_filter(x, sigma, mode=mode, approx=approx)
    with use_reference():
        torch.testing.assert_close(y, gaussian_filter(x, sigma, mode=mode, approx=approx))


# --- torch's machinery ---------------------------------------------------------------------------------------
def test_compiles_as_one_graph_without_recompiling_for_a_new_sigma():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(x: Tensor, s: Tensor) -> Tensor:
        return gaussian_filter(x * 2, s, mode="reflect").sin()

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for value in (1.0, 2.0, 3.5):
        x = torch.randn(1, 1, 6, 7, 8, requires_grad=True)
        s = torch.tensor([value] * 3, requires_grad=True)
        ours = torch.autograd.grad(compiled(x, s).sum(), (x, s))
        eager = torch.autograd.grad(f(x, s).sum(), (x, s))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_compiles_with_the_default_backend():
    f = torch.compile(lambda x: gaussian_filter(x, 1.5), fullgraph=True)
    x = torch.randn(1, 1, 6, 7, 8)
    assert torch.equal(f(x), gaussian_filter(x, 1.5))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_gives_its_dtype_and_fp32_arithmetic(compiled: bool):
    f = lambda x: gaussian_filter(x, 1.5)  # noqa: E731
    if compiled:
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 1, 6, 7, 8, requires_grad=True)
    exact = gaussian_filter(x.detach(), 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        y = f(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_checkpointing_gives_the_same_gradient():
    x = torch.randn(1, 1, 6, 7, 8, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: gaussian_filter(x, 1.5).sin(), x, use_reentrant=False)
    (again,) = torch.autograd.grad(y.sum(), x)
    (once,) = torch.autograd.grad(gaussian_filter(x, 1.5).sin().sum(), x)
    assert torch.equal(again, once)


def test_use_reference_holds_inside_compiled_code():
    f = torch.compile(lambda x: gaussian_filter(x, 1.0), backend="aot_eager")
    x = torch.randn(1, 1, 9, requires_grad=True)
    f(x)
    with use_reference():
        assert "medaccel" not in str(f(x).grad_fn).lower()
        torch.testing.assert_close(f(x), reference.gaussian_filter(x, torch.ones(1), 4.0, "erf", "constant", False))


def test_tracing_records_the_op_and_not_its_result():
    x = torch.randn(1, 1, 6, 7)
    traced = torch.jit.trace(lambda x: gaussian_filter(x, torch.ones(1)), x)
    other = torch.randn(1, 1, 6, 7)
    torch.testing.assert_close(traced(other), gaussian_filter(other, 1.0))  # not a constant of the first input


def _filtered_sum(seed: int) -> float:
    x = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(seed))
    return float(gaussian_filter(x, 2.0).sum())


class _Filtered(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> float:
        torch.set_num_threads(2)  # a worker that asks for threads must not hang on the parent's dead pool
        return _filtered_sum(index)


FORK = """
import torch
from tests.ops.test_gaussian import _Filtered, _filtered_sum
torch.set_num_threads(2)
_filtered_sum(0)  # starts the parent's threads
loader = torch.utils.data.DataLoader(_Filtered(), batch_size=2, num_workers=2, multiprocessing_context="fork")
got = [float(v) for batch in loader for v in batch]
assert got == [_filtered_sum(i) for i in range(6)], got
"""


def run_python(code: str, timeout: int = 120, **env: str) -> subprocess.CompletedProcess:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **env},
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def test_forked_loader_workers_filter_after_the_parent_did():
    result = run_python(FORK)
    assert result.returncode == 0, result.stderr


# --- bad input -----------------------------------------------------------------------------------------------
X = torch.zeros(1, 1, 4, 5, 6)
BAD = {
    "two dims": ((torch.zeros(3, 4), 1.0), {}, ValueError, r"shape \(3, 4\); expected \(B, C, \*spatial\)"),
    "six dims": ((torch.zeros(1, 1, 2, 2, 2, 2), 1.0), {}, ValueError, "1-3 spatial axes"),
    "integers": ((X.long(), 1.0), {}, TypeError, "torch.int64; expected a floating-point tensor"),
    "not a tensor": (([1.0], 1.0), {}, TypeError, "list"),
    "negative": ((X, -1.0), {}, ValueError, r"sigma\[0\] is -1.0; expected"),
    "negative tensor": ((X, torch.tensor([1.0, -2.0, 1.0])), {}, ValueError, r"sigma\[1\] is -2.0"),
    "nan": ((X, float("nan")), {}, ValueError, r"sigma\[0\] is nan"),
    "nan tensor": ((X, torch.tensor(float("nan"))), {}, ValueError, r"sigma\[0\] is nan"),
    "infinite": ((X, float("inf")), {}, ValueError, r"sigma\[0\] is inf"),
    "too many": ((X, (1.0, 2.0)), {}, ValueError, "2 values; expected 1 or 3"),
    "wrong tensor": ((X, torch.ones(2)), {}, ValueError, r"shape \(2,\); expected a scalar or \(3,\)"),
    "integer sigma": ((X, torch.ones(3, dtype=torch.int64)), {}, ValueError, "sigma has dtype torch.int64"),
    "other device": ((X, torch.ones(3, device="meta")), {}, ValueError, "sigma is on meta and input on cpu"),
    "far too large": ((X, 1e9), {}, ValueError, "reaches more than"),
    "far too large tensor": (
        (X, torch.tensor([1.0, 1e9, 1.0])),
        {},
        ValueError,
        r"sigma\[1\] is 1000000000.0; .* reaches",
    ),
    "mode": ((X, 1.0), {"mode": "zeros"}, ValueError, "mode is 'zeros'; expected one of"),
    "approx": ((X, 1.0), {"approx": "box"}, ValueError, "approx is 'box'; expected one of"),
    "truncated": ((X, 1.0), {"truncated": 0.0}, ValueError, "truncated is 0.0"),
}


@pytest.mark.parametrize("forced", [False, True], ids=["native", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_a_sentence(what: str, forced: bool):
    args, options, error, match = BAD[what]
    with use_reference() if forced else contextlib.nullcontext(), pytest.raises(error, match=match):
        gaussian_filter(*args, **options)


def test_memory_beyond_the_output_stays_small():
    code = """
import resource, torch
from medaccel.ops import gaussian_filter
x = torch.ones(1, 1, 192, 192, 192)
gaussian_filter(x[..., :16, :16, :16], 2.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = gaussian_filter(x, 2.0)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / (y.numel() * 4))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 1.1
