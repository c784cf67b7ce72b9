# SPDX-License-Identifier: Apache-2.0
"""Scans as they are trained on: canonical, at one spacing, cropped to the body, kept on disk as whole HU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from medaccel.data.ct import Scan, ScanList, Skipped, find_scans, read_scan, sift
from medaccel.data.ct_transforms import canonical
from medaccel.data.files import atomic_path
from medaccel.training.digest import digest

# Of what a cached scan holds; another one makes new files.
_FORMAT = 1
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
    workers: int = 0,
    progress: bool = True,
    found: ScanList | None = None,
) -> dict[str, Any]:
    """Finds scans, fills the cache, and sets some aside.

    Args:
        folders: of scans.
        cache: folder of prepared scans; what is there is not made again. Files are written atomically, and any
            number of runs may share them.
        spacing: mm.
        held_out: share that is set aside: at least one, and at least one is left. Which, depends on the seed and the
            order of the paths.
        skip_limit: share of the scans that may be unreadable.
        seed: of the split.
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
    found = found or find_scans(*folders)
    cache.mkdir(parents=True, exist_ok=True)
    if workers > 1:
        from joblib import Parallel, delayed

        Parallel(n_jobs=workers)(delayed(_try)(scan, cache, spacing) for scan in found.scans)
    kept, skipped = sift(found.scans, lambda scan: cached(scan, cache, spacing), limit=skip_limit, progress=progress)
    if len(kept) < 2:
        raise ValueError(
            f"{kept[0].path} is the only scan; expected at least two, one to train on and one to evaluate on"
        )
    apart = min(max(1, round(held_out * len(kept))), len(kept) - 1)
    order = np.random.default_rng([seed, _HELD_OUT_SEED]).permutation(len(kept))
    chosen = {int(i) for i in order[:apart]}
    entries = [
        {"path": str(scan.path), "uid": scan.uid, "cached": cached(scan, cache, spacing).name} for scan in kept
    ]
    return {
        "training": [entry for i, entry in enumerate(entries) if i not in chosen],
        "held_out": [entry for i, entry in enumerate(entries) if i in chosen],
        "skipped": _plain(skipped),
        "duplicates": _plain(found.duplicates),
        "no_ct": _plain(found.no_ct),
    }


def cached(scan: Scan, cache: Path, spacing: Sequence[float]) -> Path:
    """The prepared scan's file in the cache, which is made if it is missing.

    It is named by the scan's path, size and time of change, and by what is done to it.

    Raises:
        FileNotFoundError, ValueError: as `medaccel.data.ct.read_scan`.
    """
    path = cache / f"{digest([_FORMAT, _identity(scan), [float(step) for step in spacing]])}.pt"
    if not path.exists():
        volume = canonical(read_scan(scan), spacing)["image"]
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
    content = torch.load(path, weights_only=True, mmap=mapped)
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


def _try(scan: Scan, cache: Path, spacing: Sequence[float]) -> None:
    """Fills the cache; what can't be read is `sift`'s to count."""
    try:
        cached(scan, cache, spacing)
    except (ValueError, OSError):
        return


def _identity(scan: Scan) -> list[Any]:
    """A scan's path, and size and time of its files."""
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(scan)]
    return [str(scan.path.resolve()), scan.uid, stats]


def files_of(scan: Scan) -> list[Path]:
    """A scan's files; of a DICOM series all of its folder."""
    files = sorted(scan.path.iterdir()) if scan.path.is_dir() else [scan.path]
    raw = scan.path.with_suffix(".raw")  # beside LUNA16's .mhd
    if raw.is_file() and raw not in files:
        files.append(raw)
    return [file for file in files if file.is_file()]


def _plain(passed: Sequence[Skipped]) -> list[dict[str, str]]:
    return [{"path": str(skip.path), "reason": skip.reason} for skip in passed]
