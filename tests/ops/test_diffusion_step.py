# SPDX-License-Identifier: Apache-2.0
"""Tests the diffusion step: every implementation against the fp64 reference, its gradients, masks and memory."""

import contextlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import diffusion_step
from medaccel.ops.diffusion_step import reference
from medaccel.ops.diffusion_step.cases import CASES, DDPM, Case, named
from tests.ops.checks import (
    HERE,
    IMPLEMENTATIONS,
    assert_twice_as_good,
    implementation,
    max_error,
    poisoned_memory,
)
from tests.ops.diffusion_steps import FLOOR, KERNELS, OP, run, with_gradients


def in_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_match_the_fp64_reference(case: Case, name: str, dtype: torch.dtype):
    tensors = case.tensors(dtype)
    with use_reference():
        truth = with_gradients(case, in_double(tensors))
        plain = with_gradients(case, tensors)
    with implementation(name), poisoned_memory():
        ours = with_gradients(case, tensors)
    for actual, same_precision, exact in zip(ours, plain, truth, strict=True):
        assert actual.dtype == dtype
        assert_twice_as_good(actual, same_precision, exact, FLOOR[dtype], 1.0)
    assert all(y.is_contiguous() for y in ours[:2])


@pytest.mark.parametrize("name", ["ddpm_clipped", "multistep", "everything", "masked"])
def test_gradients_pass_gradcheck(name: str):
    case = named(name)
    tensors = {k: t[..., :2] for k, t in case.tensors(torch.float64).items()}
    wanted = {k: t.requires_grad_() for k, t in tensors.items() if k != "mask"}

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return run(case, {**tensors, **dict(zip(wanted, values, strict=True))})

    assert torch.autograd.gradcheck(call, tuple(wanted.values()))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["ddpm_clipped", "everything", "empty_batch", "sliced"])
def test_registration_passes_opcheck(name: str, requires_grad: bool):
    case = named(name)
    tensors = case.tensors()
    if requires_grad:
        tensors = {k: t.requires_grad_() if t.is_floating_point() else t for k, t in tensors.items()}
    ordered = [tensors.get(k) for k in ("sample", "model_output", "previous", "noise", "guide", "mask")]
    coefficients = torch.rand(9, 1, dtype=torch.float64)
    key = torch.tensor([5, 7, 0])
    for need_x0 in (True, False):
        torch.library.opcheck(OP, (*ordered, coefficients, key, -1.0, 1.0, need_x0))


def test_only_the_wanted_gradients_are_computed_and_nothing_is_kept_without_a_clip():
    case = named("ddpm")
    everything = with_gradients(case, case.tensors())
    tensors = case.tensors()
    tensors["sample"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        outputs = run(case, tensors)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    torch.autograd.backward(outputs, grads)
    assert torch.equal(tensors["sample"].grad, everything[2])
    assert tensors["model_output"].grad is None
    assert sum(kept) <= 9  # the coefficients


def test_coefficients_have_a_gradient_by_the_reference():
    case = named("ddpm")
    tensors = case.tensors(torch.float64)
    s = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    call = lambda s: run(case, tensors, s=s)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, s)


