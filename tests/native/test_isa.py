# SPDX-License-Identifier: Apache-2.0
"""Tests which compiled module is loaded: torch's capability, MEDACCEL_ISA, and the processor's abilities."""

import os
import re
import subprocess
import sys

import pytest

from medaccel import _native

SUPPORTED = _native.cpu.supported_isas()
CODE = "import medaccel; print(medaccel.doctor()); print('isa:', medaccel._native.cpu.isa)"


def run(**env: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "MEDACCEL_ISA"} | env
    return subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("isa", _native.ISAS)
@pytest.mark.slow
def test_the_environment_forces_an_instruction_set(isa: str):
    result = run(MEDACCEL_ISA=isa)
    if isa in SUPPORTED:
        assert result.returncode == 0, result.stderr
        assert f"isa: {isa}" in result.stdout
    else:
        assert result.returncode != 0
        assert f"MEDACCEL_ISA is '{isa}', but this processor runs only {', '.join(SUPPORTED)}" in result.stderr


def test_an_unknown_instruction_set_is_refused():
    result = run(MEDACCEL_ISA="sse9")
    assert result.returncode != 0
    assert "MEDACCEL_ISA is 'sse9'; expected one of baseline, avx2, avx512" in result.stderr


def test_without_a_wish_torchs_capability_decides():
    assert "isa: baseline" in run(ATEN_CPU_CAPABILITY="default").stdout


def test_doctor_says_what_serves_and_what_is_built():
    text = run().stdout
    assert re.search(r"^gaussian_filter +cpu +C\+\+, ", text, re.MULTILINE)
    assert "CUDA kernels" in text
