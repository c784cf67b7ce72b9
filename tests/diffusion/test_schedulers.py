# SPDX-License-Identifier: Apache-2.0
"""Schedulers: MONAI's values given the same noise, the skipped-step fault mended, accelerate, refusals."""

import copy
import math
from typing import Any

import pytest
import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM
from torch import Tensor, nn

import medaccel
from medaccel.diffusion import DDIMScheduler, DDPMScheduler, noised

BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SHAPE = (2, 3, 5, 6, 7)


def pair(ours: Any, monai: Any, **options: Any) -> tuple[Any, Any]:
    """Returns medaccel's scheduler with MONAI's behaviour, and MONAI's."""
    return ours(skipped_steps="training", kernel_noise=False, **options), monai(**options)


def accelerated(scheduler: Any) -> Any:
    twin = copy.deepcopy(scheduler)
    assert medaccel.accelerate(twin)
    return twin


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], amplified: float = 1.0) -> None:
    """Compares results; `amplified` is the factor by which x0's formula multiplies a rounding of the sample, 1 /
    √ᾱ."""
    for a, b, factor in zip(ours, theirs, (1.0, amplified), strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= BOUND[a.dtype] * max(1.0, float(b.abs().max())) * factor


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("schedule", ["linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_ddpm_steps_have_monais_values(variance: str, prediction: str, schedule: str, dtype: torch.dtype):
    for clip in (True, False):
        ours, monai = pair(
            DDPMScheduler, MonaiDDPM, schedule=schedule, variance_type=variance, prediction_type=prediction,
            clip_sample=clip,
        )  # fmt: skip
        twin = accelerated(monai)
        x, m = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)
        for t in (0, 1, 2, 500, torch.tensor(998), 999):
            expected, amplified = monai.step(m, t, x, seeded(5)), float(monai.alphas_cumprod[t] ** -0.5)
            assert_close(ours.step(m, t, x, seeded(5)), expected, amplified)
            assert_close(twin.step(m, t, x, seeded(5)), expected, amplified)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1000, 50, 7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_have_monais_values(eta: float, steps: int, prediction: str, dtype: torch.dtype):
    for clip, to_one in ((True, True), (False, False)):
        options = {"prediction_type": prediction, "clip_sample": clip, "set_alpha_to_one": to_one}
        ours, monai = pair(DDIMScheduler, MonaiDDIM, **options)
        twin = accelerated(monai)
        x, m = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)
        for scheduler in (ours, monai, twin):
            scheduler.set_timesteps(steps)
        for t in monai.timesteps[:: max(1, steps // 5)]:
            expected = monai.step(m, t, x, eta=eta, generator=seeded(5))
            amplified = float(monai.alphas_cumprod[t] ** -0.5)
            assert_close(ours.step(m, t, x, eta, seeded(5)), expected, amplified)
            assert_close(twin.step(m, t, x, eta, seeded(5)), expected, amplified)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_noising_and_velocity_have_monais_values(dtype: torch.dtype):
    x, z, t = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype), torch.tensor([3, 999])
    for ours, monai in (pair(DDPMScheduler, MonaiDDPM), pair(DDIMScheduler, MonaiDDIM)):
        for scheduler in (ours, accelerated(monai)):
            assert_close(
                (scheduler.add_noise(x, z, t), scheduler.get_velocity(x, z, t)),
                (monai.add_noise(x, z, t), monai.get_velocity(x, z, t)),
            )


def test_a_learned_variance_is_monais():
    for variance in ("learned", "learned_range"):
        ours, monai = pair(DDPMScheduler, MonaiDDPM, variance_type=variance)
        x, m = torch.randn(1, 1, 4, 4), torch.rand(1, 2, 4, 4)
        assert_close(ours.step(m, 500, x, seeded(1)), monai.step(m, 500, x, seeded(1)))


def test_mixed_precision_is_promoted_as_torch_does():
    monai = MonaiDDPM()
    twin = accelerated(monai)
    x, m = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    for a, b in ((x, m.double()), (x.double(), m)):
        # MONAI multiplies float32 coefficients with float32 tensors before it promotes.
        for ours, theirs in zip(twin.step(b, 500, a, seeded(1)), monai.step(b, 500, a, seeded(1)), strict=True):
            assert ours.dtype == theirs.dtype == torch.float64
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_whole_run_of_an_accelerated_scheduler_is_monais():
    def model(x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        return 0.3 * x + 0.001 * timesteps.reshape(-1, 1, 1, 1)

    for monai in (MonaiDDPM(num_train_timesteps=20), MonaiDDIM(num_train_timesteps=20)):
        noise, results = torch.randn(1, 1, 8, 8, dtype=torch.float64), []
        for scheduler in (monai, accelerated(monai)):
            torch.manual_seed(1)
            results.append(DiffusionInferer(scheduler).sample(noise, model, scheduler, verbose=False))
        assert float((results[0] - results[1]).abs().max()) < 1e-10


def test_accelerate_finds_schedulers_in_a_model_and_revert_gives_monais_back():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scheduler = MonaiDDPM()

    holder = Holder()
    assert medaccel.accelerate(holder).changed == [("scheduler", "medaccel.diffusion.schedulers.DDPMScheduler")]
    assert type(holder.scheduler) is DDPMScheduler
    assert (holder.scheduler.skipped_steps, holder.scheduler.kernel_noise) == ("training", False)
    medaccel.revert(holder)
    assert type(holder.scheduler) is MonaiDDPM
    holder.scheduler.step = lambda *arguments: None
    ((_, why),) = medaccel.accelerate(holder).kept
    assert why == "its step or add_noise has been replaced on the instance"


# --- what is mended --------------------------------------------------------------------------------------------
def gaussian_noise_prediction(scheduler: Any, x: Tensor, t: int, mean: float, std: float) -> Tensor:
    """Returns ε of data N(mean, std²), exactly."""
    alpha = scheduler.alphas_cumprod[t].double()
    return (1 - alpha).sqrt() * (x - alpha.sqrt() * mean) / (alpha * std**2 + 1 - alpha)


def sampled(scheduler: Any, steps: int, mean: float, std: float, **options: Any) -> Tensor:
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 100_000, dtype=torch.float64)
    for t in scheduler.timesteps:
        x, _ = scheduler.step(gaussian_noise_prediction(scheduler, x, int(t), mean, std), t, x, **options)
    return x


def test_ddpm_with_fewer_steps_than_training_samples_the_data():
    mean, std, options = 0.4, 0.3, {"clip_sample": False}
    mended = sampled(DDPMScheduler(**options), 100, mean, std, seed=3)
    faulty = sampled(DDPMScheduler(skipped_steps="training", **options), 100, mean, std, seed=3)
    assert float(mended.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(1e5))
    assert float(mended.std()) == pytest.approx(std, rel=0.1)  # one of the 100 steps
    assert abs(float(faulty.std()) - std) > 0.3  # MONAI's way ends in noise


@pytest.mark.parametrize("steps", [1000, 50, 30, 7])
def test_ddim_goes_to_the_level_of_the_next_inference_step(steps: int):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    clean, noise = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    t, following = (scheduler.timesteps[i : i + 1] for i in (1, 2))
    x, _ = scheduler.step(noise, int(t), scheduler.add_noise(clean, noise, t))
    torch.testing.assert_close(x, scheduler.add_noise(clean, noise, following), rtol=1e-6, atol=1e-6)


def test_every_step_of_a_full_run_is_the_same_either_way():
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    a, b = DDPMScheduler(), DDPMScheduler(skipped_steps="training")
    for t in (0, 1, 500, 999):
        assert_close(a.step(m, t, x, seed=1), b.step(m, t, x, seed=1))


# --- the kernel's noise ----------------------------------------------------------------------------------------
def test_kernel_noise_follows_torchs_generator_or_the_seed():
    scheduler, x = DDPMScheduler(), torch.randn(SHAPE)
    torch.manual_seed(1)
    first = scheduler.step(x, 500, x)[0]
    torch.manual_seed(1)
    assert torch.equal(first, scheduler.step(x, 500, x)[0])
    assert not torch.equal(first, scheduler.step(x, 500, x)[0])
    assert torch.equal(scheduler.step(x, 500, x, seeded(2))[0], scheduler.step(x, 500, x, seeded(2))[0])
    assert torch.equal(scheduler.step(x, 500, x, seed=2)[0], scheduler.step(x, 500, x, seed=2)[0])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_need_no_stored_noise(prediction: str):
    scheduler = DDPMScheduler(prediction_type=prediction)
    x, t = torch.randn(SHAPE, dtype=torch.float64), torch.tensor([10, 700])
    noise = noised(x, 0.0, 1.0, seed=4)
    torch.testing.assert_close(scheduler.add_noise(x, None, t, seed=4), scheduler.add_noise(x, noise, t))
    torch.testing.assert_close(scheduler.training_target(x, None, t, seed=4), scheduler.training_target(x, noise, t))
    # The target is what the step's formula turns back into x0.
    noisy = scheduler.add_noise(x, noise, t)[:1]
    target = scheduler.training_target(x, noise, t)[:1]
    clean = DDPMScheduler(prediction_type=prediction, clip_sample=False).step(target, 10, noisy, seed=1)[1]
    torch.testing.assert_close(clean, x[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMScheduler()], ids=lambda s: type(s).__name__)
def test_kept_voxels_end_as_the_guide(scheduler: Any):
    guide, mask = torch.randn(SHAPE), torch.rand(SHAPE) < 0.5
    scheduler.set_timesteps(4)
    x = torch.randn(SHAPE)
    for t in scheduler.timesteps:
        x, _ = scheduler.step(0.5 * x, t, x, seed=1, mask=mask, guide=guide, out=(x, None))
    assert torch.equal(x[~mask], guide[~mask])


def test_half_precision_noising_does_not_spoil_the_table():
    scheduler = DDPMScheduler()
    scheduler.add_noise(torch.ones(1, 4).half(), None, torch.tensor([3]), seed=1)
    assert scheduler.alphas_cumprod.dtype == torch.float32


# --- bad input -------------------------------------------------------------------------------------------------
X = torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_bad_input_is_refused_in_a_sentence(cls: Any):
    name = cls.__name__
    scheduler = cls(check_finite=True)
    bad = X.clone()
    bad[0, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match=f"{name}: model_output holds a NaN or an infinity at timestep 7; expected"):
        scheduler.step(bad, 7, X)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match=f"{name}: timestep is {t}; expected 0 to 999"):
            scheduler.step(X, t, X)
    with pytest.raises(ValueError, match=rf"{name}: timesteps reach from 0 to 1000; expected 0 to 999"):
        scheduler.add_noise(X, X, torch.tensor([0, 1000]))
    with pytest.raises(ValueError, match=f"{name}: num_inference_steps is 0; expected 1 to 1000"):
        scheduler.set_timesteps(0)
    scheduler.timesteps = torch.tensor([0, 500, 999])
    with pytest.raises(ValueError, match=f"{name}: timesteps are not sorted; expected decreasing ones"):
        scheduler.step(X, 500, X)
    with pytest.raises(ValueError, match=f"{name}: clip_sample_min is 1.0 and clip_sample_max -1.0; expected"):
        cls(clip_sample_min=1.0, clip_sample_max=-1.0)
    with pytest.raises(ValueError, match=f"{name}: skipped_steps is 'all'; expected one of"):
        cls(skipped_steps="all")
    with pytest.raises(ValueError, match=r"model_output has shape \(1, 1, 4, 2\); expected the sample's"):
        cls().step(X[..., :2], 999, X)


def test_noising_is_mapped_over_time_steps_and_their_range_still_checked():
    scheduler = DDPMScheduler(num_train_timesteps=10)
    x, noise, steps = torch.randn(3, 1, 1, 4, 4), torch.randn(3, 1, 1, 4, 4), torch.tensor([[0], [4], [9]])
    for f in (scheduler.add_noise, scheduler.get_velocity):
        expected = torch.stack([f(*one) for one in zip(x, noise, steps, strict=True)])
        torch.testing.assert_close(torch.vmap(f)(x, noise, steps), expected)
        gradient = torch.vmap(torch.func.grad(lambda x, z, t: f(x, z, t).square().sum()))(x, noise, steps)  # noqa: B023
        leaf = x.clone().requires_grad_()
        total = sum(f(*one).square().sum() for one in zip(leaf, noise, steps, strict=True))
        torch.testing.assert_close(gradient, torch.autograd.grad(total, leaf)[0])
        with pytest.raises(ValueError, match="timesteps reach from 1 to 10"):
            torch.vmap(f)(x, noise, steps + 1)
