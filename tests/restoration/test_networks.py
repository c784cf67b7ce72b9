# SPDX-License-Identifier: Apache-2.0
"""Tests the inputs and losses of networks: scalings, losses, conditioning, patches that depend on their number
alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from medaccel.restoration.evaluation import metrics
from medaccel.restoration.methods.base import RestorationTask
from medaccel.restoration.methods.networks import losses
from medaccel.restoration.methods.networks.base_image import base_image
from medaccel.restoration.methods.networks.nets import ActivityNet, Conditioning, blend
from medaccel.restoration.methods.networks.patches import Patches, PrepareStudy
from medaccel.restoration.methods.networks.scaling import SCALINGS, scaling
from medaccel.restoration.study import load_study, save_study
from medaccel.training.sampler import Numbered
from tests.restoration.test_gaussian_methods import SPACING, make_study


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("studies")
    for seed in range(2):
        save_study(root / f"made_{seed}", make_study(seed))
    return sorted(root.iterdir())


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_is_inverted_over_all_that_a_pet_holds(name: str):
    suv = torch.cat([torch.zeros(1), torch.logspace(-4, 2.5, 200)]).double()
    there = scaling(name)
    torch.testing.assert_close(there.inverse(there.forward(suv)), suv, rtol=1e-9, atol=1e-12)
    # A network may give anything: the inverse stays finite and increasing.
    outputs = torch.linspace(-8, 11, 500, dtype=torch.float64)
    back = there.inverse(outputs)
    assert bool(back.isfinite().all())
    assert bool((back.diff() > 0).all())


def test_an_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="scaling is 'log'; expected one of asinh, sqrt"):
        scaling("log")


def test_the_ssim_loss_is_the_metric_and_has_its_gradient(studies: list[Path]):
    study = load_study(studies[0])
    mask = metrics.body_mask(study.exposures[90], study.spacing)
    as_tensor = lambda a: torch.from_numpy(a).double()[None, None]  # noqa: E731
    image, target, inside = as_tensor(study.exposures[60]), as_tensor(study.exposures[90]), as_tensor(mask)
    found = losses.ssim_distance(image, target, inside)
    expected = metrics.ssim_distance(image[0, 0].numpy(), target[0, 0].numpy(), mask)
    assert found.item() == pytest.approx(expected, rel=1e-9)
    small = [x[..., :9, :8, :7].clone() for x in (image, target, inside)]
    small[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.ssim_distance(x, *small[1:]), small[:1])


def test_a_patch_without_body_has_no_loss_and_a_finite_gradient():
    image = torch.rand(1, 1, 8, 8, 8, requires_grad=True)
    nothing = torch.zeros(1, 1, 8, 8, 8)
    total = losses.squared_error(image, nothing, nothing) + losses.ssim_distance(image, nothing, nothing)
    total.sum().backward()
    assert total.item() == 0
    assert bool((image.grad == 0).all())


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_half_precision_volumes_are_fp32(dtype: torch.dtype, cast: torch.dtype | None):
    """An fp16 sum of a body of 48³ voxels would be infinite, a bf16 one would stop growing at 256."""
    generator = torch.Generator().manual_seed(2)
    image, target = (4 * torch.rand(2, 2, 1, 48, 48, 48, generator=generator)).to(dtype)
    mask = torch.ones_like(image)
    for loss in (losses.squared_error, losses.ssim_distance):
        with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
            found = loss(image, target, mask)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), loss(image.double(), target.double(), mask.double()), rtol=1e-4, atol=1e-6
        )
        assert torch.equal(loss(image, target, mask.bool()), loss(image, target, mask))


def test_the_blend_is_the_oracle(studies: list[Path]):
    study = load_study(studies[0])
    image, truth = study.exposures[60], study.noise_free
    assert truth is not None
    found = blend(torch.from_numpy(image)[None, None], torch.from_numpy(truth)[None, None], torch.tensor([60.0]), 90)
    np.testing.assert_allclose(found[0, 0].numpy(), metrics.oracle(image, truth, 60, 90), rtol=1e-6)


class _Nothing(torch.nn.Module):
    """A network that adds nothing; remembers what it was shown."""

    def forward(self, channels: torch.Tensor) -> torch.Tensor:
        self.shown = channels
        return torch.zeros_like(channels[:, :1])


@pytest.mark.parametrize("base", ["gaussian", "nlm"])
def test_a_network_that_adds_nothing_gives_the_base_and_sees_exposure_and_ct(base: str, studies: list[Path]):
    study = load_study(studies[0])
    image = torch.from_numpy(study.exposures[60])[None, None]
    denoised = torch.from_numpy(base_image(study.exposures[60], SPACING))[None, None]
    spacing, ct = torch.tensor([SPACING], dtype=torch.float64), torch.full_like(image, 500.0)
    net = ActivityNet(_Nothing(), Conditioning("asinh", use_ct=True, base=base))
    activity = net(image, spacing, torch.tensor([120.0]), ct, denoised)
    shown = net.network.shown
    assert shown.shape[1] == net.conditioning.channels
    if base == "nlm":
        torch.testing.assert_close(activity, denoised, rtol=1e-4, atol=1e-5)
    else:  # smoother than the PET, of about its mean
        assert float(activity.std()) < float(image.std())
        assert float(activity.mean()) == pytest.approx(float(image.mean()), rel=0.02)
    assert bool((shown[:, 3] == 1).all())  # log2(120 s / 60 s)
    torch.testing.assert_close(shown[:, 4], torch.full_like(shown[:, 4], 0.5))
    assert bool((shown[:, 5] == 1).all())
    net(image, spacing, torch.tensor([60.0]), None, denoised)
    assert bool((net.network.shown[:, 4:6] == 0).all())


def test_smoothing_is_in_millimetres_whatever_the_voxels():
    volume = torch.zeros(2, 1, 33, 33, 33)
    volume[:, :, 16, 16, 16] = 1.0
    spacing = torch.tensor([[4.0, 4.0, 4.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    channels, _ = Conditioning("sqrt")(volume, spacing, torch.tensor([60.0, 60.0]))
    peaks = channels[:, 1, 16, 16, 16]
    assert float(peaks[1]) < float(peaks[0])  # the same width is more voxels there


def test_a_patch_depends_on_seed_and_number_alone(studies: list[Path]):
    make = lambda **options: Patches(studies, RestorationTask((60,), 90), roi_size=(16, 16, 16), **options)  # noqa: E731
    one, other = make(seed=3), make(seed=3, cache="none")
    _ = one[4]
    for key, value in one[7].items():
        again = other[7][key]
        same = torch.equal(value.nan_to_num(), again.nan_to_num()) if torch.is_tensor(value) else value == again
        assert same, key
    assert not torch.equal(one[7]["input"], one[8]["input"])
    assert not torch.equal(one[7]["input"], make(seed=4)[7]["input"])


def test_all_volumes_of_a_patch_are_cropped_turned_and_scaled_alike(studies: list[Path]):
    patches = Patches(studies, RestorationTask((60,), 90), roi_size=(16, 16, 16))
    for number in range(6):
        patch = patches[number]
        noise = (patch["input"] - patch["noise_free"])[patch["mask"].bool()]
        signal = patch["noise_free"][patch["mask"].bool()]
        assert patch["input"].shape == (1, 16, 16, 16)
        # Were one of them turned or scaled otherwise, what is left would be the patient and not noise.
        assert float(noise.std()) < 0.9
        assert abs(float(noise.mean())) < 0.2 < float(signal.mean())


def test_a_study_smaller_than_the_patch_is_padded(studies: list[Path]):
    patch = Patches(studies, RestorationTask((60,), 90), roi_size=(32, 32, 32))[0]
    assert patch["input"].shape == (1, 32, 32, 32)
    assert float(patch["mask"].sum()) > 0


def test_numbers_are_shared_out_among_processes_and_begin_at_the_step_that_was_reached():
    first = lambda sampler, count: list(itertools.islice(sampler, count))  # noqa: E731
    assert first(Numbered(2), 4) == [0, 1, 2, 3]
    assert first(Numbered(2, step=lambda: 3), 4) == [6, 7, 8, 9]
    # Two processes with one item a step see, together, what one with two would.
    parts = [first(Numbered(2, rank, 2, lambda: 3), 2) for rank in range(2)]
    assert list(zip(*parts, strict=True)) == [(6, 7), (8, 9)]
    with pytest.raises(ValueError, match="batch_size is 5; expected a multiple of the 2 processes"):
        Numbered(5, 0, 2)


def test_what_can_not_be_trained_on_is_refused(tmp_path: Path, studies: list[Path]):
    with pytest.raises(ValueError, match="no training studies"):
        Patches([], RestorationTask(), roi_size=(16, 16, 16))
    with pytest.raises(ValueError, match="cache is 'tape'; expected one of memory, disk, none"):
        Patches(studies, RestorationTask(), roi_size=(16, 16, 16), cache="tape")
    with pytest.raises(FileNotFoundError, match=r"PET_120\.nii\.gz: missing exposure"):
        PrepareStudy(RestorationTask((60,), 120))({"study": str(studies[0])})
    study = make_study(0)
    study.noise_free = None
    save_study(tmp_path / "measured", study)
    with pytest.raises(FileNotFoundError, match=r"has no noise_free\.nii\.gz"):
        PrepareStudy(RestorationTask(), "noise_free")({"study": str(tmp_path / "measured")})
    measured = PrepareStudy(RestorationTask())({"study": str(tmp_path / "measured")})
    assert not measured["has_noise_free"]
    assert torch.equal(measured["noise_free"], measured["target"])
    study.exposures[90] = study.exposures[60]
    save_study(tmp_path / "same", study)
    with pytest.raises(ValueError, match="do not differ within the body"):
        PrepareStudy(RestorationTask())({"study": str(tmp_path / "same")})
