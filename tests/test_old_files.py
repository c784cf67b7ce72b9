# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and config.yaml files of an earlier version load, and give the values that it computed."""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from medaccel.nets import SwinUNETR, load_pretrained
from medaccel.pretraining.config import PretrainingConfig
from medaccel.restoration.methods import load_method
from medaccel.restoration.methods.base import RestorationRequest
from medaccel.restoration.run_folder import RunFolder
from medaccel.segmentation.config import SegmentationConfig
from medaccel.segmentation.model import checkpoint
from medaccel.segmentation.model.presets import make_settings

FILES = Path(__file__).parent / "old_files"
EXPECTED = json.loads((FILES / "expected.json").read_text())
METHODS = EXPECTED["restoration"]["methods"]


def _unpacked(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(lzma.decompress((FILES / f"{name}.xz").read_bytes()))
    return path


def _options(name: str) -> dict[str, Any]:
    return yaml.safe_load((FILES / f"{name}.yaml").read_text())


def _pet() -> np.ndarray:
    """A blob, a lesion and a ripple, in SUV."""
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 24, 22)), indexing="ij")
    blob = 3 * np.exp(-3 * (i**2 + j**2 + k**2)) + 2 * np.exp(-40 * ((i - 0.3) ** 2 + j**2 + (k + 0.2) ** 2))
    return (blob * (1 + 0.2 * np.sin(37 * i + 11 * j) * np.cos(29 * k))).astype(np.float32)


def _ct() -> torch.Tensor:
    """The same idea for a network: (1, 1, 64, 32, 32)."""
    i, j, k = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (64, 32, 32)), indexing="ij")
    return (torch.exp(-3 * (i**2 + 2 * j**2 + k**2)) * (1 + 0.3 * torch.sin(9 * i + 5 * k)))[None, None]


def _compare(array: Any, expected: dict[str, float]) -> None:
    values = np.asarray(array, dtype=np.float64)
    found = {
        "mean": values.mean(),
        "deviation": values.std(),
        "middle": values[tuple(n // 2 for n in values.shape)],
        "first": values.ravel()[0],
    }
    assert found == pytest.approx(expected, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_restoration_method_of_an_earlier_version_restores_what_it_did(name: str, tmp_path: Path):
    method = load_method(_unpacked(f"{name}.pt", tmp_path), name)
    assert (method.task.input_seconds, method.task.target_seconds) == ((60,), 90)
    given = _options("restoration")["settings"].get(name, {})
    assert {key: method.settings[key] for key in given} == given
    restored = method.restore(RestorationRequest(_pet(), (4.0, 4.0, 4.0)))
    _compare(restored.volume, METHODS[name]["volume"])
    if "std" in METHODS[name]:
        _compare(restored.std, METHODS[name]["std"])


def test_a_method_stored_again_restores_the_same(tmp_path: Path):
    method = load_method(_unpacked("gaussian_mix.pt", tmp_path))
    method.save(tmp_path / "again.pt")
    request = RestorationRequest(_pet(), (4.0,) * 3)
    _compare(load_method(tmp_path / "again.pt").restore(request).volume, METHODS["gaussian_mix"]["volume"])


def test_a_run_folder_of_an_earlier_version_is_the_run_that_was_frozen(tmp_path: Path):
    for name in METHODS:
        _unpacked(f"{name}.pt", tmp_path / "checkpoints")
    (tmp_path / "config.yaml").write_bytes((FILES / "restoration.yaml").read_bytes())
    config, frozen = RunFolder(tmp_path).frozen()
    expected = EXPECTED["restoration"]
    assert config.digest() == expected["digest"]
    assert (frozen["digest"], frozen["best"]) == (expected["frozen"], expected["best"])
    written = _options("restoration")
    del written["frozen"]
    assert config.plain() == written  # so that the same command takes the run up


def test_pretrained_weights_of_an_earlier_version_load_whole(tmp_path: Path):
    path, expected = _unpacked("weights.pt", tmp_path), EXPECTED["pretraining"]
    assert torch.load(path, weights_only=True)["pretraining"]["options"] == _options("pretraining")
    net = SwinUNETR(in_channels=1, out_channels=2, feature_size=12).eval()
    report = load_pretrained(net, path)
    assert (len(report.loaded), len(report.skipped)) == (expected["loaded"], expected["skipped"])
    assert len(report.missing) == expected["missing"]
    with torch.no_grad():
        maps = net.swinViT(_ct())
    for array, values in zip(maps, expected["maps"], strict=True):
        _compare(array, values)


def test_pretraining_options_of_an_earlier_version_are_the_same_options(tmp_path: Path):
    written = _options("pretraining")
    config = PretrainingConfig.of(tmp_path, written)
    assert config.plain() == written
    assert config.digest() == EXPECTED["pretraining"]["digest"]


def test_a_segmentation_network_of_an_earlier_version_loads_and_computes_the_same(tmp_path: Path):
    loaded, expected = checkpoint.load(_unpacked("best.pt", tmp_path)), EXPECTED["segmentation"]
    assert {str(value): name for value, name in loaded.labels.items()} == expected["labels"]
    assert loaded.seen == expected["seen"]
    assert loaded.settings == _options("segmentation")["cells"]["spleen"]
    with torch.no_grad():
        _compare(loaded.network()(_ct())[0], expected["logits"])


def test_segmentation_options_of_an_earlier_version_are_the_same_options(tmp_path: Path):
    written = _options("segmentation")
    cells = written.pop("cells")
    config = SegmentationConfig(output=tmp_path, **written)
    assert config.plain() == written
    assert config.digest() == EXPECTED["segmentation"]["digest"]
    assert make_settings(written["settings"]) == cells["spleen"]
