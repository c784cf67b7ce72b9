# SPDX-License-Identifier: Apache-2.0
"""Adapts trained weights to a user's own scanner: the command `medaccel restoration finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medaccel.data import check_output
from medaccel.restoration.evaluation import metrics
from medaccel.restoration.evaluation.training_range import TrainingRange
from medaccel.restoration.methods import load_method
from medaccel.restoration.methods.base import RestorationTask
from medaccel.restoration.methods.unet import UNetMethod
from medaccel.restoration.sources import check_study_units
from medaccel.restoration.study import find_studies, load_study
from medaccel.restoration.validate import common_task
from medaccel.weights import RESTORATION, find

_HELD_OUT = 4  # the last one of so many studies is held out


def finetune(
    studies: Path,
    output: Path,
    *,
    model: str | Path = RESTORATION,
    input_seconds: Sequence[int] = (),
    target_seconds: int | None = None,
    nested: bool = True,
    steps: int = 200,
    learning_rate: float = 1e-4,
    batch_size: int = 4,
    seed: int = 0,
    check_units: bool = True,
    force: bool = False,
    progress: bool = True,
) -> list[str]:
    """Trains a U-Net's weights further on studies of one's own scanner, without noise-free images.

    The loss compares the predicted activity with the longer exposure, whose noise must be independent of the input's:
    of nested exposures the part that the input doesn't hold. From 4 studies on, every fourth is held out, and the
    outcome says what was gained there.

    Args:
        studies: a study folder with PET_<seconds>.nii.gz files, or a folder of such folders.
        output: the new checkpoint, a .pt file; a folder of its name without .pt keeps the training's own files, from
            which an interrupted call goes on.
        model: a name that `medaccel weights list` has, or the path of a checkpoint of the method unet.
        input_seconds: exposures to restore from, s; by default all below the target that every study has.
        target_seconds: exposure to compare with, s; by default the longest that every study has.
        nested: the shorter exposures' events are a part of the longer one's, as in list-mode rebins.
        steps: optimizer steps.
        learning_rate: AdamW's largest learning rate.
        batch_size: patches of a step.
        seed: seed of all randomness.
        check_units: refuse studies that can't be in SUV.
        force: overwrite an existing output.
        progress: show progress on stderr.

    Returns:
        Sentences that say what was gained.

    Raises:
        ValueError: the studies share no two exposures or are damaged; the model is of another method.
        FileNotFoundError: there are no studies.
        FileExistsError: the output exists, and `force` is not given.
    """
    output = Path(output)
    if output.suffix != ".pt":
        raise ValueError(f"output is {output}; expected a file name that ends in .pt")
    check_output(output, force=force)
    method = load_method(find(model))
    if not isinstance(method, UNetMethod):
        raise ValueError(
            f"model: {find(model)} holds the method {method.name}; expected unet, which can be trained on"
        )
    folders = find_studies(studies)
    task = common_task(folders, input_seconds, target_seconds)
    if check_units:
        check_study_units(folders, (*task.input_seconds, task.target_seconds))
    held_out = folders[_HELD_OUT - 1 :: _HELD_OUT]
    used = [folder for folder in folders if folder not in held_out]
    method.task = task
    before = _scores(method, held_out, task)
    method.settings |= {
        "steps": steps,
        "steps_per_epoch": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "warm_up": min(20, steps),
        "ema_decay": 0.0,
    }
    method.finetune(used, folder=output.with_suffix(""), nested=nested, seed=seed, progress=progress)
    old = TrainingRange.from_plain(method.fitted.parameters["training_range"])
    own = TrainingRange.of(used, task.input_seconds)
    method.fitted.parameters["training_range"] = old.joined(own).plain()
    after = _scores(method, held_out, task)
    method.save(output)
    sentences = [
        f"{t} s, {len(held_out)} held-out studies: MSE score {before[t]:.1f} % before, {after[t]:.1f} % after."
        for t in before
    ]
    if not before:
        sentences.append(f"No study was held out of {len(folders)}, so nothing says what was gained.")
    elif any(after[t] < before[t] for t in before):
        sentences.append(
            "Held-out studies are restored no better than before: prefer the model that you started from."
        )
    return sentences


def _scores(method: UNetMethod, studies: Sequence[Path], task: RestorationTask) -> dict[int, float]:
    """Returns the mean MSE score (%) against the target at each exposure; nothing without studies."""
    found: dict[int, list[float]] = {}
    for path in studies:
        study = load_study(path, (*task.input_seconds, task.target_seconds))
        target = study.exposures[task.target_seconds]
        mask = metrics.body_mask(target, study.spacing)
        for seconds in task.input_seconds:
            image = study.exposures[seconds]
            share = seconds / task.target_seconds
            restored = share * image + (1 - share) * method.predict(image, study.spacing)
            score = metrics.score(metrics.mse(restored, target, mask), metrics.mse(image, target, mask))
            found.setdefault(seconds, []).append(float(score))
    return {seconds: sum(scores) / len(scores) for seconds, scores in found.items()}
