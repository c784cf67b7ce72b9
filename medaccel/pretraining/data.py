# SPDX-License-Identifier: Apache-2.0
"""Prepares scans for training: canonical, at one spacing, cropped to the body, kept on disk as whole HU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from medaccel.data.ct import Scan, ScanList, Skipped, find_scans, read_scan, sift
from medaccel.data.ct_transforms import canonical
from medaccel.data.files import atomic_path, is_full_disk
from medaccel.data.tensors import check_tensors, first_line, load_tensors
from medaccel.studies.digest import digest

# This is the version of a cached scan's content and checks; another version makes new files.
_FORMAT = 2
_HELD_OUT_SEED = 7


@dataclass(frozen=True)
class Scans:
    """Lists the prepared files of some folders that are trained on (`training`) and those that are not
    (`held_out`)."""

    training: tuple[Path, ...]
    held_out: tuple[Path, ...]

    @classmethod
    def of(cls, plain: dict[str, Any], cache: Path) -> Scans:
        """Builds the lists from the result of `prepare`."""
        training, held_out = (
            tuple(cache / entry["cached"] for entry in plain[part]) for part in ("training", "held_out")
        )
        return cls(training, held_out)


def prepare(
    folders: Sequence[Path],
    cache: Path,
    spacing: Sequence[float],
    *,
    held_out: float,
    skip_limit: float,
    seed: int,
    check_units: bool = True,
    workers: int = 0,
    progress: bool = True,
    found: ScanList | None = None,
) -> dict[str, Any]:
    """Finds scans, fills the cache, and sets some aside.

    Args:
        folders: folders of scans.
        cache: folder of prepared scans; whole files in it are not made again. Files are written atomically, and any
            number of runs may share them.
        spacing: voxel size, mm.
        held_out: share that is set aside: at least one scan, and at least one is left. Seed and order of the paths
            decide which.
        skip_limit: share of the scans that may be unreadable, or look like no CT in HU.
        seed: seed of the split.
        check_units: if False, accept label maps, other modalities and scaled intensities too.
        workers: processes that fill the cache; 0 and 1: this one.
        progress: show a bar.
        found: the result of `find_scans` for the folders, if it is known.

    Returns:
        Plain values: "training" and "held_out", lists of {"path", "uid", "cached"}; "skipped", "duplicates" and
        "no_ct", of {"path", "reason"}.

    Raises:
        FileNotFoundError, NotADirectoryError: a path is no folder.
        ValueError: there are no scans, fewer than two can be read, or more are unreadable than the limit.
    """
    found = found or find_scans(*folders, check_units=check_units)
    cache.mkdir(parents=True, exist_ok=True)
    files: dict[Scan, Path] = {}

    def use(scan: Scan, made: Path | Exception | None = None) -> None:
        outcome = _try(scan, cache, spacing, check_units) if made is None else made
        if isinstance(outcome, Exception):
            raise outcome
        files[scan] = outcome

    ahead: dict[Scan, Path | Exception] = {}
    if workers > 1:
        from joblib import Parallel, delayed

        calls = (delayed(_try)(scan, cache, spacing, check_units) for scan in found.scans)
        ahead = dict(zip(found.scans, Parallel(n_jobs=workers)(calls), strict=True))
    kept, skipped = sift(
        found.scans, lambda scan: use(scan, ahead.get(scan)), limit=skip_limit, progress=progress and not ahead
    )
    if len(kept) < 2:
        raise ValueError(
            f"{kept[0].path} is the only scan; expected at least two, one to train on and one to evaluate on"
        )
    apart = min(max(1, round(held_out * len(kept))), len(kept) - 1)
    order = np.random.default_rng([seed, _HELD_OUT_SEED]).permutation(len(kept))
    chosen = {int(i) for i in order[:apart]}
    entries = [{"path": str(scan.path), "uid": scan.uid, "cached": files[scan].name} for scan in kept]
    return {
        "training": [entry for i, entry in enumerate(entries) if i not in chosen],
        "held_out": [entry for i, entry in enumerate(entries) if i in chosen],
        "skipped": _plain(skipped),
        "duplicates": _plain(found.duplicates),
        "no_ct": _plain(found.no_ct),
    }


def cached(scan: Scan, cache: Path, spacing: Sequence[float], *, check_units: bool = True) -> Path:
    """Returns the prepared scan's file in the cache, which is made if it is missing or damaged.

    Its name depends on the scan's path, size and time of change, and on the preparation.

    Raises:
        OSError, ValueError: `medaccel.data.ct.read_scan` refuses the scan.
    """
    what = [_FORMAT, _identity(scan), [float(step) for step in spacing], *([] if check_units else ["unchecked"])]
    path = cache / f"{digest(what)}.pt"
    if not _whole(path):
        volume = canonical(read_scan(scan, check_units=check_units), spacing)["image"]
        content = {
            "hu": volume.as_tensor().round().clamp(-1024, 32767).to(torch.int16).contiguous(),
            "affine": torch.as_tensor(np.asarray(volume.affine), dtype=torch.float64),
        }
        with atomic_path(path, force=True) as temporary:
            torch.save(content, temporary)
    return path


def load(path: Path, *, mapped: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads a prepared scan: HU (1, i, j, k), int16, and its affine to RAS mm, (4, 4), fp64.

    mapped: leave the file on disk, and read the parts that are used.
    """
    content = load_tensors(path, mmap=mapped)
    return content["hu"], content["affine"]


class Volumes:
    """Returns prepared scans by number: MetaTensors (1, i, j, k), float32 HU.

    Args:
        paths: the cache's files.
        cache: "memory" keeps all of them in memory, two bytes per voxel; "disk" reads them each time.
    """

    def __init__(self, paths: Sequence[Path], cache: str = "memory") -> None:
        self.paths = tuple(paths)
        self._held = [load(path) for path in self.paths] if cache == "memory" else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> MetaTensor:
        hu, affine = self._held[number] if self._held is not None else load(self.paths[number], mapped=True)
        return MetaTensor(hu.float(), affine=affine)


def _whole(path: Path) -> bool:
    try:
        check_tensors(path)
    except (ValueError, FileNotFoundError):
        return False
    return True


def _try(scan: Scan, cache: Path, spacing: Sequence[float], check_units: bool) -> Path | Exception:
    """Returns the cache's file, or the error for `sift` to count; a full disk ends the run."""
    try:
        return cached(scan, cache, spacing, check_units=check_units)
    except (ValueError, OSError) as error:
        if is_full_disk(error):
            raise
        return error
    except (RuntimeError, MemoryError) as error:  # a header can make MONAI's resampling ask for too much
        return ValueError(f"{scan.path}: can't be resampled ({first_line(error)})")


def _identity(scan: Scan) -> list[Any]:
    """Returns a scan's path, and size and time of its files."""
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(scan)]
    return [os.path.realpath(scan.path), scan.uid, stats]


def files_of(scan: Scan) -> list[Path]:
    """Lists a scan's files: the whole folder of a DICOM series."""
    files = sorted(scan.path.iterdir()) if scan.path.is_dir() else [scan.path]
    raw = scan.path.with_suffix(".raw")  # lies beside LUNA16's .mhd
    if raw.is_file() and raw not in files:
        files.append(raw)
    return [file for file in files if file.is_file()]


def _plain(passed: Sequence[Skipped]) -> list[dict[str, str]]:
    return [{"path": str(skip.path), "reason": skip.reason} for skip in passed]
