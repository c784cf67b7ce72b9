# SPDX-License-Identifier: Apache-2.0
"""Tests the diffusion step's GPU kernels beyond numbers: sanitizers, orders of threads, launches, resources."""

from pathlib import Path

import pytest
import torch

from medaccel.ops import diffusion_step
from medaccel.ops.diffusion_step.cases import named
from tests.cuda_emulation.sanitized import ADDRESS, CSRC, ORDERS, THREAD, build, compiler_is_missing, run
from tests.gpu_resources import compile_for_gpu, nvcc_is_missing
from tests.ops.checks import EMULATED, emulated_module, implementation

ROOT = Path(__file__).resolve().parents[2]
DRIVER = (CSRC / "diffusion_step" / "cuda.cu", ROOT / "tests" / "native" / "diffusion_step_cuda_driver.cpp")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_kernels_are_clean_under_sanitizers(sanitizer: str):
    if compiler_is_missing():
        pytest.skip("g++ is not here")
    program = build(DRIVER, sanitizer)
    result = run(program, order="rand1")
    assert result.finding is None, result.output
    assert "all held" in result.output


@pytest.mark.slow
def test_every_order_of_threads_and_blocks_gives_the_same_bits():
    if compiler_is_missing():
        pytest.skip("g++ is not here")
    program = build(DRIVER)
    outputs = {order: run(program, order=order).output for order in ORDERS}
    assert "all held" in outputs["fwd"], outputs["fwd"]
    assert len(set(outputs.values())) == 1  # the output holds a checksum of every result


@pytest.mark.parametrize("name", EMULATED)
def test_a_step_is_one_launch_and_nothing_waits_for_the_device(name: str):
    module = emulated_module()
    case = named("everything")
    tensors = case.tensors()
    tensors["sample"].requires_grad_()
    module.reset()
    with implementation(name):
        y, _ = diffusion_step(**tensors, **case.options())
        y.sum().backward()
    kernels = [kernel.strip("()").split("<")[0] for kernel, *_ in module.launches()]
    assert kernels == ["forward_kernel", "backward_kernel"]
    assert module.synchronizations() == 0


def test_a_launch_that_fails_names_the_kernel_and_the_line():
    module = emulated_module()
    module.reset()
    module.fail_next_launch()
    x = torch.zeros(1, 9)
    with (
        implementation(EMULATED[0]),
        pytest.raises(RuntimeError, match=r"diffusion_step/cuda\.cu:\d+: launch of .*forward_kernel"),
    ):
        diffusion_step(x, x, a=1, b=0, c=1, d=0, e=0, s=0)
    module.reset()


@pytest.mark.slow
def test_no_kernel_spills_on_any_architecture():
    if nvcc_is_missing():
        pytest.skip("nvcc is not here")
    resources = compile_for_gpu(CSRC / "diffusion_step" / "cuda.cu")
    assert len(resources) == 3 * 4  # architectures × (forward, backward) × (fp32, fp64 arithmetic)
    for r in resources:
        assert r.spill_store_bytes == r.spill_load_bytes == 0, r
        if "<float>" in r.kernel:  # enough warps in flight to keep the memory busy
            assert r.registers <= 80, r
            assert r.occupancy(256).fraction >= 0.375, r
