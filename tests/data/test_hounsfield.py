# SPDX-License-Identifier: Apache-2.0
"""Files that are no CT in HU are refused with a description; a CT passes, however it was taken or cropped."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from medaccel.data import make_nifti, read_nifti, read_pet_series, save_nifti
from medaccel.data.ct import Scan, find_scans, read_scan
from medaccel.data.hounsfield import check_hu, check_modality, judge
from medaccel.phantoms.ct import make_phantom

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def phantom() -> np.ndarray:
    return make_phantom(3, spacing=(6.0, 6.0, 6.0), centre_z=-60.0).hu.astype(np.float32)


@pytest.fixture(scope="module", params=["torso_ct", "torso_ct_short", "sts_001_ct_crop"])
def real(request: pytest.FixtureRequest, data_dir: Path) -> np.ndarray:
    return np.asarray(read_nifti(data_dir / "ct" / f"{request.param}.nii.gz").dataobj).astype(np.float32)


def noise(shape: tuple[int, ...], deviation: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, deviation, shape)


def cornered(hu: np.ndarray, padding: float) -> np.ndarray:
    """A round field of view, filled up as scanners do."""
    i, j = np.ogrid[: hu.shape[0], : hu.shape[1]]
    middle = [(n - 1) / 2 for n in hu.shape[:2]]
    result = hu.copy()
    result[(i - middle[0]) ** 2 + (j - middle[1]) ** 2 > min(middle) ** 2] = padding
    return result


def metal(hu: np.ndarray, value: float) -> np.ndarray:
    result = hu.copy()
    result[20:26, 20:26, 5:9] = value
    return result


def head() -> np.ndarray:
    r = np.sqrt(sum(x**2 for x in np.mgrid[-40:40, -40:40, -20:20]))
    hu = np.select([r < 8, r < 30, r < 34], [8.0, 35.0, 1000.0], -1000.0)
    return (hu + noise(hu.shape, 6)).round()


TRUE: dict[str, Change] = {
    "as it is": lambda hu: hu,
    "padded with -2000": lambda hu: cornered(hu, -2000),
    "padded with -3024": lambda hu: cornered(hu, -3024),
    "padded with -32768": lambda hu: cornered(hu, -32768),
    "metal, 12 bits": lambda hu: metal(hu, 3071),
    "metal, beyond": lambda hu: metal(hu, 30000),
    "low dose": lambda hu: hu + noise(hu.shape, 80).astype(np.float32),
    "lung window": lambda hu: hu.clip(-1350, 150),
    "12 bits": lambda hu: hu.clip(-1024, 3071),
}


def _passes(hu: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_hu(hu, Path("ct.nii.gz"))


@pytest.mark.parametrize("change", TRUE.values(), ids=TRUE)
def test_phantoms_pass(phantom: np.ndarray, change: Change):
    _passes(change(phantom))


@pytest.mark.parametrize("change", TRUE.values(), ids=TRUE)
def test_patients_pass(real: np.ndarray, change: Change):
    _passes(change(real))


@pytest.mark.parametrize("size", [6, 12, 20, 30])
def test_crops_pass_with_and_without_air(real: np.ndarray, size: int):
    rng = np.random.default_rng(size)
    for _ in range(40):
        start = [int(rng.integers(n - min(size, n) + 1)) for n in real.shape]
        crop = real[tuple(slice(s, s + size) for s in start)]
        found = judge(crop)
        assert found.refusal is None, (start, found)


CROPS = {
    "head": head(),
    "brain": head()[28:52, 28:52, 8:32],
    "lung": (-850 + noise((30, 30, 30), 40)).round(),
    "liver": (60 + noise((20, 20, 20), 12)).round(),
    "contrast": (250 + noise((20, 20, 20), 20)).round(),
    "bone": (700 + noise((20, 20, 20), 300)).round(),
    "water": np.where(np.mgrid[-30:30, -30:30, -15:15][0] ** 2 < 400, 0.0, -1000.0) + noise((60, 60, 30), 4),
}


@pytest.mark.parametrize("name", CROPS)
def test_parts_of_the_body_and_phantoms_of_water_pass(name: str):
    _passes(CROPS[name])


SCALED: dict[str, tuple[Change, str]] = {
    "0 to 1": (lambda hu: (hu.clip(-1000, 1000) + 1000) / 2000, "looks like intensities scaled to 0 … 1"),
    "0 to 1, soft tissue": (lambda hu: (hu.clip(-160, 240) + 160) / 400, "looks like intensities scaled to 0 … 1"),
    "8 bits": (lambda hu: ((hu.clip(-160, 240) + 160) / 400 * 255).round(), "looks like 8-bit grey values"),
    "0 to 255": (lambda hu: (hu - hu.min()) / np.ptp(hu) * 255, "looks like 8-bit grey values"),
    "thousandths": (lambda hu: hu / 1000, "looks like HU divided by 1000"),
    "hundredths": (lambda hu: hu / 100, "looks like HU divided by 100"),
    "z-scores": (lambda hu: (hu - hu.mean()) / hu.std(), "looks like z-scores"),
    "offset 1024": (lambda hu: hu + 1024, "looks like a CT with an offset of 1000 or 1024"),
    "offset 1000": (lambda hu: (hu + 1000).clip(0), "looks like a CT with an offset of 1000 or 1024"),
    "unsigned": (lambda hu: (hu + 1024).clip(0, 4095).astype(np.uint16), "looks like a CT with an offset"),
    "offset, padded": (lambda hu: cornered(hu + 1024, -2000), "looks like a CT with an offset"),
    "offset twice": (lambda hu: hu - 1024, "its values go down to"),
    "tenfold": (lambda hu: hu * 10, "its values go down to"),
    "16 bits": (lambda hu: ((hu - hu.min()) / np.ptp(hu) * 65535).round(), "far above bone|looks like MR"),
    "read as unsigned": (lambda hu: hu.astype(np.int16).view(np.uint16), "far above bone|looks like MR"),
    "attenuation, 1/cm": (lambda hu: (hu / 1000 + 1).clip(0) * 0.19, "looks like intensities scaled to 0 … 1"),
    "MR": (
        lambda hu: np.abs(np.where(hu > -500, 400 + hu.clip(-200, 300), 0) + noise(hu.shape, 15)).round(),
        "looks like MR",
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_other_units_are_refused(phantom: np.ndarray, kind: str):
    change, message = SCALED[kind]
    with pytest.raises(ValueError, match=rf"ct\.nii\.gz: .*({message}).*expected a CT in HU \(check_units: false"):
        check_hu(np.asarray(change(phantom)), Path("ct.nii.gz"))


@pytest.mark.parametrize("kind", SCALED)
def test_other_units_are_refused_of_patients_too(real: np.ndarray, kind: str):
    found = judge(np.asarray(SCALED[kind][0](real)))
    assert found.refusal is not None, found


def test_a_pet_is_refused_in_any_unit(data_dir: Path):
    suv = np.asarray(read_pet_series(data_dir / "pet" / "sts_001_fdg_pet_dicom").dataobj)
    crop = np.asarray(read_nifti(data_dir / "pet" / "sts_001_pet_suv_crop.nii.gz").dataobj)
    for values in (suv, suv * 5000, (suv * 5000).round(), suv * 5, crop):
        assert "looks like" in str(judge(values).refusal)
        assert "PET" in str(judge(values).refusal)


def sparse() -> np.ndarray:
    mask = np.zeros((70, 70, 70), np.uint8)
    mask[31, 33, 35] = 1
    return mask


def instances() -> np.ndarray:
    blobs = ndimage.gaussian_filter(noise((60, 60, 60), 1), 3)
    return np.asarray(ndimage.label(blobs > 0.05)[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (sparse(), "looks like a label map: 2 integer values from 0 to 1"),
        (sparse() * 255.0, "looks like a label map: 2 integer values from 0 to 255"),
        (sparse().astype(np.int16) - 1, "looks like a label map: 2 integer values from -1 to 0"),
        (instances(), r"looks like a label map: \d+ integer values from 0 to"),
        (np.arange(105).repeat(1000).reshape(50, 50, 42), "looks like a label map: 105 integer values from 0 to 104"),
    ],
)
def test_label_maps_are_refused(values: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        check_hu(values, Path("labels.nii.gz"))


def test_the_label_map_of_a_patient_is_refused(data_dir: Path):
    organs = np.asarray(read_nifti(data_dir / "ct" / "torso_ct_short_organs.nii.gz").dataobj)
    assert judge(organs).refusal == "looks like a label map: 42 integer values from 0 to 117"
    assert judge(ndimage.zoom(organs.astype(float), 1.3, order=1)).refusal is not None  # resampled as an image


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda hu: hu.clip(-200, 300),
            r"its values end at -200, which \d+% of the voxels have: clipped to a window",
        ),
        (lambda hu: hu / 10, "looks like HU divided by 10"),
        (lambda hu: np.where(hu > -500, 30.0, -1000.0), "it holds two values alone, -1000 and 30"),
        (lambda hu: np.full_like(hu, 40), "it is 40 everywhere"),
    ],
)
def test_what_may_be_a_ct_is_warned_about(phantom: np.ndarray, change: Change, message: str):
    with pytest.warns(UserWarning, match=rf"ct\.nii\.gz: {message} \(is it a CT in HU\?\)"):
        check_hu(change(phantom), Path("ct.nii.gz"))


# --- What names and dataset.json say ---


@pytest.mark.parametrize(
    "content",
    [
        {"modality": {"0": "CT"}},
        {"modality": {"0": "CTA"}},
        {"modality": "CT (portal venous phase)"},
        {"channel_names": {"0": "noNorm"}},
        {"channel_names": ["LDCT"]},
        {"modality": None},
        {"modality": {"0": 3}},
        {},
    ],
)
def test_ct_and_what_tells_nothing_pass(content: dict[str, object]):
    check_modality(content, Path("dataset.json"))


@pytest.mark.parametrize(
    "content",
    [
        {"modality": {"0": "MRI"}},
        {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}},
        {"modality": {"0": "CT", "1": "PET"}},
        {"modality": "MR"},
        {"modality": ["PET/CT"]},
        {"channel_names": {"0": "nonCT"}},
        {"channel_names": {"0": "T2_weighted"}},
    ],
)
def test_other_modalities_are_refused(content: dict[str, object]):
    with pytest.raises(ValueError, match=r"dataset\.json: (modality|channel_names) is .*; expected CT \(check_units"):
        check_modality(content, Path("dataset.json"))


LABELS = (
    "msd/labelsTr/a.nii.gz",
    "msd/labelsTs/a.nii.gz",
    "total/s0001/segmentations/spleen.nii.gz",
    "total/s0001/segmentations/aorta.nii.gz",
    "lits/segmentation-0.nii",
    "kits/case_00000/segmentation.nii.gz",
    "other/a_seg.nii.gz",
    "other/a-label.nii",
    "other/lung_mask.nii.gz",
    "other/masks/a.nii.gz",
    "btcv/label0001.nii.gz",
)
SCANS = (
    "msd/imagesTr/a.nii.gz",
    "total/s0001/ct.nii.gz",
    "lits/volume-0.nii",
    "kits/case_00000/imaging.nii.gz",
    "other/a.nii.gz",
    "other/segovia.nii.gz",
    "other/unmasked.nii.gz",
    "labels_of_nothing/a.nii.gz",
    "segmentation/imagesTr/a.nii.gz",
)


def test_label_maps_that_lie_beside_the_scans_are_none(tmp_path: Path):
    for name in (*LABELS, *SCANS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"never opened")
    found = find_scans(tmp_path)
    assert sorted(str(scan.path.relative_to(tmp_path)) for scan in found.scans) == sorted(SCANS)
    assert all("label map" in skip.reason and "check_units: false" in skip.reason for skip in found.no_ct)
    assert len(find_scans(tmp_path, check_units=False).scans) == len(LABELS) + len(SCANS)


def test_a_task_of_another_modality_is_passed_over(tmp_path: Path):
    for task, modality in (("Task01_BrainTumour", "MRI"), ("Task09_Spleen", "CT")):
        (tmp_path / task / "imagesTr").mkdir(parents=True)
        (tmp_path / task / "imagesTr" / "a.nii.gz").write_bytes(b"never opened")
        (tmp_path / task / "dataset.json").write_text(json.dumps({"modality": {"0": modality}}))
    found = find_scans(tmp_path)
    assert [scan.path.parts[-3] for scan in found.scans] == ["Task09_Spleen"]
    assert [skip.path.name for skip in found.no_ct] == ["Task01_BrainTumour"]
    assert "expected CT" in found.no_ct[0].reason


def test_reading_can_be_told_to_take_it_all_the_same(tmp_path: Path):
    save_nifti(tmp_path / "a.nii.gz", make_nifti(sparse(), np.eye(4)))
    scan = Scan(tmp_path / "a.nii.gz", "nifti")
    with pytest.raises(ValueError, match=r"a\.nii\.gz: looks like a label map"):
        read_scan(scan)
    assert np.asarray(read_scan(scan, check_units=False).dataobj).sum() == 1
