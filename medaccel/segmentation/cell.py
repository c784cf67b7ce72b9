# SPDX-License-Identifier: Apache-2.0
"""Runs one cell of the study: fine-tunes from an initialization on a share of the labels, chooses on validation,
tests once.

    last.ckpt exists during training; a cell that was killed continues from it
    best.pt the chosen network (`medaccel.segmentation.model.checkpoint`)
    result.json all results; a cell that has this file is finished
    csv/, tensorboard/

An initialization changes only the weights that a cell starts from: a seed has the same split, the same crops in the
same order and the same random values for tensors that the weights leave out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medaccel.data import voxel_spacing
from medaccel.data.hounsfield import BODY_HU
from medaccel.data.msd import Case, MSDDataset, load_case
from medaccel.nets import load_pretrained
from medaccel.segmentation.evaluation.metrics import score_case
from medaccel.segmentation.model import checkpoint
from medaccel.segmentation.model.inference import segment
from medaccel.segmentation.model.presets import make_settings
from medaccel.segmentation.model.training import (
    Crops,
    SegmentationFit,
    Validation,
    make_network,
    shared_out,
    validation_case,
)
from medaccel.segmentation.protocol import RANDOM, Cell, Split
from medaccel.segmentation.run_folder import BEST, RESULT
from medaccel.studies.digest import file_sha256
from medaccel.studies.tables import write_json
from medaccel.training import ranks
from medaccel.training.fit import train

_LAST = "last.ckpt"
# These tensors of the network give the classes, and are never taken from elsewhere.
_HEAD = "out."
# These settings change where and how a cell is computed, but not its result.
_MACHINE = ("accelerator", "strategy", "num_workers", "cache", "checkpoint_minutes", "sw_batch_size")


def run_cell(
    cell: Cell,
    dataset: MSDDataset,
    split: Split,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    weights: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains, chooses and tests, or reads the result of an earlier call.

    Under torchrun, each process calls it: they share the batch, the validation cases and the test cases, and the
    first one writes.

    Args:
        cell: the cell; its seed also seeds the crops and the random weights.
        dataset: the task.
        split: the split of the dataset's cases.
        folder: the cell's folder; made if missing.
        settings: the result of `medaccel.segmentation.model.presets.make_settings`, or overrides for it.
        weights: the weights to start from, any file that `medaccel.nets.load_pretrained` reads; None for random
            initialization.
        progress: show bars.

    Returns:
        The content of result.json: "cell", "settings", "labels", "cases" (numbers for training, choice and test),
        "initialization" (None, or file, SHA-256, dialect and numbers of tensors loaded, skipped and missing),
        "steps", "best" (step, dice), "curve" (step, dice of the validation, mean training loss since the point
        before), "dice" (mean over the test cases, by structure), "rows" (case, structure, `CaseScores`), "seconds"
        (all runs of it together, without reading cases), of which "training_seconds", "validation_seconds" and
        "test_seconds", and "seconds_per_step".

    Raises:
        ValueError: settings or weights don't fit the cell; the folder holds another cell's result or checkpoint; the
            fraction leaves no case; `load_case` refuses a case.
        RuntimeError: `load_pretrained` finds no weight that fits.
    """
    s, folder = make_settings(settings), Path(folder)
    if (weights is None) != (cell.init == RANDOM):
        given = "none are given" if weights is None else f"{weights} is given"
        raise ValueError(f"cell {cell.name} starts from {cell.init!r}, but {given}; expected weights unless random")
    sha256 = None if weights is None or not weights.is_file() else file_sha256(weights)
    if (folder / RESULT).is_file():
        return _finished(folder / RESULT, cell, s, sha256)
    by_name = {case.name: case for case in dataset.cases}
    parts = {"training": split.subset(cell.fraction), "validation": split.validation, "test": split.test}
    missing = sorted({name for names in parts.values() for name in names} - set(by_name))
    if missing:
        raise ValueError(f"split names {', '.join(missing[:3])}; expected cases of {dataset.name}")
    training, validation, test = ([by_name[name] for name in names] for names in parts.values())
    validation = validation[: s["validation_cases"] or None]

    ranks.join(s["accelerator"])
    network, initialization = _initialized(s, len(dataset.labels), cell.seed, weights, sha256)
    crops = Crops(dataset, training, s, seed=cell.seed, progress=progress)
    known = [validation_case(*load_case(dataset, case), s) for case in validation]
    check = Validation(known, len(dataset.labels), s)
    # The training depends on these beside its settings: a checkpoint with others is refused.
    whose = {"cell": asdict(cell), "initialization": sha256, "cases": [c.name for c in (*training, *validation)]}
    _, trained, _ = train(
        SegmentationFit(network, len(dataset.labels), s | {"whose": whose}),
        crops,
        folder,
        seed=cell.seed,
        progress=progress,
        callbacks=[check],
    )
    network.load_state_dict(check.weights)
    read = time.perf_counter()
    network.to(_device(s["accelerator"]))
    rows = [row for found in shared_out(lambda case: _tested(network, dataset, case, s), test) for row in found]
    tested = time.perf_counter() - read
    with ranks.first_process() as first:
        if first:
            checkpoint.save(
                folder / BEST,
                checkpoint.Checkpoint(s, dataset.labels, check.weights, _seen(dataset, training)),
            )
            result = {
                "cell": asdict(cell),
                "settings": s,
                "labels": {str(value): name for value, name in dataset.labels.items()},
                "cases": {"training": len(training), "validation": len(validation), "test": len(test)},
                "initialization": initialization,
                "steps": s["steps"],
                "best": check.best,
                "curve": check.curve,
                "dice": _means(rows),
                "rows": rows,
                "seconds": trained + tested,
                "training_seconds": trained - check.seconds,
                "validation_seconds": check.seconds,
                "test_seconds": tested,
                "seconds_per_step": (trained - check.seconds) / s["steps"],
            }
            write_json(folder / RESULT, result)
            (folder / _LAST).unlink(missing_ok=True)
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def _finished(path: Path, cell: Cell, settings: Mapping[str, Any], sha256: str | None) -> dict[str, Any]:
    """Returns an existing result, if it is this cell's."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        stored, its_settings = result["cell"], result["settings"]
        its_sha256 = (result["initialization"] or {}).get("sha256")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a cell's result ({error}); delete it to run the cell anew") from error
    differing = [f"cell's {key}" for key, value in asdict(cell).items() if stored.get(key) != value]
    differing += [key for key, value in settings.items() if key not in _MACHINE and its_settings.get(key) != value]
    if sha256 is not None and its_sha256 != sha256:
        differing.append("weights")
    if differing:
        raise ValueError(f"{path}: of another {', '.join(differing)}; delete it to run the cell anew")
    if ranks.rank() == 0:
        path.with_name(_LAST).unlink(missing_ok=True)  # left by a cell that was killed just before its end
    return result


def _initialized(
    s: Mapping[str, Any], classes: int, seed: int, weights: Path | None, sha256: str | None
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Returns the network at the start of the training, and a report of the weights loaded into it."""
    network = make_network(s, classes, seed)
    if weights is None:
        return network, None
    head = {key: value.clone() for key, value in network.state_dict().items() if key.startswith(_HEAD)}
    report = load_pretrained(network, weights)
    network.load_state_dict(head, strict=False)
    loaded = [key for key in report.loaded if not key.startswith(_HEAD)]
    return network, {
        "file": str(weights),
        "sha256": sha256,
        "dialect": report.dialect,
        "loaded": len(loaded),
        "skipped": len(report.skipped) + len(report.loaded) - len(loaded),
        "missing": len(report.missing) + len(report.loaded) - len(loaded),
    }


