# SPDX-License-Identifier: Apache-2.0
"""A label map becomes a DICOM segmentation that other readers place where the labels are, with coded segments."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medaccel.data import open_series
from medaccel.data.dicom import DicomSeries
from medaccel.data.dicom_seg import check_segmentation, segment_codes, write_segmentation
from tests.data.dicom_series import COLUMNS, ROWS, SLICES, write_series
from tests.data.test_dicom_exchange import whole
from tests.data.validator import errors

NAMES = {0: "background", 1: "kidney_left", 3: "lesion", 4: "something else"}


def ct(folder: Path, reverse: bool = False) -> DicomSeries:
    def edit(ds: Dataset, k: int) -> None:
        whole(ds, k)
        ds.Modality, ds.SOPClassUID, ds.RescaleSlope = "CT", "1.2.840.10008.5.1.4.1.1.2", 1
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        if reverse:
            x, y, z = ds.ImagePositionPatient
            ds.ImagePositionPatient = [x, y, -z]

    return open_series(write_series(folder, edit))


def labels() -> np.ndarray:
    result = np.zeros((COLUMNS, ROWS, SLICES), np.uint8)
    result[1:3, 1:3, 2:4], result[4, 3, 5], result[0, 0, 0] = 1, 3, 3
    return result


@pytest.mark.parametrize("reverse", [False, True])
def test_segments_lie_where_the_labels_are(tmp_path: Path, reverse: bool) -> None:
    hd = pytest.importorskip("highdicom")
    series, path = ct(tmp_path / "in", reverse), tmp_path / "seg.dcm"
    write_segmentation(path, labels(), NAMES, series, description="test")
    assert errors(path) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    seg = hd.seg.segread(path)
    assert [seg.get_segment_description(n).segment_label for n in (1, 2, 3)] == list(NAMES.values())[1:]
    volume = seg.get_volume(combine_segments=True)  # (slices, rows, columns), to LPS
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ series.affine
    found: dict[int, set[tuple[int, ...]]] = {1: set(), 2: set()}
    for index in np.argwhere(volume.array):
        place = np.linalg.inv(to_lps) @ volume.affine @ [*index, 1]
        found[int(volume.array[tuple(index)])].add(tuple(int(n) for n in np.rint(place[:3])))
    assert found == {n: {tuple(map(int, i)) for i in np.argwhere(labels() == v)} for n, v in ((1, 1), (2, 3))}
    assert (seg.PatientName, seg.StudyInstanceUID, seg.FrameOfReferenceUID) == (
        "Doe^Jane",
        "1.2.3.9.77",
        "1.2.3.9.78",
    )
    assert seg.SeriesDescription == seg.ContentDescription == "research only: test"
    referred = {
        str(item.ReferencedSOPInstanceUID) for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referred <= {str(h.SOPInstanceUID) for h in series.headers}


def test_a_scan_without_any_structure_gives_an_empty_segmentation(tmp_path: Path) -> None:
    hd = pytest.importorskip("highdicom")
    write_segmentation(tmp_path / "seg.dcm", 0 * labels(), NAMES, ct(tmp_path / "in"), description="test")
    assert errors(tmp_path / "seg.dcm") == []
    assert not hd.seg.segread(tmp_path / "seg.dcm").pixel_array.any()


CODES = {
    "spleen": ("Spleen", None, "Anatomical Structure"),
    "Liver": ("Liver", None, "Anatomical Structure"),
    "kidney_right": ("Kidney", "Right", "Anatomical Structure"),
    "left lung": ("Lung", "Left", "Anatomical Structure"),
    "lungs": ("Lung", None, "Anatomical Structure"),
    "urinary_bladder": ("Bladder", None, "Anatomical Structure"),
    "liver tumour": ("Neoplasm", None, "Morphologically Abnormal Structure"),
    "cancer": ("Neoplasm", None, "Morphologically Abnormal Structure"),
    "lung_nodule": ("Nodule", None, "Morphologically Abnormal Structure"),
    "infection": ("Lesion", None, "Morphologically Abnormal Structure"),
    "structure 7": ("Anatomical Structure", None, "Anatomical Structure"),
    "!": ("Anatomical Structure", None, "Anatomical Structure"),
}


@pytest.mark.parametrize("name", CODES)
def test_structures_are_coded(name: str) -> None:
    pytest.importorskip("highdicom")
    category, kind, side = segment_codes(name)
    found = kind.meaning, None if side is None else side.CodeMeaning, category.meaning
    assert found == CODES[name]
    assert kind.scheme_designator == category.scheme_designator == "SCT"


def test_what_is_missing_is_told_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("highdicom")
    series, path = ct(tmp_path / "in"), tmp_path / "seg.dcm"
    with pytest.raises(ValueError, match=r"shape \(5, 4, 5\), expected the series' \(5, 4, 6\)"):
        write_segmentation(path, labels()[:, :, 1:], NAMES, series, description="test")
    with pytest.raises(ValueError, match=r"labels \[3\] have no name"):
        write_segmentation(path, labels(), {1: "a"}, series, description="test")
    del series.headers[2].FrameOfReferenceUID
    with pytest.raises(ValueError, match=r"FrameOfReferenceUID \(0020,0052\) is missing"):
        check_segmentation(series)
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(ValueError, match="needs highdicom, which is not installed here: pip install"):
        write_segmentation(path, labels(), NAMES, series, description="test")
    assert not path.exists()
