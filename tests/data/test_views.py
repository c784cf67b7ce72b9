# SPDX-License-Identifier: Apache-2.0
"""Two views have true affines, repeat, overlap, and feed the losses."""

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from medaccel.data import TwoViews, feature_affine
from medaccel.data.views import RandGaussianBlur, intensity_transforms
from medaccel.losses import PixelContrastiveLoss, pixel_centres
from medaccel.ops import gaussian_filter

# An oblique volume with anisotropic voxels, in mm.
AFFINE = torch.tensor(
    [[1.9, 0.2, 0.0, -40.0], [-0.2, 1.4, 0.3, 15.0], [0.1, -0.3, 2.9, 7.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64
)


def coordinates(sizes: tuple[int, ...], affine: Tensor) -> Tensor:
    """A volume whose channels are each voxel's own coordinates in mm, and ones."""
    at = pixel_centres(sizes, affine[None])[0].T.reshape(-1, *sizes)
    return torch.cat([at, torch.ones(1, *sizes)]).float()


def inside(view: Tensor) -> Tensor:
    """Marks the voxels of a view that, like their neighbours, come from inside the volume."""
    return view[-1] > 1 - 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_a_views_affine_leads_to_where_its_voxels_come_from(seed: int):
    volume = MetaTensor(coordinates((50, 44, 40), AFFINE), affine=AFFINE)
    views = TwoViews((24, 20, 16), intensity=[]).set_random_state(seed)(volume)
    for number in (1, 2):
        view, affine = views[f"view{number}"], views[f"affine{number}"]
        said = pixel_centres((24, 20, 16), affine[None])[0].T.reshape(3, 24, 20, 16)
        kept = inside(view)
        assert kept.float().mean() > 0.5
        error = (view[:3] - said)[:, kept].abs().max()
        assert error < 0.02, f"{error} mm"  # voxels are about 2 mm


@pytest.mark.parametrize("seed", range(3))
def test_images_of_two_axes_too(seed: int):
    affine = torch.diag(torch.tensor([0.8, 1.3, 1.0], dtype=torch.float64))
    whole = torch.eye(4, dtype=torch.float64)  # as MONAI reads one
    whole[:2, :2] = affine[:2, :2]
    image = MetaTensor(coordinates((90, 70), affine), affine=whole)
    views = TwoViews((32, 40), intensity=[]).set_random_state(seed)(image)
    for number in (1, 2):
        view, to_mm = views[f"view{number}"], views[f"affine{number}"]
        assert to_mm.shape == (3, 3)
        said = pixel_centres((32, 40), to_mm[None])[0].T.reshape(2, 32, 40)
        assert (view[:2] - said)[:, inside(view)].abs().max() < 0.02


def test_a_feature_pixel_lies_in_the_middle_of_its_voxels():
    features = feature_affine(AFFINE, (24, 20, 16), (6, 5, 4))
    voxels = pixel_centres((24, 20, 16), AFFINE[None])[0].reshape(6, 4, 5, 4, 4, 4, 3)
    middles = voxels.mean(dim=(1, 3, 5)).reshape(-1, 3)
    torch.testing.assert_close(pixel_centres((6, 5, 4), features[None])[0], middles)


def test_a_seed_repeats_both_views_and_another_does_not():
    volume = torch.rand(1, 40, 40, 40)
    first, again, other = (TwoViews((16,) * 3).set_random_state(seed)(volume) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["view1"], other["view1"])
    assert not torch.equal(first["affine1"], first["affine2"])


def test_views_of_one_volume_have_positives_for_the_loss():
    views = TwoViews((32,) * 3).set_random_state(0)
    loss = PixelContrastiveLoss()
    for _ in range(3):
        pair = views(torch.rand(1, 64, 64, 64))
        affines = [feature_affine(pair[f"affine{n}"][None], (32,) * 3, (8,) * 3) for n in (1, 2)]
        features = [torch.randn(1, 16, 8, 8, 8) for _ in range(2)]
        assert 0 < float(loss(*features, *affines)) < 20


def test_the_blur_is_medaccels_gaussian():
    x = torch.rand(2, 12, 13, 14)
    blur = RandGaussianBlur((0.8, 0.8), prob=1.0)
    assert torch.equal(blur(x), gaussian_filter(x[None], 0.8, mode="nearest")[0])
    assert RandGaussianBlur(prob=0.0)(x) is x
    blurred = blur(MetaTensor(x, affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0]))))
    assert isinstance(blurred, MetaTensor)
    assert float(blurred.affine[0, 0]) == 2.0


def test_intensities_change_and_shapes_do_not():
    x = torch.rand(1, 16, 16, 16)
    changed = x
    for transform in intensity_transforms((16, 16, 16)):
        transform.prob = 1.0
        after = transform(changed.clone())
        assert after.shape == x.shape
        assert not torch.equal(torch.as_tensor(after), torch.as_tensor(changed)), type(transform).__name__
        changed = after
    assert changed.isfinite().all()


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"roi_size is \(8,\); expected 2 or 3 sizes of at least 1"):
        TwoViews((8,))
    with pytest.raises(ValueError, match=r"scale is \(0.5, 2.0\) and region 1.5; expected 0 < scale"):
        TwoViews((8, 8), scale=(0.5, 2.0))
    with pytest.raises(ValueError, match=r"data has shape \(1, 9, 9\); expected \(C, \*spatial\) with 3 axes"):
        TwoViews((8, 8, 8))(torch.rand(1, 9, 9))
    with pytest.raises(ValueError, match="roi_size has 2 and feature_size 3 axes; expected 3 for this affine"):
        feature_affine(AFFINE, (8, 8), (4, 4, 4))
