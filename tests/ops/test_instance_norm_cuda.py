# SPDX-License-Identifier: Apache-2.0
"""Tests instance norm's GPU kernels beyond small maps' numbers: large instances, launches, slices, orders,
resources."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medaccel import use_reference
from medaccel.ops import instance_norm_act
from medaccel.ops.instance_norm import native
from medaccel.ops.instance_norm.cases import Case, laid
from tests.cuda_emulation.sanitized import ADDRESS, CSRC, ORDERS, THREAD, build, compiler_is_missing, run
from tests.gpu_resources import compile_for_gpu, nvcc_is_missing
from tests.ops.checks import EMULATED, assert_twice_as_good, emulated_module, implementation, poisoned_memory
from tests.ops.test_instance_norm import FLOOR, with_gradients

ROOT = Path(__file__).resolve().parents[2]
DRIVER = (CSRC / "instance_norm" / "cuda.cu", ROOT / "tests" / "native" / "instance_norm_cuda_driver.cpp")

# Instances that several blocks share, beyond 64 KiB: as vectors and as single elements, full and partial chunks.
SHARED = [
    Case("vectors", (1, 3, 32, 32, 33), residual=True, affine=True),
    Case("single_elements", (1, 2, 27, 29, 31), affine=True),
    Case("vectors_last", (1, 24, 13, 14, 15), "last", "last", residual=True, affine=True),
    Case("single_elements_last", (2, 13, 12, 13, 14), "last", "last", residual=True, slope=-0.3),
    Case("many_channels_last", (1, 1100, 3, 7, 50), "last", "last", slope=None),
    Case("large_mean", (1, 1, 30, 32, 32), offset=1000.0),
    Case("large_mean_last", (1, 16, 12, 12, 12), "last", "last", offset=1000.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_an_instance_that_many_blocks_share_matches_the_fp64_reference(case: Case):
    tensors = case.tensors(torch.float32)
    with use_reference():
        truth = with_gradients(case, tensors, torch.float64)
        plain = with_gradients(case, tensors, torch.float32)
    module = emulated_module()
    module.reset()
    with implementation(EMULATED[0]), poisoned_memory():
        ours = with_gradients(case, tensors, torch.float32)
    kernels = [kernel.strip("()").split("<")[0] for kernel, *_ in module.launches()]
    assert kernels == ["moments", "merge_moments", "normalise", "sums", "merge_sums", "gradient"]
    x = tensors[0].double()
    size = float(x.abs().max() / x.var(tuple(range(2, x.dim())), correction=0).sqrt().min())
    for actual, same, exact in zip(ours, plain, truth, strict=True):
        assert_twice_as_good(actual, same, exact, FLOOR[torch.float32], max(float(exact.abs().max()), 1.0) * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", ["", "last"])
@pytest.mark.parametrize("size", [6, 32])
def test_half_storage_has_fp32_arithmetic_and_gradients(size: int, view: str, dtype: torch.dtype):
    """An instance of 32³ voxels is shared out; channels last, eight channels are one vector."""
    case = Case("", (1, 8 if view else 1, size, size, size + 2), view, view, residual=True, affine=True, slope=0.1)
    tensors = tuple(t.to(dtype) for t in case.tensors(torch.float32))
    with use_reference():
        truth = with_gradients(case, tensors, torch.float64)
        plain = with_gradients(case, tensors, dtype)
    with implementation(EMULATED[0]), poisoned_memory():
        ours = with_gradients(case, tensors, dtype)
    for actual, same, exact in zip(ours, plain, truth, strict=True):
        assert actual.dtype == dtype
        assert_twice_as_good(actual, same, exact, torch.finfo(dtype).eps)


def test_a_small_instance_is_one_launch_and_nothing_waits_for_the_device():
    module = emulated_module()
    launched = {}
    for affine in (False, True):
        case = Case("", (2, 16, 5, 6, 7), "last", "last", residual=True, affine=affine)
        module.reset()
        with implementation(EMULATED[0]):
            with_gradients(case, case.tensors(torch.float32), torch.float32)
        launched[affine] = [kernel.strip("()").split("<")[0] for kernel, *_ in module.launches()]
        assert module.synchronizations() == 0
    assert launched[False] == ["normalise_at_once", "gradient_at_once"]
    assert launched[True] == ["normalise_at_once", "gradient_at_once", "merge_sums"]


@pytest.mark.parametrize("view", ["", "last"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_slice_of_a_concatenations_gradient_is_read_as_it_lies(
    view: str, batch: int, monkeypatch: pytest.MonkeyPatch
):
    x, skip, r = (laid(torch.randn(batch, 8, 4, 5, 6), view) for _ in range(3))
    grad = laid(torch.randn(batch, 16, 4, 5, 6), view)

    def gradients() -> tuple[Tensor, ...]:
        given = [t.detach().requires_grad_() for t in (x, r)]
        y = instance_norm_act(given[0], residual=given[1], negative_slope=0.1)
        return torch.autograd.grad(torch.cat((skip, y), 1), given, grad)

    with use_reference():
        truth = gradients()
    copied = []
    dense = native._dense
    monkeypatch.setattr(
        native, "_dense", lambda t, last: (copied.append(t) if (d := dense(t, last)) is not t else None, d)[1]
    )
    with implementation(EMULATED[0]):
        ours = gradients()
    assert [t for t in copied if t.data_ptr() != dense(t, bool(view)).data_ptr()] == []
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


STRIDES = {
    "dense": (lambda g: g, (2 * 3 * 4 * 5, 4 * 5), (60, 3)),
    "sum's": (lambda g: g.new_ones(()).expand(g.shape), None, None),
    "every second voxel": (lambda g: g.repeat(1, 1, 1, 2)[..., ::2], None, None),
    "transposed": (lambda g: g.transpose(2, 3).contiguous().transpose(2, 3), None, None),
}


@pytest.mark.parametrize("name", STRIDES)
def test_only_gradients_that_the_kernel_can_walk_are_taken_as_they_lie(name: str):
    make, *_ = STRIDES[name]
    for last in (False, True):
        grad = make(laid(torch.randn(2, 3, 4, 5), "last" if last else ""))
        found = native._strides(grad, last)
        assert (found == ((60, 3) if last else (60, 20))) if name == "dense" else (found is None)


def test_a_launch_that_fails_names_the_kernel_and_the_line():
    module = emulated_module()
    module.reset()
    module.fail_next_launch()
    with (
        implementation(EMULATED[0]),
        pytest.raises(RuntimeError, match=r"instance_norm/cuda\.cu:\d+: launch of .*normalise_at_once"),
    ):
        instance_norm_act(torch.randn(1, 2, 9))
    module.reset()


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1.0, 1e19, 1e35])
@pytest.mark.parametrize("view", ["", "last"])
def test_small_and_large_deviations(view: str, scale: float):
    x = laid(((torch.randn(2, 3, 9, 8, 7, dtype=torch.float64) + 0.5) * scale).float(), view)
    eps = 1e-5 if scale >= 1 else 1e-37
    with use_reference():
        truth = instance_norm_act(x.double(), eps=eps)
    with implementation(EMULATED[0]):
        y = instance_norm_act(x, eps=eps)
    assert float((y - truth).abs().max()) <= 2e-6 * float(truth.abs().max())


def test_an_outlier_does_not_spoil_the_variance():
    x = torch.randn(1, 1, 30, 30, 30, dtype=torch.float64)
    x[0, 0, 0, 0, 0] = 1e4
    with use_reference():
        truth = instance_norm_act(x)
    with implementation(EMULATED[0]):
        y = instance_norm_act(x.float())
    assert float((y.double() - truth).abs().max()) < 2e-4 * float(truth.abs().max())


# --- the driver without Python ------------------------------------------------------------------------------------
needs_compiler = pytest.mark.skipif(compiler_is_missing() is not None, reason="g++ is not here")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_kernels_are_clean_under_sanitizers(sanitizer: str):
    result = run(build(DRIVER, sanitizer), order="rand1")
    assert result.finding is None, result.output
    assert "all held" in result.output


@pytest.mark.slow
@needs_compiler
def test_every_order_of_threads_and_blocks_gives_the_same_bits():
    program = build(DRIVER)
    outputs = {order: run(program, order=order).output for order in ORDERS}
    assert "all held" in outputs["fwd"], outputs["fwd"]
    assert len(set(outputs.values())) == 1  # the output holds a checksum of every result


# Line of a kernel, what it is exchanged for, who finds it.
PLANTED = {
    "a column beyond the last channel is no idle one": (
        "blocks.h",
        "b.idle = b.row >= b.rows || (plan.last && b.column * N >= plan.channels);",
        "b.idle = b.row >= b.rows;",
        ADDRESS,
        "AddressSanitizer",
    ),
    "a chunk's last voxels are taken for a whole chunk's": (
        "blocks.h",
        "static_cast<int>(min(plan.step, plan.voxels - b.begin));",
        "static_cast<int>(plan.step);",
        ADDRESS,
        "AddressSanitizer",
    ),
    "vectors are loaded from where they are not aligned": (
        "cuda.cu",
        "if (aligned && line % width == 0)",
        "if ((aligned || width > 1) && line % width == 0)",
        ADDRESS,
        "UndefinedBehaviorSanitizer",
    ),
    "a block's chunks share their partial sums": (
        "cuda.cu",
        "t.partial[instance * plan.chunks + b.chunk] = moments;",
        "t.partial[instance * plan.chunks] = moments;",
        THREAD,
        "ThreadSanitizer",
    ),
    "a block reads its statistics before they are written": (
        "cuda.cu",
        """    __syncthreads();  // the block reads what it has just written
    block_normalise<S, T, N>(t, plan, b);""",
        "    block_normalise<S, T, N>(t, plan, b);",
        THREAD,
        "ThreadSanitizer",
    ),
    "a channel's parts have equal weights": (
        "blocks.h",
        "squares += fma(static_cast<double>(n(i)) * d, d, part.b);",
        "squares += fma(d, d, part.b);",
        None,
        "CheckFailed",
    ),
}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name: str, tmp_path: Path):
    file, old, new, sanitizer, finder = PLANTED[name]
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc" / "instance_norm" / file
    text = source.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times, not once: {old}"
    source.write_text(text.replace(old, new))
    kernels = tmp_path / "csrc" / "instance_norm" / "cuda.cu"
    # The driver's tensors are float: without the other types the compiler takes a third of the time.
    others = r"call\((double|__nv_bfloat16|__half)\(\), \w+\(\), std::integral_constant<int, \d>\(\)\)"
    only_float, count = re.subn(
        others, "call(float(), float(), std::integral_constant<int, 4>())", kernels.read_text()
    )
    assert count == 3
    kernels.write_text(only_float)
    result = run(build((kernels, DRIVER[1]), sanitizer), order="rev")
    if finder == "CheckFailed":
        assert "host reference" in result.output or "expected" in result.output, result.output[-2000:]
        assert "all held" not in result.output
    else:
        assert (result.finding or "nothing was found").startswith(finder), result.output[-2000:]


# --- compiled for the GPUs ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_no_kernel_spills_and_three_blocks_fit_a_multiprocessor_on_any_architecture():
    if nvcc_is_missing():
        pytest.skip("nvcc is not here")
    resources = compile_for_gpu(CSRC / "instance_norm" / "cuda.cu")
    # Architectures × (6 kernels × (fp32, bf16, fp16 as vectors and as elements, fp64) + 2 merges in two precisions).
    assert len(resources) == 3 * (6 * 7 + 2 * 2)
    for r in resources:
        assert r.spill_store_bytes == r.spill_load_bytes == 0, r
        assert r.occupancy(256).blocks >= (2 if "gradient_at_once" in r.kernel else 3), r
