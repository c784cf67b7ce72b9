# SPDX-License-Identifier: Apache-2.0
"""Shifted-window attention: what it refuses, and its memory and numbers at the limits of what it takes."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

from medaccel import use_reference
from medaccel.ops import shifted_window_attention
from tests.ops.checks import EMULATED, IMPLEMENTATIONS

OP = torch.ops.medaccel.shifted_window_attention.default
CPU = [name for name in IMPLEMENTATIONS if name not in EMULATED]  # the GPU's kernel has a suite of its own
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-7}


GOOD = {
    "qkv": torch.zeros(1, 4, 4, 12),
    "bias_table": torch.zeros(9, 2),
    "bias_index": torch.zeros(4, 4, dtype=torch.int64),
    "window_size": (2, 2),
    "shift_size": (1, 1),
}
BAD = {
    "qkv channels": ({"qkv": torch.zeros(1, 4, 4, 10)}, ValueError, "qkv has 10 channels and bias_table 2 heads"),
    "no channels": ({"qkv": torch.zeros(1, 4, 4, 0)}, ValueError, "qkv has 0 channels"),
    "table width": ({"bias_table": torch.zeros(9, 5)}, ValueError, "12 channels and bias_table 5 heads; expected 3"),
    "table shape": (
        {"bias_table": torch.zeros(9)},
        ValueError,
        r"bias_table has shape \(9,\); expected \(T, heads\)",
    ),
    "index too large": ({"bias_index": torch.full((4, 4), 9)}, ValueError, r"values from 9 to 9; expected \[0, 9\)"),
    "index negative": ({"bias_index": torch.full((4, 4), -1)}, ValueError, "values from -1 to -1"),
    "index shape": ({"bias_index": torch.zeros(3, 4).long()}, ValueError, r"\(3, 4\); expected \(4, 4\) for window"),
    "index with gradient": (
        {"bias_index": torch.zeros(4, 4, requires_grad=True)},
        TypeError,
        "bias_index is torch.float32; expected an integer tensor",
    ),
    "bool index": ({"bias_index": torch.zeros(4, 4).bool()}, TypeError, "bias_index is torch.bool"),
    "shift too large": ({"shift_size": (2, 1)}, ValueError, r"shift_size is \(2, 1\); expected 2 values >= 0"),
    "negative shift": ({"shift_size": (-1, 1)}, ValueError, r"shift_size is \(-1, 1\)"),
    "window rank": ({"window_size": (2, 2, 2)}, ValueError, r"window_size is \(2, 2, 2\); expected 2 sizes >= 1"),
    "window of zero": ({"window_size": (0, 2)}, ValueError, r"window_size is \(0, 2\)"),
    "two dims": ({"qkv": torch.zeros(4, 12)}, ValueError, r"shape \(4, 12\); expected \(B, \*spatial, 3·C\)"),
    "integers": ({"qkv": torch.zeros(1, 4, 4, 12).int()}, TypeError, "qkv is torch.int32; expected a floating-point"),
    "pad shape": ({"pad_qkv": torch.zeros(4)}, ValueError, r"pad_qkv has shape \(4,\); expected \(12,\)"),
    "other device": ({"bias_table": torch.zeros(9, 2, device="meta")}, ValueError, "bias_table is on meta and qkv"),
    "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; expected a probability in \[0, 1\)"),
    "no seed": ({"dropout_p": 0.5}, ValueError, "dropout_seed is None; expected one int64 element"),
    "float seed": ({"dropout_p": 0.5, "dropout_seed": torch.zeros(1)}, ValueError, "dropout_seed is torch.float32"),
}


@pytest.mark.parametrize("forced", [False, True], ids=["native", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_a_sentence(what: str, forced: bool):
    changes, error, match = BAD[what]
    arguments = {**GOOD, **changes}
    with use_reference() if forced else contextlib.nullcontext(), pytest.raises(error, match=match):
        shifted_window_attention(
            arguments.pop("qkv"), arguments.pop("bias_table"), arguments.pop("bias_index"), **arguments
        )


MEMORY = """
import resource, torch
from medaccel.ops import shifted_window_attention
from medaccel.ops.window_attention.cases import Case

def call(size):
    case = Case("", (size,) * 3, (7,) * 3, (3,) * 3, 3, 8)
    qkv, table, index, pad = case.tensors()
    wanted = [t.requires_grad_() for t in (qkv, table, pad)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y = shifted_window_attention(qkv, table, index, pad_qkv=pad, **case.options())
    torch.autograd.grad(y, wanted, torch.ones_like(y))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, qkv.numel() * 4 / 2**20

call(14)
print(*call(42))
"""


def test_memory_stays_linear_in_the_map():
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    extra, qkv = (float(v) for v in result.stdout.split())  # MiB
    # Output, its gradient and qkv's gradient are 5/3 of qkv; one block's scores alone would be 300 MiB.
    assert extra <= 2 * qkv + 16
