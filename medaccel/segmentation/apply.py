# SPDX-License-Identifier: Apache-2.0
"""Applies a trained network to a user's own CT: the command `medaccel segmentation apply`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nibabel.nifti1 import Nifti1Image

from medaccel.data import check_output, is_nifti_name, save_nifti, voxel_spacing
from medaccel.data.ct import Scan, find_scans, read_scan
from medaccel.data.dicom import open_series
from medaccel.data.dicom_seg import check_segmentation, write_segmentation
from medaccel.data.dicom_write import RESEARCH_ONLY
from medaccel.data.files import check_input
from medaccel.data.hounsfield import BODY_HU
from medaccel.data.nifti import is_nifti_input
from medaccel.studies.digest import file_sha256
from medaccel.studies.tables import write_json

_META_IMAGE = (".mhd", ".mha")
# A scan's voxels may be smaller or larger than the training's by this factor, and its body's mean may differ by so
# many HU.
_SPACING_FACTOR = 1.5
_BODY_MARGIN = 100.0


def apply(
    checkpoint: Path,
    input: Path,
    output: Path,
    *,
    output_type: Literal["nifti", "dicom_seg"] = "nifti",
    keep_largest: int | None = None,
    ratio: tuple[str, ...] = (),
    report: Path | None = None,
    series_uid: str | None = None,
    check_units: bool = True,
    force: bool = False,
    progress: bool = True,
) -> tuple[Path, ...]:
    """Segments one CT with a trained network. For research only.

    Args:
        checkpoint: best.pt of a cell.
        input: a .nii, .nii.gz, .mhd or .mha file in HU, or a folder with a CT DICOM series.
        output: a .nii or .nii.gz file: the label map, on the input's grid; or a .dcm file for dicom_seg.
        output_type: nifti; or dicom_seg for a DICOM segmentation of the series that is the input, which keeps the
            patient's data (name, ID, birth date) and is readable by its owner alone.
        keep_largest: number of components to keep of each structure, 0 keeps all; by default the training's setting.
        ratio: shares to report, such as lesion/lung: the volume of lesions in that of lungs and lesions together,
            since a voxel has one label and a lesion's is no longer lung; + joins, as in lesion/lung_left+lung_right.
        report: a JSON file with the volume of each structure, mL, its components and the shares; by default beside
            the output, with its name.
        series_uid: SeriesInstanceUID, if the folder has several series.
        check_units: refuse an input that doesn't look like a CT in HU, but like a label map, MR or another unit.
        force: overwrite existing files.
        progress: report the progress on stderr.

    Returns:
        The paths that were written: the label map and the report.

    Raises:
        ValueError: the checkpoint is damaged or has another kind or format; the output has another format; a ratio
            names no structure of the network; dicom_seg lacks its package or a DICOM series; the input is damaged or
            no CT in HU; the folder holds several series; `keep_largest` is below 0; the work needs more memory than
            is free.
        OSError: input or checkpoint is missing; an output exists or can't be written, and an old one stays as it was.

    Warns:
        UserWarning: the scan's voxels or CT numbers differ from the training's.
    """
    checkpoint, input, output = Path(checkpoint), Path(input), Path(output)
    _check_output_type(input, output, output_type)
    report = _beside(output) if report is None else Path(report)
    for path in (output, report):  # outputs are checked before anything is read
        check_output(path, force=force)
    if keep_largest is not None and keep_largest < 0:
        raise ValueError(f"keep_largest is {keep_largest}; expected 0 for all components, or how many are kept")
    import torch

    from medaccel.segmentation.memory import Size, expected_of_scan
    from medaccel.segmentation.model.checkpoint import load
    from medaccel.segmentation.model.inference import segment
    from medaccel.training.memory import expect

    trained = load(checkpoint)
    pairs = [_ratio(text, trained.labels) for text in ratio]
    source = _scan(input, series_uid, check_units)
    series = None
    if output_type == "dicom_seg":
        series = open_series(source.path, series_uid=source.uid)
        check_segmentation(series)
    scan = read_scan(source, check_units=check_units)
    for sentence in _unlike(scan, trained.seen):
        warnings.warn(f"{input}: {sentence}", stacklevel=2)
    expected = expect(
        f"{input}: segmenting it",
        expected_of_scan(Size.of(scan, trained.settings["spacing"]), trained.settings, len(trained.labels)),
        gpu=torch.cuda.is_available(),
    )
    if progress:
        print(f"medaccel: {expected.sentence}", file=sys.stderr)
    network = trained.network().to("cuda" if torch.cuda.is_available() else "cpu")
    labels = segment(network, scan, trained.settings, keep_largest=keep_largest, progress=progress)
    labels.header["descrip"] = f"{RESEARCH_ONLY}: labels".encode()[:79]
    content = {
        "input": str(input),
        "output": str(output),
        "checkpoint_sha256": file_sha256(checkpoint),
        "shape": list(scan.shape),
        "spacing_mm": list(voxel_spacing(scan)),
        "structures": (rows := volumes(labels, trained.labels)),
        "ratios": [_share(part, whole, rows) for part, whole in pairs],
    }
    if series is None:
        save_nifti(output, labels, force=force)
    else:
        values = np.asarray(labels.dataobj)
        what = f"labels of a network, SHA-256 {content['checkpoint_sha256'][:12]}"
        write_segmentation(output, values, trained.labels, series, description=what, force=force)
    write_json(report, content, force=force)
    return output, report


def volumes(image: Nifti1Image, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Returns "label", "name", "volume_ml" and 26-connected "components" of each structure of a label map.

    Components are given by their volumes, mL, the largest first.
    """
    from medaccel.segmentation.evaluation.metrics import component_voxels

    values = np.asarray(image.dataobj)
    millilitres = float(np.prod(voxel_spacing(image))) / 1000
    rows = []
    for value, name in sorted(names.items()):
        if value:
            sizes = [count * millilitres for count in component_voxels(values == value)]
            rows.append({"label": value, "name": name, "volume_ml": sum(sizes), "components": sizes})
    return rows


