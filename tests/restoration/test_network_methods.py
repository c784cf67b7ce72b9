# SPDX-License-Identifier: Apache-2.0
"""Tests the methods with a network: what they restore, choose, draw and store; calibration; report of their fits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medaccel.report.html import Page, Section, render
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.methods import load_method, make_method
from medaccel.restoration.methods.base import RestorationRequest, RestorationTask
from medaccel.restoration.methods.diffusion import DiffusionMethod, _Shuffled, sample_cap
from medaccel.restoration.methods.networks import method as networks_method
from medaccel.restoration.methods.networks.method import Candidates, body_box
from medaccel.restoration.methods.sdedit import _NoiseShown
from medaccel.restoration.report.fits import fit_blocks
from medaccel.restoration.study import PETStudy, save_study
from tests.restoration.runs import TINY
from tests.restoration.test_gaussian_methods import SPACING, make_study

SWIN: dict[str, Any] = {"steps": 1, "steps_per_epoch": 1, "num_heads": [3, 3, 3, 3], "depths": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("studies")
    for seed in range(3):
        save_study(root / f"made_{seed}", make_study(seed))
    return sorted(root.iterdir())


@pytest.fixture(scope="module")
def fits(studies: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, methods = tmp_path_factory.mktemp("fits"), {}
    settings = {
        "swin_unetr": SWIN,
        "diffusion_sdedit": TINY | {"t0": [5, 20, 40]},
        "diffusion_conditional": TINY | {"base": "nlm"},
    }
    for name, chosen in settings.items():
        methods[name] = make_method(name, RestorationTask((60,), 90), chosen)
        methods[name].fit(studies[:2], studies[2:], folder=folder / name, progress=False)
        methods[name].save(folder / f"{name}.pt")
    return {"methods": methods, "folder": folder}


@pytest.fixture
def study() -> PETStudy:
    return make_study(7)


@pytest.mark.parametrize("name", ["swin_unetr", "diffusion_sdedit", "diffusion_conditional"])
@pytest.mark.slow
def test_a_restoration_is_the_blend_that_was_chosen_and_survives_storing(
    name: str, fits: dict[str, Any], study: PETStudy
):
    method, image = fits["methods"][name], study.exposures[60]
    weight = method.fitted.choices["weight"]["60"]
    assert weight == 0 or 0.66 < weight < 0.76
    found = method.restore(RestorationRequest(image, SPACING))
    assert found.volume.shape == image.shape
    assert found.volume.dtype == np.float32
    assert np.isfinite(found.volume).all()
    assert found.weight == pytest.approx(weight)
    np.testing.assert_allclose(found.volume, weight * image + (1 - weight) * found.activity, rtol=1e-5, atol=1e-6)
    again = load_method(fits["folder"] / f"{name}.pt", name).restore(RestorationRequest(image, SPACING))
    np.testing.assert_array_equal(again.volume, found.volume)


def test_the_candidates_are_named_with_their_scores(fits: dict[str, Any]):
    tried = fits["methods"]["diffusion_sdedit"].fitted.scores
    assert "60 s, t0 5, weight 0" in tried
    assert len({name.split(",")[1] for name in tried}) >= 2  # several t0, from small upward
    best = fits["methods"]["diffusion_sdedit"].fitted.choices
    assert f"60 s, t0 {best['t0']['60']}, weight {best['weight']['60']:g}" in tried
    assert all(np.isfinite(scores).all() for scores in tried.values())


def test_samples_depend_on_their_seed_and_their_mean_and_deviation_are_theirs(fits: dict[str, Any], study: PETStudy):
    method: DiffusionMethod = fits["methods"]["diffusion_conditional"]
    image = study.exposures[60]
    found = method.restore(RestorationRequest(image, SPACING, samples=3, keep_samples=True))
    assert found.samples is not None
    assert found.samples.shape == (3, *image.shape)
    np.testing.assert_allclose(found.activity, found.samples.mean(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.std, found.samples.std(axis=0, ddof=1), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(found.samples[0], found.samples[1])
    again = method.restore(RestorationRequest(image, SPACING, samples=2, keep_samples=True))
    np.testing.assert_array_equal(again.samples, found.samples[:2])
    other = method.restore(RestorationRequest(image, SPACING, samples=2, keep_samples=True, seed=1))
    assert not np.array_equal(other.samples, again.samples)
    assert method.restore(RestorationRequest(image, SPACING, samples=1)).std is None
    with pytest.raises(ValueError, match="samples is 0; expected a whole number >= 1"):
        method.restore(RestorationRequest(image, SPACING, samples=0))


def test_windows_of_a_large_volume_agree_with_the_whole(fits: dict[str, Any], study: PETStudy):
    method = fits["methods"]["swin_unetr"]
    tall = np.concatenate([study.exposures[60]] * 5, axis=2)  # 100 slices: two windows along the axis
    whole = method.predict(tall, SPACING, 60, None)
    assert whole.shape == tall.shape
    # Seams would show as jumps that the volume doesn't have.
    jumps = np.abs(np.diff(whole.mean(axis=(0, 1))))
    assert jumps.max() < 3 * np.abs(np.diff(tall.mean(axis=(0, 1)))).max()


def test_windows_are_added_up_where_three_volumes_fit_and_end_on_the_cpu(
    fits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def place_of_sums(device: torch.device, size: float) -> tuple[torch.device, str]:
        asked.append((device, size))
        return torch.device("cpu"), "windows are added up here"

    monkeypatch.setattr(networks_method, "place_of_sums", place_of_sums)
    method = fits["methods"]["swin_unetr"]
    roi = method.settings["roi_size"]
    size = (roi[0] + 8, 5, roi[2])  # windows do not fit along the first axis; the second is padded to one
    result = method.windows(torch.rand(1, 1, *size), lambda patch: 2 * patch)
    assert asked == [(torch.device("cpu"), 3 * 4 * size[0] * roi[1] * size[2])]
    assert method.placed == "windows are added up here"
    assert (result.shape, result.device.type) == ((1, 1, *size), "cpu")


def test_the_cap_is_what_independent_posterior_samples_reach():
    assert sample_cap(1, 60, 90) == pytest.approx(-100 / 3)
    assert sample_cap(8, 60, 90) == pytest.approx(25)
    rng = np.random.default_rng(0)
    # Activity known, counts drawn: the input and its target nest, samples of the target come from its posterior.
    first, second = (rng.standard_normal(400_000) / np.sqrt(t) for t in (60, 30))
    target = (60 * first + 30 * second) / 90
    posterior = [(60 * first + 30 * rng.standard_normal(first.size) / np.sqrt(30)) / 90 for _ in range(4)]
    score = metrics.score(np.mean((np.mean(posterior, axis=0) - target) ** 2), np.mean((first - target) ** 2))
    assert score == pytest.approx(sample_cap(4, 60, 90), abs=1)


def test_the_choice_takes_both_scores(study: PETStudy):
    candidates = Candidates(RestorationTask((60,), 90), [study])
    image, truth = study.exposures[60], study.noise_free
    assert truth is not None
    candidates.add("oracle", study, 60, metrics.oracle(image, truth, 60, 90).astype(np.float32))
    candidates.add("truth", study, 60, truth)
    candidates.add("input", study, 60, image)
    assert candidates.best(60) == "oracle"
    assert candidates.scores()["60 s, input"] == pytest.approx((0.0, 0.0), abs=1e-9)


def test_the_box_holds_the_body_and_is_the_whole_where_there_is_none():
    volume = np.zeros((40, 40, 40), dtype=np.float32)
    volume[15:25, 12:28, 10:30] = 3
    box = body_box(volume, (4.0, 4.0, 4.0))
    assert volume[box].sum() == volume.sum()
    assert volume[box].size < volume.size
    assert body_box(np.full((8, 8, 8), 0.01, dtype=np.float32), (4.0, 4.0, 4.0)) == (slice(0, 8),) * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:, :, :1], "expected three axes of at least two voxels"),
        (lambda v: v * np.nan, "voxels that are NaN or infinite"),
        (lambda v: v - 100, "expected SUV >= 0"),
        (lambda v: v * 0, "zero everywhere"),
    ],
)
def test_a_volume_that_is_no_suv_is_refused(change: Any, message: str, fits: dict[str, Any], study: PETStudy):
    for method in fits["methods"].values():
        with pytest.raises(ValueError, match=message):
            method.restore(RestorationRequest(change(study.exposures[60]), SPACING))


def test_an_exposure_that_was_not_fitted_to_is_refused(fits: dict[str, Any], study: PETStudy):
    with pytest.raises(ValueError, match="seconds is 45; expected one of 60"):
        fits["methods"]["swin_unetr"].restore(RestorationRequest(study.exposures[60], SPACING, seconds=45))


@pytest.mark.parametrize(("reference", "predict"), [("target", "activity"), ("noise_free", "target")])
def test_the_loss_falls_to_zero_at_what_it_asks_for(reference: str, predict: str, studies: list[Path]):
    from torch.utils.data import default_collate

    from medaccel.restoration.methods.networks.nets import blend
    from medaccel.restoration.methods.networks.patches import Patches

    method = make_method("swin_unetr", RestorationTask((60,), 90), {"predict": predict, "loss": "mse"})
    batch = default_collate([Patches(studies, method.task, roi_size=(16, 16, 16), reference=reference)[0]])
    module = method.module()  # type: ignore[attr-defined]
    # What the network would have to predict: for the target reference, the activity whose blend is PET90.
    perfect = batch["target"] if predict == "target" else 3 * batch["target"] - 2 * batch["input"]
    if reference == "target":
        torch.testing.assert_close(blend(batch["input"], perfect, batch["seconds"], 90), batch["target"])
    module.network.forward = lambda *_: perfect
    assert float(module.losses(batch, 0)["mse"]) == pytest.approx(0, abs=1e-9)
    module.network.forward = lambda *_: batch["input"]
    assert float(module.losses(batch, 0)["mse"]) > 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predict": "counts"}, "predict is 'counts'; expected one of activity, target"),
        ({"base": "median"}, "base is 'median'; expected one of gaussian, nlm"),
        ({"scaling": "log"}, "scaling is 'log'"),
        ({"roi_size": [64, 64]}, "expected three multiples of 32"),
        ({"roi_size": [32, 32, 32]}, "one of them 64 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_method("swin_unetr", RestorationTask(), settings)
    with pytest.raises(ValueError, match=r"channels.*to divide 8"):
        make_method("diffusion_sdedit", RestorationTask(), {"shuffle": 4, "channels": [8, 8, 8]})
    with pytest.raises(ValueError, match="expected increasing levels"):
        make_method("diffusion_sdedit", RestorationTask(), {"t0": [10, 5]})


class _Silent(torch.nn.Module):
    """Keeps what it is shown, and says nothing."""

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        self.shown = x[:, 1:]
        return torch.zeros_like(x[:, :1])


def test_the_prior_is_shown_the_noise_of_smooth_volumes_and_no_more_of_edges_than_that():
    sigma = 0.05
    net = _NoiseShown(_Silent(), [1.0, sigma])
    noise = torch.randn(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 0.2, 12)[None, None, :, None, None].expand_as(noise)
    v = net(ramp + sigma * noise, torch.tensor([1.0]))
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2), slice(2, -2))
    assert float(torch.corrcoef(torch.stack([v[inner].flatten(), noise[inner].flatten()]))[0, 1]) > 0.9
    assert torch.equal(v, net.network.shown)
    edge = torch.zeros(1, 1, 12, 12, 12)
    edge[:, :, 6:] = 50.0
    assert float(net(edge, torch.tensor([1.0])).abs().max()) <= 4.0


class _FirstChannel(torch.nn.Module):
    """Returns the content of the first shuffled channel, for blocks of two voxels per side."""

    def forward(self, blocks: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        assert blocks.shape[1] == 16
        return blocks[:, :8]


def test_a_network_on_blocks_of_voxels_puts_every_voxel_back():
    x = torch.rand(1, 2, 8, 16, 24)
    assert torch.equal(_Shuffled(_FirstChannel(), 2)(x, torch.tensor([3.0])), x[:, :1])


def test_the_report_tells_the_fits(fits: dict[str, Any]):
    html = render(Page("fits", [], [Section("fits", fit_blocks(fits["methods"], "swin_unetr"))]))
    assert "Swin UNETR (chosen)" in html
    assert "t0 5, weight 0" in html
    assert "can&#39;t exceed an MSE score" in html or "can't exceed an MSE score" in html
