# SPDX-License-Identifier: Apache-2.0
"""Runs the study: `run` fits the methods, chooses on validation studies and freezes the choice; `score` scores it on
test studies, once.

No choice has seen a test study: `run` ends with config.yaml holding the choices and the hashes of the checkpoints,
and `score` refuses a folder in which either has changed. `run_folder` lists the files.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from medaccel.restoration import memory
from medaccel.restoration.config import RestorationConfig, ScoreConfig
from medaccel.restoration.detection import Detection, detect
from medaccel.restoration.evaluation.calibration import Calibration
from medaccel.restoration.evaluation.training_range import TrainingRange
from medaccel.restoration.methods import METHODS, load_method, make_method, method_class
from medaccel.restoration.methods.base import Method, RestorationTask
from medaccel.restoration.methods.names import REFERENCES
from medaccel.restoration.report.write import write_report
from medaccel.restoration.run_folder import RunFolder
from medaccel.restoration.scoring import Scored, Scorer, fit_calibrations
from medaccel.restoration.sources import (
    TEST_SEED,
    check_sources,
    describe,
    given_to_score,
    known_studies,
    simulator_of,
    studies_of_curve,
    studies_to_score,
    training_studies,
)
from medaccel.restoration.study import read_parameters
from medaccel.studies.digest import digest
from medaccel.studies.inputs import check_inputs
from medaccel.studies.lock import locked
from medaccel.studies.run_folder import REPORT, remove_temporaries
from medaccel.studies.settings import before_work, check_accelerator
from medaccel.training import ranks
from medaccel.training.memory import expect, local_processes
from medaccel.weights import find

Say = Callable[[str], None]


def run(config: RestorationConfig, *, force: bool = False, resume: bool = False, say: Say = print) -> Path:
    """Fits the methods, chooses on validation studies, and writes a report of the choice.

    Under `torchrun` all processes train together; the first one does everything else.

    Args:
        config: the options.
        force: start clean if the folder holds a run with other options, or a finished one.
        resume: refuse a folder that holds no run. (One that holds this run is resumed in any case.)
        say: a function that is called with each line of progress.

    Returns:
        The path of report.html.

    Raises:
        ValueError, OSError: options or data are bad, the folder is unwritable or holds something else, or the run
            needs more memory than is free.
    """
    with before_work():
        check(config)
        own = {name: settings_of(config, name) for name in config.methods}
        stages = memory.expected_of_run(config, own)
        expected = expect("the run", *stages, gpu=memory.on_gpu(own), processes=local_processes())
    folder = RunFolder(config.output)
    ranks.join(config.trainer.accelerator)
    alone = folder.session(config.plain(), force, resume, say) if ranks.rank() == 0 else nullcontext()
    with alone:
        if ranks.rank() == 0:
            say(expected.sentence)
        return _run(config, folder, say)


def check(config: RestorationConfig) -> None:
    """Refuses bad settings, devices, packages and studies before anything is made.

    Raises:
        ValueError, OSError: something is refused.
    """
    for name in METHODS:
        # Settings of methods that this run leaves out are checked too: the next run would find a mistake in them.
        if name in config.methods or name in config.settings:
            settings = make_method(name, task_of(config), settings_of(config, name)).settings
            if name in config.methods and "accelerator" in settings:
                check_accelerator(f"{name}: accelerator", settings["accelerator"])
            if name in config.methods and settings.get("weights"):
                try:
                    load_method(find(settings["weights"]), name)
                except (ValueError, OSError) as error:
                    raise ValueError(f"{name}: weights is {settings['weights']!r}: {error}") from error
    for name in config.methods:
        reason = getattr(method_class(name), "unavailable", lambda: None)()
        if reason is not None:
            raise ValueError(f"methods: {name} can't run here: {reason}")
    check_accelerator("trainer: accelerator", config.trainer.accelerator)
    check_sources(config)


def _run(config: RestorationConfig, folder: RunFolder, say: Say) -> Path:
    with ranks.first_process() as first:
        if first:
            training_studies(config, say)
    train, validation = known_studies(config)
    trained_on = cache(lambda: TrainingRange.of(train, config.exposures).plain())  # read once, and only if needed
    fitted = {name: _fit(config, folder, name, train, validation, trained_on, say) for name in config.methods}
    if ranks.rank() != 0:
        ranks.leave()
        return config.output / REPORT
    say(f"scoring on the {len(validation)} validation studies")
    _discard_other_rows(config.output / "validation", {"checkpoints": folder.hashes(config)})
    scorer = Scorer(fitted, config.output / "validation")
    scored = [scorer.score(validation, seconds, config.target_seconds) for seconds in config.exposures]
    calibrations = fit_calibrations(scorer, scored)
    best = choose_best(scored)
    choices = {name: method.fitted.choices for name, method in fitted.items()}
    for name, found in calibrations.items():
        choices[name] = choices[name] | {"calibration": {t: json.loads(c.to_json()) for t, c in found.items()}}
    folder.freeze(config, choices, best)
    say(f"chosen on validation: {best}")
    report = write_report(
        config.output,
        config,
        scorer,
        scored,
        data="the validation studies, which the choices were made on: optimistic",
        calibrations=calibrations,
        best=best,
        say=say,
    )
    say(f"report: {report.resolve()}")
    say(f"score on test studies, once: medaccel restoration score {config.output}")
    ranks.leave()
    return report


def score(chosen: ScoreConfig, *, say: Say = print) -> Path:
    """Scores a finished run on test studies and records that in scored.json.

    Returns:
        The path of the report, in the run's `scored` folder.

    Raises:
        FileNotFoundError: the folder holds no finished run, or there are no studies.
        ValueError: the choices have changed since; a test patient was fitted to; the run lacks a method.
    """
    folder = RunFolder(chosen.run)
    with before_work():
        config, frozen = folder.frozen()
        names = chosen.methods or config.methods
        missing = set(names) - set(config.methods)
        if missing:
            raise ValueError(
                f"methods names {sorted(missing)}; expected some of the run's, {', '.join(config.methods)}"
            )
        late = [t for t in chosen.curve_seconds if t >= config.target_seconds]
        if late:
            raise ValueError(
                f"curve_seconds holds {late}; expected exposures below {config.target_seconds} s, the target's"
            )
        given = given_to_score(config, chosen)
    methods = {name: load_method(folder.checkpoint(name), name) for name in names}
    calibrations = {
        name: {
            t: Calibration.from_json(json.dumps(values))
            for t, values in frozen["choices"].get(name, {}).get("calibration", {}).items()
        }
        for name in names
    }
    own = {name: method.settings for name, method in methods.items()}
    say(expect("scoring", *memory.expected_of_scoring(config, chosen, own), gpu=memory.on_gpu(own)).sentence)
    output = chosen.run / "scored" / chosen.label
    identity = {"options": chosen.plain(), "frozen": frozen["digest"]}
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, "scoring"):
        remove_temporaries(output)
        with before_work():
            first = _check_same_scoring(output, identity)
            if given:
                check_inputs(output, "scoring", given, advice="choose another --name")
        return _score(chosen, config, frozen, methods, calibrations, output, first, say)


def _score(
    chosen: ScoreConfig,
    config: RestorationConfig,
    frozen: Mapping[str, Any],
    methods: Mapping[str, Method],
    calibrations: dict[str, dict[str, Calibration]],
    output: Path,
    first: bool,
    say: Say,
) -> Path:
    paths = studies_to_score(config, chosen, say)
    if not first:
        say(f"{output}: scored before with these choices; what is there is kept")
    record = {
        "name": chosen.label,
        "frozen": frozen["digest"],
        "studies": len(paths),
        "studies_digest": digest([[path.name, read_parameters(path)] for path in paths]),
        "methods": list(methods),
    }
    times = RunFolder(chosen.run).note_score(record) if first else 1
    if times > 1:
        say(f"note: these studies have been scored {times} times with this run's choices (scored.json)")
    for name in list(calibrations):
        drawn = methods[name].settings.get("samples")
        if calibrations[name] and chosen.samples not in (None, drawn):
            say(
                f"{name}: its intervals were calibrated with {drawn} samples, not {chosen.samples}; they are left out"
            )
            calibrations[name] = {}
    scorer = Scorer(
        methods,
        output,
        samples=chosen.samples,
        sampled_studies=chosen.sampled_studies,
        one_patient=chosen.dicom is not None,
    )
    scored = [scorer.score(paths, seconds, config.target_seconds) for seconds in config.exposures]
    report = write_report(
        output,
        config,
        scorer,
        scored,
        curve=_curve(chosen, config, methods, output, say),
        detection=_detection(chosen, config, methods, output, say),
        frozen=frozen["digest"],
        data=describe(chosen),
        calibrations={name: found for name, found in calibrations.items() if found},
        best=frozen["best"],
        chosen=chosen,
        choices=frozen["choices"],
        say=say,
    )
    say(f"report: {report.resolve()}")
    return report


def _detection(
    chosen: ScoreConfig, config: RestorationConfig, methods: Mapping[str, Method], output: Path, say: Say
) -> Detection | None:
    """Lets model observers look for faint lesions in the first test phantoms."""
    if not chosen.observer_phantoms:
        return None
    say(f"observers: {chosen.observer_phantoms} phantoms, {chosen.observer_realisations} realisations of each")
    return detect(
        methods,
        output / "observers",
        seeds=range(config.seed + TEST_SEED, config.seed + TEST_SEED + chosen.observer_phantoms),
        realisations=chosen.observer_realisations,
        seconds=config.input_seconds,
        target_seconds=config.target_seconds,
        simulator=simulator_of(config),
    )


def _curve(
    chosen: ScoreConfig, config: RestorationConfig, methods: Mapping[str, Method], output: Path, say: Say
) -> list[Scored]:
    """Scores the methods that can restore every exposure of the curve on each of them."""
    if not chosen.curve_seconds:
        return []
    able = {name: [method.at(t) for t in chosen.curve_seconds] for name, method in methods.items()}
    able = {name: found for name, found in able.items() if None not in found}
    if not able:
        say("curve_seconds: none of the methods can restore all of these exposures; there is no curve")
        return []
    paths = studies_of_curve(config, chosen, say)
    scored = []
    for number, seconds in enumerate(chosen.curve_seconds):
        at = {name: method for name, found in able.items() if (method := found[number]) is not None}
        scorer = Scorer(
            at, output / "curve", samples=chosen.samples, sampled_studies=chosen.sampled_studies, examples=0
        )
        scored.append(scorer.score(paths, seconds, config.target_seconds))
    return sorted(scored, key=lambda one: one.seconds)


def task_of(config: RestorationConfig) -> RestorationTask:
    """Returns the task that the options describe."""
    return RestorationTask(config.exposures, config.target_seconds)


def settings_of(config: RestorationConfig, name: str) -> dict[str, Any]:
    """Returns a method's settings: the trainer's, as far as the method takes them, then its own."""
    kind = method_class(name)
    shared = {key: value for key, value in config.trainer.items() if key in kind.defaults}
    return shared | dict(config.settings.get(name, {}))


def choose_best(scored: Sequence[Scored]) -> str:
    """Returns the method with the highest mean, over exposures and studies, of both scores' shares of their maximum.

    MSE score / limit and 1 − SSIM score / ceiling count alike, so that neither is improved at the other's cost, nor
    the noisy look at the truth's: a method that is no better than the input against the noise-free image is passed
    over, unless all are.
    """
    criteria: dict[str, float] = {}
    honest: set[str] = set()
    for name in scored[0].rows:
        if name in REFERENCES:
            continue
        shares, truths = [], []
        for one in scored:
            for row in one.rows[name]:
                ssim = row["share_of_ceiling"]  # unknown without a noise-free image: the plain score stands for it
                ssim = ssim if math.isfinite(ssim) else row["score_ssim"] / 100
                shares.append(0.5 * (row["share_of_limit"] + ssim))
                truths.append(row["truth_score_mse"])
        criteria[name] = float(np.nanmean(shares))
        if not np.isfinite(truths).all() or np.mean(truths) > 0:
            honest.add(name)
    return max(honest or criteria, key=lambda name: criteria[name])


def _fit(
    config: RestorationConfig,
    folder: RunFolder,
    name: str,
    train: Sequence[Path],
    validation: Sequence[Path],
    trained_on: Callable[[], dict[str, Any]],
    say: Say,
) -> Method:
    """Loads a method from its checkpoint, or fits it and stores it there."""
    checkpoint = folder.checkpoint(name)
    done = checkpoint.exists()
    ranks.barrier()  # all processes have looked before the first one writes
    if done:
        say(f"{name}: fitted before")
        return load_method(checkpoint, name)
    if ranks.rank() == 0:
        say(f"{name}: fitting to {len(train)} studies")
    start = time.perf_counter()
    method = make_method(name, task_of(config), settings_of(config, name))
    if method.distributed or ranks.rank() == 0:
        method.fit(train, validation, folder=config.output / "fits" / name, seed=config.seed)
    if ranks.rank() == 0:
        if "training_range" not in method.fitted.parameters:  # a method that makes its own studies knows their range
            method.fitted.parameters["training_range"] = trained_on()
        method.fitted.seconds = method.fitted.seconds or time.perf_counter() - start
        method.save(checkpoint)
        say(f"{name}: fitted in {time.perf_counter() - start:.0f} s")
    ranks.barrier()
    return method


def _discard_other_rows(output: Path, identity: Mapping[str, Any]) -> None:
    """Removes validation rows that other checkpoints made."""
    try:
        _check_same_scoring(output, identity)
    except ValueError:
        shutil.rmtree(output)
        _check_same_scoring(output, identity)


def _check_same_scoring(output: Path, identity: Mapping[str, Any]) -> bool:
    """Refuses a folder with the rows of another scoring, which are not mixed with this one's; returns True if this is
    the first."""
    from medaccel.data.files import write_text

    record, text = output / "scoring.json", json.dumps(identity, indent=1, sort_keys=True) + "\n"
    if record.exists():
        if record.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{output} holds a scoring with other options or of other choices; expected the same ones, or "
                "another --name"
            )
        return False
    output.mkdir(parents=True, exist_ok=True)
    write_text(record, text)
    return True
