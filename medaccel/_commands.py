# SPDX-License-Identifier: Apache-2.0
"""Lists the commands of `medaccel`: each one's options, examples, needed packages, and the function that it calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from medaccel import _parsers
from medaccel._parser import Parser
from medaccel.studies.settings import before_work, hints_of

# Each command imports these beyond the kernels' own needs; the value is the package that brings the import.
PACKAGES = {
    "monai": "monai",
    "einops": "einops",
    "lightning": "lightning",
    "tensorboard": "tensorboard",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "matplotlib": "matplotlib",
    "jinja2": "Jinja2",
    "SimpleITK": "SimpleITK",
    "joblib": "joblib",
}
_APPLYING = ("monai", "einops", "lightning", "scipy")
_REPORTING = (*_APPLYING, "skimage", "matplotlib", "jinja2")
_TRAINING = (*_REPORTING, "tensorboard", "joblib")


def _options(namespace: Namespace, *skip: str) -> dict[str, Any]:
    values = namespace.as_dict() if isinstance(namespace, Namespace) else dict(namespace)
    return {k: v for k, v in values.items() if k not in ("config", *skip)}


def _call_doctor(_: Namespace) -> None:
    from medaccel import doctor

    print(doctor())


def _call_info(arguments: Namespace) -> int:
    from medaccel.info import info

    found = info(**_options(arguments))
    print(found)
    return 0 if found.refusal is None else 1


def _call_verify(arguments: Namespace) -> int:
    from medaccel.data.files import check_output, write_text
    from medaccel.verify import check_devices, verify

    with before_work():
        if arguments.devices is not None:
            check_devices(arguments.devices)
        if arguments.json is not None:
            check_output(arguments.json, force=True)
    outcome = verify(devices=arguments.devices, speed=arguments.speed)
    print(outcome)
    if arguments.json is not None:
        write_text(arguments.json, outcome.json(), force=True)
    return 0 if outcome.passed else 1


def _call_smooth(arguments: Namespace) -> None:
    from medaccel.smooth import smooth

    options = _options(arguments, "quiet")
    smooth(**options, progress=not arguments.quiet)
    print(f"written: {options['output']}")


def _call_restoration_run(arguments: Namespace) -> None:
    from medaccel.restoration.config import RestorationConfig
    from medaccel.restoration.pipeline import run

    _run(arguments, RestorationConfig, run)


def _call_restoration_score(arguments: Namespace) -> None:
    from medaccel.restoration.config import ScoreConfig
    from medaccel.restoration.pipeline import score

    with before_work():
        chosen = ScoreConfig(**_options(arguments))
    score(chosen)


def _call_restoration_apply(arguments: Namespace) -> None:
    from medaccel.restoration.apply import apply

    model = arguments.pop("model")
    if model is not None:
        if arguments.checkpoint is not None:
            with before_work():
                raise ValueError("checkpoint and model are both given; expected at most one of them")
        arguments.checkpoint = model
    _apply(arguments, apply)


def _call_restoration_validate(arguments: Namespace) -> None:
    from medaccel.restoration.validate import validate

    print(validate(**_options(arguments, "quiet"), progress=not arguments.quiet))


def _call_restoration_finetune(arguments: Namespace) -> None:
    from medaccel.restoration.finetune import finetune

    options = _options(arguments, "quiet")
    print("\n".join([*finetune(**options, progress=not arguments.quiet), f"written: {options['output']}"]))


def _call_weights_list(_: Namespace) -> None:
    from medaccel.weights import catalogue

    for name, chosen in catalogue().items():
        state = str(chosen.place) if chosen.place.exists() else "not here yet: `medaccel weights get` fetches it"
        print(f"{name}: {chosen.purpose} ({chosen.bytes / 1e6:.1f} MB)\n  {state}\n  model card: {chosen.card_path}")


def _call_weights_get(arguments: Namespace) -> None:
    from medaccel.weights import get, known

    with before_work():
        known(arguments.name)
    print(get(**_options(arguments), say=lambda sentence: print(f"medaccel: {sentence}", file=sys.stderr)))


def _call_weights_path(arguments: Namespace) -> None:
    from medaccel.weights import find, known

    with before_work():
        known(arguments.name)
        print(find(arguments.name))


def _call_pretraining_run(arguments: Namespace) -> None:
    from medaccel.pretraining.config import PretrainingConfig
    from medaccel.pretraining.pipeline import run

    _run(arguments, PretrainingConfig, run)


def _call_segmentation_run(arguments: Namespace) -> None:
    from medaccel.segmentation.config import SegmentationConfig
    from medaccel.segmentation.pipeline import run

    _run(arguments, SegmentationConfig, run, ("cell",))


def _call_segmentation_apply(arguments: Namespace) -> None:
    from medaccel.data.files import read_json
    from medaccel.segmentation.apply import apply, spoken

    *_, report = _apply(arguments, apply)
    print("\n".join(spoken(read_json(report))))


def _call_demo(arguments: Namespace) -> None:
    from medaccel.demo import demo

    demo(arguments.output, force=arguments.force)


def _run(
    arguments: Namespace, config: Callable[..., Any], run: Callable[..., Any], apart: Sequence[str] = ()
) -> None:
    """Runs a pipeline, with its options converted to their class."""
    options = _options(arguments)
    others = {name: options.pop(name) for name in ("force", "resume", *apart)}
    with before_work():
        chosen = config(**options)
    run(chosen, **others)


def _apply(arguments: Namespace, apply: Callable[..., Any]) -> tuple[Path, ...]:
    options = _options(arguments, "quiet")
    written = tuple(apply(**options, progress=not arguments.quiet))
    for path in written:
        print(f"written: {path}")
    return written


@dataclass(frozen=True)
class Command:
    """Describes one command.

    Args:
        help: its purpose in a few words.
        parser: a function that makes its parser.
        call: a function that runs it; a result of None counts as 0.
        options: the class or function that defines its options, as module:name.
        packages: the packages of `PACKAGES` that it imports.
        hints: types of further options.
    """

    help: str
    parser: Callable[[], Parser]
    call: Callable[[Namespace], int | None]
    options: str | None = None
    packages: tuple[str, ...] = ()
    hints: tuple[tuple[str, Any], ...] = ()

    def types(self) -> dict[str, Any]:
        """Returns the types of its options, by name."""
        found = dict(self.hints)
        if self.options is not None:
            module, _, name = self.options.partition(":")
            found |= hints_of(getattr(import_module(module), name))
        return found


COMMANDS = {
    "doctor": Command("what is installed and which kernels serve", _parsers.doctor, _call_doctor),
    "info": Command("what a file or folder is, and how it is read", _parsers.info, _call_info, "medaccel.info:info"),
    "verify": Command(
        "check and time every kernel on this machine",
        _parsers.verify,
        _call_verify,
        hints=(("devices", list[str] | None), ("json", Path | None), ("speed", bool)),
    ),
    "smooth": Command(
        "Gaussian smoothing of a NIfTI file or DICOM series", _parsers.smooth, _call_smooth, "medaccel.smooth:smooth"
    ),
    "restoration run": Command(
        "fit, choose on validation studies, and report",
        _parsers.restoration_run,
        _call_restoration_run,
        "medaccel.restoration.config:RestorationConfig",
        _TRAINING,
    ),
    "restoration score": Command(
        "score a finished run on test studies",
        _parsers.restoration_score,
        _call_restoration_score,
        "medaccel.restoration.config:ScoreConfig",
        _REPORTING,
    ),
    "restoration apply": Command(
        "restore a PET with a fitted method",
        _parsers.restoration_apply,
        _call_restoration_apply,
        "medaccel.restoration.apply:apply",
        _APPLYING,
    ),
    "restoration validate": Command(
        "measure a model on one's own exposures",
        _parsers.restoration_validate,
        _call_restoration_validate,
        "medaccel.restoration.validate:validate",
        _REPORTING,
    ),
    "restoration finetune": Command(
        "adapt a model to one's own scanner",
        _parsers.restoration_finetune,
        _call_restoration_finetune,
        "medaccel.restoration.finetune:finetune",
        (*_APPLYING, "tensorboard"),
    ),
    "weights list": Command("the trained weights, and where they are", _parsers.weights_list, _call_weights_list),
    "weights get": Command(
        "fetch weights that the package doesn't hold",
        _parsers.weights_get,
        _call_weights_get,
        hints=(("name", str), ("from_file", Path | None), ("mirror", str | None)),
    ),
    "weights path": Command(
        "the path of a file of weights", _parsers.weights_path, _call_weights_path, hints=(("name", str),)
    ),
    "pretraining run": Command(
        "train on CT without labels, and report",
        _parsers.pretraining_run,
        _call_pretraining_run,
        "medaccel.pretraining.config:PretrainingConfig",
        _TRAINING,
    ),
    "segmentation run": Command(
        "compare initializations in a grid of runs, and report",
        _parsers.segmentation_run,
        _call_segmentation_run,
        "medaccel.segmentation.config:SegmentationConfig",
        _TRAINING,
        (("cell", int | None),),
    ),
    "segmentation apply": Command(
        "segment a CT with a trained network",
        _parsers.segmentation_apply,
        _call_segmentation_apply,
        "medaccel.segmentation.apply:apply",
        _APPLYING,
    ),
    "demo": Command(
        "small studies, from phantoms to reports",
        _parsers.demo,
        _call_demo,
        packages=_TRAINING,
        hints=(("output", Path),),
    ),
}
GROUPS = {
    "restoration": "PET restoration: short exposures made to look like long ones.",
    "pretraining": "Pretraining without labels, on CT.",
    "weights": "Trained weights: those in the package, and larger ones that are fetched.",
    "segmentation": "Segmentation of CT, and what pretraining does for it.",
}
