# SPDX-License-Identifier: Apache-2.0
"""Tests the Gaussian's GPU kernels beyond numbers: approximations, streams, devices, errors, orders, resources."""

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medaccel import _native, use_reference
from medaccel.ops import gaussian_filter
from medaccel.ops.gaussian import native
from medaccel.ops.gaussian.cases import APPROX, MODES
from tests.cuda_emulation.sanitized import ADDRESS, CSRC, ORDERS, THREAD, build, compiler_is_missing, run
from tests.gpu_report import (
    PLANE_INSTRUCTIONS,
    THREADS,
    disassembled,
    find_cuobjdump,
    march_plan,
    plane_instructions,
    predict_march,
)
from tests.gpu_resources import compile_for_gpu, nvcc_is_missing
from tests.ops.checks import EMULATED, emulated_module, implementation, max_error

ROOT = Path(__file__).resolve().parents[2]
DRIVER = (CSRC / "gaussian" / "cuda.cu", ROOT / "tests" / "native" / "gaussian_cuda_driver.cpp")


@pytest.mark.parametrize("approx", APPROX)
@pytest.mark.parametrize("normalize", [False, True])
def test_taps_and_their_slopes_are_made_on_the_device(approx: str, normalize: bool):
    x = torch.randn(1, 1, 40, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    results = []
    for name in ("reference", *EMULATED):
        with implementation(name):
            y = gaussian_filter(x, sigma, approx=approx, normalize=normalize)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, sigma))))
    for emulated in results[1:]:
        for ours, truth in zip(emulated, results[0], strict=True):
            assert max_error(ours, truth) < 1e-12 * max(1.0, float(truth.abs().max()))


def test_several_tiles_chunks_and_channels_meet_without_a_seam():
    x = torch.randn(1, 2, 70, 35, 70)
    with use_reference():
        truth = gaussian_filter(x.double(), 2.0, mode="reflect")
    with implementation(EMULATED[0]):
        assert max_error(gaussian_filter(x, 2.0, mode="reflect"), truth) < 2e-6


@pytest.mark.parametrize("bad", [-1.0, float("nan"), 1000.0])
def test_a_sigma_that_the_host_cannot_see_gives_nan_where_it_makes_no_sense(bad: float):
    module = emulated_module()
    x, sigma = torch.randn(1, 1, 6, 7, 8), torch.tensor([1.0, bad, 1.0], dtype=torch.float64)
    with implementation(EMULATED[1]):
        y = native.gaussian_filter_gpu(x, sigma, 4.0, "erf", "constant", False, False)
    assert y.isnan().all()
    assert module.synchronizations() == 0


def test_nothing_waits_for_the_device_and_only_what_may_serve_is_launched():
    module = emulated_module()
    x = torch.randn(1, 1, 6, 7, 8)
    launched = {}
    for name in EMULATED:
        for sigma in (1.0, 2.0, 4.0):
            module.reset()
            with implementation(name):
                gaussian_filter(x, torch.full((3,), sigma))
            kernels = [kernel for kernel, *_ in module.launches()]
            launched[name, sigma] = [kernel.strip("()").split("<")[0] for kernel in kernels]
            assert module.synchronizations() == 0
    passes = ["one_axis"] * 3
    assert launched[EMULATED[0], 1.0] == launched[EMULATED[0], 2.0] == ["make_taps", "march"]
    assert launched[EMULATED[0], 4.0] == ["make_taps", *passes]
    # The host does not know the radius: everything is launched, and what isn't meant returns at once.
    assert all(launched[EMULATED[1], s] == ["make_taps", "march", "march", *passes] for s in (1.0, 2.0, 4.0))


def test_an_earlier_kernels_error_is_reported_as_such():
    module = emulated_module()
    module.reset()
    module.inject_earlier_error()
    with implementation(EMULATED[0]), pytest.raises(RuntimeError, match="earlier"):
        gaussian_filter(torch.randn(1, 1, 9), 1.0)
    module.reset()


def test_a_launch_that_fails_names_the_kernel_and_the_line():
    module = emulated_module()
    module.reset()
    module.fail_next_launch()
    with (
        implementation(EMULATED[0]),
        pytest.raises(RuntimeError, match=r"gaussian/cuda\.cu:\d+: launch of .*make_taps"),
    ):
        gaussian_filter(torch.randn(1, 1, 9), 1.0)
    module.reset()


