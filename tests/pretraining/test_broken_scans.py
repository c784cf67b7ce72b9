# SPDX-License-Identifier: Apache-2.0
"""Files that are no scans are passed over and listed, and one broken file ends no pretraining."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from medaccel.data import make_nifti, read_nifti, save_nifti
from medaccel.phantoms.ct_dataset import write_pool, write_task
from medaccel.pretraining.config import PretrainingConfig
from medaccel.pretraining.data import load, prepare
from tests.pretraining.made import SPACING

EVERYTHING = {"held_out": 0.25, "skip_limit": 0.0, "seed": 0, "progress": False}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    write_pool(folder, 3, spacing=SPACING, progress=False)
    return folder


def names(entries: list[dict[str, str]]) -> list[str]:
    return [Path(entry["path"]).name for entry in entries]


def trained_on(found: dict[str, list[dict[str, str]]]) -> list[str]:
    return sorted(names(found["training"] + found["held_out"]))


def test_a_decathlon_task_gives_its_images_alone(tmp_path: Path):
    write_task(tmp_path / "task", "spleen", 2, spacing=SPACING, progress=False)
    found = prepare([tmp_path / "task"], tmp_path / "cache", SPACING, **EVERYTHING)
    assert trained_on(found) == ["spleen_000.nii.gz", "spleen_001.nii.gz"]
    assert names(found["no_ct"]) == ["labelsTr"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_what_looks_like_no_ct_is_skipped_with_the_reason_up_to_the_limit(tmp_path: Path, pool: Path, workers: int):
    source = shutil.copytree(pool, tmp_path / "scans")
    image = read_nifti(source / "scan_000.nii.gz")
    hu = np.asarray(image.dataobj).astype(np.float32)
    for name, values in {
        "organs": (hu > -500).astype(np.uint8) + (hu > 100),
        "scaled": (hu.clip(-1000, 1000) + 1000) / 2000,
        "offset": hu + 1024,
    }.items():
        save_nifti(source / f"{name}.nii.gz", make_nifti(values, image.affine))
    options = EVERYTHING | {"skip_limit": 0.5, "workers": workers}
    found = prepare([source], tmp_path / "cache", SPACING, **options)
    assert trained_on(found) == [f"scan_00{n}.nii.gz" for n in range(3)]
    reasons = dict(zip(names(found["skipped"]), (entry["reason"] for entry in found["skipped"]), strict=True))
    assert "organs.nii.gz: looks like a label map: 3 integer values from 0 to 2" in reasons["organs.nii.gz"]
    assert "scaled.nii.gz: looks like intensities scaled to 0 … 1" in reasons["scaled.nii.gz"]
    assert "offset.nii.gz: looks like a CT with an offset" in reasons["offset.nii.gz"]
    with pytest.raises(ValueError, match=r"3 of 6 scans can't be read, expected at most 0 %: .*looks like"):
        prepare([source], tmp_path / "cache", SPACING, **EVERYTHING)
    everything = prepare([source], tmp_path / "cache", SPACING, **options, check_units=False)
    assert len(trained_on(everything)) == 6
    # What was prepared without the check is not taken by a run that makes it.
    assert trained_on(prepare([source], tmp_path / "cache", SPACING, **options)) == trained_on(found)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_and_hostile_files_end_no_pretraining(tmp_path: Path, pool: Path, workers: int):
    source = shutil.copytree(pool, tmp_path / "scans")
    content = gzip.decompress((source / "scan_000.nii.gz").read_bytes())
    (source / "bomb.nii.gz").write_bytes(gzip.compress(content + bytes(64 << 20)))
    (source / "cut.nii.gz").write_bytes((source / "scan_000.nii.gz").read_bytes()[:-9])
    (source / "empty.nii.gz").touch()
    (source / "header.mhd").write_text("NDims = 3\nDimSize = 99999 99999 99999\nElementType = MET_SHORT\n")
    os.mkfifo(source / "pipe.nii.gz")
    (source / "nowhere.nii").symlink_to("nothing")
    (source / "zero.nii").symlink_to("/dev/zero")
    (source / "scan.dcm").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00" + bytes(range(256)))
    (source / "folder.nii.gz").mkdir()
    (source / "loop").symlink_to(source)
    found = prepare([source], tmp_path / "cache", SPACING, **(EVERYTHING | {"skip_limit": 0.8, "workers": workers}))
    assert trained_on(found) == [f"scan_00{n}.nii.gz" for n in range(3)]
    skipped = {"bomb.nii.gz", "cut.nii.gz", "empty.nii.gz", "header.mhd", "nowhere.nii", "pipe.nii.gz", "zero.nii"}
    assert set(names(found["skipped"])) == skipped
    assert all(Path(entry["path"]).name in entry["reason"] for entry in found["skipped"])


def test_a_damaged_cache_is_made_again(tmp_path: Path, pool: Path):
    cache = tmp_path / "cache"
    found = prepare([pool], cache, SPACING, **EVERYTHING)
    path = cache / found["training"][0]["cached"]
    whole, hu = path.read_bytes(), load(path)[0]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for content in (bytes(flipped), whole[:-30], whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        assert prepare([pool], cache, SPACING, **EVERYTHING) == found
        assert torch.equal(load(path)[0], hu)


def test_a_full_disk_is_no_fault_of_the_scans(tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch):
    def full(content: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medaccel.pretraining.data.torch.save", full)
    with pytest.raises(OSError, match="No space left on device"):
        prepare([pool], tmp_path / "cache", SPACING, **(EVERYTHING | {"skip_limit": 1.0}))


def test_the_options_of_before_are_the_same_run(tmp_path: Path):
    assert "check_units" not in PretrainingConfig(output=tmp_path).plain()
    plain = PretrainingConfig(output=tmp_path, check_units=False).plain()
    assert plain["check_units"] is False
    assert PretrainingConfig.of(tmp_path, plain).check_units is False