def _tested(network: nn.Module, dataset: MSDDataset, case: Case, s: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each structure of a test case, on the case's own grid."""
    scan, label = load_case(dataset, case)
    predicted = np.asarray(segment(network, scan, s).dataobj)
    truth = np.asarray(label.dataobj)
    rows = []
    for value, name in sorted(dataset.labels.items()):
        if value:
            scores = score_case(predicted == value, truth == value, voxel_spacing(scan))
            rows.append({"case": case.name, "structure": name} | scores.plain())
    return rows


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the mean Dice over the cases, by structure."""
    names = dict.fromkeys(row["structure"] for row in rows)
    return {name: float(np.mean([row["dice"] for row in rows if row["structure"] == name])) for name in names}


def _seen(dataset: MSDDataset, cases: Sequence[Case]) -> dict[str, Any]:
    """Returns the range of the scans that were trained on; see `checkpoint.Checkpoint`."""
    sizes, means = [], []
    for case in cases:
        scan, _ = load_case(dataset, case)
        values = np.asarray(scan.dataobj)
        sizes.append(voxel_spacing(scan))
        body = values[values > BODY_HU]
        if body.size:
            means.append(float(body.mean()))
    extent = [[min(axis), max(axis)] for axis in zip(*sizes, strict=True)]
    return {"spacing_mm": extent, "body_hu": [min(means), max(means)] if means else None}


def _device(accelerator: str) -> torch.device:
    """Returns the device on which a process tests, the one that Lightning trained on."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
