# SPDX-License-Identifier: Apache-2.0
"""Applies a cell's network to a user's CT: NIfTI, MetaImage and DICOM in, labels on the same grid and volumes out."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch

from medaccel.cli import main
from medaccel.data import make_nifti, read_dicom_series, read_nifti, save_nifti, voxel_spacing
from medaccel.data.msd import read_dataset
from medaccel.segmentation.apply import _ratio, _share, apply, spoken, volumes
from medaccel.segmentation.model.inference import segment
from tests.data.test_ct import UID, write_ct_series
from tests.data.test_dicom_seg import ct
from tests.data.validator import errors

Finished = tuple[Path, dict[str, Any]]


def edited(tiny_cell: Finished, path: Path, **changes: Any) -> Path:
    """Returns the cell's checkpoint with other entries."""
    torch.save(torch.load(tiny_cell[0] / "best.pt", weights_only=True) | changes, path)
    return path


@pytest.mark.slow
def test_labels_and_volumes_of_a_scan(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    from medaccel.segmentation.model import checkpoint

    case = read_dataset(tiny_task).cases[0]
    best, scan = tiny_cell[0] / "best.pt", read_nifti(case.image)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        written = apply(best, case.image, tmp_path / "labels.nii.gz", progress=False)
    assert written == (tmp_path / "labels.nii.gz", tmp_path / "labels.json")
    labels, report = read_nifti(written[0]), json.loads(written[1].read_text())
    assert labels.shape == scan.shape
    assert np.array_equal(labels.affine, scan.affine)
    trained = checkpoint.load(best)
    expected = np.asarray(segment(trained.network(), scan, trained.settings).dataobj)
    assert np.array_equal(np.asarray(labels.dataobj), expected)
    (spleen,) = report["structures"]
    assert (spleen["label"], spleen["name"], report["spacing_mm"]) == (1, "spleen", [8.0, 8.0, 8.0])
    assert spleen["volume_ml"] == pytest.approx(expected.sum() * 0.512)
    assert sum(spleen["components"]) == pytest.approx(spleen["volume_ml"])
    # The cell's own score of the case is of the same labels.
    rows = {row["case"]: row["predicted_ml"] for row in tiny_cell[1]["rows"]}
    for case in read_dataset(tiny_task).cases:
        if case.name in rows:
            apply(best, case.image, tmp_path / "labels.nii.gz", force=True, progress=False)
            report = json.loads(written[1].read_text())
            assert report["structures"][0]["volume_ml"] == pytest.approx(rows[case.name])


def test_components_that_are_kept(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    image = read_dataset(tiny_task).cases[0].image
    _, report = apply(
        tiny_cell[0] / "best.pt",
        image,
        tmp_path / "labels.nii",
        keep_largest=1,
        report=tmp_path / "volumes.json",
        progress=False,
    )
    assert report == tmp_path / "volumes.json"
    assert len(json.loads(report.read_text())["structures"][0]["components"]) <= 1


def test_volumes_are_in_millilitres():
    labels = np.zeros((10, 10, 10), dtype=np.uint8)
    labels[:2, :2, :2] = labels[5:8, 5:8, 5:8] = 1
    labels[0, 0, 9] = 3
    found = volumes(make_nifti(labels, np.diag([10.0, 10.0, 5.0, 1.0])), {0: "background", 1: "a", 2: "b", 3: "c"})
    assert [(row["name"], row["volume_ml"], row["components"]) for row in found] == [
        ("a", 17.5, [13.5, 4.0]),
        ("b", 0, []),
        ("c", 0.5, [0.5]),
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metaimage_and_dicom_are_read(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    best = tiny_cell[0] / "best.pt"
    scan = read_nifti(read_dataset(tiny_task).cases[0].image)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(np.asarray(scan.dataobj).T))
    image.SetSpacing(voxel_spacing(scan))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(tmp_path / "scan.mhd"))
    labels, _ = apply(best, tmp_path / "scan.mhd", tmp_path / "a.nii.gz", progress=False)
    expected, _ = apply(best, read_dataset(tiny_task).cases[0].image, tmp_path / "b.nii.gz", progress=False)
    assert np.array_equal(np.asarray(read_nifti(labels).dataobj), np.asarray(read_nifti(expected).dataobj))

    series = write_ct_series(tmp_path / "dicom")
    labels, _ = apply(best, series, tmp_path / "c.nii.gz", progress=False)
    of_dicom = read_dicom_series(series)
    assert read_nifti(labels).shape == of_dicom.shape
    np.testing.assert_allclose(read_nifti(labels).affine, of_dicom.affine, atol=1e-4)
    other = write_ct_series(tmp_path / "dicom" / "other", uid="1.2.3.4.5.6")
    with pytest.raises(ValueError, match=rf"dicom: holds 2 CT scans \({UID}, 1\.2\.3\.4\.5\.6\); expected one"):
        apply(best, other.parent, tmp_path / "d.nii.gz", progress=False)
    apply(best, other.parent, tmp_path / "d.nii.gz", series_uid=UID, progress=False)
    with pytest.raises(ValueError, match=r"holds 0 CT scans of the series 9; expected one"):
        apply(best, other.parent, tmp_path / "e.nii.gz", series_uid="9", progress=False)


def test_scans_unlike_those_of_the_training_are_warned_about(tiny_cell: Finished, tmp_path: Path):
    best = tiny_cell[0] / "best.pt"
    hu = np.full((60, 40, 40), -1000, dtype=np.int16)
    hu[10:50, 5:35, 5:35] = 30
    for name, values, affine, message in (
        ("fine", hu, np.diag([1.0, 1.0, 5.0, 1.0]), r"has voxels of 1 × 1 × 5 mm, .* trained on 8 to 8 mm"),
        ("bright", hu + 300, np.diag([8.0, 8.0, 8.0, 1.0]), r"the body's mean is .* \(is it a CT in HU\?\)"),
        ("air", hu // 10 - 800, np.diag([8.0, 8.0, 8.0, 1.0]), "nothing in it is above -500 HU"),
    ):
        save_nifti(tmp_path / f"{name}.nii.gz", make_nifti(values.astype(np.int16), affine))
        with pytest.warns(UserWarning, match=message):
            apply(best, tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_labels.nii.gz", progress=False)


def test_what_can_not_be_is_refused_before_anything_is_written(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    best, image, output = tiny_cell[0] / "best.pt", read_dataset(tiny_task).cases[0].image, tmp_path / "a.nii.gz"
    (tmp_path / "notes.txt").write_text("notes")
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(image.read_bytes()[:-200])
    for input, message in (
        (tmp_path / "notes.txt", r"notes\.txt: expected a \.nii, \.nii\.gz, \.mhd or \.mha file"),
        (damaged, r"damaged\.nii\.gz: truncated or corrupt gzip"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(best, input, output, progress=False)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        apply(best, tmp_path / "none.nii.gz", output, progress=False)
    with pytest.raises(ValueError, match=r"a\.mhd: the output's name must end in \.nii or \.nii\.gz"):
        apply(best, image, tmp_path / "a.mhd", progress=False)
    with pytest.raises(ValueError, match="keep_largest is -1; expected 0 for all components"):
        apply(best, image, output, keep_largest=-1, progress=False)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(FileExistsError):
        apply(best, image, output, progress=False)
    assert not output.exists()


def test_checkpoints_of_another_kind_are_refused(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    image = read_dataset(tiny_task).cases[0].image
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    settings = torch.load(tiny_cell[0] / "best.pt", weights_only=True)["settings"]
    for path, message in (
        (tmp_path / "other.pt", r"other\.pt: no segmentation network; expected the best\.pt"),
        (tmp_path / "noise.pt", r"noise\.pt: not a checkpoint that can be read"),
        (edited(tiny_cell, tmp_path / "new.pt", format=9), "of format 9; this version reads format 1"),
        (
            edited(tiny_cell, tmp_path / "wide.pt", settings=settings | {"feature_size": 24}),
            r"wide\.pt: its settings, labels and weights don't fit together",
        ),
        (edited(tiny_cell, tmp_path / "lean.pt", labels=None), r"lean\.pt: its settings, labels and weights don't"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(path, image, tmp_path / "a.nii.gz", progress=False)
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file; expected the best\.pt"):
        apply(tmp_path / "none.pt", image, tmp_path / "a.nii.gz", progress=False)


# --- Shares, and DICOM segmentations ---

ROWS: list[dict[str, Any]] = [
    {"name": "lung_left", "volume_ml": 2000.0},
    {"name": "lung_right", "volume_ml": 2500.0},
    {"name": "lesion", "volume_ml": 500.0},
    {"name": "none", "volume_ml": 0.0},
]
LABELS = {0: "background", 1: "lung_left", 2: "lung_right", 3: "lesion", 4: "none"}


@pytest.mark.parametrize(
    ("text", "share", "line"),
    [
        ("lesion/lung_left+lung_right", 0.1, "lesion in lung_left+lung_right: 10.0% (500.0 of 5000.0 mL)"),
        ("lesion / lung_left", 0.2, "lesion in lung_left: 20.0% (500.0 of 2500.0 mL)"),
        ("none/lesion", 0.0, "none in lesion: 0.0% (0.0 of 500.0 mL)"),
    ],
)
def test_a_share_is_of_the_whole_with_the_part_in_it(text: str, share: float, line: str):
    row = _share(*_ratio(text, LABELS), ROWS)
    assert row["share"] == pytest.approx(share)
    assert spoken({"structures": ROWS, "ratios": [row]})[-1] == line
    assert spoken({"structures": ROWS, "ratios": []})[0] == "lung_left: 2000.0 mL"


def test_a_share_of_nothing_is_not_defined():
    empty = [{"name": name, "volume_ml": 0.0} for name in LABELS.values()]
    row = _share("lesion", "lung_left", empty)
    assert row["share"] is None
    assert "not defined" in spoken({"structures": [], "ratios": [row]})[0]


@pytest.mark.parametrize("text", ["lesion", "lesion/", "/lung_left", "lesion/lung", "a/b/c", "lesion/lesion", ""])
def test_a_ratio_of_unknown_structures_is_refused(text: str):
    with pytest.raises(ValueError, match=r"ratio is .*; expected"):
        _ratio(text, LABELS)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dicom_series_gets_a_dicom_segmentation(
    tiny_cell: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hd = pytest.importorskip("highdicom")
    best = str(tiny_cell[0] / "best.pt")
    series = ct(tmp_path / "dicom")
    command = ["segmentation", "apply", "--checkpoint", best, str(tmp_path / "dicom"), "--quiet"]
    assert main([*command, str(tmp_path / "seg.dcm"), "--output_type", "dicom_seg"]) == 0
    said = capsys.readouterr().out
    assert "seg.json" in said
    assert "spleen: " in said
    assert " mL" in said
    assert errors(tmp_path / "seg.dcm") == []
    found = hd.seg.segread(tmp_path / "seg.dcm")
    assert found.get_segment_description(1).segmented_property_type.meaning == "Spleen"
    labels, _ = apply(tiny_cell[0] / "best.pt", tmp_path / "dicom", tmp_path / "a.nii", progress=False)
    assert int(found.pixel_array.sum()) == int((np.asarray(read_nifti(labels).dataobj) == 1).sum())
    assert len(series.headers) == read_nifti(labels).shape[2]


def test_a_segmentation_needs_a_series_and_a_name(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    best, image = tiny_cell[0] / "best.pt", read_dataset(tiny_task).cases[0].image
    for output, options, message in (
        ("a.dcm", {"output_type": "dicom_seg"}, r"dicom_seg refers to a DICOM series; expected its folder"),
        ("a.nii", {"output_type": "dicom_seg"}, r"a\.nii: the output's name must end in \.dcm for dicom_seg"),
        ("a.dcm", {}, r"a\.dcm: the output's name must end in \.nii or \.nii\.gz"),
        ("a.nii", {"output_type": "rtstruct"}, r"output_type is 'rtstruct'; expected nifti or dicom_seg"),
        ("a.nii", {"ratio": ("spleen/liver",)}, r"ratio is 'spleen/liver'; expected part/whole of spleen"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(best, image, tmp_path / output, progress=False, **options)
    assert not list(tmp_path.glob("a.*"))
