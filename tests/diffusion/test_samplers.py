# SPDX-License-Identifier: Apache-2.0
"""Samplers on data whose score is known: moments, orders of convergence, correctors, refusals."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from medaccel.diffusion import VESDE, VPSDE, Sampler, sample_rectified_flow
from medaccel.diffusion import coefficients as c
from medaccel.diffusion.coefficients import PREDICTIONS, Level
from medaccel.diffusion.samplers import METHODS, State
from medaccel.ops import diffusion_step
from tests.diffusion.mixture import Mixture

N = 40_000
LIKE = torch.empty(0, dtype=torch.float64)
SDES = {"VP": VPSDE(), "VE": VESDE(sigma_min=0.005, sigma_max=20.0)}


def run(sde: VPSDE | VESDE, prediction: str = "epsilon", steps: int | None = None, n: int = N, **options) -> Tensor:
    sampler = Sampler(sde, prediction=prediction, **options)
    x = sampler.start((1, n), seed=11, like=LIKE)
    return sampler.sample(Mixture().model(sde, prediction), x, seed=12, steps=steps)


def assert_moments(x: Tensor, bias: float) -> None:
    """Checks that mean and variance are the data's within five standard errors and the bias of the steps."""
    data, n = Mixture(), x.numel()
    assert abs(float(x.mean()) - data.mean()) < 5 * math.sqrt(data.variance() / n) + bias
    fourth = float((x - x.mean()).pow(4).mean())
    error = math.sqrt(fourth - data.variance() ** 2) / math.sqrt(n)
    assert abs(float(x.var()) - data.variance()) < 5 * error + bias
    assert abs(float((x < -0.4).double().mean()) - 0.3) < 5 * math.sqrt(0.21 / n) + bias  # the left component's share


@pytest.mark.parametrize("kind", SDES)
@pytest.mark.parametrize("method", METHODS)
def test_samples_have_the_datas_moments(method: str, kind: str):
    steps, bias = {"dpm_solver_2m": (60, 0.01), "ddim": (250, 0.015)}.get(method, (None, 0.015))
    assert_moments(run(SDES[kind], method=method, steps=steps), bias)


@pytest.mark.parametrize("method", METHODS)
def test_every_prediction_gives_the_same_sample(method: str):
    for sde in SDES.values():
        results = [run(sde, prediction, 20, 500, method=method) for prediction in PREDICTIONS]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-8, atol=1e-8)


def test_langevin_corrector_mends_a_coarse_predictor():
    coarse = run(SDES["VE"], steps=60, method="euler_maruyama")
    corrected = run(SDES["VE"], steps=60, method="euler_maruyama", corrector_steps=2)
    wrong = [abs(float(x.var()) - Mixture().variance()) for x in (coarse, corrected)]
    assert wrong[1] < 0.5 * wrong[0]
    assert_moments(run(SDES["VP"], steps=200, method="euler_maruyama", corrector_steps=1), 0.02)


def exact_flow(x: Tensor, mean: float, std: float, levels: tuple[Level, Level]) -> Tensor:
    """The probability flow of Gaussian data: (x − α · mean) / √(α²·std² + σ²) stays what it is."""
    (a, s), (b, t) = levels
    return b * mean + (x - a * mean) * math.sqrt(((b * std) ** 2 + t * t) / ((a * std) ** 2 + s * s))


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm_solver_2m", 2)])
def test_order_of_convergence_is_the_theorys(method: str, order: int):
    """The error between two levels of a VP diffusion falls as steps^−order, in steps of equal log-SNR."""
    mean, std = 0.4, 0.5
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)[None]
    errors = []
    for steps in (20, 40, 80):
        logs = torch.linspace(-2.0, 2.0, steps + 1, dtype=torch.float64).tolist()
        levels = [Level(1 / math.sqrt(1 + math.exp(-2 * v)), 1 / math.sqrt(1 + math.exp(2 * v))) for v in logs]
        y, previous, before = x.clone(), None, None
        for level, to in itertools.pairwise(levels):
            m = level.sigma * (y - level.alpha * mean) / ((level.alpha * std) ** 2 + level.sigma**2)  # ε
            step = c.ddim("epsilon", level, to) if method == "ddim" else c.dpm_solver_2m("epsilon", level, to, before)
            y, x0 = diffusion_step(y, m, previous=previous, **step)
            previous, before = x0, level
        errors.append(float((y - exact_flow(x, mean, std, (levels[0], levels[-1]))).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_the_ancestral_step_is_ddpms_and_ddim_with_eta_one_has_its_variance():
    sde = VPSDE()
    alpha_bar = [sde.level(i).alpha ** 2 for i in range(1000)]
    for t in (1, 10, 500, 999):
        beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
        step = c.ancestral("epsilon", sde.level(t), sde.level(t - 1))
        # SDEdit's form: μ = (x − β/√(1−ᾱ) · ε) / √α.
        x_factor, e_factor = step["d"] + step["c"] * step["a"], step["c"] * step["b"]
        assert x_factor == pytest.approx(1 / math.sqrt(1 - beta), rel=1e-9)
        assert e_factor == pytest.approx(-beta / math.sqrt(1 - alpha_bar[t]) / math.sqrt(1 - beta), rel=1e-8)
        assert step["s"] ** 2 == pytest.approx(beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]), rel=1e-8)
        assert c.ddim("epsilon", sde.level(t), sde.level(t - 1), 1.0)["s"] == pytest.approx(step["s"], rel=1e-9)


