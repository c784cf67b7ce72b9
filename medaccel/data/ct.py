# SPDX-License-Identifier: Apache-2.0
"""Finds and reads CT scans in the forms they are published in: NIfTI, MetaImage (LUNA16), DICOM series (LIDC-IDRI,
TCIA Covid-19).

LUNA16 (https://luna16.grand-challenge.org) has one .mhd with its .raw a scan, named by the SeriesInstanceUID; its
coordinates are LPS, and a TransformMatrix of −1 flips axes. LIDC-IDRI, which LUNA16 is a part of, and TCIA's Covid-19
collections (CT-Images-in-COVID-19, COVID-19-AR) are trees of DICOM series, among them radiographs and segmentations
that are no CT. A series that is found twice, whatever the format, counts once. Label maps lie beside the scans in the
Decathlon (labelsTr), nnU-Net (labelsTs), TotalSegmentator (segmentations), LiTS (segmentation-0) and others; they are
recognised by their names here, and by their content when they are read.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from nibabel.nifti1 import Nifti1Image

from medaccel.data.dicom import load_series, open_clipped, open_series
from medaccel.data.files import is_full_disk, read_json
from medaccel.data.hounsfield import ImageWarning, check_hu, check_modality
from medaccel.data.metaimage import SUFFIXES as META_IMAGE
from medaccel.data.metaimage import read_metaimage
from medaccel.data.nifti import is_nifti_name, make_nifti, read_nifti

_UID = re.compile(r"\d+(\.\d+){4,}")
# LUNA16's masks of the lungs have the same names as their scans.
_LUNG_MASKS = "seg-lungs-LUNA16"
# These are folders of label maps, and words in the names of files that hold one.
_LABEL_FOLDER = re.compile(r"labels?(tr|ts|va|val|train|test)?|segmentations|segs?|masks?|groundtruths?|gts?", re.I)
_LABEL_WORD = re.compile(r"(^|[^a-z])(segs?|segmentations?|masks?|labels?|labelmaps?|groundtruth|gt)([^a-z]|$)", re.I)
_DATASET_JSON = "dataset.json"
# A body is smaller than this, in mm and litres; a header that claims more asks for terabytes when the scan is
# resampled.
_MOST_EXTENT, _MOST_VOLUME = 3000.0, 2000.0
# Scanners pad the field of view with −2000 or −3024.
_LOWEST_HU = -1024.0


@dataclass(frozen=True)
class Scan:
    """Names one scan on disk.

    Args:
        path: the file, or the series' folder.
        kind: "nifti", "metaimage" or "dicom".
        uid: SeriesInstanceUID, if it is known.
    """

    path: Path
    kind: Literal["nifti", "metaimage", "dicom"]
    uid: str | None = None


@dataclass(frozen=True)
class Skipped:
    """Names a file that was passed over, and the reason."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ScanList:
    """Lists `scans` in the order of their paths, `duplicates`, and files that are `no_ct`; only headers have been
    read."""

    scans: tuple[Scan, ...]
    duplicates: tuple[Skipped, ...]
    no_ct: tuple[Skipped, ...]


def find_scans(*folders: str | os.PathLike[str], check_units: bool = True) -> ScanList:
    """Finds all CT scans in some folders and the folders below them.

    Files named as label maps, and files that a dataset.json calls another modality, are no CT. A pipe, a link that
    leads nowhere and the like count as scans by their names; `read_scan` says that they can't be read.

    Args:
        folders: the earlier one is preferred if two hold the same series.
        check_units: if False, take everything that can be read, whatever its name.

    Raises:
        FileNotFoundError, NotADirectoryError: a path is no folder.
        ValueError: no folder holds a scan.
    """
    scans: list[Scan] = []
    duplicates: list[Skipped] = []
    no_ct: list[Skipped] = []
    known: dict[str, Path] = {}
    visited: set[str] = set()
    for folder in folders:
        root = Path(folder)
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such folder")
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: expected a folder of scans, but this is a file")
        for found in _walk(root, check_units, visited):
            if isinstance(found, Skipped):
                no_ct.append(found)
            elif found.uid is not None and found.uid in known:
                duplicates.append(Skipped(found.path, f"the series of {known[found.uid]}"))
            else:
                if found.uid is not None:
                    known[found.uid] = found.path
                scans.append(found)
    if not scans:
        passed = f" ({len(no_ct)} that are no CT were passed over)" if no_ct else ""
        raise ValueError(
            f"{', '.join(str(folder) for folder in folders)}: no CT scans{passed}; expected .nii, .nii.gz, .mhd or "
            ".mha files, or folders of DICOM slices"
        )
    return ScanList(tuple(scans), tuple(duplicates), tuple(no_ct))


def read_scan(scan: Scan, *, check_units: bool = True) -> Nifti1Image:
    """Reads a scan in HU, float32, with an affine to RAS, mm; values below −1024 are padding and become −1024.

    Args:
        scan: a scan that `find_scans` found.
        check_units: refuse voxels that are no CT in HU (`medaccel.data.hounsfield.check_hu`).

    Raises:
        OSError, ValueError: the file is missing, damaged or truncated; it has fewer than two slices; its values
            aren't finite or are the same everywhere; it looks like a label map or is in another unit.

    Warns:
        UserWarning: the scan may not be a CT in HU.
    """
    if scan.kind == "metaimage":
        image = read_metaimage(scan.path)
    elif scan.kind == "dicom":
        image = load_series(open_series(scan.path, series_uid=scan.uid))
    else:
        image = read_nifti(scan.path)
    values = np.asarray(image.dataobj, dtype=np.float32)
    if min(values.shape) < 2:
        raise ValueError(f"{scan.path}: has shape {values.shape}; expected at least two voxels along each axis")
    check_extent(image, scan.path)
    if not np.isfinite(values).all():
        raise ValueError(f"{scan.path}: holds values that are not finite; expected HU")
    if values.min() == values.max():
        raise ValueError(f"{scan.path}: is {values.min():g} everywhere; expected a CT in HU")
    if check_units:
        check_hu(values, scan.path)
    return make_nifti(np.maximum(values, _LOWEST_HU), np.asarray(image.affine), image)


