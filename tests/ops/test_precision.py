# SPDX-License-Identifier: Apache-2.0
"""Tests that fp32 products on a GPU follow torch's settings of their precision."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # a process, because the settings can't all be taken back

# What the user sets, in order, and the precision of fp32 products that follows.
SETTINGS = {
    "": "ieee",
    "set_float32_matmul_precision('highest')": "ieee",
    "set_float32_matmul_precision('high')": "tf32x3",
    "set_float32_matmul_precision('medium')": "tf32",
    "backends.cuda.matmul.allow_tf32 = True": "tf32x3",
    "backends.cuda.matmul.allow_tf32 = False": "ieee",
    "backends.cuda.matmul.fp32_precision = 'tf32'": "tf32x3",
    "backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "backends.fp32_precision = 'tf32'": "tf32x3",
    "set_float32_matmul_precision('medium'); torch.backends.cuda.matmul.allow_tf32 = False": "ieee",
    "set_float32_matmul_precision('medium'); torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "set_float32_matmul_precision('high'); torch.set_float32_matmul_precision('highest')": "ieee",
}
_PROGRAM = """
import os, sys, torch
from medaccel.ops._precision import dot_precision
for setting in sys.argv[1:]:
    if (child := os.fork()) == 0:
        try:
            exec(f"torch.{setting}" if setting else "")
            print([dot_precision(d) for d in (torch.float32, torch.bfloat16, torch.float16)], flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    command = [sys.executable, "-c", _PROGRAM, *SETTINGS]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == len(SETTINGS), run.stderr
    return {setting: eval(line) for setting, line in zip(SETTINGS, lines, strict=True)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_follow_torchs_setting(found: dict[str, list[str]], setting: str):
    assert found[setting] == [SETTINGS[setting], "ieee", "ieee"]
