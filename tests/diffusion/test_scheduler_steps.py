# SPDX-License-Identifier: Apache-2.0
"""Tests which step a scheduler takes: timesteps not listed, edited tables, levels without signal, odd arguments."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from torch import Tensor

import medaccel
from medaccel.diffusion import DDIMScheduler, DDPMScheduler

KINDS = {"ddpm": (DDPMScheduler, MonaiDDPM), "ddim": (DDIMScheduler, MonaiDDIM)}
SHAPE = (2, 3, 5, 6, 7)
# The values that MONAI's own tests publish: 50 inference steps, and then training steps 0 to 49 in ascending order.
PUBLISHED = {"ddpm": (-1.0153, -0.3218, 0.8454, -0.7870), "ddim": (-0.9579, -0.6457, 0.4684, -0.9694)}

DDPM_OPTIONS = [
    {"variance_type": variance, "prediction_type": prediction, "schedule": schedule}
    for variance, prediction, schedule in itertools.product(
        ("fixed_small", "fixed_large", "learned", "learned_range"),
        ("epsilon", "sample", "v_prediction"),
        ("linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"),
    )
]
DDIM_OPTIONS = [
    {"set_alpha_to_one": to_one, "prediction_type": prediction, "schedule": schedule, "steps_offset": offset}
    for to_one, prediction, schedule, offset in itertools.product(
        (True, False), ("epsilon", "sample", "v_prediction"), ("linear_beta", "cosine"), (0, 1)
    )
]
CONFIGURATIONS = [("ddpm", options) for options in DDPM_OPTIONS] + [("ddim", options) for options in DDIM_OPTIONS]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def accelerated(scheduler: Any) -> Any:
    twin = copy.deepcopy(scheduler)
    assert medaccel.accelerate(twin)
    return twin


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], amplified: float = 1.0) -> None:
    """To the rounding of the sums; amplified: what x0's formula multiplies it by, 1 / √ᾱ."""
    for a, b, factor in zip(ours, theirs, (1.0, amplified), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-6 * factor, atol=1e-6 * factor, equal_nan=True)


def published_loop(scheduler: Any) -> Tensor:
    scheduler.set_timesteps(50)
    torch.manual_seed(42)
    model_output, x = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    for t in range(50):
        x, _ = scheduler.step(model_output=model_output, timestep=t, sample=x)
    return x


# --- timesteps that set_timesteps does not list ----------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_monais_published_loop_over_timesteps_that_are_not_listed(kind: str):
    ours, monai = KINDS[kind]
    with pytest.warns(UserWarning, match="timestep 1 is not among the 50 of set_timesteps; from here on"):
        x = published_loop(ours())
    for result in (x, published_loop(accelerated(monai()))):
        torch.testing.assert_close(result.flatten(), torch.tensor(PUBLISHED[kind]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 6, 4, 4, 4), (1, 1, 3)], ids=str)
@pytest.mark.parametrize(("kind", "options"), CONFIGURATIONS, ids=str)
def test_any_timestep_is_taken_by_monais_rule(kind: str, options: dict[str, Any], shape: tuple[int, ...]):
    ours, monai = KINDS[kind]
    for steps in (100, 7):
        mended, theirs = ours(**options), monai(**options)
        twin = accelerated(theirs)
        for scheduler in (mended, theirs, twin):
            scheduler.set_timesteps(steps)
        listed = set(theirs.timesteps.tolist())
        x, m = torch.randn(shape), torch.randn(shape)
        for t in (500, 3, 2, 1, 998):
            expected, amplified = theirs.step(m, t, x, generator=seeded(t)), float(theirs.alphas_cumprod[t] ** -0.5)
            assert_same(twin.step(m, t, x, generator=seeded(t)), expected, amplified)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = mended.step(m, t, x, generator=seeded(t))
            if t not in listed:
                assert_same(got, expected, amplified)


