# SPDX-License-Identifier: Apache-2.0
"""Measures methods on a user's own exposures, such as list-mode rebins: the command `medaccel restoration validate`.

A simulation can't prove that its noise is a scanner's. Given PET_30, PET_60 and PET_90 of one's own scanner, this
scores each method on each shorter exposure against the longest, measures the noise, compares it with the range that
the model was trained on, and tells whether fine-tuning is worth it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.restoration.evaluation.training_range import TrainingRange, noise_level
from medaccel.restoration.methods import load_method, make_method
from medaccel.restoration.methods.base import Method, RestorationTask
from medaccel.restoration.methods.names import IDENTITY, NOISE_FREE, ORACLE, label
from medaccel.restoration.scoring import Scorer
from medaccel.restoration.sources import check_study_units
from medaccel.restoration.study import durations_of, find_studies, load_study
from medaccel.studies.digest import digest, file_sha256
from medaccel.studies.tables import write_csv, write_json
from medaccel.weights import RESTORATION, find

#: These are fitted to the studies themselves, beside the model.
CLASSICAL = ("gaussian1", "nlm")
_MODEL = "model"  # its name in tables
_WORTH = 0.03  # share of the limit by which the model must lag for fine-tuning to be advised


@dataclass(frozen=True)
class Validation:
    """Holds the outcome of `validate`.

    Attributes:
        rows: one row for each exposure and method: means over the studies, with `share_of_limit`, `score_mse`,
            `score_ssim`, `seconds_a_volume` and `studies`.
        noise: one row for each study and exposure: the noise level and the sentences about the model's range.
        advice: what follows for the user, a sentence each.
    """

    rows: list[dict[str, Any]]
    noise: list[dict[str, Any]]
    advice: list[str]

    def __str__(self) -> str:
        lines = [
            f"{'method':<22}{'input':>8}{'of the limit':>14}{'MSE score':>12}{'1-SSIM score':>14}{'s/volume':>10}"
        ]
        for row in self.rows:
            share, *others = (row[key] for key in ("share_of_limit", "score_mse", "score_ssim", "seconds_a_volume"))
            numbers = [f"{100 * share:.1f} %", *(f"{value:.1f}" for value in others)]
            cells = "".join(f"{cell:>{width}}" for cell, width in zip(numbers, (14, 12, 14, 10), strict=True))
            lines.append(f"{label(row['method'], {_MODEL: 'The model'}):<22}{row['seconds']:>6} s{cells}")
        return "\n".join([*lines, "", *self.advice])


def validate(
    studies: Path,
    *,
    model: str | Path = RESTORATION,
    methods: Sequence[str] = CLASSICAL,
    input_seconds: Sequence[int] = (),
    target_seconds: int | None = None,
    output: Path = Path("runs/validation"),
    check_units: bool = True,
    progress: bool = True,
) -> Validation:
    """Scores a model and classical methods on studies with several exposures of the same scan.

    Args:
        studies: a study folder with PET_<seconds>.nii.gz files, or a folder of such folders.
        model: a name that `medaccel weights list` has, or the path of a checkpoint.
        methods: methods that are fitted to these very studies, which favours them: gaussian1, gaussian3,
            gaussian_mix, nlm, tv, bm4d.
        input_seconds: exposures to restore from, s; by default all below the target that every study has.
        target_seconds: exposure to compare with, s; by default the longest that every study has.
        output: folder for validation.csv and validation.json, and for the scores that an interrupted call goes on
            from.
        check_units: refuse studies that can't be in SUV.
        progress: show progress on stderr.

    Raises:
        ValueError: the studies share no two exposures, or an exposure that is asked for is missing; a study is
            damaged; the model or a method is unknown.
        FileNotFoundError: there are no studies.
    """
    folders = find_studies(studies)
    task = common_task(folders, input_seconds, target_seconds)
    if check_units:
        check_study_units(folders, (*task.input_seconds, task.target_seconds))
    path = find(model)
    fitted: dict[str, Method] = {_MODEL: load_method(path)}
    if fitted[_MODEL].task.target_seconds != task.target_seconds and not fitted[_MODEL].any_exposure:
        raise ValueError(
            f"target_seconds is {task.target_seconds}; expected {fitted[_MODEL].task.target_seconds}, which {path} "
            "predicts"
        )
    fitted[_MODEL].task = task
    identity = [file_sha256(path), [str(folder) for folder in folders], list(methods), str(task)]
    folder = Path(output) / digest(identity)
    for name in methods:
        method = make_method(name, task)
        method.fit(folders, folders, folder=folder / "fits" / name, progress=progress)
        fitted[name] = method
    scorer = Scorer(fitted, folder / "scores", progress=progress)
    rows = []
    for seconds in task.input_seconds:
        scored = scorer.score(folders, seconds, task.target_seconds)
        for name, found in scored.rows.items():
            if name not in (ORACLE, NOISE_FREE):
                rows.append(
                    {"method": name, "seconds": seconds, "studies": len(folders)}
                    | {key: _mean(row[key] for row in found) for key in ("share_of_limit", "score_mse", "score_ssim")}
                    | {"seconds_a_volume": _mean(scored.times.get(name, [0.0]))}
                )
    noise = _noise(fitted[_MODEL], folders, task)
    outcome = Validation(rows, noise, _advice(rows, noise))
    write_csv(Path(output) / "validation.csv", rows)
    write_json(Path(output) / "validation.json", vars(outcome))
    return outcome


def common_task(
    folders: Sequence[Path], input_seconds: Sequence[int] = (), target_seconds: int | None = None
) -> RestorationTask:
    """Returns the exposures that all studies have; the longest is the target unless another is asked for.

    Raises:
        ValueError: there are no two common exposures; one that is asked for is missing; inputs are not shorter than
            the target.
    """
    common: set[int] | None = None
    for folder in folders:
        own = set(durations_of(folder))
        common = own if common is None else common & own
    found = sorted(common or ())
    target = (found[-1] if found else 0) if target_seconds is None else target_seconds
    inputs = tuple(sorted(input_seconds, reverse=True)) or tuple(t for t in reversed(found) if t < target)
    missing = [t for t in (*inputs, target) if t not in found]
    if missing or not inputs:
        told = ", ".join(f"{t} s" for t in found) or "none"
        asked = ", ".join(f"{t} s" for t in missing)
        raise ValueError(
            f"the studies have these exposures in common: {told}; expected "
            + (f"{asked} among them" if input_seconds or target_seconds else "at least two, such as 60 s and 90 s")
        )
    return RestorationTask(inputs, target)


def _mean(values: Any) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else math.nan


def _noise(model: Method, folders: Sequence[Path], task: RestorationTask) -> list[dict[str, Any]]:
    """Measures the noise of every input, and compares it with the model's range."""
    plain = model.fitted.parameters.get("training_range")
    rows = []
    for folder in folders:
        study = load_study(folder, (*task.input_seconds, task.target_seconds))
        for seconds in task.input_seconds:
            volume = study.exposures[seconds]
            outside = (
                [] if plain is None else TrainingRange.from_plain(plain).warnings(volume, study.spacing, seconds)
            )
            level = noise_level(volume, study.spacing)
            rows.append({"study": study.name, "seconds": seconds, "noise_level": level, "outside": outside})
    return rows


