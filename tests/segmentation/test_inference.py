# SPDX-License-Identifier: Apache-2.0
"""Label maps on the scan's own grid, with a network whose answer is known."""

import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from nibabel import Nifti1Image
from torch import Tensor, nn

from medaccel.data import make_nifti, resample
from medaccel.data.ct_transforms import canonical
from medaccel.segmentation.evaluation.metrics import dice
from medaccel.segmentation.model import inference
from medaccel.segmentation.model.inference import logit_planes, predict_labels, probability_planes, segment
from medaccel.segmentation.model.presets import make_settings

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
    """Returns HU of a body in air with two balls in it, and the balls' labels."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))

    def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
        middle = np.multiply(centre, shape)[:, None, None, None]
        return ((grid - middle) ** 2).sum(axis=0) < radius**2

    labels = np.zeros(shape, dtype=np.uint8)
    labels[ball((0.35, 0.5, 0.5), 9)] = 1
    labels[ball((0.65, 0.45, 0.5), 8)] = 2
    hu = np.where(ball((0.5, 0.5, 0.5), 24), 0.0, -1000.0)
    return (hu + 60.0 * (labels == 1) + 95.0 * (labels == 2)).astype(np.int16), labels


def predict_probabilities(network: nn.Module, image: MetaTensor, settings: Mapping[str, Any]) -> Tensor:
    """(classes, i, j, k): all planes at once."""
    return torch.cat([p for _, p in probability_planes(network, image, settings)], dim=1)


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


def test_labels_do_not_depend_on_how_many_planes_are_done_at_a_time(monkeypatch: pytest.MonkeyPatch):
    image = make_nifti(scan()[0], np.diag([2.0, 2.0, 2.5, 1.0]))
    some = np.asarray(segment(Brightness(), image, SETTINGS).dataobj)
    for planes in (1, 7, 1000):
        monkeypatch.setattr(inference, "_PLANES", planes)
        assert np.array_equal(np.asarray(segment(Brightness(), image, SETTINGS).dataobj), some)


# Sizes that windows fit, don't fit, and that are smaller than one; depths of one and several rows of windows.
@pytest.mark.parametrize("shape", [(35, 20, 17), (32, 16, 16), (20, 10, 25), (75, 17, 15), (33, 32, 5)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("sw_batch_size", [1, 4])
def test_logits_are_those_of_monais_sliding_window_bit_for_bit(
    shape: tuple[int, int, int], overlap: float, sw_batch_size: int
):
    from monai.data import MetaTensor
    from monai.inferers import sliding_window_inference

    settings = SETTINGS | {"roi_size": [16, 16, 16], "overlap": overlap, "sw_batch_size": sw_batch_size}
    hu = 100 * torch.rand(1, *shape)
    network = nn.Sequential(nn.Conv3d(1, 5, 3, padding=1), nn.InstanceNorm3d(5))
    with torch.inference_mode():
        logits = sliding_window_inference(
            hu[None] / 100, settings["roi_size"], sw_batch_size, network, overlap=overlap, mode="gaussian"
        )
    image, expected = MetaTensor(hu), torch.as_tensor(logits)[0]
    assert torch.equal(torch.cat([found for _, found in logit_planes(network, image, settings)], dim=1), expected)
    # The exponential of the last few voxels of a tensor is not torch's vectorised one.
    torch.testing.assert_close(
        predict_probabilities(network, image, settings), expected.softmax(0), rtol=1e-6, atol=0
    )
    assert np.array_equal(predict_labels(network, image, settings), expected.argmax(dim=0).numpy())


def all_at_once(network: nn.Module, image: Nifti1Image, settings: dict) -> np.ndarray:
    """Labels by way of every class' probabilities over the whole scan."""
    seen = canonical(image, settings["spacing"])["image"]
    affine = np.asarray(seen.affine, dtype=np.float64).copy()
    affine[:3, 3] -= affine[:3, :3].sum(axis=1)
    found = [
        np.asarray(resample(make_nifti(np.pad(p.numpy(), 1, mode="edge"), affine), image, outside=value).dataobj)
        for p, value in zip(predict_probabilities(network, seen, settings), (1.0, 0.0, 0.0), strict=True)
    ]
    return np.argmax(found, axis=0).astype(np.uint8)


