# SPDX-License-Identifier: Apache-2.0
"""Scores every method on every study; rows are kept as they are made, so that an interrupted scoring continues.

The folder holds rows/<study>_<seconds>s.json, and volumes/ with images that are needed again: the restored images of
the first studies (pictures, noise), and the mean and deviation of drawn samples in every study's body (coverage). If
one of a study's files is damaged, the study is scored again.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medaccel.data.files import atomic_path, read_json
from medaccel.data.tensors import check_tensors, first_line, load_tensors
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.blocks import block_errors
from medaccel.restoration.evaluation.calibration import Calibration, Item, fit_calibration
from medaccel.restoration.evaluation.noise_effects import NoiseLevel, noise_level
from medaccel.restoration.evaluation.study_scores import StudyEvaluator
from medaccel.restoration.methods.base import Method, Restoration, RestorationRequest
from medaccel.restoration.methods.names import IDENTITY, NOISE_FREE, ORACLE
from medaccel.restoration.study import PETStudy, load_study
from medaccel.studies.cost import measured
from medaccel.studies.tables import json_text, nan_for_null, write_json

EXAMPLES = 3  # studies whose restored images are kept


@dataclass
class Scored:
    """Holds the results of scoring at one exposure; lists have one entry per study.

    Attributes:
        seconds, target_seconds: exposures of input and target.
        paths: study folders.
        rows: method: rows of `StudyEvaluator.evaluate`; of a study that a method was not asked for, NaN.
        noise: noise level of each input.
        times: seconds of each restoration, by method.
        blocks: summed errors (studies, axial blocks), by distance ("mse", "ssim") and method.
        memory: bytes that each restoration had at once (`medaccel.studies.cost`), by method; NaN where unknown.
    """

    seconds: int
    target_seconds: int
    paths: list[Path] = field(default_factory=list)
    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    noise: list[NoiseLevel] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    blocks: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    memory: dict[str, list[float]] = field(default_factory=dict)

    @property
    def studies(self) -> list[str]:
        """Returns the studies' names."""
        return [path.name for path in self.paths]

    def costs(self) -> dict[str, tuple[float, float]]:
        """Returns mean seconds and largest memory (GiB) of a volume, by method."""
        found = {}
        for name, times in self.times.items():
            known = [size for size in self.memory.get(name, []) if math.isfinite(size)]
            found[name] = (float(np.mean(times)), max(known) / 2**30 if known else math.nan)
        return found


