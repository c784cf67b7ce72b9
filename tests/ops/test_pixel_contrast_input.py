# SPDX-License-Identifier: Apache-2.0
"""The pixel contrast: what it refuses, and its memory and numbers at the limits of what it takes."""

import contextlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medaccel import use_reference
from medaccel.ops import pixel_contrastive_loss
from tests.ops.checks import EMULATED, IMPLEMENTATIONS

OP = torch.ops.medaccel.pixel_contrastive_loss.default
CPU = [name for name in IMPLEMENTATIONS if name not in EMULATED]  # the GPU's kernel has a suite of its own
FLOOR = {torch.float64: 1e-13, torch.float32: 3e-7}


GOOD = {
    "query": torch.zeros(2, 5, 4),
    "key": torch.zeros(2, 6, 4),
    "query_coords": torch.zeros(2, 5, 3),
    "key_coords": torch.zeros(2, 6, 3),
    "radius": 1.0,
}
BAD = {
    "query dims": ({"query": torch.zeros(5, 4)}, ValueError, r"query has shape \(5, 4\); expected \(B, N, C\)"),
    "no channels": ({"query": torch.zeros(2, 5, 0)}, ValueError, r"query has shape \(2, 5, 0\); expected .* C >= 1"),
    "key channels": ({"key": torch.zeros(2, 6, 3)}, ValueError, r"key has shape \(2, 6, 3\); expected \(2, M, 4\)"),
    "key batch": ({"key": torch.zeros(1, 6, 4)}, ValueError, r"key has shape \(1, 6, 4\); expected \(2, M, 4\)"),
    "integers": ({"query": torch.zeros(2, 5, 4).int()}, TypeError, "query is torch.int32; expected a floating-point"),
    "no tensor": ({"key": [1.0]}, TypeError, "key is list; expected a floating-point tensor"),
    "coords batch": (
        {"query_coords": torch.zeros(1, 5, 3)},
        ValueError,
        r"query_coords has shape \(1, 5, 3\); expected \(2, 5, S\), the batch and the pixels of query",
    ),
    "coords pixels": ({"key_coords": torch.zeros(2, 5, 3)}, ValueError, r"key_coords has shape \(2, 5, 3\)"),
    "coords axes": ({"key_coords": torch.zeros(2, 6, 2)}, ValueError, r"key_coords .* S = 1-3 the same for both"),
    "four axes": ({"query_coords": torch.zeros(2, 5, 4)}, ValueError, r"query_coords has shape \(2, 5, 4\)"),
    "integer coords": ({"key_coords": torch.zeros(2, 6, 3).long()}, TypeError, "key_coords is torch.int64"),
    "radius 0": ({"radius": 0.0}, ValueError, "radius is 0.0; expected a finite number above 0"),
    "radius NaN": ({"radius": math.nan}, ValueError, "radius is nan; expected a finite number above 0"),
    "a sample's radius": ({"radius": torch.tensor([1.0, -1.0])}, ValueError, "radius is -1.0; expected a finite"),
    "radius shape": ({"radius": torch.ones(3)}, ValueError, r"radius has shape \(3,\); expected .* one per sample"),
    "integer radius": ({"radius": torch.ones(2).int()}, TypeError, "radius is torch.int32"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a finite number above 0"),
    "temperature -1": ({"temperature": -1}, ValueError, "temperature is -1; expected a finite number above 0"),
    "temperature inf": ({"temperature": math.inf}, ValueError, "temperature is inf"),
    "reduction": ({"reduction": "median"}, ValueError, "reduction is 'median'; expected 'mean', 'sum' or 'none'"),
    "other device": ({"key": torch.zeros(2, 6, 4, device="meta")}, ValueError, "key is on meta and query on cpu"),
}


@pytest.mark.parametrize("forced", [False, True], ids=["native", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_a_sentence(what: str, forced: bool):
    changes, error, match = BAD[what]
    arguments = {**GOOD, **changes}
    with use_reference() if forced else contextlib.nullcontext(), pytest.raises(error, match=match):
        pixel_contrastive_loss(*[arguments.pop(name) for name in list(GOOD)[:4]], **arguments)


MEMORY = """
import resource, torch
from medaccel.ops import pixel_contrastive_loss
from medaccel.ops.pixel_contrast.cases import Views

def call(size):
    query, key, *coords, radius = Views("", (size,) * 3, 64, batch=1).tensors()
    query.requires_grad_(), key.requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixel_contrastive_loss(query, key, *coords, radius=radius).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, query.numel() * 4 / 2**20

call(6)
print(*call(16))
"""


def test_memory_stays_linear_in_the_pixels():
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    extra, query = (float(v) for v in result.stdout.split())  # MiB
    # Both gradients, both maps normalised and their gradients are 6 of query's size; the scores would be 64 MiB.
    assert query == 1.0
    assert extra <= 6 * query + 10


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-7, 1e-10, 1e-15])
def test_gradients_at_small_temperatures_are_those_of_plain_pytorch(temperature: float):
    """There a score's rounding is more than 1, and an exponential's argument must be rounded as its sum was."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 40, 8, generator=generator, requires_grad=True) for _ in range(2)]
    at = torch.rand(2, 40, 3, generator=generator)
    results = []
    for forced in (True, False):
        with use_reference() if forced else contextlib.nullcontext():
            loss = pixel_contrastive_loss(*features, at, at, radius=0.4, temperature=temperature)
        results.append([loss.detach(), *torch.autograd.grad(loss, features)])
    for plain, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
