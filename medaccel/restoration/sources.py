# SPDX-License-Identifier: Apache-2.0
"""Provides a run's studies from folders, phantoms or a measured PET, and separates the patients that are fitted to
from the others."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medaccel.data import open_series, read_nifti, read_pet_series, voxel_spacing
from medaccel.data.files import read_json
from medaccel.data.hounsfield import check_hu
from medaccel.phantoms.pet import DEFAULT_SHAPE, DEFAULT_SPACING
from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.methods.base import check_volume
from medaccel.restoration.simulation.config import SimulatorConfig
from medaccel.restoration.simulation.generate import simulate_study, write_studies
from medaccel.restoration.simulation.simulator import Progress
from medaccel.restoration.study import STUDY_JSON, find_studies, is_complete, read_parameters, save_study
from medaccel.restoration.uptake import check_suv
from medaccel.studies.inputs import Record, differences, refuse_changes
from medaccel.studies.inputs import record as inputs_of
from medaccel.studies.tables import write_json
from medaccel.training import ranks

# These denoisers make a measured patient's truth.
TRUTHS = {"nlm": "non-local means", "gaussian": "a Gaussian of 6 mm", "tv": "total variation"}
VALIDATION_SEED, TEST_SEED = 500, 1000  # seeds of these sets start here, so that no person is in two sets


def check_sources(config: RestorationConfig) -> None:
    """Checks options and folders before the fits, which would otherwise fail after hours."""
    simulator_of(config)
    if config.train_studies is not None:
        # A study that lacks an exposure is found here, and not by a worker that draws it after hours.
        paths = [p for role in split(config) for p in role]
        exposures = (*config.exposures, config.target_seconds)
        for path in paths:
            for seconds in exposures:
                if not (path / f"PET_{seconds}.nii.gz").is_file():
                    raise FileNotFoundError(f"{path / f'PET_{seconds}.nii.gz'}: missing exposure")
        if config.check_units and ranks.rank() == 0 and not _checked_before(config, paths):
            check_study_units(paths, exposures)


def check_study_units(studies: Sequence[Path], exposures: Sequence[int]) -> None:
    """Refuses studies that can't be in SUV, or whose CT is not in HU; one image is in memory at a time.

    Raises:
        OSError, ValueError: `read_nifti`, `check_suv` or `check_hu` refuses a study.
    """
    for folder in tqdm(studies, desc="units of the studies", unit="study", leave=False):
        for seconds in exposures:
            path = folder / f"PET_{seconds}.nii.gz"
            image = read_nifti(path)
            volume, spacing = np.asarray(image.dataobj), voxel_spacing(image)
            check_volume(str(path), volume, spacing)
            check_suv(volume, spacing, path)
        ct = folder / "CT.nii.gz"
        if os.path.lexists(ct):
            values = np.asarray(read_nifti(ct).dataobj)
            if np.isfinite(values).all():  # `load_study` refuses other values
                check_hu(values, ct)


def _checked_before(config: RestorationConfig, studies: Sequence[Path]) -> bool:
    """Tells whether a run of the same studies has already written its splits.json, and nothing has been changed
    since."""
    record = config.output / "splits.json"
    try:
        content = read_json(record)
        known = {entry["study"] for role in ("training", "validation") for entry in content[role]}
        since = record.stat().st_mtime_ns
        files = [file for study in studies for file in study.iterdir()]
        unchanged = all(file.stat().st_mtime_ns < since for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return unchanged and bool(content.get("units_checked")) and known >= {str(study.absolute()) for study in studies}


def simulator_of(config: RestorationConfig) -> SimulatorConfig:
    """Returns the simulator that the options describe.

    Raises:
        ValueError: one of the run's exposures is not simulated.
    """
    simulator = config.simulator
    missing = {*config.exposures, config.target_seconds} - set(simulator.durations)
    if missing:
        raise ValueError(
            f"the exposures must be among the simulated durations {simulator.durations}; "
            f"{sorted(missing)} are not (simulator.durations sets them)"
        )
    return simulator


def split(config: RestorationConfig) -> tuple[list[Path], list[Path]]:
    """Splits `train_studies` and `validation_studies` into training and validation studies; no patient is in both.

    Raises:
        ValueError: a patient is in both folders, or a single patient is to be split.
        FileNotFoundError: there are no studies.
    """
    assert config.train_studies is not None
    train = find_studies(config.train_studies)
    if config.validation_studies is not None:
        validation = find_studies(config.validation_studies)
        shared = {patient(p) for p in train} & {patient(p) for p in validation}
        if shared:
            raise ValueError(
                f"patient {min(shared)} is among the training and the validation studies; expected one or the other"
            )
        return train, validation
    patients = sorted({patient(p) for p in train})
    if len(patients) < 2:
        raise ValueError(
            f"train_studies: {config.train_studies} holds one patient only; expected at least two, one to fit to and "
            "one to choose on (or validation_studies)"
        )
    aside = min(max(1, round(config.validation_fraction * len(patients))), len(patients) - 1)
    order = np.random.default_rng(config.seed).permutation(len(patients))
    held = {patients[i] for i in order[:aside]}
    return [p for p in train if patient(p) not in held], [p for p in train if patient(p) in held]


def patient(study: Path) -> str:
    """Names a study's patient: `patient` of the parameters in its study.json, else its folder's name."""
    return str(read_parameters(study).get("patient", study.resolve().name))


def training_studies(config: RestorationConfig, say: Callable[[str], None]) -> tuple[list[Path], list[Path]]:
    """Returns study folders to fit to and to choose on, simulated if the options name none, and writes them to
    splits.json.

    Raises:
        ValueError: the given studies differ from those in splits.json.
    """
    record = config.output / "splits.json"
    if config.train_studies is not None:
        train, validation = split(config)
        say(f"studies: {len(train)} to fit to, {len(validation)} to choose on")
    else:
        say(f"studies: {config.train_phantoms} phantoms to fit to, {config.validation_phantoms} to choose on")
        spacings = config.phantom_spacings
        train = _phantoms(config, "train", config.train_phantoms, "standard", config.seed, spacings)
        first = config.seed + VALIDATION_SEED
        validation = _phantoms(config, "validation", config.validation_phantoms, "standard", first, spacings)
    names = {
        role: [{"study": str(p.absolute()), "patient": patient(p)} for p in paths]
        for role, paths in (("training", train), ("validation", validation))
    }
    files = [file for path in (*train, *validation) for file in _files(path, config)]
    before = read_json(record) if record.exists() else {}
    inputs: Record = {}
    if config.train_studies is not None:  # simulated studies belong to the run
        if "inputs" in before:
            said, inputs = differences(before["inputs"], files)
            refuse_changes(config.output, "run", said)
        else:
            inputs = inputs_of(files)
    if "inputs" in before and any(before[role] != names[role] for role in names):
        refuse_changes(config.output, "run", ["the studies or their patients are others"])
    content = {**names, "units_checked": config.check_units, "inputs": inputs}
    write_json(record, content)
    return train, validation


def _files(study: Path, config: RestorationConfig, further: Sequence[int] = ()) -> list[Path]:
    """Lists the files that a run reads from a study; a scoring reads further exposures."""
    exposures = dict.fromkeys((*config.exposures, config.target_seconds, *further))
    names = [f"PET_{seconds}.nii.gz" for seconds in exposures]
    names += ["CT.nii.gz", "lesions.nii.gz", "noise_free.nii.gz", "activity.nii.gz", "organs.nii.gz", STUDY_JSON]
    return [study / name for name in names if (study / name).is_file()]


def given_to_score(config: RestorationConfig, chosen: ScoreConfig) -> list[Path]:
    """Lists the files of the studies, or of the series, that are given to score on; empty if phantoms are made.

    Raises:
        ValueError: one of their patients was fitted to or chosen on; the folder holds no PET series.
        FileNotFoundError: there are no studies.
    """
    if chosen.dicom is not None:
        return [Path(header.filename) for header in open_series(chosen.dicom).headers]
    if chosen.test_studies is None:
        return []
    paths = _unseen(config, chosen.test_studies)
    for path in paths[: chosen.curve_studies]:
        for seconds in chosen.curve_seconds:
            if not (path / f"PET_{seconds}.nii.gz").is_file():
                raise FileNotFoundError(
                    f"{path / f'PET_{seconds}.nii.gz'}: missing exposure, which curve_seconds names"
                )
    return [file for path in paths for file in _files(path, config, chosen.curve_seconds)]


def _unseen(config: RestorationConfig, folder: Path) -> list[Path]:
    paths = find_studies(folder)
    seen = {patient(p) for role in known_studies(config) for p in role}
    shared = sorted(seen & {patient(p) for p in paths})
    if shared:
        raise ValueError(f"patient {shared[0]} of {folder} was fitted to or chosen on; it can't be a test")
    return paths


def known_studies(config: RestorationConfig) -> tuple[list[Path], list[Path]]:
    """Returns the studies that `training_studies` of another process wrote down."""
    names = read_json(config.output / "splits.json")
    return tuple([Path(entry["study"]) for entry in names[role]] for role in ("training", "validation"))  # type: ignore[return-value]


def studies_to_score(config: RestorationConfig, chosen: ScoreConfig, say: Callable[[str], None]) -> list[Path]:
    """Returns study folders to score on.

    Raises:
        ValueError: one of their patients was fitted to or chosen on.
    """
    if chosen.dicom is not None:
        simulator = simulator_of(config)
        return _real_patient(config, chosen, chosen.dicom, say, chosen.realisations, simulator, chosen.label)
    if chosen.test_studies is None:
        say(f"test studies: {chosen.test_phantoms} simulated phantoms (shifted generator)")
        return _phantoms(config, "test", chosen.test_phantoms, "shifted", config.seed + TEST_SEED)
    paths = _unseen(config, chosen.test_studies)
    if chosen.check_units:
        check_study_units(paths, (*config.exposures, config.target_seconds))
    say(f"test studies: {len(paths)} in {chosen.test_studies}")
    return paths


def studies_of_curve(config: RestorationConfig, chosen: ScoreConfig, say: Callable[[str], None]) -> list[Path]:
    """Returns study folders with the exposures of `curve_seconds`.

    Simulated studies that lack one are simulated again, in a folder of their own: exposures nest, so that others
    in between are another realisation of the noise.
    """
    durations = tuple(sorted({*chosen.curve_seconds, config.target_seconds}))
    simulator = simulator_of(config)
    if chosen.test_studies is not None:
        return _unseen(config, chosen.test_studies)[: chosen.curve_studies]
    suffix = ""
    if set(durations) - set(simulator.durations):
        suffix = "_" + "_".join(map(str, durations))
        simulator = SimulatorConfig(**{**simulator.whole(), "durations": durations})
    if chosen.dicom is not None:
        count = min(chosen.curve_studies or chosen.realisations, chosen.realisations)
        return _real_patient(config, chosen, chosen.dicom, say, count, simulator, chosen.label + suffix)
    count = min(chosen.curve_studies or chosen.test_phantoms, chosen.test_phantoms)
    first = config.seed + TEST_SEED
    return _phantoms(config, f"test{suffix}", count, "shifted", first, simulator=simulator)


def _phantoms(
    config: RestorationConfig,
    role: str,
    count: int,
    generator: str,
    first_seed: int,
    spacings: Sequence[tuple[float, float, float]] = (DEFAULT_SPACING,),
    simulator: SimulatorConfig | None = None,
) -> list[Path]:
    paths: list[Path] = []
    simulator, folder = simulator or simulator_of(config), config.output / "studies" / role
    with _percent(f"{role} phantoms") as report:
        for number in range(count):
            spacing = spacings[number % len(spacings)]
            paths += write_studies(
                folder,
                [first_seed + number],
                generator,
                config=simulator,
                shape=[math.ceil(n * d / s) for n, d, s in zip(DEFAULT_SHAPE, DEFAULT_SPACING, spacing, strict=True)],
                spacing=spacing,
                progress=lambda share, message, number=number: report((number + share) / count, message),  # type: ignore[misc]
            )
    return paths


def _real_patient(
    config: RestorationConfig,
    chosen: ScoreConfig,
    dicom: Path,
    say: Callable[[str], None],
    count: int,
    simulator: SimulatorConfig,
    folder: str,
) -> list[Path]:
    """Simulates exposures of a measured PET: its denoised activity is the truth."""
    say(f"test studies: {count} noise realisations of the PET in {dicom} (simulated exposures)")
    open_series(dicom)
    paths, image = [], None
    for index in range(count):
        path = config.output / "studies" / folder / f"patient_{index}"
        paths.append(path)
        if is_complete(path):
            made = read_parameters(path).get("denoise")
            if made != chosen.truth:
                raise ValueError(
                    f"{path}: its truth was made by {made!r}, not {chosen.truth!r}; expected another --name, or the "
                    "folder removed"
                )
            continue
        if image is None:
            image = read_pet_series(dicom, progress=True)
            if chosen.check_units:
                check_suv(np.maximum(np.asarray(image.dataobj), 0), voxel_spacing(image), dicom)
        with _percent(path.name) as report:
            study = simulate_study(
                path.name,
                np.maximum(np.asarray(image.dataobj, dtype=np.float32), 0),
                voxel_spacing(image),
                image.affine,
                config=simulator,
                seed=config.seed + TEST_SEED + index,
                denoise=chosen.truth,
                origin={"dicom": dicom.name},
                progress=report,
            )
            save_study(path, study, force=True)
    return paths


@contextmanager
def _percent(description: str) -> Iterator[Progress]:
    """Shows a bar for work that reports the share done and a word about itself."""
    with tqdm(total=100, desc=description, unit="%", bar_format="{desc}: {bar} {n:.0f} % {postfix}") as bar:

        def report(share: float, message: str) -> None:
            bar.n = 100 * share
            bar.set_postfix_str(message)

        yield report


def describe(chosen: ScoreConfig) -> str:
    """Describes the test studies, to complete "scored on … studies: "."""
    if chosen.dicom is not None:
        return "simulated noise realisations of one measured PET"
    if chosen.test_studies is not None:
        return f"the studies in {chosen.test_studies.name}"
    return "phantoms of the shifted generator, which no method was fitted on"


def notes_on(chosen: ScoreConfig) -> list[str]:
    """Returns the notes that a reader needs about the origin of the truth."""
    if chosen.dicom is None:
        return []
    return [
        f"The patient's own image is noisy, so it was denoised by {TRUTHS[chosen.truth]} before its exposures were "
        "simulated: the denoised activity is the truth here, and what it lost of the patient's finest detail no "
        "method can be scored on. Such a truth favours methods that are like its denoiser."
    ]