def spoken(report: Mapping[str, Any]) -> list[str]:
    """Returns the lines on volumes and shares that a user wants to read at once."""
    lines = [f"{row['name']}: {row['volume_ml']:.1f} mL" for row in report["structures"]]
    for row in report["ratios"]:
        share = "not defined, as both are empty" if row["share"] is None else f"{row['share']:.1%}"
        lines.append(f"{row['part']} in {row['whole']}: {share} ({row['part_ml']:.1f} of {row['whole_ml']:.1f} mL)")
    return lines


def _check_output_type(input: Path, output: Path, output_type: str) -> None:
    if output_type == "nifti":
        if not is_nifti_name(output):
            raise ValueError(f"{output}: the output's name must end in .nii or .nii.gz")
        return
    if output_type != "dicom_seg":
        raise ValueError(f"output_type is {output_type!r}; expected nifti or dicom_seg")
    if output.suffix.lower() != ".dcm":
        raise ValueError(f"{output}: the output's name must end in .dcm for dicom_seg")
    if input.exists() and not input.is_dir():
        raise ValueError(f"{input}: dicom_seg refers to a DICOM series; expected its folder")
    check_segmentation()


def _ratio(text: str, names: Mapping[int, str]) -> tuple[str, str]:
    """Returns the two sides of a ratio; each names a structure, or several with + between them."""
    known = [name for value, name in sorted(names.items()) if value]
    part, slash, whole = (word.strip() for word in text.partition("/"))
    unknown = [name for side in (part, whole) for name in side.split("+") if name.strip() not in known]
    if not slash or unknown:
        raise ValueError(
            f"ratio is {text!r}; expected part/whole of {', '.join(known)}, such as {known[0]}/{known[-1]}"
        )
    if {name.strip() for name in part.split("+")} & {name.strip() for name in whole.split("+")}:
        raise ValueError(f"ratio is {text!r}; expected different structures on both sides")
    return part, whole


def _share(part: str, whole: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the volumes of a part and of the whole with that part in it, mL, and the part's share."""
    millilitres = {row["name"]: row["volume_ml"] for row in rows}
    inner, outer = (sum(millilitres[n] for n in {n.strip() for n in side.split("+")}) for side in (part, whole))
    share = inner / (inner + outer) if inner + outer else None
    return {"part": part, "whole": whole, "part_ml": inner, "whole_ml": inner + outer, "share": share}


def _beside(output: Path) -> Path:
    """Returns the path `a.json` for `a.nii.gz` or `a.dcm`."""
    end = output.name.lower().rindex(".nii" if is_nifti_name(output) else ".dcm")
    return output.with_name(output.name[:end] + ".json")


def _scan(path: Path, series_uid: str | None, check_units: bool) -> Scan:
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        check_input(path)
        if is_nifti_input(path):
            return Scan(path, "nifti")
        if path.suffix.lower() in _META_IMAGE:
            return Scan(path, "metaimage")
        raise ValueError(f"{path}: expected a .nii, .nii.gz, .mhd or .mha file, or the folder of a CT DICOM series")
    scans = find_scans(path, check_units=check_units).scans
    if series_uid is not None:
        scans = tuple(scan for scan in scans if scan.uid == series_uid)
    if len(scans) != 1:
        wanted = "" if series_uid is None else f" of the series {series_uid}"
        found = ", ".join(scan.uid or scan.path.name for scan in scans[:3])
        raise ValueError(
            f"{path}: holds {len(scans)} CT scans{wanted}{f' ({found})' if found else ''}; expected one, or a "
            "series_uid that says which"
        )
    return scans[0]


def _unlike(scan: Nifti1Image, seen: Mapping[str, Any]) -> list[str]:
    """Returns the warnings that a user needs before trusting the labels, a sentence each."""
    sentences = []
    steps, extent = voxel_spacing(scan), seen["spacing_mm"]
    low, high = min(axis[0] for axis in extent), max(axis[1] for axis in extent)
    if min(steps) < low / _SPACING_FACTOR or max(steps) > high * _SPACING_FACTOR:
        size = " × ".join(f"{step:g}" for step in steps)
        sentences.append(f"has voxels of {size} mm, and the network was trained on {low:g} to {high:g} mm")
    values = np.asarray(scan.dataobj)
    body = values[values > BODY_HU]
    if not body.size:
        sentences.append(f"nothing in it is above {BODY_HU:g} HU (is it a CT in HU?)")
    elif seen["body_hu"]:
        mean, (least, most) = float(body.mean()), seen["body_hu"]
        if not least - _BODY_MARGIN <= mean <= most + _BODY_MARGIN:
            sentences.append(
                f"the body's mean is {mean:.0f} HU, and the network was trained on {least:.0f} to {most:.0f} HU "
                "(is it a CT in HU?)"
            )
    return sentences
