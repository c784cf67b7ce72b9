# SPDX-License-Identifier: Apache-2.0
"""Writes phantom CTs to disk: two labelled tasks in the Decathlon's layout, and a pool of unlabelled scans.

Every file depends on its number and the seed alone, so an interrupted writing continues where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medaccel.data import make_nifti, save_nifti, write_text
from medaccel.data.msd import DATASET_JSON, MSDDataset, read_dataset
from medaccel.phantoms.ct import PhantomCT, make_phantom
from medaccel.phantoms.ct_anatomy import ORGANS, SHIFTED, STANDARD, TUMOUR, Population

# No person of one task appears in the other, or in the pool.
_POOL_SEED = 900_000


@dataclass(frozen=True)
class PhantomTask:
    """Describes a task: its labels, the field of view that shows them, the first seed of its persons, and their
    population."""

    title: str
    label: str
    organs: tuple[str, ...]
    centre_z: float  # mm, argument of `make_phantom`
    first_seed: int
    population: Population


TASKS = {
    "spleen": PhantomTask("PhantomSpleen", "spleen", ("spleen",), -60.0, 100_000, STANDARD),
    "lung": PhantomTask("PhantomLung", "cancer", ("lesion",), 80.0, 200_000, TUMOUR),
}


def write_task(
    folder: str | Path,
    task: str,
    cases: int = 60,
    *,
    seed: int = 0,
    spacing: Sequence[float] = (4.0, 4.0, 4.0),
    population: Population | None = None,
    progress: bool = True,
) -> MSDDataset:
    """Writes a labelled task of phantom CTs and returns it as `read_dataset` does.

    Args:
        folder: the task's folder; made if missing.
        task: "spleen" or "lung"; the lungs' lesions are the latter's label, a tumour and up to two more.
        cases: their number; at least 1.
        seed: shifts all persons; another seed gives other persons.
        spacing: voxel size, mm.
        population: the population that persons are drawn from; by default the task's own, `STANDARD` or `TUMOUR`.
        progress: show a bar.

    Raises:
        ValueError: the task is unknown, no cases are asked for, the seed is out of range, or the folder holds another
            task.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    chosen, root = TASKS[task], Path(folder)
    population = population or chosen.population
    what = {"cases": cases, "seed": seed, "spacing_mm": [float(s) for s in spacing], "population": population.name}
    names = [f"{task}_{number:03d}" for number in range(cases)]
    content = {
        "name": chosen.title,
        "description": "simulated torso CTs (medaccel.phantoms.ct)",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": chosen.label},
        "numTraining": cases,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "phantoms": what,
    }
    _start(root, content, cases, seed)
    wanted = [ORGANS[organ] for organ in chosen.organs]
    for number in _counted(cases, f"{task} phantoms", progress):
        image, label = (root / part / f"{names[number]}.nii.gz" for part in ("imagesTr", "labelsTr"))
        if image.is_file() and label.is_file():
            continue
        phantom = _scan(chosen.first_seed, seed, number, population, spacing, chosen.centre_z)
        _save(label, np.isin(phantom.organs, wanted).astype(np.uint8), phantom)
        _save(image, phantom.hu, phantom)
    return read_dataset(root)


def write_pool(
    folder: str | Path,
    count: int = 200,
    *,
    seed: int = 0,
    spacing: Sequence[float] = (4.0, 4.0, 4.0),
    population: Population = SHIFTED,
    progress: bool = True,
) -> list[Path]:
    """Writes unlabelled scans, `scan_000.nii.gz` and so on, of all parts of the trunk, and returns their paths.

    The arguments are those of `write_task`.

    Raises:
        ValueError: no scans are asked for, the seed is out of range, or the folder holds others.
    """
    root = Path(folder)
    what = {"cases": count, "seed": seed, "spacing_mm": [float(s) for s in spacing], "population": population.name}
    _start(root, {"name": "PhantomPool", "phantoms": what}, count, seed, "pool.json")
    paths = [root / f"scan_{number:03d}.nii.gz" for number in range(count)]
    for number in _counted(count, "unlabelled phantoms", progress):
        if not paths[number].is_file():
            height = float(np.random.default_rng([seed, number]).uniform(-70, 80))
            phantom = _scan(_POOL_SEED, seed, number, population, spacing, height)
            _save(paths[number], phantom.hu, phantom)
    return paths


def _start(root: Path, content: dict[str, object], count: int, seed: int, name: str = DATASET_JSON) -> None:
    """Writes a description of the folder's content to come, unless the folder has it already."""
    if not 1 <= count <= 1000:
        raise ValueError(f"cases is {count}; expected 1 to 1000")
    if not 0 <= seed < 50:
        raise ValueError(f"seed is {seed}; expected 0 to 49")
    text = json.dumps(content, indent=1) + "\n"
    path = root / name
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path}: of other phantoms; expected the same ones, or another folder")
    else:
        root.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _counted(count: int, title: str, progress: bool) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(range(count), desc=title, disable=not progress)


def _scan(
    first: int, seed: int, number: int, population: Population, spacing: Sequence[float], centre_z: float
) -> PhantomCT:
    return make_phantom(first + 1000 * seed + number, population=population, spacing=spacing, centre_z=centre_z)


def _save(path: Path, array: np.ndarray, phantom: PhantomCT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_nifti(path, make_nifti(array, phantom.affine), force=True)