def check_extent(image: Nifti1Image, path: Path) -> None:
    """Raises ValueError if a header makes a scan larger than a body. Raises ValueError."""
    extent = np.asarray(image.shape) * np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)
    if extent.max() > _MOST_EXTENT or float(np.prod(extent)) / 1e6 > _MOST_VOLUME:
        size = " × ".join(f"{side:.4g}" for side in extent)
        raise ValueError(f"{path}: is {size} mm large by its header; expected a scan of a body, in mm")


def sift(
    scans: Sequence[Scan], use: Callable[[Scan], object], *, limit: float = 0.1, progress: bool = False
) -> tuple[list[Scan], list[Skipped]]:
    """Uses each scan, for instance to fill a cache, and lists those that can't be read.

    Args:
        scans: the scans to use.
        use: called with each scan; its ValueError or OSError says that the scan can't be read.
        limit: the share of scans that may be skipped.
        progress: show a bar.

    Returns:
        The scans that could be used, and the others with the reason.

    Raises:
        ValueError: more than the limit can't be read, or none can; the first reasons are named.
        OSError: the disk is full, which is no fault of the scan's.
    """
    from tqdm import tqdm

    if not 0 <= limit <= 1:
        raise ValueError(f"limit is {limit:g}; expected a share from 0 to 1")
    kept: list[Scan] = []
    skipped: list[Skipped] = []
    for scan in tqdm(scans, desc="scans", disable=not progress):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ImageWarning)  # hundreds of scans are padded alike
                use(scan)
        except (ValueError, OSError) as error:
            if is_full_disk(error):
                raise
            skipped.append(Skipped(scan.path, str(error)))
        else:
            kept.append(scan)
    if len(skipped) > limit * len(scans) or not kept:
        reasons = "; ".join(skip.reason for skip in skipped[:3])
        raise ValueError(
            f"{len(skipped)} of {len(scans)} scans can't be read, expected at most {100 * limit:g} %: {reasons}"
        )
    return kept, skipped


def _walk(root: Path, check_units: bool, visited: set[str]) -> Iterator[Scan | Skipped]:
    """Yields the scans of a folder and of those below, in the order of names; one DICOM series per folder and UID."""
    real = os.path.realpath(root)
    if real in visited:  # links may lead back
        return
    visited.add(real)
    try:
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        folders = [path for path in entries if path.is_dir()]
    except OSError as error:
        yield Skipped(root, f"{root}: can't be looked into ({error.strerror})")
        return
    if check_units and (reason := _other_modality(root)) is not None:
        yield Skipped(root, reason)
        return
    others = []
    for path in (path for path in entries if path not in set(folders)):
        found = _scan_file(path)
        if found is None:
            others.append(path)
        elif check_units and _LABEL_WORD.search(_stem(path)):
            yield Skipped(path, "a label map, by its name (check_units: false takes it all the same)")
        else:
            yield found
    yield from _series(root, [path for path in others if path.is_file()])
    for folder in folders:
        if folder.name == _LUNG_MASKS:
            yield Skipped(folder, "LUNA16's lung masks, no scans")
        elif check_units and _LABEL_FOLDER.fullmatch(folder.name):
            yield Skipped(folder, "label maps, by the folder's name (check_units: false takes them all the same)")
        else:
            yield from _walk(folder, check_units, visited)


def _scan_file(path: Path) -> Scan | None:
    """Returns the scan that a file's name announces, if any."""
    if is_nifti_name(path):
        return Scan(path, "nifti", _uid(_stem(path)))
    if path.suffix.lower() in META_IMAGE:
        return Scan(path, "metaimage", _uid(_stem(path)))
    return None


def _stem(path: Path) -> str:
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name[: name.rindex(".")]


def _other_modality(folder: Path) -> str | None:
    """Returns the modality in a task's dataset.json if it isn't CT; a file that can't be read counts as CT."""
    path = folder / _DATASET_JSON
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    try:
        check_modality(content if isinstance(content, dict) else {}, path)
    except ValueError as error:
        return str(error)
    return None


def _series(folder: Path, files: Sequence[Path]) -> Iterator[Scan | Skipped]:
    """Yields the DICOM series among the files of one folder."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    modalities: dict[str, str] = {}
    for path in files:
        try:
            with open_clipped(path) as file:
                header = pydicom.dcmread(
                    file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "Modality"]
                )
            uid, modality = str(header.get("SeriesInstanceUID", "")), str(header.get("Modality", ""))
        except (InvalidDicomError, OSError, EOFError):
            continue  # a licence, a table, …
        except Exception as error:  # a parser of damaged bytes can stumble in any way
            yield Skipped(path, f"{path}: damaged DICOM file ({error})")
            continue
        if uid:
            modalities.setdefault(uid, modality)
    for uid, modality in sorted(modalities.items()):
        if modality == "CT":
            yield Scan(folder, "dicom", uid)
        else:
            yield Skipped(folder, f"a DICOM series of modality {modality or 'unknown'}, expected CT")


def _uid(stem: str) -> str | None:
    return stem if _UID.fullmatch(stem) else None
