# SPDX-License-Identifier: Apache-2.0
"""Tests `medaccel restoration validate` and `finetune` on simulated exposures of one's own scanner."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medaccel.cli import main
from medaccel.data import make_nifti, save_nifti
from medaccel.restoration.finetune import finetune
from medaccel.restoration.methods import load_method, make_method
from medaccel.restoration.methods.base import RestorationTask
from medaccel.restoration.methods.networks.study_patches import StudyPatches
from medaccel.restoration.validate import common_task, validate

SMALL = {"roi_size": [16, 16, 16], "channels": [4, 8], "blocks": [1, 1]}
RANGE = {
    "seconds": [30, 60],
    "voxel_min": [3.0] * 3,
    "voxel_max": [5.0] * 3,
    "noise_min": 0.01,
    "noise_max": 1.0,
}


def _study(folder: Path, seed: int, seconds: tuple[int, ...] = (30, 60, 90)) -> Path:
    """Writes nested exposures of a warm block with a hot one in it: Poisson counts, blurred."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((28, 24, 26))
    truth[4:-4, 4:-4] = 1.5
    truth[10:16, 9:14, 9:15] = 5.0
    folder.mkdir(parents=True)
    counts, last = np.zeros_like(truth), 0
    for t in seconds:
        counts += rng.poisson(0.05 * truth * (t - last))
        last = t
        image = gaussian_filter(counts / (0.05 * t), 0.8).astype(np.float32)
        save_nifti(folder / f"PET_{t}.nii.gz", make_nifti(image, np.diag([4.0, 4, 4, 1])))
    return folder


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for seed in range(4):
        _study(folder / f"patient{seed}", seed)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = make_method("unet", RestorationTask((60, 30), 90), {**SMALL, "accelerator": "cpu"})
    method.fitted.parameters["training_range"] = RANGE
    path = tmp_path_factory.mktemp("model") / "unet.pt"
    method.save(path)
    return path


def test_the_longest_common_exposure_is_the_target(studies: Path, tmp_path: Path) -> None:
    folders = sorted(studies.iterdir())
    assert common_task(folders) == RestorationTask((60, 30), 90)
    assert common_task([*folders, _study(tmp_path / "other", 9, (20, 30, 60))]) == RestorationTask((30,), 60)
    assert common_task(folders, [30]) == RestorationTask((30,), 90)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"input_seconds": [45]}, "30 s, 60 s, 90 s; expected 45 s among them"),
        ({"target_seconds": 120}, "expected 120 s among them"),
        ({"target_seconds": 30}, "30 s, 60 s, 90 s; expected"),
        ({"input_seconds": [90], "target_seconds": 60}, "90"),
    ],
)
def test_exposures_that_are_missing_are_named(studies: Path, asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        common_task(sorted(studies.iterdir()), **asked)


def test_one_exposure_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least two, such as 60 s and 90 s"):
        common_task([_study(tmp_path / "s", 0, (60,))])


def test_validation_measures_all_and_advises(studies: Path, model: Path, tmp_path: Path) -> None:
    found = validate(studies, model=model, methods=["gaussian1"], output=tmp_path / "out", progress=False)
    shares = {(row["method"], row["seconds"]): row["share_of_limit"] for row in found.rows}
    assert set(shares) == {(name, t) for name in ("identity", "model", "gaussian1") for t in (60, 30)}
    assert shares["gaussian1", 60] > 0.3 > abs(shares["model", 60])  # the untrained network is nearly the identity
    assert len(found.noise) == 8
    assert "Fine-tuning on a few more studies of this scanner is advised" in str(found)
    written = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert written["advice"] == found.advice
    assert (tmp_path / "out" / "validation.csv").read_text().startswith("method,seconds,studies,share_of_limit")
    again = validate(studies, model=model, methods=["gaussian1"], output=tmp_path / "out", progress=False)
    assert again.rows == found.rows


def test_images_out_of_range_are_told(studies: Path, model: Path, tmp_path: Path) -> None:
    method = load_method(model)
    method.fitted.parameters["training_range"] = RANGE | {"noise_min": 2.0, "noise_max": 3.0}
    method.save(tmp_path / "other.pt")
    found = validate(
        studies / "patient0", model=tmp_path / "other.pt", methods=[], output=tmp_path / "out", progress=False
    )
    assert sum("the noise is" in sentence for sentence in found.advice) == 2
    assert found.advice[-1].startswith("Fine-tuning on a few more")


def test_the_reference_is_independent_of_the_input(studies: Path) -> None:
    folders, task = sorted(studies.iterdir()), RestorationTask((60,), 90)

    def correlation(nested: bool) -> float:
        patches = StudyPatches(folders, task, (16, 16, 16), nested=nested)
        flat = (slice(17, 22), slice(7, 17), slice(4, 22))  # neither edges nor the hot block
        pairs = [(study.exposures[60][flat], patches._reference(study, 60, flat)) for study, *_ in patches.prepared]
        images, references = (np.concatenate([pair[n].ravel() for pair in pairs]) for n in (0, 1))
        return float(np.corrcoef(images, references)[0, 1])

    assert correlation(False) > 0.7
    assert abs(correlation(True)) < 0.1


def test_finetuning_gains_on_held_out_studies(studies: Path, model: Path, tmp_path: Path) -> None:
    options = {"model": model, "steps": 100, "learning_rate": 1e-2, "batch_size": 2, "progress": False}
    said = finetune(studies, tmp_path / "mine.pt", **options)
    assert [sentence.partition(",")[0] for sentence in said] == ["60 s", "30 s"]
    before, after = (float(part.split(" % ")[0]) for part in said[0].partition("score ")[2].split("before, "))
    assert after > before + 5
    tuned = load_method(tmp_path / "mine.pt")
    assert tuned.fitted.parameters["finetuned_on"] == 3
    assert tuned.fitted.parameters["training_range"]["noise_max"] == 1.0
    with pytest.raises(FileExistsError):
        finetune(studies, tmp_path / "mine.pt", **options)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["validate", "none"], "none"),
        (["validate", "STUDIES", "--model", "unknown"], "weights 'unknown' are unknown"),
        (["validate", "STUDIES", "--methods", "[magic]"], "method 'magic' is unknown"),
        (["finetune", "STUDIES", "out.txt"], "ends in .pt"),
        (["finetune", "none", "out.pt"], "none"),
    ],
)
def test_mistakes_are_sentences(
    studies: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command,
    message,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(studies) if word == "STUDIES" else word for word in command]
    assert main(["restoration", *words, "--quiet"]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*.pt"))