def random_affines() -> list[np.ndarray]:
    """Draws every order and direction of axes, turned ones, and one as of a tilted gantry."""
    rng = np.random.default_rng(0)
    affines = []
    for order in itertools.permutations(range(3)):
        matrix = np.eye(4)
        matrix[:3, :3] = np.diag(rng.choice([-1, 1], 3) * rng.uniform(1.5, 3.5, 3))[list(order)]
        affines.append(matrix)
    turned = np.eye(4)
    turned[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * [2.0, 2.5, 3.0]
    sheared = np.diag([2.0, 2.0, 3.0, 1.0])
    sheared[0, 2], sheared[1, 2] = 0.4, 0.9
    return [*affines, turned, sheared]


@pytest.mark.parametrize("number", range(len(random_affines())))
def test_labels_are_those_of_all_probabilities_at_once(number: int):
    image = make_nifti(scan()[0], random_affines()[number])
    labels = np.asarray(segment(Brightness(), image, SETTINGS).dataobj)
    assert np.array_equal(labels, all_at_once(Brightness(), image, SETTINGS))
    assert (labels > 0).any()


def test_memory_does_not_grow_with_the_scans_length_times_its_classes():
    from monai.data import MetaTensor

    settings = SETTINGS | {"roi_size": [16, 16, 16], "overlap": 0.5, "spacing": [1.0, 1.0, 1.0]}
    network = nn.Conv3d(1, 60, 1)
    most = 0

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        """Tells the largest tensor that any op makes."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                most = max(most, out.untyped_storage().nbytes())
            return out

    image = MetaTensor(torch.zeros(1, 320, 32, 32))
    with Watched():
        assert predict_labels(network, image, settings).shape == (320, 32, 32)
    assert most == 60 * 16 * 32 * 32 * 4  # memory follows a window's depth, not the scan's


@pytest.mark.parametrize("depth", [16, 40])
def test_the_planes_that_a_gpu_is_asked_to_hold_are_all_that_is_held(monkeypatch: pytest.MonkeyPatch, depth: int):
    """Nothing larger is made where windows are added up than what `place_of_sums` was asked for."""
    asked: list[float] = []

    def place_of_sums(device: torch.device, size: float) -> tuple[torch.device, str]:
        asked.append(size)
        return torch.device("meta"), "windows are added up elsewhere"  # a device whose tensors can be told apart

    class Elsewhere(torch.utils._python_dispatch.TorchDispatchMode):
        """Adds up the memory of the tensors that are alive there."""

        def __init__(self) -> None:
            super().__init__()
            self.alive: dict[int, int] = {}
            self.most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.device.type == "meta":
                storage = out.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
                    self.most = max(self.most, sum(self.alive.values()))
            return out

    monkeypatch.setattr(inference, "place_of_sums", place_of_sums)
    settings = SETTINGS | {"roi_size": [depth, 16, 16], "overlap": 0.5}
    with Elsewhere() as elsewhere:
        planes = inference.logit_planes(nn.Conv3d(1, 60, 1), MetaTensor(torch.zeros(1, 90, 64, 48)), settings)
        for _, found in planes:
            assert found.device.type == "meta"  # `probability_planes` would bring it to the CPU
            found.softmax(dim=0)
    window = 4 * depth * 16 * 16 * (60 + 1)
    assert len(asked) == 1
    assert 0.7 * asked[0] < elsewhere.most <= asked[0] + 2 * window


def test_the_bar_says_where_windows_are_added_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    network, image = Brightness(), MetaTensor(torch.zeros(1, 64, 32, 32))
    list(logit_planes(network, image, SETTINGS, progress=True))
    assert "added up" not in capsys.readouterr().err  # on a CPU there is no other place