class Scorer:
    """Scores methods on studies into a folder.

    Args:
        methods: fitted methods by name.
        folder: holds rows and volumes.
        samples: how many the drawing methods draw; None: their setting.
        sampled_studies: number of studies, from the first on, that they are applied to; None: all.
        one_patient: all studies are realisations of one patient; errors are kept by axial block.
        progress: show bars.
        examples: number of studies, from the first on, whose restored images are kept.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        folder: Path,
        *,
        samples: int | None = None,
        sampled_studies: int | None = None,
        one_patient: bool = False,
        progress: bool = True,
        examples: int = EXAMPLES,
    ) -> None:
        self.examples = examples
        self.methods, self.folder, self.samples = dict(methods), folder, samples
        self.sampled_studies, self.one_patient, self.progress = sampled_studies, one_patient, progress
        (folder / "rows").mkdir(parents=True, exist_ok=True)
        (folder / "volumes").mkdir(exist_ok=True)

    def score(self, paths: Sequence[Path], seconds: int, target_seconds: int) -> Scored:
        """Scores all methods, and the references, on all studies at one exposure."""
        result = Scored(seconds, target_seconds, list(paths))
        label = f"scoring {seconds} s"
        for position, path in enumerate(tqdm(paths, desc=label, unit="study", disable=not self.progress)):
            record = self._study(path, position, seconds, target_seconds)
            for name, row in record["rows"].items():
                result.rows.setdefault(name, []).append(nan_for_null(row))
            result.noise.append(NoiseLevel(**nan_for_null(record["noise"])))
            for name, value in record["times"].items():
                result.times.setdefault(name, []).append(value)
            for name, value in nan_for_null(record.get("memory", {})).items():  # earlier versions kept none
                result.memory.setdefault(name, []).append(value)
            for distance, found in record["blocks"].items():
                for name, sums in found.items():
                    result.blocks.setdefault(distance, {}).setdefault(name, []).append(sums)
        return result

    def volumes(self, path: Path, seconds: int) -> dict[str, np.ndarray]:
        """Returns the restored images of one of the first studies, by method."""
        return {
            name: read_volume(self._volume(path, seconds, name))
            for name in self.methods
            if self._volume(path, seconds, name).exists()
        }

    def items(self, method: str, paths: Sequence[Path], seconds: int) -> Iterator[Item]:
        """Yields truth λ, mean, deviation and body of each study that the method drew samples of."""
        for path in paths:
            kept = self._volume(path, seconds, f"{method}_samples")
            if kept.exists():
                drawn = load_tensors(kept)
                mask = drawn["mask"].numpy()
                shape = (len(drawn["mean"]), 1, 1)  # the body's voxels, as a volume of their own
                yield (
                    drawn["truth"].numpy().reshape(shape),
                    drawn["mean"].numpy().reshape(shape),
                    drawn["std"].numpy().reshape(shape),
                    mask.reshape(-1)[mask.reshape(-1)].reshape(shape),
                )

    def _volume(self, path: Path, seconds: int, name: str) -> Path:
        return self.folder / "volumes" / f"{path.name}_{seconds}s_{name}.pt"

    def _study(self, path: Path, position: int, seconds: int, target_seconds: int) -> dict[str, Any]:
        """Returns a study's record, from its file if it exists."""
        file = self.folder / "rows" / f"{path.name}_{seconds}s.json"
        if file.exists():
            try:
                return self._kept(file, path, seconds)
            except ValueError as error:
                warnings.warn(f"{error}; the study is scored again", stacklevel=3)
        study = load_study(path, (seconds, target_seconds))
        evaluator = StudyEvaluator(study, seconds, target_seconds)
        image = study.exposures[seconds]
        request = RestorationRequest(image, study.spacing, seconds, study.ct, samples=self.samples)
        images, times, memory = {IDENTITY: image}, {}, {}
        skipped = []
        for name, method in tqdm(self.methods.items(), desc=study.name, leave=False, disable=not self.progress):
            if method.samples and self.sampled_studies is not None and position >= self.sampled_studies:
                skipped.append(name)
                continue
            found, cost = measured(functools.partial(method.restore, request))
            times[name], memory[name] = cost.seconds, cost.memory
            images[name] = found.volume
            self._keep(path, position, seconds, name, found, study, evaluator.mask)
        if study.noise_free is not None:
            images[ORACLE] = metrics.oracle(image, study.noise_free, seconds, target_seconds)
            images[NOISE_FREE] = study.noise_free
        # SciPy's filters, which take most of the time, release the interpreter's lock.
        with ThreadPoolExecutor(max_workers=2) as pool:
            rows = dict(zip(images, pool.map(evaluator.evaluate, images.values()), strict=True))
        nothing = dict.fromkeys(rows[IDENTITY], math.nan)
        order = [IDENTITY, *self.methods, *(name for name in (ORACLE, NOISE_FREE) if name in images)]
        blocks: dict[str, Any] = {}
        if self.one_patient:
            for distance in ("mse", "ssim"):
                blocks[distance] = {
                    name: block_errors(
                        volume, evaluator.target, evaluator.mask, study.spacing, distance=distance
                    ).tolist()
                    for name, volume in images.items()
                }
        level = noise_level(
            image, evaluator.target, evaluator.mask, seconds, target_seconds, liver_core=evaluator.liver_core
        )
        record: dict[str, Any] = {
            "rows": {name: rows.get(name, nothing) for name in order},
            "noise": asdict(level),
            "times": times,
            "memory": memory,
            "blocks": blocks,
        }
        write_json(file, record)
        return dict(json.loads(json_text(record)))

    def _kept(self, file: Path, path: Path, seconds: int) -> dict[str, Any]:
        """Returns a study's record in its file; raises ValueError if the file, or a volume that belongs to it, is
        damaged."""
        record = read_json(file)
        try:
            NoiseLevel(**record["noise"])
            rows = record["rows"]
            keys = set(rows[IDENTITY])
            whole = bool(keys) and all(set(rows[name]) == keys for name in self.methods)
            numbers = (value for row in rows.values() for value in row.values() if value is not None)
            whole = whole and all(isinstance(value, int | float) for value in (*numbers, *record["times"].values()))
            whole = whole and (not self.one_patient or all(record["blocks"][kind] for kind in ("mse", "ssim")))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not a study's rows ({first_line(error)})") from error
        if not whole:
            raise ValueError(f"{file}: lacks a method's row, or a part of one")
        for name in self.methods:
            for volume in (self._volume(path, seconds, name), self._volume(path, seconds, f"{name}_samples")):
                if volume.exists():
                    check_tensors(volume)
        return dict(record)

    def _keep(
        self,
        path: Path,
        position: int,
        seconds: int,
        name: str,
        found: Restoration,
        study: PETStudy,
        mask: metrics.Mask,
    ) -> None:
        if position < self.examples:
            with atomic_path(self._volume(path, seconds, name), force=True) as temporary:
                torch.save(torch.from_numpy(np.ascontiguousarray(found.volume, dtype=np.float32)), temporary)
        if found.std is not None and found.activity is not None and study.noise_free is not None:
            kept = {"truth": study.noise_free[mask], "mean": found.activity[mask], "std": found.std[mask]}
            content = {key: torch.from_numpy(value.astype(np.float32)) for key, value in kept.items()}
            with atomic_path(self._volume(path, seconds, f"{name}_samples"), force=True) as temporary:
                torch.save({**content, "mask": torch.from_numpy(mask)}, temporary)


def read_volume(path: Path) -> np.ndarray:
    """Reads a volume that scoring kept."""
    volume: np.ndarray = load_tensors(path).numpy()
    return volume


def fit_calibrations(scorer: Scorer, scored: Sequence[Scored]) -> dict[str, dict[str, Calibration]]:
    """Fits, for each drawing method and exposure, factors that make its intervals cover 90 % of λ on these
    studies."""
    found: dict[str, dict[str, Calibration]] = {}
    for name, method in scorer.methods.items():
        if not method.samples:
            continue
        for one in scored:
            items = list(scorer.items(name, one.paths, one.seconds))
            if items:
                found.setdefault(name, {})[str(one.seconds)] = fit_calibration(items)
    return found
