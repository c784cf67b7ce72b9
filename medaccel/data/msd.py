# SPDX-License-Identifier: Apache-2.0
"""Reads tasks in the layout of the Medical Segmentation Decathlon (Antonelli et al., Nature Communications 2022).

    dataset.json   name, labels {"0": "background", "1": "spleen"}, training [{"image": …, "label": …}]
    imagesTr/      the cases' CT, NIfTI, HU
    labelsTr/      their label maps, on the same grids

imagesTs has no public labels and is not read. Files named `._*`, which macOS leaves in the published archives, do not
count as cases.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Image

from medaccel.data import read_nifti
from medaccel.data.ct import check_extent
from medaccel.data.files import read_json
from medaccel.data.hounsfield import check_hu, check_modality

DATASET_JSON = "dataset.json"
# Affines of one grid may differ by the rounding of float32 headers, mm.
_AFFINE_TOLERANCE = 1e-2
_NAMED = 3  # an error names this many of the missing files


@dataclass(frozen=True)
class Case:
    """Names one labelled scan (by its file's name, without endings) and its files."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class MSDDataset:
    """Describes a task: its name, folder, labels (value to name, 0 the background) and labelled cases in the order of
    names.

    `check_units` says whether `load_case` refuses voxels that are no CT in HU.
    """

    name: str
    folder: Path
    labels: Mapping[int, str]
    cases: tuple[Case, ...]
    check_units: bool = True


def read_dataset(folder: str | Path, *, check_units: bool = True) -> MSDDataset:
    """Reads and checks dataset.json; volumes are not read before `load_case`.

    Args:
        folder: the task's folder, such as Task09_Spleen.
        check_units: refuse another modality than CT, here, and voxels that are no HU, in `load_case`.

    Raises:
        FileNotFoundError: the folder, dataset.json, or files that it names are missing.
        ValueError: dataset.json isn't JSON, its fields are missing or of another kind, it names another modality, a
            file outside the folder, or one case twice.
    """
    root = Path(folder)
    path = root / DATASET_JSON
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected a task of the Medical Segmentation Decathlon's layout")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected an object with labels and training")
    if check_units:
        check_modality(content, path)
    labels = _labels(content.get("labels"), path)
    entries = content.get("training")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: training is {entries!r}; expected a list of {{image, label}}")
    cases: dict[str, Case] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise ValueError(f"{path}: training holds {entry!r}; expected {{image, label}}")
        image, label = (_inside(root, entry[key], path) for key in ("image", "label"))
        if image.name.startswith("._") or label.name.startswith("._"):
            continue
        name = image.name.removesuffix(".gz").removesuffix(".nii")
        if name in cases:
            raise ValueError(f"{path}: case {name} is named twice")
        cases[name] = Case(name, image, label)
    if not cases:
        raise ValueError(f"{path}: training names no case but files ._*; expected a list of {{image, label}}")
    missing = [file for case in cases.values() for file in (case.image, case.label) if not file.is_file()]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        names = ", ".join(str(file.relative_to(root)) for file in missing[:_NAMED])
        raise FileNotFoundError(f"{path}: names files that are missing: {names}{more}")
    title = content.get("name")
    ordered = tuple(cases[key] for key in sorted(cases))
    name = title if isinstance(title, str) and title else Path(os.path.realpath(root)).name
    return MSDDataset(name, root, labels, ordered, check_units)


def load_case(dataset: MSDDataset, case: Case) -> tuple[Nifti1Image, Nifti1Image]:
    """Reads the CT (HU) and the label map (whole numbers) of a case.

    A label map without foreground is no error here: each measure decides what it means.

    Raises:
        OSError, ValueError: a file is missing or damaged; the grids differ; values aren't finite, or no CT in HU
            (`medaccel.data.hounsfield.check_hu`); dataset.json doesn't name a label.

    Warns:
        UserWarning: the image may be no CT in HU.
    """
    image, label = read_nifti(case.image), read_nifti(case.label)
    if image.shape != label.shape or not np.allclose(image.affine, label.affine, atol=_AFFINE_TOLERANCE):
        raise ValueError(
            f"{case.label}: its grid {label.shape} with affine {_short(label.affine)} differs from the image's, "
            f"{image.shape} with {_short(image.affine)}"
        )
    if not np.isfinite(np.asarray(image.dataobj)).all():
        raise ValueError(f"{case.image}: holds values that are not finite; expected HU")
    check_extent(image, case.image)
    if dataset.check_units:
        check_hu(np.asarray(image.dataobj), case.image)
    found = np.unique(np.asarray(label.dataobj))
    outside = [float(value) for value in found if float(value) not in dataset.labels]
    if outside:
        raise ValueError(
            f"{case.label}: holds {', '.join(f'{v:g}' for v in outside[:_NAMED])}; expected the labels of "
            f"{DATASET_JSON}, {', '.join(str(v) for v in sorted(dataset.labels))}"
        )
    return image, label


def _labels(content: Any, path: Path) -> dict[int, str]:
    if not isinstance(content, dict):
        raise ValueError(f'{path}: labels is {content!r}; expected such as {{"0": "background", "1": "spleen"}}')
    try:
        labels = {int(value): str(name) for value, name in content.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: labels is {content!r}; expected whole numbers as keys") from error
    if sorted(labels) != list(range(len(labels))) or len(labels) < 2:
        raise ValueError(f"{path}: labels has the values {sorted(labels)}; expected 0, 1, … without a gap")
    return labels


def _inside(root: Path, name: Any, path: Path) -> Path:
    """Returns a file that dataset.json names, if it lies in the task's folder, also after following links."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: names the file {name!r}; expected a path such as ./imagesTr/case.nii.gz")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or any(sign in name for sign in "\\:\0"):
        raise ValueError(f"{path}: names the file {name!r}; expected one within the task's folder")
    file = root / relative
    real = Path(os.path.realpath(file))  # `resolve` may raise anything on a circle of links
    if not real.is_relative_to(os.path.realpath(root)):
        raise ValueError(f"{path}: names the file {name!r}, a link to {real}; expected one within the task's folder")
    return file


def _short(affine: np.ndarray) -> str:
    return "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3])