def call(
    x: torch.Tensor, y: torch.Tensor, device: int = 0, stream: int = 0, chunks: int = 0, **settings: Any
) -> None:
    """The binding itself, for what the wrappers never do."""
    sigma, mode, radius = settings.get("sigma", [1.0] * 3), settings.get("mode", 0), settings.get("radius", 4)
    module = emulated_module()
    work = torch.empty(module.gaussian_workspace_bytes(radius), dtype=torch.uint8)
    size = list(x.shape[2:])
    module.gaussian_filter(
        x.data_ptr(), y.data_ptr(), 0, x.shape[:2], size, x.stride()[:2], y.stride()[:2], 0, sigma, 4.0, 0, mode,
        False, False, -1, work.data_ptr(), radius, [0, 0], device, stream, chunks,
    )  # fmt: skip


def test_kernels_run_on_the_tensors_device_and_give_the_current_one_back():
    module = emulated_module()
    module.reset()
    module.set_device_count(2)
    x, y = torch.randn(1, 1, 4, 5, 6), torch.empty(1, 1, 4, 5, 6)
    call(x, y, device=1)
    assert {device for _, device, _ in module.launches()} == {1}
    call(x, y, device=0)
    assert {device for _, device, _ in module.launches()} == {0}
    module.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_half_storage_has_fp32_arithmetic_and_gradients(dtype: torch.dtype, mode: str):
    x = torch.randn(1, 2, 9, 10, 11).to(dtype).requires_grad_()
    sigma = torch.tensor([1.0, 1.5, 0.7], requires_grad=True)
    results = []
    for name in ("reference", EMULATED[0]):
        with implementation(name):
            y = gaussian_filter(x, sigma, mode=mode)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, sigma))))
    for ours, truth, bound in zip(results[1], results[0], (8e-3, 8e-3, 2e-2), strict=True):
        assert max_error(ours, truth) <= bound * float(truth.abs().max())


# --- the driver without Python ------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_kernels_are_clean_under_sanitizers(sanitizer: str):
    if compiler_is_missing():
        pytest.skip("g++ is not here")
    program = build(DRIVER, sanitizer)
    for order in ("fwd", "rand1"):
        result = run(program, order=order)
        assert result.finding is None, result.output
        assert "all held" in result.output


@pytest.mark.slow
def test_every_order_of_threads_and_blocks_gives_the_same_bits():
    if compiler_is_missing():
        pytest.skip("g++ is not here")
    program = build(DRIVER)
    outputs = {order: run(program, order=order).output for order in ORDERS}
    assert "all held" in outputs["fwd"]
    assert len(set(outputs.values())) == 1  # the output holds a checksum of every result


PLANTED = {
    "a barrier is missing between x and y": (
        "            __syncthreads();\n            const float* line =",
        "            const float* line =",
        THREAD,
        "ThreadSanitizer",
    ),
    "the last thread fetches beyond the tile": (
        "if ((n + 1) * kThreads > S::quads && i >= S::quads) continue;\n                Quad<float> q;",
        "Quad<float> q;",
        ADDRESS,
        "AddressSanitizer",
    ),
    "columns beyond the volume are written": (
        "if (c < p.out_rows) to[c * p.width]",
        "to[c * p.width]",
        ADDRESS,
        "AddressSanitizer",
    ),
    "without taps along y, rows before the first are read": (
        "if (Full || ry > 0 || c == j) filtered",
        "filtered",
        None,
        "exit status 1",
    ),
    "a chunk's halo is one plane too short": (
        "int source = source_of(p.z0 - rz);",
        "int source = -1;",
        None,
        "exit status 1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_what_is_planted_in_the_march_is_found(bug: str, tmp_path: Path):
    if compiler_is_missing():
        pytest.skip("g++ is not here")
    old, new, sanitizer, finding = PLANTED[bug]
    for folder in ("gaussian", "common"):
        shutil.copytree(CSRC / folder, tmp_path / folder)
    source = tmp_path / "gaussian" / "cuda.cu"
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))
    result = run(build((source, DRIVER[1]), sanitizer))
    assert result.finding is not None, result.output
    assert result.finding.startswith(finding), result.finding


