# SPDX-License-Identifier: Apache-2.0
"""A GPU is asked without a launch for its code in this build, and only a lasting answer is remembered."""

from collections.abc import Iterator

import pytest
import torch

from medaccel import _native
from tests.ops.checks import emulated_module


class _Answers:
    """Answers with one error after the other, and then with an architecture."""

    architectures = "80,90,100"

    def __init__(self, *errors: str) -> None:
        self.errors, self.asked = list(errors), 0

    def running_architecture(self, index: int) -> int:
        self.asked += 1
        if self.errors:
            raise RuntimeError(self.errors.pop(0))
        return 90


_PASSING = (
    "probe/cuda.cu:24: cudaFuncGetAttributes failed: cudaErrorMemoryAllocation (out of memory)",
    "probe/cuda.cu:24: cudaFuncGetAttributes failed: cudaErrorStreamCaptureUnsupported (operation not permitted when "
    "stream is capturing)",
    "probe/cuda.cu:24: cudaSetDevice failed: cudaErrorDevicesUnavailable (CUDA-capable device(s) is/are busy)",
    "probe/cuda.cu:24: cudaGetDevice met the error of an earlier kernel: cudaErrorIllegalAddress",
)
_LASTING = (
    "probe/cuda.cu:24: cudaFuncGetAttributes failed: cudaErrorNoKernelImageForDevice (no kernel image is available)",
    "probe/cuda.cu:24: cudaFuncGetAttributes failed: cudaErrorInvalidDeviceFunction (invalid device function)",
    "probe/cuda.cu:24: cudaFuncGetAttributes failed: cudaErrorInvalidKernelImage (device kernel image is invalid)",
    "probe/cuda.cu:24: cudaFuncGetAttributes failed: cudaErrorUnsupportedPtxVersion (the provided PTX was compiled "
    "with an unsupported toolchain.)",
)


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    _native._probe_gpu.cache_clear()
    yield
    _native._probe_gpu.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("error", _PASSING)
def test_an_error_that_may_pass_is_told_and_not_remembered(monkeypatch: pytest.MonkeyPatch, error: str):
    module = _Answers(error, error)
    monkeypatch.setattr(_native, "cuda", module)
    for _ in range(2):
        reason = str(_native.gpu_problem(0))
        assert error in reason
        assert "no code" not in reason
    assert _native.gpu_problem(0) is None
    assert _native.gpu_problem(0) is None
    assert module.asked == 3  # the good answer is remembered


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("error", _LASTING)
def test_that_a_build_has_no_code_for_a_gpu_is_remembered(monkeypatch: pytest.MonkeyPatch, error: str):
    module = _Answers(error)
    monkeypatch.setattr(_native, "cuda", module)
    for _ in range(3):
        assert "no code for cuda:0, sm_90" in str(_native.gpu_problem(0))
    assert module.asked == 1


@pytest.mark.usefixtures("asked_anew")
def test_a_gpu_whose_capability_can_not_be_read_now_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    def fails(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(_native, "cuda", _Answers())
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", fails)
        assert "out of memory" in str(_native.gpu_problem(0))
    assert _native.gpu_problem(0) is None


def test_the_probe_launches_and_allocates_nothing():
    module = emulated_module()
    module.reset()
    assert module.running_architecture(0) == 0
    assert module.launches() == []