def test_the_variance_exploding_step_is_sdedits():
    """The step is x + ε² · score + ε · z with ε² = σ² − σ′²."""
    step = c.euler_maruyama("score", Level(1.0, 3.0), Level(1.0, 2.0))
    assert (step["d"], step["e"], step["s"]) == pytest.approx((1.0, 5.0, math.sqrt(5.0)))


def test_rectified_flow_follows_straight_lines_exactly_and_curved_ones_better_with_more_steps():
    noise = torch.randn(1, 1000, dtype=torch.float64)
    point = sample_rectified_flow(lambda x, t: (2.0 - x) / (t[0] / 1000), noise, steps=3)
    torch.testing.assert_close(point, torch.full_like(noise, 2.0))
    mean, std = 0.4, 0.5

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        """Returns E[x0 − noise | x] for Gaussian data and x = (1 − t) · x0 + t · noise."""
        t = time[0].double() / 1000
        variance = ((1 - t) * std) ** 2 + t * t
        return mean + ((1 - t) * std**2 - t) / variance * (x - (1 - t) * mean)

    wrong = []
    for steps in (20, 40, 80):
        y = sample_rectified_flow(velocity, noise, steps=steps)
        wrong.append(float((y - (mean + std * noise)).abs().max()))
    for coarse, fine in itertools.pairwise(wrong):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.25)


def test_a_sample_depends_on_neither_batch_nor_interruption():
    sde = SDES["VP"]
    for method in METHODS:
        sampler = Sampler(sde, method)
        model = lambda x, time: 0.3 * x  # noqa: E731 (torch's own exp differs by where in a batch a number lies)
        x = torch.randn(3, 7, 5, dtype=torch.float64)
        together = sampler.sample(model, x, seed=5, t0=200, steps=9)
        alone = [sampler.sample(model, x[i : i + 1], seed=5, t0=200, steps=9, sample_offset=i) for i in range(3)]
        assert torch.equal(torch.cat(alone), together)
        indices = sde.indices(200, 9)
        states = sampler.run(model, State(x.clone()), indices, seed=5)
        half = next(itertools.islice(states, 3, None))
        rest = State(half.x.clone(), half.step, None if half.previous is None else half.previous.clone())
        (*_, last) = sampler.run(model, rest, indices, seed=5)
        assert torch.equal(last.x, together)


def test_the_callers_noise_is_left_alone():
    sampler, x = Sampler(SDES["VP"]), torch.randn(1, 50)
    before = x.clone()
    sampler.sample(lambda x, t: x, x, seed=1, steps=3)
    sample_rectified_flow(lambda x, t: x, x, steps=3)
    assert torch.equal(x, before)


