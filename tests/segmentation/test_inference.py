# SPDX-License-Identifier: Apache-2.0
"""Label maps on the scan's own grid, with a network whose answer is known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medaccel.data import make_nifti
from medaccel.data.ct_transforms import canonical
from medaccel.segmentation.inference import predict_probabilities, segment
from medaccel.segmentation.metrics import dice
from medaccel.segmentation.presets import make_settings

SETTINGS = make_settings(
    {"spacing": [3.0, 3.0, 3.0], "window": [0.0, 100.0], "roi_size": [64, 32, 32], "overlap": 0.25}
)


class Brightness(nn.Module):
    """Class 1 is what is bright, class 2 what is brighter still: 40 … 75 HU and above."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.cat([torch.zeros_like(x), x - 0.4, 2 * x - 1.15], dim=1)


def scan(shape: tuple[int, int, int] = (70, 60, 50)) -> tuple[np.ndarray, np.ndarray]:
    """HU of a body in air with two balls in it, and the balls' labels."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))

    def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
        middle = np.multiply(centre, shape)[:, None, None, None]
        return ((grid - middle) ** 2).sum(axis=0) < radius**2

    labels = np.zeros(shape, dtype=np.uint8)
    labels[ball((0.35, 0.5, 0.5), 9)] = 1
    labels[ball((0.65, 0.45, 0.5), 8)] = 2
    hu = np.where(ball((0.5, 0.5, 0.5), 24), 0.0, -1000.0)
    return (hu + 60.0 * (labels == 1) + 95.0 * (labels == 2)).astype(np.int16), labels


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([2.0, 2.0, 2.5, 1.0]),
        np.array([[-2.0, 0, 0, 60], [0, -2.0, 0, 10], [0, 0, 2.5, -900], [0, 0, 0, 1]]),
        np.array([[0.0, 0, 2.5, 5], [-2.0, 0, 0, 6], [0, 2.0, 0, 7], [0, 0, 0, 1]]),
    ],
    ids=["RAS", "LPS", "other axes"],
)
def test_labels_lie_where_the_structures_are(affine: np.ndarray):
    hu, truth = scan()
    image = make_nifti(hu, affine)
    labels = segment(Brightness(), image, SETTINGS)
    assert labels.shape == image.shape
    assert np.array_equal(labels.affine, image.affine)
    values = np.asarray(labels.dataobj)
    assert values.dtype == np.uint8
    shift = np.argwhere(values == 2).mean(axis=0) - np.argwhere(truth == 2).mean(axis=0)
    assert np.abs(shift).max() < 0.15  # voxels
    assert dice(values > 0, truth > 0) > 0.94
    for value in (1, 2):  # the brighter ball's rim is as bright as the other ball
        assert dice(values == value, truth == value) > 0.88


def test_probabilities_add_up_and_air_is_background():
    image = canonical(make_nifti(scan()[0], np.diag([2.0, 2.0, 2.5, 1.0])), SETTINGS["spacing"])["image"]
    network = Brightness().train()
    probabilities = predict_probabilities(network, image, SETTINGS)
    assert probabilities.shape == (3, *image.shape[1:])
    assert torch.allclose(probabilities.sum(dim=0), torch.ones(image.shape[1:]))
    assert (probabilities[0][image.as_tensor()[0] < -900] > 0.9).all()
    assert network.training  # as it was


def test_windows_leave_no_seams():
    image = canonical(make_nifti(scan()[0], np.diag([2.0, 2.0, 2.5, 1.0])), SETTINGS["spacing"])["image"]
    small = predict_probabilities(Brightness(), image, SETTINGS)
    whole = predict_probabilities(Brightness(), image, SETTINGS | {"roi_size": [96, 96, 96]})
    assert torch.allclose(small, whole, atol=1e-5)


def test_a_scan_smaller_than_the_window_and_one_with_air_alone():
    hu, truth = scan((40, 24, 20))
    labels = np.asarray(segment(Brightness(), make_nifti(hu, np.eye(4)), SETTINGS).dataobj)
    assert labels.shape == (40, 24, 20)
    assert dice(labels > 0, truth > 0) > 0.6
    air = make_nifti(np.full((30, 20, 20), -1000, dtype=np.int16), np.diag([3.0, 3.0, 3.0, 1.0]))
    assert not np.asarray(segment(Brightness(), air, SETTINGS).dataobj).any()


def test_the_largest_components_are_kept_of_each_structure():
    hu, _ = scan()
    hu[35, 42, 10:13] = hu[40:44, 42:46, 10:14] = 60
    image = make_nifti(hu, np.diag([2.0, 2.0, 2.5, 1.0]))
    everything, largest = (
        np.asarray(segment(Brightness(), image, SETTINGS, keep_largest=count).dataobj) for count in (0, 1)
    )
    assert everything[41, 43, 12] == 1
    assert largest[41, 43, 12] == 0
    assert (largest == 2).sum() == (everything == 2).sum() > 0


def test_long_scans_are_done_slab_by_slab(monkeypatch: pytest.MonkeyPatch):
    from medaccel.segmentation import inference

    image = make_nifti(scan()[0], np.diag([2.0, 2.0, 2.5, 1.0]))
    whole = np.asarray(segment(Brightness(), image, SETTINGS).dataobj)
    monkeypatch.setattr(inference, "_SLICES", 7)
    assert np.array_equal(np.asarray(segment(Brightness(), image, SETTINGS).dataobj), whole)