def test_double_backward_raises_a_sentence():
    case = named("ddpm_clipped")
    tensors = case.tensors()
    tensors["sample"].requires_grad_()
    (g,) = torch.autograd.grad(run(case, tensors)[0].square().sum(), tensors["sample"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_zero_stride_gradients_are_taken():
    case = named("ddpm_clipped")
    grads = []
    for context in (contextlib.nullcontext(), use_reference()):
        tensors = case.tensors()
        tensors["sample"].requires_grad_()
        with context:
            grads.append(torch.autograd.grad(run(case, tensors)[0].sum(), tensors["sample"])[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_half_precision_is_computed_in_fp32_and_rounded_once(name: str, dtype: torch.dtype):
    for case in (named("everything"), named("several_blocks")):
        tensors = case.tensors(dtype)
        tensors["sample"].view(-1)[:4] = torch.tensor([torch.nan, torch.inf, 1e-7, 6e4], dtype=dtype)
        with implementation(name):
            outputs = run(case, tensors)
            exact = run(case, {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()})
        for y, z in zip(outputs, exact, strict=True):
            assert y.dtype == dtype
            assert torch.equal(y.nan_to_num(7), z.to(dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_every_half_number_survives_storage(name: str, dtype: torch.dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, -1)
    with implementation(name):
        y, x0 = diffusion_step(x, 0 * x.nan_to_num(0, 0, 0), a=1, b=0, c=1, d=0, e=0, s=0)
    for result in (y.nan_to_num(7), x0.nan_to_num(7)):
        assert torch.equal(result[~x.isinf()], x.nan_to_num(7)[~x.isinf()])


@pytest.mark.parametrize("name", KERNELS)
def test_rounding_to_half_precision_is_torchs(name: str):
    x = torch.randn(1, 4096) * torch.logspace(-9, 6, 4096)
    with implementation(name):
        for dtype in (torch.bfloat16, torch.float16):
            half = torch.zeros(1, 4096, dtype=dtype)
            exact = diffusion_step(half, half, noise=x.to(dtype), a=0, b=0, c=0, d=0, e=0, s=0.7)[0]
            expected = (x.to(dtype).float() * torch.tensor(0.7)).to(dtype)
            assert torch.equal(exact, expected)


def test_a_half_precision_output_of_the_network_goes_with_a_float_sample():
    case = named("ddpm")
    for name in HERE[1:]:
        for dtype in (torch.bfloat16, torch.float16):
            tensors = case.tensors()
            mixed = {**tensors, "model_output": tensors["model_output"].to(dtype).requires_grad_()}
            rounded = {**tensors, "model_output": mixed["model_output"].detach().float()}
            with implementation(name):
                y, x0 = run(case, mixed)
                assert torch.equal(y, run(case, rounded)[0])
            assert y.dtype == x0.dtype == torch.float32
            (grad,) = torch.autograd.grad(x0.sum(), mixed["model_output"])
            assert grad.dtype == dtype


# --- mask and guide ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_kept_voxel_is_noised_to_the_new_level_and_ends_as_the_guide(name: str):
    shape = (1, 1, 7, 8, 9)
    x, m, guide = torch.randn(shape), torch.full(shape, torch.nan), torch.randn(shape)
    keep = torch.zeros(shape, dtype=torch.bool)
    high, low = 0.6, 0.85  # ᾱ of this level and the next
    a, b = 1 / math.sqrt(high), -math.sqrt((1 - high) / high)
    s = 0.2
    options = {"a": a, "b": b, "c": math.sqrt(low), "d": 0, "e": math.sqrt(1 - low - s * s), "s": s}
    key = torch.tensor([4, 11, 0])
    expected = math.sqrt(low) * guide.double() + math.sqrt(1 - low) * reference.normals(shape, key, of_guide=True)
    with implementation(name):
        y, x0 = diffusion_step(x, m, mask=keep, guide=guide, seed=4, offset=11, **options)
        assert max_error(y, expected) < 2e-6
        assert x0.isnan().all()
        last = {"a": a, "b": b, "c": 1, "d": 0, "e": 0, "s": 0}
        assert torch.equal(diffusion_step(x, m, mask=keep, guide=guide, **last)[0], guide)


def test_a_mask_of_any_type_generates_where_it_is_not_zero():
    case = named("one_mask_for_all")
    tensors = case.tensors()
    expected = run(case, tensors)[0]
    for dtype in (torch.uint8, torch.int64, torch.float32):
        assert torch.equal(run(case, {**tensors, "mask": 3 * tensors["mask"].to(dtype)})[0], expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_nan_stays_where_it_is_and_clipping_keeps_it(name: str):
    case = named("ddpm_clipped")
    tensors = case.tensors()
    tensors["model_output"][0, 1, 2, 3, 4] = torch.nan
    with implementation(name):
        for y in run(case, tensors):
            assert y.isnan().nonzero().tolist() == [[0, 1, 2, 3, 4]]


# --- in place ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case_name", ["ddpm_clipped", "several_blocks", "everything", "sliced", "empty_batch"])
def test_in_place_gives_the_same_bits(name: str, case_name: str):
    case = named(case_name)
    with implementation(name):
        expected = run(case, case.tensors())
        for target in ("sample and model_output", "sample", "guide and previous", "other"):
            tensors = case.tensors()
            out: Any = tuple(torch.empty(case.shape) for _ in range(2))
            if target == "sample and model_output":
                out = (tensors["sample"], tensors["model_output"])
            elif target == "sample":
                out = tensors["sample"]
            elif target == "guide and previous" and case.previous:
                out = (tensors["guide"], tensors["previous"])
            results = run(case, tensors, out=out)
            assert results[0] is (out[0] if isinstance(out, tuple) else out)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        tensors = case.tensors()
        y, x0 = run(case, tensors, out=(tensors["sample"], None))
        assert x0 is None
        assert torch.equal(y, expected[0])


MEMORY = """
import resource, torch
from medaccel.ops import diffusion_step

x, m = torch.randn(1, 1, 192, 192, 192), torch.randn(1, 1, 192, 192, 192)
options = dict(a=1.1, b=-0.4, c=0.9, d=0.1, e=0.0, s=0.3, clip=(-1, 1))
small = torch.zeros(1, 8)
diffusion_step(small, small, **options)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
diffusion_step(x, m, out=(x, m), **options)
middle = peak()
y = diffusion_step(x, m, **options)
print(middle - before, peak() - middle)
"""


def test_a_step_takes_its_outputs_and_in_place_nothing():
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    in_place, outputs = (float(v) for v in result.stdout.split())  # MiB
    assert in_place <= 2
    assert outputs <= 2 * 27 + 2


# --- torch's machinery ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_and_not_anew_for_each_step(backend: str):
    case = named("ddpm_clipped")
    options = {k: v for k, v in case.options().items() if k not in ("s", "offset")}
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def call(x: Tensor, m: Tensor, s: Tensor, offset: int) -> Tensor:
        y, x0 = diffusion_step(2 * x, m, s=s, offset=offset, **options)
        return (y + x0).square()

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for step in range(4):
        wanted = [t.requires_grad_() for t in case.tensors().values()]
        s = torch.tensor(0.1 + 0.1 * step)
        ours = torch.autograd.grad(compiled(*wanted, s, step + 2).sum(), wanted)
        for a, b in zip(ours, torch.autograd.grad(call(*wanted, s, step + 2).sum(), wanted), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # the second makes the offset dynamic


def test_autocast_leaves_the_samplers_state_alone():
    case = named("ddpm")
    tensors = case.tensors()
    tensors["model_output"] = tensors["model_output"].bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, x0 = run(case, tensors)
    assert y.dtype == x0.dtype == torch.float32
    assert torch.equal(y, run(case, tensors)[0])


def test_checkpointing_draws_the_same_noise_again():
    x, m = torch.randn(1, 500, requires_grad=True), torch.randn(1, 500)
    call = lambda x: diffusion_step(x, m, **DDPM)[0].sin()  # noqa: E731
    torch.manual_seed(1)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False).sum(), x)
    torch.manual_seed(1)
    (once,) = torch.autograd.grad(call(x).sum(), x)
    assert torch.equal(again, once)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    values=st.lists(st.floats(-2, 2), min_size=7, max_size=7),
    clip=st.sampled_from([None, (-1.0, 1.0), (0.5, 0.5)]),
    masked=st.booleans(),
    place=st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**31)),
)
def test_random_calls_match_the_reference(shape: list, values: list, clip: Any, masked: bool, place: tuple):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        k: torch.randn(shape, generator=generator, dtype=torch.float64)
        for k in ("sample", "model_output", "previous")
    }
    if masked:
        tensors["mask"] = torch.rand(shape, generator=generator) < 0.5
        tensors["guide"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    options = {**dict(zip("abcdefs", values, strict=True)), "clip": clip, "guide_scale": 0.8, "guide_std": 0.6}
    options |= dict(zip(("seed", "offset", "sample_offset"), place, strict=True))
    ours = diffusion_step(**tensors, **options)
    with use_reference():
        truth = diffusion_step(**tensors, **options)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
