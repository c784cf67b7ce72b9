# SPDX-License-Identifier: Apache-2.0
"""`doctor` and `explain`: which kernel serves, or why plain PyTorch does."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import medaccel
from medaccel import _native
from medaccel.ops._registry import OPS
from tests.ops.checks import implementation


def volume(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(1, 1, 5, 6, 7, device=device, dtype=dtype)


@pytest.mark.parametrize("isa", _native.ISAS)
def test_explain_names_the_instruction_set_in_use(isa: str):
    with implementation(f"cpu-{isa}"):
        sentence = medaccel.explain("gaussian_filter", volume(dtype=torch.bfloat16))
    assert sentence == f"gaussian_filter on cpu, bfloat16: its C++ kernel ({isa})"


def test_explain_takes_the_function_or_its_name():
    by_name = medaccel.explain("gaussian_filter", volume())
    assert medaccel.explain(medaccel.ops.gaussian_filter, volume()) == by_name


def test_a_device_without_kernel_is_served_by_the_reference_and_explain_says_why():
    x = volume("meta")
    assert medaccel.ops.gaussian_filter(x, 1.0).device.type == "meta"
    assert medaccel.explain("gaussian_filter", x) == (
        "gaussian_filter on meta, float32: plain PyTorch, since gaussian_filter has no kernel for device 'meta'"
    )


def test_doctor_says_the_same_of_a_device_without_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    served = {device: kernel for op, device, kernel in medaccel.doctor().kernels if op == "gaussian_filter"}
    assert served == {
        "cpu": f"C++, {_native.cpu.isa}",
        "meta:0": "plain PyTorch, since gaussian_filter has no kernel for device 'meta'",
    }


def test_use_reference_is_a_reason_too():
    with medaccel.use_reference():
        sentence = medaccel.explain("gaussian_filter", volume())
        rows = medaccel.doctor().kernels
    assert sentence.endswith("plain PyTorch, since use_reference() is in force")
    assert all(kernel.endswith("use_reference() is in force") for _, _, kernel in rows)
    assert "C++" in medaccel.explain("gaussian_filter", volume())


def test_a_missing_native_module_is_a_reason_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "cpu_problem", "_cpu_avx2 can't be loaded: no such file")
    assert medaccel.explain("gaussian_filter", volume()).endswith("since _cpu_avx2 can't be loaded: no such file")
    assert "no native module" in str(medaccel.doctor())


# --- a GPU, which this machine need not have ----------------------------------------------------------------------
class _Kernels:
    architectures = "80,90,100"

    @staticmethod
    def running_architecture(index: int) -> int:
        return 90


@pytest.fixture
def gpu_volume(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """A tensor without memory that says it lies on cuda:0, an H100 with kernels built for it."""
    monkeypatch.setattr(_native, "cuda", _Kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _native._probe_gpu.cache_clear()
    with FakeTensorMode():
        yield volume("cuda:0", torch.float16)
    _native._probe_gpu.cache_clear()


def test_explain_names_the_architecture_whose_code_runs(gpu_volume: Tensor):
    sentence = medaccel.explain("gaussian_filter", gpu_volume)
    assert sentence == "gaussian_filter on cuda:0, float16: its CUDA C++ kernel (code for sm_90)"


def serves(tensor: Tensor) -> None:
    """The predicate of an op whose kernel takes everything."""


def test_explain_names_triton_where_that_serves(gpu_volume: Tensor, monkeypatch: pytest.MonkeyPatch):
    row = replace(OPS["shifted_window_attention"], name="attention", predicate=f"{__name__}:serves")
    monkeypatch.setitem(OPS, "attention", row)
    assert medaccel.explain("attention", gpu_volume) == "attention on cuda:0, float16: its Triton kernel (sm_90)"


def test_a_gpu_that_no_kernel_serves_is_told_why(gpu_volume: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "plain PyTorch, since cuda:0 is sm_70; the CUDA kernels need sm_80" in medaccel.explain(
        "gaussian_filter", gpu_volume
    )


# --- bad input ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("op", ["gausian_filter", torch.relu])
def test_an_unknown_op_names_the_known_ones(op: object):
    name = op if isinstance(op, str) else "relu"
    with pytest.raises(
        ValueError, match=rf"explain: op is '{name}'; expected one of \['diffusion_step', 'gaussian_filter'"
    ):
        medaccel.explain(op, volume())


@pytest.mark.parametrize("bad", [torch.zeros(1, 1, 9, dtype=torch.int32), 3.0])
def test_what_the_op_refuses_is_not_explained_away(bad: object):
    kind = "torch.int32" if isinstance(bad, Tensor) else "float"
    with pytest.raises(TypeError, match=f"explain: input is {kind}; gaussian_filter takes a floating-point tensor"):
        medaccel.explain("gaussian_filter", bad)
