# SPDX-License-Identifier: Apache-2.0
"""Scans on one grid: axes, voxel size, crop; what lies where stays there."""

import numpy as np
import pytest
import torch
from nibabel.nifti1 import Nifti1Image

from medaccel.data import make_nifti
from medaccel.data.ct_transforms import canonical, window


def _scan(affine: np.ndarray) -> tuple[Nifti1Image, Nifti1Image]:
    """Makes a block of water in air, and a small organ in it."""
    hu = np.full((20, 24, 18), -1000.0, dtype=np.float32)
    hu[4:16, 5:20, 3:15] = 0.0
    organ = np.zeros(hu.shape, dtype=np.uint8)
    organ[6:9, 8:11, 5:8] = 1
    hu[organ == 1] = 100.0
    return make_nifti(hu, affine), make_nifti(organ, affine)


def _middle(volume: torch.Tensor, affine: torch.Tensor) -> np.ndarray:
    """Returns the middle of a mask, mm."""
    index = torch.nonzero(volume[0] > 0.5).double().mean(dim=0)
    return (affine[:3, :3].double() @ index + affine[:3, 3].double()).numpy()


@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_an_organ_stays_where_it_was_whatever_the_axes(flip: tuple[int, int, int]):
    affine = np.diag([*(2.0 * np.array(flip)), 1.0])
    affine[:3, 3] = [30, -20, 7]
    image, label = _scan(affine)
    found = canonical(image, (2, 2, 2), label=label)
    assert found["image"].shape == found["label"].shape
    where = affine[:3, :3] @ np.argwhere(np.asarray(label.dataobj) == 1).mean(axis=0) + affine[:3, 3]
    assert np.allclose(_middle(found["label"], found["label"].affine), where, atol=1e-4)
    assert (found["image"].affine.diagonal()[:3] == 2).all()
    assert float(found["image"][found["label"] > 0.5].min()) == 100.0


def test_the_voxel_size_is_the_one_asked_for_and_labels_stay_whole_numbers():
    image, label = _scan(np.diag([2.0, 2.0, 2.0, 1.0]))
    found = canonical(image, (3.0, 3.0, 4.0), label=label, foreground=False)
    assert torch.equal(found["image"].affine.diagonal()[:3], torch.tensor([3.0, 3.0, 4.0], dtype=torch.float64))
    assert set(found["label"].unique().tolist()) == {0.0, 1.0}
    assert found["image"].dtype == torch.float32


def test_the_crop_leaves_the_body_and_its_margin():
    image, _ = _scan(np.eye(4))
    assert canonical(image, (1, 1, 1), margin=2)["image"].shape == (1, 16, 19, 16)
    assert canonical(image, (1, 1, 1), margin=0)["image"].shape == (1, 12, 15, 12)
    air = make_nifti(np.full((5, 6, 7), -1000.0, dtype=np.float32), np.eye(4))
    assert canonical(air, (1, 1, 1))["image"].shape == (1, 5, 6, 7)  # nothing to crop to


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, float("nan"))])
def test_spacing_out_of_range_is_refused(spacing: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"spacing is .*; expected three numbers of mm above 0"):
        canonical(_scan(np.eye(4))[0], spacing)


def test_a_window_maps_its_limits_to_0_and_1_and_clips():
    hu = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 900.0])
    assert torch.equal(window(hu, (-100, 100)), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"window is .*; expected two increasing numbers of HU"):
        window(hu, (100, -100))
