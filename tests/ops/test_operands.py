# SPDX-License-Identifier: Apache-2.0
"""Tests that the registered ops check their operands themselves: wrong ones end in a sentence, never in a crash."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medaccel.ops import shifted_window_attention
from tests.ops.malformed import OPS

ROOT = Path(__file__).parents[2]
# The dispatcher's own: an argument that the schema does not know, or a backend without a kernel.
DISPATCHER = ("RuntimeError", "NotImplementedError")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Every call's outcome. In a process of its own, which a fault would end."""
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-m", "tests.ops.malformed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"the last call is {lines[-1:]}: {done.stderr[-2000:]}"
    assert lines[-1] == {"op": None}
    return [line for line in lines if "result" in line]


def test_every_registered_op_is_in_the_table():
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "medaccel::" in name
    }
    assert names == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_malformed_operands_end_in_a_sentence(op: str, records: list[dict[str, Any]]):
    mine = [record for record in records if record["op"] == op]
    assert len(mine) > 50
    wrong = []
    for record in mine:
        result, text, outcome = record["result"], record["text"], record["outcome"]
        refused = result in ("TypeError", "ValueError") and text.startswith(op.removesuffix("_backward"))
        if result in DISPATCHER and text and "INTERNAL ASSERT" not in text:
            refused = True
        fine = {"refused": refused, "equal": result == "equal", "any": refused or result in ("equal", "a result")}
        if not fine[outcome]:
            wrong.append(f"{record['what']}: expected {outcome}, got {result} {text[:200]}")
    assert not wrong, "\n".join(wrong)


def test_tensors_whose_memory_does_not_say_what_they_hold_are_served(records: list[dict[str, Any]]):
    mine = [record for record in records if record["op"] == "public"]
    assert len(mine) > 100
    wrong = [record for record in mine if record["outcome"] == "equal" and record["result"] != "equal"]
    assert not wrong, "\n".join(f"{record['what']}: {record['result']} {record['text'][:200]}" for record in wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_an_index_changed_behind_autograds_back_is_refused_in_the_backward_pass(dtype: torch.dtype):
    index = torch.randint(0, 27, (8, 8)).to(dtype)
    qkv, table = torch.randn(1, 4, 4, 4, 24, requires_grad=True), torch.randn(27, 2, requires_grad=True)
    y = shifted_window_attention(qkv, table, index, window_size=(2, 2, 2), shift_size=(0, 0, 0))
    index.numpy()[3, 5] = 100
    with pytest.raises(ValueError, match=r"bias_index has values from \d+ to 100; expected \[0, 27\)"):
        y.sum().backward()
