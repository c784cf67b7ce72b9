# SPDX-License-Identifier: Apache-2.0
"""Tests varied training studies, the noise that is measured in an image, and the U-Net method on both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medaccel.phantoms import pet_varied
from medaccel.restoration.evaluation.training_range import root_noise
from medaccel.restoration.methods import load_method, make_method
from medaccel.restoration.methods.base import RestorationRequest, RestorationTask
from medaccel.restoration.methods.networks.unet import RestorationUNet
from medaccel.restoration.simulation.varied import varied_study, write_varied

SMALL = {
    "roi_size": [16, 16, 16],
    "channels": [4, 8],
    "blocks": [1, 1],
    "varied_studies": 2,
    "steps": 4,
    "steps_per_epoch": 2,
    "batch_size": 2,
    "warm_up": 1,
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small studies, each of another kind."""
    path = tmp_path_factory.mktemp("varied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pet_varied, "_MOST_VOXELS", 40_000)
        list(write_varied(path, [0, 1]))
    return path


def _image(noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    root = np.full((40, 36, 44), 1.5)
    root[:, :18] = 1.0
    root += noise * rng.standard_normal(root.shape)
    outside = np.zeros_like(root)
    outside[6:-6, 6:-6] = np.square(root)[6:-6, 6:-6]
    return outside.astype(np.float32)


@pytest.mark.parametrize("noise", [0.03, 0.1, 0.2])
def test_noise_is_measured(noise: float) -> None:
    assert root_noise(_image(noise), (4, 4, 4)) == pytest.approx(noise, rel=0.06)


def test_noise_goes_with_the_unit_and_not_with_the_air() -> None:
    image = _image(0.1)
    found = root_noise(image, (4, 4, 4))
    assert root_noise(9e3 * image, (4, 4, 4)) == pytest.approx(np.sqrt(9e3) * found, rel=1e-4)
    assert root_noise(np.pad(image, 30), (4, 4, 4)) == pytest.approx(found, rel=0.02)


def test_image_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="no noise that could be measured"):
        root_noise(np.ones((20, 20, 20), dtype=np.float32), (4, 4, 4))


@pytest.mark.parametrize("kind", ["standard", "varied", "leaves"])
def test_a_varied_study_is_reproducible_and_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pet_varied, "_MOST_VOXELS", 40_000)
    study, again = (varied_study(3, {kind: 1.0}) for _ in range(2))
    assert np.array_equal(study.noise_free, again.noise_free)
    assert all(np.array_equal(a, b) for a, b in zip(study.inputs, again.inputs, strict=True))
    assert len(study.inputs) == len(study.record["seconds"]) == len(study.record["errors"])
    # More counts, less error.
    assert study.record["errors"] == sorted(study.record["errors"], reverse=True)
    for image, error in zip(study.inputs, study.record["errors"], strict=True):
        assert np.square(image - study.noise_free)[study.mask].mean() == pytest.approx(error, rel=1e-4)


def test_written_studies_are_kept(folder: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert [p.name for p in write_varied(folder, [0, 1])] == ["000000.npy", "000001.npy"]
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    images = np.load(folder / "000000.npy")
    record = json.loads((folder / "000000.json").read_text())
    assert images.dtype == np.float16
    assert len(images) == 2 + len(record["seconds"])


def test_the_networks_output_goes_with_the_unit() -> None:
    network = RestorationUNet((4, 8), (1, 1))
    volume, noise, spacing = torch.rand(1, 1, 8, 8, 8), torch.tensor([0.1]), torch.full((1, 3), 4.0)
    torch.testing.assert_close(
        network(1e3 * volume, 1e3**0.5 * noise, spacing), 1e3 * network(volume, noise, spacing)
    )


def test_fit_resumes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "varied_folder": str(folder)}
    whole = make_method("unet", RestorationTask((60,), 90), settings)
    whole.fit([], [], folder=tmp_path / "whole", progress=False)
    assert all(np.isfinite(v).all() for v in whole.fitted.losses.values())
    again = make_method("unet", RestorationTask((60,), 90), settings)
    again.fit([], [], folder=tmp_path / "whole", progress=False)
    restored = whole.restore(RestorationRequest(_image(0.1), (4, 4, 4))).volume
    assert np.array_equal(again.restore(RestorationRequest(_image(0.1), (4, 4, 4))).volume, restored)
    whole.save(tmp_path / "unet.pt")
    loaded = load_method(tmp_path / "unet.pt", "unet")
    assert np.array_equal(loaded.restore(RestorationRequest(_image(0.1), (4, 4, 4))).volume, restored)


@pytest.mark.parametrize("slices", [30, 64, 150])
def test_slabs_join_without_a_seam(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from medaccel.restoration.methods import unet

    monkeypatch.setattr(unet, "_fast_bfloat16", lambda device: False)
    method = make_method("unet", RestorationTask((60,), 90), {**SMALL, "varied_folder": "", "flips": 1})
    rng = np.random.default_rng(0)
    volume = rng.gamma(20.0, 0.1, size=(24, 22, slices)).astype(np.float32)
    apart = method.restore(RestorationRequest(volume, (4, 4, 4))).volume
    monkeypatch.setattr(unet, "_SLAB", 1024)
    np.testing.assert_allclose(
        apart, method.restore(RestorationRequest(volume, (4, 4, 4))).volume, rtol=1e-4, atol=1e-4
    )


def test_trained_weights_are_taken_over(folder: Path, tmp_path: Path) -> None:
    task = RestorationTask((60,), 90)
    trained = make_method("unet", task, {**SMALL, "varied_folder": str(folder)})
    trained.fit([], [], folder=tmp_path / "fit", progress=False)
    trained.save(tmp_path / "trained.pt")
    taken = make_method("unet", task, {"weights": str(tmp_path / "trained.pt"), "accelerator": "cpu"})
    taken.fit([], [], folder=tmp_path / "other", progress=False)
    assert taken.settings["channels"] == trained.settings["channels"]
    request = RestorationRequest(_image(0.1), (4, 4, 4))
    assert np.array_equal(taken.restore(request).volume, trained.restore(request).volume)
    taken.save(tmp_path / "taken.pt")
    (tmp_path / "trained.pt").unlink()  # the new checkpoint stands alone
    assert np.array_equal(load_method(tmp_path / "taken.pt").restore(request).volume, taken.restore(request).volume)


@pytest.mark.parametrize("seconds", [4, 90, 120])
def test_an_exposure_that_leaves_nothing_to_predict_is_refused(seconds: int) -> None:
    method = make_method("unet", RestorationTask((60,), 90), SMALL)
    with pytest.raises(ValueError, match=f"seconds is {seconds}; expected 5 or more, and fewer than 90"):
        method.restore(RestorationRequest(_image(0.1), (4, 4, 4), seconds=seconds))


@pytest.mark.parametrize(
    ("seconds", "weight"), [(60, 0.7), (55, 55 / 90 + 0.7 - 60 / 90), (30, 0.4), (10, 1 / 9 + 0.4 - 1 / 3)]
)
def test_the_blend_of_other_exposures_is_the_nearest_ones(seconds: int, weight: float) -> None:
    method = make_method("unet", RestorationTask((60, 30), 90), SMALL)
    method.fitted.choices = {"weight": {"60": 0.7, "30": 0.4}}
    found = method.restore(RestorationRequest(_image(0.1), (4, 4, 4), seconds=seconds))
    assert found.weight == pytest.approx(weight)
