# SPDX-License-Identifier: Apache-2.0
"""The Gaussian methods: what they can express, how they are fitted, stored and loaded."""

import signal
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch

from medaccel.restoration.methods import gaussian
from medaccel.restoration.methods.gaussian import GaussianCascade, GaussianMix, fit, restore
from medaccel.restoration.study import PETStudy

SPACING = (4.0, 4.0, 3.0)


def make_study(seed: int, noise: float = 0.6) -> PETStudy:
    """A smooth body with white noise that a Gaussian can take away."""
    rng = np.random.default_rng(seed)
    truth = scipy.ndimage.gaussian_filter(rng.random((24, 22, 20)), 3.0)
    truth = (2 + 40 * (truth - truth.mean())).clip(0.5).astype(np.float32)
    draw = lambda scale: (truth + scale * rng.standard_normal(truth.shape)).clip(0).astype(np.float32)  # noqa: E731
    first = draw(noise)
    second = ((2 * first + draw(noise * 2**0.5)) / 3).astype(np.float32)
    return PETStudy(f"made_{seed}", SPACING, np.diag([*SPACING, 1.0]), {60: first, 90: second}, noise_free=truth)


@pytest.fixture(scope="module")
def studies() -> list[PETStudy]:
    return [make_study(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def fits(studies: list[PETStudy]) -> dict:
    return {name: fit(name, studies, 60, 90, epochs=8, progress=False) for name in gaussian.METHODS}


def test_a_fit_needs_a_weight_for_each_gaussian():
    with pytest.raises(ValueError, match="1 weights for 2 Gaussians"):
        gaussian.FittedMethod([(1, 1, 1), (2, 2, 2)], weights=[1.0])


def test_a_cascade_is_the_one_gaussian_whose_variance_is_the_sum():
    one, three = GaussianCascade(1), GaussianCascade(3)
    with torch.no_grad():
        three.log_sigma.copy_(torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.5, 2.0], [0.5, 1.0, 1.0]]).log())
        one.log_sigma.copy_((three.log_sigma.exp() ** 2).sum(0, keepdim=True).sqrt().log())
    volume = torch.randn(1, 1, 20, 22, 24, dtype=torch.float64)
    spacing = torch.tensor(SPACING, dtype=torch.float64)
    # The difference is what the three kernels cut off at 6σ.
    torch.testing.assert_close(one(volume, spacing), three(volume, spacing), rtol=0, atol=1e-3)


def test_fitting_lowers_the_loss_and_three_layers_end_where_one_does(fits: dict):
    losses = {name: fitted.losses for name, (_, fitted) in fits.items()}
    for record in losses.values():
        assert record[-1] < record[0]
    assert losses["gaussian3"][-1] == pytest.approx(losses["gaussian1"][-1], abs=0.003)
    assert losses["gaussian_mix"][-1] <= losses["gaussian1"][-1] + 1e-4


def test_the_fitted_sigma_beats_every_sigma_of_a_grid(studies: list[PETStudy], fits: dict):
    def loss(model: GaussianCascade) -> float:
        data = gaussian._Studies(studies, 60, 90)
        return float(gaussian.GaussianFit(model).loss([data[i] for i in range(len(data))]).detach())

    best = min(loss(GaussianCascade(1, sigma)) for sigma in np.arange(0.5, 8.0, 0.25))
    assert fits["gaussian1"][1].losses[-1] <= best + 0.002


def test_mix_weights_sum_to_one_and_the_identity_comes_first(fits: dict):
    fitted = fits["gaussian_mix"][1]
    assert sum(fitted.weights) == pytest.approx(1)
    assert fitted.sigma_mm[0] == (0, 0, 0)
    mix = GaussianMix()
    with torch.no_grad():
        mix.weight.zero_()
    volume = torch.randn(1, 1, 6, 7, 8)
    assert torch.equal(mix(volume, torch.tensor(SPACING)), volume)


def test_sigma_is_in_mm_whatever_the_spacing():
    method = GaussianCascade(1, 4.0)
    impulse = np.zeros((41, 41, 41), np.float32)
    impulse[20, 20, 20] = 1
    y = restore(method, impulse, (1.0, 2.0, 4.0)).astype(np.float64)
    k = np.arange(41) - 20
    for axis, spacing in enumerate((1.0, 2.0, 4.0)):
        profile = y.sum(axis=tuple(a for a in range(3) if a != axis))
        assert spacing * np.sqrt((profile * k**2).sum()) == pytest.approx(4.0, rel=0.01)


def test_fitting_again_gives_the_same_bits(studies: list[PETStudy], fits: dict):
    _, again = fit("gaussian1", studies, 60, 90, epochs=8, progress=False)
    assert again.losses == fits["gaussian1"][1].losses


def test_a_checkpoint_takes_the_fits_place(studies: list[PETStudy], tmp_path: Path):
    path = tmp_path / "gaussian1.pt"
    _, first = fit("gaussian1", studies, 60, 90, epochs=1, checkpoint=path, progress=False)
    _, second = fit("gaussian1", studies, 60, 90, epochs=5, checkpoint=path, progress=False)
    assert second == first
    with pytest.raises(ValueError, match="a checkpoint of 'gaussian1'; expected 'gaussian3'"):
        fit("gaussian3", studies, 60, 90, checkpoint=path, progress=False)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        fit("gaussian1", studies, 60, 90, checkpoint=path, progress=False)


def test_ctrl_c_in_the_middle_of_a_fit_is_a_keyboard_interrupt_and_saves_nothing(
    studies: list[PETStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, found))
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(gaussian.GaussianFit, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit("gaussian1", studies, 60, 90, epochs=2, checkpoint=tmp_path / "fit.pt", progress=False)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before


def test_bad_training_data_is_refused(studies: list[PETStudy]):
    with pytest.raises(ValueError, match="method 'median' is unknown"):
        fit("median", studies, 60, 90)
    with pytest.raises(ValueError, match="no training studies"):
        fit("gaussian1", [], 60, 90)
    same = make_study(5)
    same.exposures[90] = same.exposures[60]
    with pytest.raises(ValueError, match="study made_5: input and target do not differ"):
        fit("gaussian1", [same], 60, 90, progress=False)


def test_a_loss_that_is_not_finite_stops_the_fit(studies: list[PETStudy]):
    module = gaussian.GaussianFit(GaussianCascade(1))
    with torch.no_grad():
        module.method.log_sigma.fill_(torch.nan)
    batch = [gaussian._Studies(studies, 60, 90)[0]]
    with pytest.raises(ValueError, match="nan"):
        module.training_step(batch, 0)