# --- compiled for the GPUs ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_no_kernel_spills_on_any_architecture():
    if nvcc_is_missing():
        pytest.skip("nvcc is not here")
    resources = compile_for_gpu(CSRC / "gaussian" / "cuda.cu")
    assert {r.arch for r in resources} == {80, 90, 100}
    marches = [r for r in resources if "::march<" in r.kernel]
    assert len(marches) == 3 * 4  # architectures × (fp32 with two radii, bf16, fp16)
    for r in resources:
        assert r.spill_store_bytes == r.spill_load_bytes == 0, r
    for r in marches:
        assert r.registers <= 128, r
        assert r.occupancy(THREADS["march"]).blocks >= 2, r


@pytest.mark.slow
def test_a_plane_costs_the_instructions_that_the_prediction_counts():
    if nvcc_is_missing() or find_cuobjdump() is None:
        pytest.skip("nvcc or cuobjdump is not here")
    code = disassembled()
    for reach, counted in PLANE_INSTRUCTIONS.items():  # another compiler may count a little differently
        assert plane_instructions(code, reach) == pytest.approx(counted, rel=0.1)


# --- work cut by size -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("processors", [108, 132, 148])
@pytest.mark.parametrize("reach", [4, 8])
@pytest.mark.parametrize("size", [64, 96, 128, 160, 192, 256, 512])
def test_volumes_from_64_voxels_on_fill_the_machine(size: int, reach: int, processors: int):
    """Hardly a multiprocessor without a block; and of all that blocks do, little is halo or an unfilled last wave."""
    plan = march_plan((1, size, size, size), reach, processors)
    assert plan.busy >= 0.95 * processors
    assert plan.blocks >= 0.95 * processors
    assert plan.longest + 2 * reach <= 1.6 * (size**3 / 32**2 / processors + 2 * reach)


