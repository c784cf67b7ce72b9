# SPDX-License-Identifier: Apache-2.0
"""Folders of CT scans as they are published: NIfTI, MetaImage (LUNA16), DICOM series (LIDC-IDRI, TCIA Covid-19).

LUNA16 (https://luna16.grand-challenge.org) has one .mhd with its .raw a scan, named by the SeriesInstanceUID; its
coordinates are LPS, and a TransformMatrix of −1 flips axes. LIDC-IDRI, which LUNA16 is a part of, and TCIA's Covid-19
collections (CT-Images-in-COVID-19, COVID-19-AR) are trees of DICOM series, among them radiographs and segmentations
that are no CT. A series that is found twice, whatever the format, counts once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from nibabel.nifti1 import Nifti1Image

from medaccel.data.dicom import load_series, open_series
from medaccel.data.nifti import is_nifti_name, make_nifti, read_nifti

_META_IMAGE = (".mhd", ".mha")
_UID = re.compile(r"\d+(\.\d+){4,}")
# LUNA16's masks of the lungs bear the names of the scans that they are of.
_NO_SCANS = ("seg-lungs-LUNA16",)
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Scanners pad the field of view with −2000 or −3024.
_LOWEST_HU = -1024.0


@dataclass(frozen=True)
class Scan:
    """One scan on disk.

    Args:
        path: of the file, or of the series' folder.
        kind: "nifti", "metaimage" or "dicom".
        uid: SeriesInstanceUID, where it is known.
    """

    path: Path
    kind: Literal["nifti", "metaimage", "dicom"]
    uid: str | None = None


@dataclass(frozen=True)
class Skipped:
    """What was passed over, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ScanList:
    """`scans` in the order of their paths; `duplicates` and what is `no_ct`; nothing has been read but headers."""

    scans: tuple[Scan, ...]
    duplicates: tuple[Skipped, ...]
    no_ct: tuple[Skipped, ...]


def find_scans(*folders: str | os.PathLike[str]) -> ScanList:
    """All CT scans in some folders and the folders below them.

    Args:
        folders: in the order in which they are preferred, where two hold the same series.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder that is none.
        ValueError: no scan in any of them.
    """
    scans: list[Scan] = []
    duplicates: list[Skipped] = []
    no_ct: list[Skipped] = []
    known: dict[str, Path] = {}
    for folder in folders:
        root = Path(folder)
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such folder")
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: expected a folder of scans, but this is a file")
        for found in _walk(root):
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


def read_scan(scan: Scan) -> Nifti1Image:
    """A scan in HU, float32, with an affine to RAS, mm; what lies below −1024 is padding and becomes −1024.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, damaged or truncated; fewer than two slices; values
            that aren't finite or are the same everywhere.
    """
    if scan.kind == "metaimage":
        image = _read_metaimage(scan.path)
    elif scan.kind == "dicom":
        image = load_series(open_series(scan.path, series_uid=scan.uid))
    else:
        image = read_nifti(scan.path)
    values = np.asarray(image.dataobj, dtype=np.float32)
    if min(values.shape) < 2:
        raise ValueError(f"{scan.path}: has shape {values.shape}; expected at least two voxels along each axis")
    if not np.isfinite(values).all():
        raise ValueError(f"{scan.path}: holds values that are not finite; expected HU")
    if values.min() == values.max():
        raise ValueError(f"{scan.path}: is {values.min():g} everywhere; expected a CT in HU")
    return make_nifti(np.maximum(values, _LOWEST_HU), np.asarray(image.affine), image)


def sift(
    scans: Sequence[Scan], use: Callable[[Scan], object], *, limit: float = 0.1, progress: bool = False
) -> tuple[list[Scan], list[Skipped]]:
    """Uses each scan, such as to fill a cache, and lists those that can't be read.

    Args:
        scans: to use.
        use: called with each; its ValueError or OSError says that the scan can't be read.
        limit: the share of scans that may be skipped.
        progress: show a bar.

    Returns:
        The scans that could be used, and the others with the reason.

    Raises:
        ValueError: more than the limit can't be read, or none can; the first reasons are named.
    """
    from tqdm import tqdm

    if not 0 <= limit <= 1:
        raise ValueError(f"limit is {limit:g}; expected a share from 0 to 1")
    kept: list[Scan] = []
    skipped: list[Skipped] = []
    for scan in tqdm(scans, desc="scans", disable=not progress):
        try:
            use(scan)
        except (ValueError, OSError) as error:
            skipped.append(Skipped(scan.path, str(error)))
        else:
            kept.append(scan)
    if len(skipped) > limit * len(scans) or not kept:
        reasons = "; ".join(skip.reason for skip in skipped[:3])
        raise ValueError(
            f"{len(skipped)} of {len(scans)} scans can't be read, expected at most {100 * limit:g} %: {reasons}"
        )
    return kept, skipped


def _walk(root: Path) -> Iterator[Scan | Skipped]:
    """Scans of a folder and those below, in the order of names; one DICOM series a folder and UID."""
    files = sorted(path for path in root.iterdir() if path.is_file() and not path.name.startswith("."))
    others = []
    for path in files:
        if is_nifti_name(path):
            yield Scan(path, "nifti", _uid(path.name.removesuffix(".gz").removesuffix(".nii")))
        elif path.suffix.lower() in _META_IMAGE:
            yield Scan(path, "metaimage", _uid(path.name[: -len(path.suffix)]))
        else:
            others.append(path)
    yield from _series(root, others)
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if folder.name in _NO_SCANS:
            yield Skipped(folder, "LUNA16's lung masks, no scans")
        else:
            yield from _walk(folder)


def _series(folder: Path, files: Sequence[Path]) -> Iterator[Scan | Skipped]:
    """The DICOM series among the files of one folder."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    modalities: dict[str, str] = {}
    for path in files:
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "Modality"])
        except (InvalidDicomError, OSError, EOFError):
            continue  # a licence, a table, …
        uid = str(header.get("SeriesInstanceUID", ""))
        if uid:
            modalities.setdefault(uid, str(header.get("Modality", "")))
    for uid, modality in sorted(modalities.items()):
        if modality == "CT":
            yield Scan(folder, "dicom", uid)
        else:
            yield Skipped(folder, f"a DICOM series of modality {modality or 'unknown'}, expected CT")


def _uid(stem: str) -> str | None:
    return stem if _UID.fullmatch(stem) else None


def _read_metaimage(path: Path) -> Nifti1Image:
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError(f"{path}: MetaImage needs SimpleITK (pip install SimpleITK)") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        image = SimpleITK.ReadImage(str(path))
        values = SimpleITK.GetArrayFromImage(image)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path}: can't be read as MetaImage ({reason})") from error
    if values.ndim != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{path}: has {image.GetDimension()} dimensions; expected a volume of one channel")
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    # SimpleITK's arrays are (k, j, i).
    return make_nifti(np.ascontiguousarray(values.T, dtype=np.float32), _LPS_TO_RAS @ lps)