@pytest.mark.parametrize("ours", [DDPMScheduler, DDIMScheduler])
def test_one_warning_and_the_mended_way_from_the_next_start_on(ours: Any):
    scheduler, x = ours(clip_sample=False), torch.randn(SHAPE, dtype=torch.float64)
    scheduler.set_timesteps(10)  # 999, 888, …
    clean = [scheduler.step(x, t, x, seed=1)[0] for t in (999, 888)]
    with pytest.warns(UserWarning, match=f"{ours.__name__}: timestep 500 is not among the 10"):
        scheduler.step(x, 500, x, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in (400, 300):
            scheduler.step(x, t, x, seed=1)
    assert not torch.equal(scheduler.step(x, 888, x, seed=1)[0], clean[1])  # still MONAI's way
    for t, expected in zip((999, 888), clean, strict=True):
        assert torch.equal(scheduler.step(x, t, x, seed=1)[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step(x, 500, x, seed=1)
    scheduler.set_timesteps(10)
    with pytest.warns(UserWarning, match="timestep 500"):
        scheduler.step(x, 500, x, seed=1)


def test_steps_that_are_listed_twice_lead_to_the_next_level():
    scheduler = DDIMScheduler(steps_offset=1)  # 1000 steps from 999 to 1
    assert len(set(scheduler.timesteps.tolist())) == 999
    x, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    for t, following in ((999, 998), (2, 1)):
        start = scheduler.add_noise(x, noise, t)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y, _ = DDIMScheduler(steps_offset=1, clip_sample=False).step(noise, t, start)
        torch.testing.assert_close(y, scheduler.add_noise(x, noise, following), rtol=1e-5, atol=1e-5)


def test_a_learned_variance_goes_to_the_next_inference_step():
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    for variance, (low, high) in {"learned": (0.0, 0.0), "learned_range": (-1.0, 1.0)}.items():
        scheduler = DDPMScheduler(variance_type=variance, clip_sample=False)
        small, large = (DDPMScheduler(variance_type=f"fixed_{v}", clip_sample=False) for v in ("small", "large"))
        for s in (scheduler, small, large):
            s.set_timesteps(10)
            s.kernel_noise = False
        for share, fixed in ((low, small), (high, large)):
            expected = fixed.step(m, 555, x, seeded(3))[0]
            if variance == "learned":  # no noise: the mean, which both variances have
                expected = expected - fixed.step(0 * m, 555, 0 * x, seeded(3))[0]
            got = scheduler.step(torch.cat([m, torch.full_like(m, share)], dim=1), 555, x, seeded(3))[0]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match="a mean and a variance, with which seed, out, mask and guide are not served"
    ):
        scheduler.step(torch.cat([m, m], dim=1), 555, x, seed=3)


# --- tables that are edited ------------------------------------------------------------------------------------
def set_item(timesteps: Tensor) -> None:
    timesteps[1] = 700


def set_data(timesteps: Tensor) -> None:
    timesteps.data[1] = 700  # no new version


def set_numpy(timesteps: Tensor) -> None:
    timesteps.numpy()[1] = 700  # neither


def copy_in(timesteps: Tensor) -> None:
    timesteps.copy_(torch.tensor([999, 700, 333, 0]))


EDITS: dict[str, Callable[[Any], Any]] = {
    "item": lambda s: set_item(s.timesteps),
    ".data": lambda s: set_data(s.timesteps),
    "numpy": lambda s: set_numpy(s.timesteps),
    "copy_": lambda s: copy_in(s.timesteps),
    "replaced": lambda s: setattr(s, "timesteps", torch.tensor([999, 700, 333, 0])),
    "another dtype": lambda s: setattr(s, "timesteps", torch.tensor([999, 700, 333, 0], dtype=torch.int32)),
    "a list": lambda s: setattr(s, "timesteps", [999, 700, 333, 0]),
    "an array": lambda s: setattr(s, "timesteps", np.array([999, 700, 333, 0])),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("ours", [DDPMScheduler, DDIMScheduler])
def test_an_edit_of_timesteps_is_seen(ours: Any, edit: str, inference: bool):
    x = torch.randn(SHAPE)
    expected = ours()
    expected.timesteps = torch.tensor([999, 700, 333, 0])
    scheduler = ours()
    with torch.inference_mode(inference), warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(4)  # 999, 666, 333, 0
        before = scheduler.step(x, 999, x, seed=1)[0].clone()
        EDITS[edit](scheduler)
        after = scheduler.step(x, 999, x, seed=1)[0]
        assert not torch.equal(after, before)
        assert torch.equal(after, expected.step(x, 999, x, seed=1)[0])
        assert torch.equal(scheduler.step(x, 700, x, seed=1)[0], expected.step(x, 700, x, seed=1)[0])


def test_a_list_of_timesteps_may_be_edited_in_place():
    scheduler, x = DDPMScheduler(), torch.randn(SHAPE)
    scheduler.timesteps = [999, 666, 333, 0]
    before = scheduler.step(x, 999, x, seed=1)[0]
    scheduler.timesteps[1] = 700
    assert not torch.equal(scheduler.step(x, 999, x, seed=1)[0], before)


def test_timesteps_on_another_device_are_told_by_identity_and_version():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    walk = scheduler._walk_now()
    walk.content, walk.version = None, scheduler.timesteps._version  # as of a GPU's
    assert scheduler._walk_now() is walk
    scheduler.timesteps[1] = 700
    assert scheduler._walk_now().following[999] == 700


@pytest.mark.parametrize("table", ["betas", "alphas", "alphas_cumprod"])
def test_an_edit_of_a_noise_table_is_seen(table: str):
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    monai = MonaiDDPM()
    ours = DDPMScheduler(skipped_steps="training", kernel_noise=False)
    twin = accelerated(monai)
    before = ours.step(m, 500, x, seeded(1))[0]
    for scheduler in (monai, ours, twin):
        getattr(scheduler, table)[500] *= 0.9
        getattr(scheduler, table).numpy()[499] *= 0.95
    expected = monai.step(m, 500, x, seeded(1))
    assert not torch.equal(expected[0], before)
    assert_same(ours.step(m, 500, x, seeded(1)), expected, 10)
    assert_same(twin.step(m, 500, x, seeded(1)), expected, 10)


def test_copies_and_pickles_have_their_own_timesteps():
    scheduler, x = DDPMScheduler(), torch.randn(SHAPE)
    scheduler.set_timesteps(4)
    before = scheduler.step(x, 999, x, seed=1)[0]
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(twin.step(x, 999, x, seed=1)[0], before)
        twin.timesteps[1] = 700
        assert not torch.equal(twin.step(x, 999, x, seed=1)[0], before)
    assert torch.equal(scheduler.step(x, 999, x, seed=1)[0], before)


# --- levels without signal, or without noise -------------------------------------------------------------------
def without_signal(scheduler: Any, at_start: int = 1) -> Any:
    """Zero terminal SNR (Lin et al., WACV 2024): √ᾱ shifted and scaled so that the last is 0."""
    roots = scheduler.alphas_cumprod.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    scheduler.alphas_cumprod = ((roots - last) * first / (first - last)) ** 2
    scheduler.alphas_cumprod[-at_start:] = 0
    scheduler.alphas = torch.cat(
        [scheduler.alphas_cumprod[:1], scheduler.alphas_cumprod[1:] / scheduler.alphas_cumprod[:-1]]
    )
    scheduler.betas = 1 - scheduler.alphas
    return scheduler


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1000, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_without_signal(kind: str, steps: int, prediction: str, clip: bool):
    ours, monai = KINDS[kind]
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    mended, theirs = (without_signal(make(prediction_type=prediction, clip_sample=clip)) for make in (ours, monai))
    twin = accelerated(theirs)
    for scheduler in (mended, theirs, twin):
        scheduler.set_timesteps(steps)
    assert_same(twin.step(m, 999, x, generator=seeded(1)), theirs.step(m, 999, x, generator=seeded(1)))
    if prediction == "epsilon":
        with pytest.raises(ValueError, match=r"the step from 999 to \d+ is undefined for a prediction of 'epsilon'"):
            mended.step(m, 999, x, seed=1)
        with pytest.raises(ValueError, match="is undefined for a prediction of 'epsilon'"):
            twin.step(m, 999, x, seed=1)  # MONAI has no seed, so there is no value of MONAI's to keep
    else:
        for t in mended.timesteps[:5]:
            x, x0 = mended.step(m, t, x, seed=1)
            assert x.isfinite().all()
            assert x0.isfinite().all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_from_no_signal_with_all_noise_is_defined(eta: float):
    for steps in (1000, 50, 3):
        scheduler = without_signal(DDIMScheduler(prediction_type="v_prediction"))
        scheduler.set_timesteps(steps)
        x = torch.randn(SHAPE)
        assert scheduler.step(x, 999, x, eta, seed=1)[0].isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS)
def test_levels_that_have_no_step_between_them(kind: str, prediction: str):
    """The last two levels have no signal, or the first one has no noise."""
    ours, monai = KINDS[kind]
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)

    def noiseless(scheduler: Any) -> Any:
        scheduler.alphas_cumprod[0] = 1
        return scheduler

    for spoil, t in ((lambda s: without_signal(s, 2), 999), (noiseless, 0)):
        mended, theirs = (spoil(make(prediction_type=prediction)) for make in (ours, monai))
        with pytest.raises(ValueError, match=f"the step from {t} to .* is undefined"):
            mended.step(m, t, x, seed=1)
        assert_same(accelerated(theirs).step(m, t, x, generator=seeded(1)), theirs.step(m, t, x, generator=seeded(1)))