def test_chunks_are_never_more_than_planes_and_many_channels_are_not_cut():
    module = emulated_module()
    assert module.gaussian_plan(1, [1, 512, 512], 0, 132) == (1, 256)  # an image has no planes to cut
    assert module.gaussian_plan(1, [3, 8, 8], 8, 132) == (3, 3)
    assert module.gaussian_plan(66, [64, 64, 64], 8, 132) == (1, 264)  # two blocks for each multiprocessor
    assert module.gaussian_plan(1, [64, 64, 64], 0, 132)[1] == 256  # without a halo, finer is free
    for volumes in (1, 2, 7, 200):
        for size in itertools.product((1, 2, 31, 33, 300), repeat=3):
            chunks, blocks = module.gaussian_plan(volumes, list(size), 8, 132)
            assert 1 <= chunks <= size[0]
            assert blocks == volumes * chunks * math.prod(-(-n // module.march_tile) for n in size[1:])


# Radii that are the instance's own, smaller ones, different ones, none; sizes with whole and cut tiles.
@pytest.mark.parametrize("sigma", [[2.0] * 3, [1.0] * 3, [0.4, 2.0, 1.3], [1.6, 0.0, 2.0], [0.0, 0.7, 0.0]])
@pytest.mark.parametrize("mode", MODES)
def test_no_bit_depends_on_how_the_work_is_cut(sigma: list[float], mode: str):
    x = torch.randn(1, 2, 10, 33, 36)
    y, radius = [], max(int(max(4 * s, 0.5) + 0.5) if s else 0 for s in sigma)
    for chunks in (1, 2, 3, 10, 0):
        y.append(torch.full_like(x, torch.nan))
        call(x, y[-1], chunks=chunks, sigma=sigma, mode=native.MODES[mode], radius=radius)
        assert torch.equal(y[-1], y[0])
    with use_reference():
        truth = gaussian_filter(x.double(), sigma, mode=mode)
    assert max_error(y[0], truth) < 2e-6


@pytest.mark.parametrize("sigma", [[1.0] * 3, [0.7, 1.0, 0.3]])
def test_no_bit_depends_on_the_instance_or_on_where_sigma_lies(sigma: list[float]):
    """Up to radius 4 fp32 has an instance of its own; bf16 takes that of radius 8."""
    x = torch.randn(1, 1, 12, 20, 36).bfloat16()
    results = []
    for name in EMULATED:
        for dtype in (torch.float32, torch.bfloat16):
            with implementation(name):
                y = gaussian_filter(x.to(dtype), torch.tensor(sigma, dtype=torch.float64), mode="reflect")
            results.append(y.bfloat16())
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("width", [64, 66, 67])  # rows of whole quads, and others
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inner_tiles_are_read_as_quads_and_others_voxel_by_voxel(width: int, dtype: torch.dtype):
    x = torch.randn(2, 1, 3, 65, width + 4).to(dtype)[..., 4:]
    with use_reference():
        truth = gaussian_filter(x.double(), 2.0, mode="mirror")
    with implementation(EMULATED[0]):
        error = max_error(gaussian_filter(x, 2.0, mode="mirror"), truth)
    assert error < (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sigma", [[2.0] * 3, [1.3, 0.4, 1.6]])
def test_a_nan_spreads_as_far_as_the_taps_and_no_farther(bad: float, sigma: list[float]):
    x = torch.randn(1, 1, 20, 40, 40)
    x[0, 0, 10, 33, 31] = bad
    with implementation(EMULATED[0]):
        spoilt = ~gaussian_filter(x, sigma)[0, 0].isfinite()
    near = torch.ones(20, 40, 40, dtype=torch.bool)
    for axis, (at, s) in enumerate(zip((10, 33, 31), sigma, strict=True)):
        shape = [1, 1, 1]
        shape[axis] = -1
        near &= ((torch.arange(near.shape[axis]) - at).abs() <= int(4 * s + 0.5)).reshape(shape)
    assert torch.equal(spoilt, near)


def test_the_prediction_counts_waves_and_halos_beside_bytes():
    small, large = predict_march(64, 8), predict_march(256, 8)
    assert small.plan.blocks == 132
    assert small.seconds > 256**-3 * 64**3 * large.seconds * 2  # halos of short chunks
    assert large.seconds >= large.by_bytes
    assert large.by_instructions > large.by_bytes  # instructions, not bytes, take the time


def test_the_module_is_built_without_a_driver_and_doctor_says_so():
    if _native.cuda is None:
        pytest.skip("the CUDA kernels are not built here")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    code = "import medaccel; print(medaccel.doctor())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert "built for sm_80, sm_90, sm_100 + PTX" in result.stdout, result.stderr


# --- GPUs that can't be served ------------------------------------------------------------------------------------
class _Module:
    architectures = "80,90,100"

    @staticmethod
    def running_architecture(index: int) -> int:
        raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("module", "capability", "sentence"),
    [
        (None, (9, 0), "the CUDA kernels are not built"),
        (_Module, (7, 5), "cuda:0 is sm_75; the CUDA kernels need sm_80 or newer"),
        (_Module, (8, 7), "no code for cuda:0, sm_87 .* rebuild with MEDACCEL_CUDA_ARCHS=87"),
    ],
)
def test_a_gpu_without_kernels_is_told_why(
    monkeypatch: pytest.MonkeyPatch, module: object, capability: tuple[int, int], sentence: str
):
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    _native._probe_gpu.cache_clear()
    try:
        reason = _native.gpu_problem(0)
    finally:
        _native._probe_gpu.cache_clear()
    assert re.search(sentence, reason)


class _Served(_Module):
    @staticmethod
    def running_architecture(index: int) -> int:
        return emulated_module().running_architecture(index)  # compiled code, which Dynamo can't trace


def test_choosing_the_gpu_kernel_does_not_break_a_compiled_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_native, "cuda", _Served)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    _native._probe_gpu.cache_clear()
    try:
        chosen = torch.compile(lambda x: x + (_native.gpu_problem(0) is None), fullgraph=True, backend="eager")
        assert chosen(torch.zeros(2)).tolist() == [1, 1]
    finally:
        _native._probe_gpu.cache_clear()


def test_an_axis_beyond_32_bit_positions_is_refused():
    module = emulated_module()
    size = [1, 1, 1 << 29]
    with pytest.raises(ValueError, match="an axis has 536870912 elements; expected fewer than"):
        module.gaussian_filter(
            0, 0, 0, [1, 1], size, [0, 0], [0, 0], 0, [1.0] * 3, 4.0, 0, 0, False, False, -1, 0, 4, [0, 0], 0, 0, 0
        )
    with pytest.raises(ValueError, match="an axis has 536870912 elements"):
        _native.cpu.gaussian_filter(0, 0, 0, size, [1, 1, 1], [1, 1, 1], [1.0], 4.0, 0, 0, False, False, 1)