def _advice(rows: Sequence[Mapping[str, Any]], noise: Sequence[Mapping[str, Any]]) -> list[str]:
    sentences = [f"{row['study']}, {row['seconds']} s: {found}." for row in noise for found in row["outside"]]
    if not sentences:
        sentences.append("Exposure, voxel size and noise of every image lie within the model's training range.")
    lagging = []
    for seconds in dict.fromkeys(row["seconds"] for row in rows):
        shares = {row["method"]: row["share_of_limit"] for row in rows if row["seconds"] == seconds}
        others = {name: share for name, share in shares.items() if name not in (_MODEL, IDENTITY)}
        if not others:
            continue
        best = max(others, key=lambda name: others[name])
        ahead = shares[_MODEL] - others[best]
        more = "more" if ahead >= 0 else "less"
        sentences.append(
            f"From {seconds} s the model takes away {100 * shares[_MODEL]:.1f} % of the error that can be taken "
            f"away, {abs(100 * ahead):.1f} points {more} than {label(best, {})}, whose strength was chosen on these "
            "very studies."
        )
        if ahead < _WORTH:
            lagging.append(seconds)
    if lagging or any(row["outside"] for row in noise):
        sentences.append(
            "Fine-tuning on a few more studies of this scanner is advised: `medaccel restoration finetune`."
        )
    else:
        sentences.append("Fine-tuning is not needed.")
    return sentences