# --- bad input -------------------------------------------------------------------------------------------------
BAD = {
    "method": (lambda: Sampler(VPSDE(), "euler"), r"Sampler: method is 'euler'; expected one of \['ancestral'"),
    "prediction": (lambda: Sampler(VPSDE(), prediction="x"), "prediction is 'x'; expected one of"),
    "eta": (lambda: Sampler(VPSDE(), eta=-0.1), "Sampler: eta is -0.1; expected 0 to 1"),
    "snr": (lambda: Sampler(VPSDE(), snr=0), "corrector_steps is 0 and snr 0; expected"),
    "clip": (lambda: Sampler(VPSDE(), clip=(1, 0)), r"Sampler: clip is \(1, 0\); expected \(min, max\)"),
    "clip without x0": (
        lambda: Sampler(VPSDE(), "euler_maruyama", clip=(0, 1)),
        "euler_maruyama predicts no x0 to clip; expected None",
    ),
    "t0": (lambda: VPSDE().indices(1001), "VPSDE: t0 is 1001; expected 1 to 1000 of the schedule's levels"),
    "t0 of zero": (lambda: VPSDE().indices(0), "VPSDE: t0 is 0; expected 1 to 1000"),
    "share": (lambda: VESDE().indices(1.5), r"VESDE: t0 is 1.5; expected a share of the schedule in \(0, 1\]"),
    "steps": (lambda: VPSDE().indices(10, 11), "VPSDE: steps is 11; expected 1 to 10, the levels up to t0"),
    "level": (lambda: VPSDE().level(1000), "VPSDE: index is 1000; expected -1 to 999"),
    "betas": (lambda: VPSDE(beta_min=2.0, beta_max=1.0), "beta_min is 2.0, beta_max 1.0 and steps 1000; expected"),
    "sigmas": (lambda: VESDE(sigma_min=0.0), "VESDE: sigma_min is 0.0, sigma_max 50.0 and steps 1000; expected"),
    "time": (lambda: VESDE(time="t"), "VESDE: time is 't'; expected 'index' or 'sigma'"),
    "table": (lambda: VPSDE.from_alphas_cumprod([0.5, 0.9]), "alphas_cumprod is not sorted; expected values in"),
    "no signal": (
        lambda: VPSDE.from_alphas_cumprod([0.9, 0.5, 0.0]),
        r"alphas_cumprod reaches from 0.9 to 0; expected values in \(0, 1\)",
    ),
    "no signal to predict": (
        lambda: c.ddim("epsilon", Level(0.0, 1.0), Level(0.5, 0.8)),
        "the level has no signal, so a prediction of 'epsilon' says nothing",
    ),
    "no noise to predict": (
        lambda: c.predictions("sample", Level(1.0, 0.0)),
        "the level has no noise, so a prediction of 'sample' says nothing",
    ),
    "noise level": (lambda: VESDE().suggest_t0(0), "VESDE: noise_level is 0; expected a standard deviation > 0"),
    "high noise level": (
        lambda: VESDE().suggest_t0(60.0),
        "noise_level is 60.0; expected at most 50, the schedule's",
    ),
    "unsorted indices": (
        lambda: next(Sampler(VPSDE()).run(lambda x, t: x, State(torch.zeros(1, 4)), [3, 5, -1], seed=1)),
        "unsorted or without -1 at the end; expected strictly decreasing",
    ),
    "NaN": (
        lambda: Sampler(VPSDE(), check_finite=True).sample(lambda x, t: x / 0, torch.zeros(1, 4), seed=1, t0=5),
        r"the model's output holds a NaN or an infinity at level 4 \(time 4\); expected finite numbers",
    ),
    "flow": (
        lambda: sample_rectified_flow(lambda x, t: x, torch.zeros(1, 4), steps=0),
        "steps is 0; expected at least",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_a_sentence(what: str):
    call, match = BAD[what]
    with pytest.raises(ValueError, match=match):
        call()


def test_suggested_t0_is_the_first_level_with_that_much_noise():
    for sde in (VPSDE(), VESDE()):
        for wanted in (0.02, 0.1, 1.0):
            t0 = sde.suggest_t0(wanted)
            ratio = [sde.level(i).sigma / sde.level(i).alpha for i in (t0 - 2, t0 - 1)]
            assert ratio[0] < wanted <= ratio[1]


def test_a_monai_schedulers_table_becomes_a_vpsde():
    from monai.networks.schedulers import DDPMScheduler

    sde = VPSDE.from_alphas_cumprod(DDPMScheduler().alphas_cumprod)
    assert len(sde) == 1000
    for i in (0, 500, 999):
        assert sde.level(i).alpha == pytest.approx(VPSDE().level(i).alpha, rel=1e-4)
