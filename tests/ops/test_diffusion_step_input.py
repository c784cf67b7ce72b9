# SPDX-License-Identifier: Apache-2.0
"""The diffusion step: what it refuses, and the limits of what it takes."""

import contextlib
from typing import Any

import pytest
import torch

from medaccel import use_reference
from medaccel.ops import diffusion_step
from medaccel.ops.diffusion_step.cases import DDPM
from tests.ops.checks import (
    EMULATED,
    IMPLEMENTATIONS,
)

OP = torch.ops.medaccel.diffusion_step.default
KERNELS = IMPLEMENTATIONS[1:]
CPU = [name for name in KERNELS if name not in EMULATED]
FLOOR = {torch.float64: 2e-15, torch.float32: 1e-6}


X = torch.zeros(2, 1, 4, 4, 4)
GOOD: dict[str, Any] = {"sample": X, "model_output": X, **DDPM}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integers": ({"sample": X.int()}, TypeError, "sample is torch.int32; expected a floating-point tensor"),
    "integer output": ({"model_output": X.int()}, TypeError, "model_output is torch.int32"),
    "scalar": ({"sample": torch.tensor(1.0)}, ValueError, r"sample has shape \(\); expected \(B, …\)"),
    "other shape": (
        {"model_output": X[:1]},
        ValueError,
        r"model_output has shape \(1, 1, 4, 4, 4\); expected the sample's, \(2, 1, 4, 4, 4\)",
    ),
    "other noise": ({"noise": X[..., :2]}, ValueError, r"noise has shape \(2, 1, 4, 4, 2\)"),
    "double output": (
        {"model_output": X.double()},
        ValueError,
        "model_output is torch.float64 and sample torch.float32",
    ),
    "half in double": (
        {"sample": X.double(), "model_output": X.half()},
        ValueError,
        "model_output is torch.float16 and sample torch.float64",
    ),
    "other device": (
        {"previous": X.to("meta")},
        ValueError,
        "previous is on meta and sample on cpu; expected the same",
    ),
    "coefficients": (
        {"a": torch.ones(3)},
        ValueError,
        r"a has shape \(3,\); expected a number or \(2,\), one a sample",
    ),
    "coefficient matrix": ({"s": torch.ones(2, 1)}, ValueError, r"s has shape \(2, 1\)"),
    "clip": ({"clip": (1.0, -1.0)}, ValueError, r"clip is \(1.0, -1.0\); expected \(min, max\) with min <= max"),
    "clip of NaN": ({"clip": (float("nan"), 1.0)}, ValueError, "clip is"),
    "seed": ({"seed": 2**64}, ValueError, "seed is 18446744073709551616; expected one of 64 bits"),
    "negative seed": ({"seed": -(2**63) - 1}, ValueError, "seed is -9223372036854775809"),
    "float seed": ({"seed": 1.5}, TypeError, "seed is 1.5; expected an integer, an int64 tensor or None"),
    "seed tensor": (
        {"seed": torch.zeros(2)},
        ValueError,
        r"seed is torch.float32 of shape \(2,\) on cpu; expected one",
    ),
    "offset": ({"offset": -1}, ValueError, r"offset is -1; expected 0 to 2\^63 - 1"),
    "guide's offset": ({"offset": 2**63}, ValueError, "offset is 9223372036854775808"),
    "sample_offset": (
        {"sample_offset": 2**32 - 1},
        ValueError,
        "sample_offset is 4294967295 for 2 samples; expected 0",
    ),
    "mask alone": ({"mask": X.bool()}, ValueError, "mask is given and guide is None; expected both or neither"),
    "guide alone": ({"guide": X}, ValueError, "guide is given and mask is None"),
    "mask shape": (
        {"mask": X[:, :, :2].bool(), "guide": X},
        ValueError,
        r"mask has shape \(2, 1, 2, 4, 4\); expected one",
    ),
    "unknown level": (
        {"mask": X.bool(), "guide": X, "a": 0.0},
        ValueError,
        "guide_scale or guide_std is None and a is 0",
    ),
    "out's shape": (
        {"out": X[:1].clone()},
        ValueError,
        r"out\[0\] is torch.float32 \(1, 1, 4, 4, 4\) on cpu; expected",
    ),
    "overlap": (
        {"sample": (line := torch.zeros(3, 8))[:2], "model_output": torch.zeros(2, 8), "out": line[1:]},
        ValueError,
        r"out\[0\] shares memory with sample but lies differently there",
    ),
    "one out twice": ({"out": (X2 := X.clone(), X2)}, ValueError, r"out\[0\] and out\[1\] share memory"),
    "out with gradient": (
        {"sample": X.clone().requires_grad_(), "out": X.clone()},
        ValueError,
        "out is given and an input requires a gradient",
    ),
}


@pytest.mark.parametrize("forced", [False, True], ids=["native", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_a_sentence(what: str, forced: bool):
    changes, error, match = BAD[what]
    with use_reference() if forced else contextlib.nullcontext(), pytest.raises(error, match=match):
        diffusion_step(**{**GOOD, **changes})


def test_one_sample_may_not_have_more_elements_than_the_counter_counts():
    from medaccel import _native

    none, size = (0, 0, 0), 2**34 + 1
    with pytest.raises(ValueError, match=f"a sample has {size} elements; expected at most {2**34}"):
        _native.cpu.diffusion_step_forward([none] * 6, [(0, 0)] * 2, 1, size, [0.0] * 9, None, (0, 0, 0), 1)


def test_samples_of_a_batch_share_mask_and_guide():
    x, guide = torch.randn(3, 2, 5, 5), torch.randn(1, 2, 5, 5)
    mask = torch.rand(1, 2, 5, 5) < 0.5
    together = diffusion_step(x, x, mask=mask, guide=guide, seed=1, **DDPM)[0]
    alone = [
        diffusion_step(x[i : i + 1], x[i : i + 1], mask=mask, guide=guide, seed=1, sample_offset=i, **DDPM)[0]
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))
