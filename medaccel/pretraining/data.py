# SPDX-License-Identifier: Apache-2.0
"""Scans as they are trained on: canonical, at one spacing, cropped to the body, kept on disk as whole HU."""

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

# Of what a cached scan holds and what was checked of it; another one makes new files.
_FORMAT = 2
_HELD_OUT_SEED = 7


@dataclass(frozen=True)
class Scans:
    """What of some folders is trained on (`training`) and what is not (`held_out`), as files of the cache."""

    training: tuple[Path, ...]
    held_out: tuple[Path, ...]

    @classmethod
    def of(cls, plain: dict[str, Any], cache: Path) -> Scans:
        """From what `prepare` gave."""
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
        folders: of scans.
        cache: folder of prepared scans; what is there and whole is not made again. Files are written atomically, and
            any number of runs may share them.
        spacing: mm.
        held_out: share that is set aside: at least one, and at least one is left. Which, depends on the seed and the
            order of the paths.
        skip_limit: share of the scans that may be unreadable, or look like no CT in HU.
        seed: of the split.
        check_units: False takes label maps, other modalities and scaled intensities too.
        workers: processes that fill the cache; 0 and 1: this one.
        progress: show a bar.
        found: what `find_scans` gave for the folders, where that is known.

    Returns:
        Plain values: "training" and "held_out", lists of {"path", "uid", "cached"}; "skipped", "duplicates" and
        "no_ct", of {"path", "reason"}.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder that is none.
        ValueError: no scans, fewer than two that can be read, or more unreadable ones than the limit.
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
    """The prepared scan's file in the cache, which is made if it is missing or damaged.

    It is named by the scan's path, size and time of change, and by what is done to it.

    Raises:
        OSError, ValueError: as `medaccel.data.ct.read_scan`.
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
    """A prepared scan: HU (1, i, j, k), int16, and its affine to RAS mm, (4, 4), fp64.

    mapped: leave the file on disk, and read what is looked at.
    """
    content = load_tensors(path, mmap=mapped)
    return content["hu"], content["affine"]


class Volumes:
    """Prepared scans by number: MetaTensors (1, i, j, k), float32 HU.

    Args:
        paths: of the cache's files.
        cache: "memory" keeps all of them there, two bytes a voxel; "disk" reads them each time.
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
    """The cache's file, or why there is none, which is `sift`'s to count; a full disk ends the run."""
    try:
        return cached(scan, cache, spacing, check_units=check_units)
    except (ValueError, OSError) as error:
        if is_full_disk(error):
            raise
        return error
    except (RuntimeError, MemoryError) as error:  # of a header that makes MONAI's resampling ask for too much
        return ValueError(f"{scan.path}: can't be resampled ({first_line(error)})")


def _identity(scan: Scan) -> list[Any]:
    """A scan's path, and size and time of its files."""
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(scan)]
    return [os.path.realpath(scan.path), scan.uid, stats]


def files_of(scan: Scan) -> list[Path]:
    """A scan's files; of a DICOM series all of its folder."""
    files = sorted(scan.path.iterdir()) if scan.path.is_dir() else [scan.path]
    raw = scan.path.with_suffix(".raw")  # beside LUNA16's .mhd
    if raw.is_file() and raw not in files:
        files.append(raw)
    return [file for file in files if file.is_file()]


def _plain(passed: Sequence[Skipped]) -> list[dict[str, str]]:
    return [{"path": str(skip.path), "reason": skip.reason} for skip in passed]
