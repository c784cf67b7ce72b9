# SPDX-License-Identifier: Apache-2.0
"""Arguments of the schedulers: numbers of all kinds, what is no timestep, and what MONAI makes of odd ones."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from torch import Tensor

from medaccel.diffusion import DDIMScheduler, DDPMScheduler
from tests.diffusion.test_scheduler_steps import KINDS, SHAPE, accelerated, assert_same, seeded

# --- arguments -------------------------------------------------------------------------------------------------
NUMBERS: dict[str, Any] = {
    "int": 500,
    "0-d tensor": torch.tensor(500),
    "one element": torch.tensor([500]),
    "int32": torch.tensor(500, dtype=torch.int32),
    "np.int64": np.int64(500),
    "np.int32": np.int32(500),
    "0-d array": np.array(500),
    "array of one": np.array([500]),
    "whole float": 500.0,
    "whole float tensor": torch.tensor(500.0),
}
NO_NUMBERS: dict[str, tuple[Any, type[Exception], str]] = {
    "fraction": (499.7, ValueError, r"timestep is 499.7; expected a whole number"),
    "NaN": (float("nan"), ValueError, r"timestep is nan; expected a whole number"),
    "infinite": (torch.tensor(torch.inf), ValueError, r"timestep is inf; expected a whole number"),
    "bool": (True, TypeError, r"timestep is True; expected a whole number"),
    "bool tensor": (torch.tensor(True), TypeError, r"timestep is tensor\(True\); expected a whole number"),
    "text": ("500", TypeError, r"timestep is '500'; expected a whole number"),
    "none": (None, TypeError, r"timestep is None; expected a whole number"),
    "several": (torch.tensor([5, 6]), ValueError, r"timestep has shape \(2,\); expected a single number"),
    "several in an array": (np.array([5, 6]), ValueError, r"timestep has shape \(2,\); expected a single number"),
    "empty": (torch.zeros(0), ValueError, r"timestep has shape \(0,\); expected a single number"),
    "complex": (5 + 0j, TypeError, r"timestep is \(5\+0j\); expected a whole number"),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_all_kinds_are_timesteps(kind: str, number: str):
    ours, monai = KINDS[kind]
    x = torch.randn(SHAPE)
    for scheduler in (ours(), accelerated(monai())):
        expected = scheduler.step(x, 500, x, generator=seeded(1))
        assert_same(scheduler.step(x, NUMBERS[number], x, generator=seeded(1)), expected)


@pytest.mark.parametrize("number", NO_NUMBERS)
@pytest.mark.parametrize("ours", [DDPMScheduler, DDIMScheduler])
def test_what_is_no_timestep_is_refused_in_a_sentence(ours: Any, number: str):
    value, error, sentence = NO_NUMBERS[number]
    x = torch.randn(SHAPE)
    with pytest.raises(error, match=sentence):
        ours().step(x, value, x)


@pytest.mark.parametrize(
    "timesteps",
    [
        torch.tensor([3, 999]),
        torch.tensor([3, 999], dtype=torch.int32),
        torch.tensor([[3], [999]]),
        np.array([3, 999]),
        [3, 999],
        (np.int64(3), np.int64(999)),
        7,
        np.int64(7),
        torch.tensor(7),
        torch.tensor([7]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_timesteps_of_noising_in_all_forms(kind: str, timesteps: Any):
    ours, monai = KINDS[kind]
    x, z = torch.randn(SHAPE), torch.randn(SHAPE)
    plain = torch.as_tensor(timesteps).long()
    for scheduler in (ours(), accelerated(monai())):
        assert_same(
            (scheduler.add_noise(x, z, timesteps), scheduler.get_velocity(x, z, timesteps)),
            (monai().add_noise(x, z, plain), monai().get_velocity(x, z, plain)),
        )


def test_timesteps_of_noising_that_make_no_sense_are_refused_in_a_sentence():
    x = torch.randn(SHAPE)
    for bad, error, sentence in (
        (torch.tensor([3.0, 9.0]), TypeError, "DDPMScheduler: timesteps are torch.float32; expected integers"),
        ([True, False], TypeError, "DDPMScheduler: timesteps are torch.bool; expected integers"),
        ([1, 2, 3], ValueError, r"DDPMScheduler: timesteps has shape \(3,\); expected \(2,\), one a sample, or one"),
        ([-1, 2], ValueError, "DDPMScheduler: timesteps reach from -1 to 2; expected 0 to 999"),
    ):
        with pytest.raises(error, match=sentence):
            DDPMScheduler().add_noise(x, x, bad)


# --- what only MONAI's own code gives --------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerated_scheduler_has_monais_values_for_odd_arguments(kind: str):
    monai = KINDS[kind][1]
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    cases: dict[str, tuple[Tensor, Any, Tensor]] = {
        "a sample that broadcasts": (m, 500, x[:1]),
        "an output that broadcasts": (m[:, :1], 500, x),
        "a negative timestep": (m, -2, x),
        "whole numbers": (m, 500, x.int()),
    }
    for output, t, sample in cases.values():
        theirs = monai()
        twin = accelerated(theirs)
        assert_same(
            twin.step(output, t, sample, generator=seeded(1)), theirs.step(output, t, sample, generator=seeded(1))
        )
    with pytest.raises(IndexError):
        accelerated(monai()).step(m, 1000, x)
    for noise, t in ((m[:1], torch.tensor([3, 9])), (m.double(), torch.tensor([3, 9])), (m, torch.tensor([-1, -2]))):
        theirs = monai()
        twin = accelerated(theirs)
        assert_same(
            (twin.add_noise(x, noise, t), twin.get_velocity(x, noise, t)),
            (theirs.add_noise(x, noise, t), theirs.get_velocity(x, noise, t)),
        )


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_of_a_step_are_torchs(kind: str, prediction: str):
    ours, monai = KINDS[kind]
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for a, b in itertools.product(dtypes, dtypes):
        theirs = monai(prediction_type=prediction)
        expected = theirs.step(m.to(b), 500, x.to(a), generator=seeded(1))
        got = accelerated(theirs).step(m.to(b), 500, x.to(a), generator=seeded(1))
        rough = 0.05 if torch.bfloat16 in (a, b) else 0.005 if torch.float16 in (a, b) else 1e-5
        for mine, other in zip(got, expected, strict=True):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=rough, atol=rough)
        mended = ours(prediction_type=prediction).step(m.to(b), 500, x.to(a), seed=1)
        assert mended[0].dtype == torch.promote_types(a, b)


def test_an_accelerated_scheduler_whose_table_became_bf16_has_monais_values():
    x, m = torch.randn(2, *SHAPE).bfloat16()
    theirs = MonaiDDPM()
    twin = accelerated(theirs)
    for scheduler in (theirs, twin):
        scheduler.add_noise(x, m, torch.tensor([3, 4]))  # moves MONAI's table to bf16 for good
    for ours, expected in zip(twin.step(m, 500, x, seeded(1)), theirs.step(m, 500, x, seeded(1)), strict=True):
        assert torch.equal(ours, expected)
