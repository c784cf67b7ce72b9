# SPDX-License-Identifier: Apache-2.0
"""Scans and items: every format, what can't be read is told, the same item whenever it is drawn."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from medaccel.data import make_nifti, read_nifti, save_nifti
from medaccel.data.ct_transforms import canonical, window
from medaccel.pretraining.data import Scans, Volumes, load, prepare
from medaccel.pretraining.items import Items
from medaccel.pretraining.tasks import PRESETS, make_tasks
from tests.data.test_ct import write_ct_series, write_metaimage
from tests.pretraining.made import ROI, SPACING, WINDOW, prepared

EVERYTHING = {"held_out": 0.25, "skip_limit": 0.0, "seed": 0, "progress": False}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Scans:
    return prepared(tmp_path_factory.mktemp("data"))


def test_a_scan_is_kept_as_canonical_hu_and_prepared_once(scans: Scans, tmp_path: Path):
    assert (len(scans.training), len(scans.held_out)) == (3, 1)
    path = scans.training[0]
    hu, affine = load(path)
    source = path.parents[1] / "scans"
    times = {p: p.stat().st_mtime_ns for p in path.parent.iterdir()}
    found = prepare([source], path.parent, SPACING, **EVERYTHING)
    assert {p: p.stat().st_mtime_ns for p in path.parent.iterdir()} == times
    entry = next(e for e in found["training"] if e["cached"] == path.name)
    expected = canonical(read_nifti(entry["path"]), SPACING)["image"]
    assert hu.dtype == torch.int16
    torch.testing.assert_close(hu.float(), expected.as_tensor().round())
    torch.testing.assert_close(affine, torch.as_tensor(np.asarray(expected.affine)))
    mapped = Volumes(scans.training, "disk")[0]
    torch.testing.assert_close(mapped.as_tensor(), Volumes(scans.training)[0].as_tensor())


def test_what_changes_a_prepared_scan_makes_another(scans: Scans, tmp_path: Path):
    source = shutil.copytree(scans.training[0].parents[1] / "scans", tmp_path / "scans")
    before = prepare([source], tmp_path / "cache", SPACING, **EVERYTHING)
    other = prepare([source], tmp_path / "cache", (9.0, 8.0, 8.0), **EVERYTHING)
    name = before["training"][0]["path"]
    image = read_nifti(name)
    save_nifti(name, make_nifti(np.asarray(image.dataobj) + 10, image.affine), force=True)
    after = prepare([source], tmp_path / "cache", SPACING, **EVERYTHING)
    files = [[entry["cached"] for entry in found["training"]] for found in (before, other, after)]
    assert not set(files[0]) & set(files[1])
    assert files[2][0] != files[0][0]
    assert files[2][1:] == files[0][1:]


def test_luna16_dicom_and_nifti_are_read_and_a_series_counts_once(tmp_path: Path):
    write_metaimage(tmp_path / "luna" / "1.2.3.4.5.6.1.mhd")
    write_ct_series(tmp_path / "lidc" / "series", uid="1.2.3.4.5.6.2")
    write_ct_series(tmp_path / "tcia" / "again", uid="1.2.3.4.5.6.2")
    (tmp_path / "tcia" / "broken.nii.gz").write_bytes(b"no gzip")
    folders = [tmp_path / name for name in ("luna", "lidc", "tcia")]
    found = prepare(folders, tmp_path / "cache", (3.0, 3.0, 3.0), **(EVERYTHING | {"skip_limit": 0.5}))
    assert {entry["uid"] for part in ("training", "held_out") for entry in found[part]} == {
        "1.2.3.4.5.6.1",
        "1.2.3.4.5.6.2",
    }
    assert [Path(entry["path"]).name for entry in found["duplicates"]] == ["again"]
    assert [Path(entry["path"]).name for entry in found["skipped"]] == ["broken.nii.gz"]
    with pytest.raises(ValueError, match=r"1 of 3 scans can't be read, expected at most 0 %: .*broken"):
        prepare(folders, tmp_path / "cache", (3.0, 3.0, 3.0), **EVERYTHING)


def test_folders_without_two_scans_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        prepare([tmp_path / "none"], tmp_path / "cache", SPACING, **EVERYTHING)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no CT scans"):
        prepare([tmp_path / "empty"], tmp_path / "cache", SPACING, **EVERYTHING)
    write_metaimage(tmp_path / "one" / "a.mhd")
    with pytest.raises(ValueError, match=r"a.mhd is the only scan; expected at least two"):
        prepare([tmp_path / "one"], tmp_path / "cache", SPACING, **EVERYTHING)


def test_the_split_depends_on_the_seed_and_parts_all_scans(scans: Scans):
    source, cache = scans.training[0].parents[1] / "scans", scans.training[0].parent
    apart = set()
    for seed in range(6):
        found = prepare([source], cache, SPACING, **(EVERYTHING | {"seed": seed}))
        names = [entry["path"] for part in ("training", "held_out") for entry in found[part]]
        assert len(set(names)) == len(names) == 4
        apart.add(found["held_out"][0]["path"])
    assert len(apart) > 1


def test_the_cache_can_be_filled_by_several_processes(scans: Scans, tmp_path: Path):
    source = scans.training[0].parents[1] / "scans"
    found = prepare([source], tmp_path / "cache", SPACING, workers=2, **EVERYTHING)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    for entry in found["training"]:
        again = scans.training[0].parent / entry["cached"]
        assert torch.equal(load(tmp_path / "cache" / entry["cached"])[0], load(again)[0])


def _items(scans: Scans, preset: str = "all", **options: object) -> Items:
    roi = (64, 64, 32)
    tasks = make_tasks(list(PRESETS[preset]), {}, roi)
    return Items(Volumes(scans.training), tasks, windows=[WINDOW, (-160.0, 240.0)], roi_size=roi, seed=1, **options)


def test_an_item_depends_on_its_number_alone(scans: Scans):
    one, other = _items(scans), _items(scans)
    expected = {n: one[n] for n in (0, 1, 7)}
    for n in (7, 0, 1):
        again = other[n]
        assert set(again) == set(expected[n])
        for key, value in again.items():
            assert torch.equal(value, expected[n][key]), key
            assert type(value) is torch.Tensor
    assert not torch.equal(expected[0]["view1"], expected[1]["view1"])


def test_the_items_of_a_batch_are_shown_in_one_window(scans: Scans, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(
        "medaccel.pretraining.items.window", lambda hu, limits: seen.append(limits) or window(hu, limits)
    )
    items = _items(scans, "instance", batch_size=3)
    for number in range(24):
        items[number]
    batches = [seen[start : start + 3] for start in range(0, 24, 3)]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert len(set(seen)) == 2


def test_views_are_padded_where_a_scan_is_smaller_and_only_made_where_they_are_needed(scans: Scans):
    item = _items(scans, "instance_pixel")[0]
    assert set(item) == {"view1", "view2", "affine1", "affine2"}
    assert item["view1"].shape == (1, 64, 64, 32)
    assert min(load(scans.training[0])[0].shape[1:]) < 64
    tasks = make_tasks(["rotation"], {}, (64, 64, 32))
    alone = Items(Volumes(scans.training), tasks, windows=[WINDOW], roi_size=(64, 64, 32))
    assert set(alone[0]) == {"rotation_view", "rotation"}


def test_both_views_show_the_scan_where_their_affines_say(scans: Scans):
    """A view without changes of intensity is the windowed scan, read where its affine leads to."""
    tasks = make_tasks(["pixel"], {}, ROI)
    plain = {"rotate": 0.0, "shear": 0.0, "scale": (1.0, 1.0), "region": 1.0, "flip": 0.5, "rotate90": 0.0}
    items = Items(Volumes(scans.training), tasks, windows=[WINDOW], roi_size=ROI, views=plain)
    items.views.intensity.transforms = ()
    volume = items.volumes[1]
    item = items.item(1, np.random.default_rng(0))
    to_scan = torch.linalg.inv(torch.as_tensor(np.asarray(volume.affine))) @ item["affine1"]
    index = torch.tensor([32.0, 16.0, 16.0, 1.0], dtype=torch.float64)
    i, j, k = (to_scan @ index)[:3].round().int().tolist()
    expected = window(volume.as_tensor(), WINDOW)[0, i, j, k]
    assert float(item["view1"][0, 32, 16, 16]) == pytest.approx(float(expected), abs=0.02)


def test_unknown_options_of_views_are_refused(scans: Scans):
    with pytest.raises(ValueError, match=r"views is \{'colour': 1\}; expected options of TwoViews"):
        _items(scans, views={"colour": 1})


def test_the_real_scans_are_prepared_and_seen(data_dir: Path, tmp_path: Path):
    for name in ("torso_ct", "torso_ct_short"):
        shutil.copy(data_dir / "ct" / f"{name}.nii.gz", tmp_path)
    found = prepare([tmp_path], tmp_path / "cache", (6.0, 6.0, 6.0), **EVERYTHING)
    assert not found["skipped"]
    volumes = Volumes(Scans.of(found, tmp_path / "cache").training)
    hu = volumes[0].as_tensor()
    assert -1024 <= float(hu.min()) < -500 < 0 < float(hu.max()) < 4000
    tasks = make_tasks(["instance", "pixel"], {}, ROI)
    item = Items(volumes, tasks, windows=[WINDOW], roi_size=ROI)[0]
    assert float(item["view1"].max()) > 0.4
