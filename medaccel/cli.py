# SPDX-License-Identifier: Apache-2.0
"""The command `medaccel`. Each sub-command has --help with examples and takes a YAML --config with overrides."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

SMOOTH_EXAMPLES = """examples:
  medaccel smooth pet.nii.gz smooth.nii.gz --fwhm 5
  medaccel smooth ct.nii ct_smooth.nii.gz --sigma "[1, 1, 2]"
  medaccel smooth dicom_folder/ suv_smooth.nii.gz --sigma 2 --unit voxel --force
"""

VERIFY_EXAMPLES = """examples:
  medaccel verify
  medaccel verify --devices [cuda:0] --json verify.json
"""

RUN_EXAMPLES = """examples:
  medaccel restoration run
  medaccel restoration run --config configs/restoration_small.yaml
  medaccel restoration run --config configs/restoration_small.yaml --resume
  medaccel restoration run --train_studies my_studies --methods [gaussian1,swin_unetr] --output runs/mine
  torchrun --nproc-per-node 4 -m medaccel.cli restoration run --config configs/restoration_full.yaml
"""

SCORE_EXAMPLES = """examples:
  medaccel restoration score runs/restoration
  medaccel restoration score runs/restoration --dicom path/to/pet_series --realisations 10
  medaccel restoration score runs/restoration --test_studies held_out --methods [gaussian1]
"""

APPLY_EXAMPLES = """examples:
  medaccel restoration apply --checkpoint gaussian_mix.pt pet_60s.nii.gz restored.nii.gz
  medaccel restoration apply --checkpoint swin_unetr.pt dicom_folder/ derived_dicom/ --ct ct_dicom/
  medaccel restoration apply --checkpoint diffusion_conditional.pt study/ restored.nii.gz --seconds 30 --samples 8
"""

PRETRAINING_EXAMPLES = """examples:
  medaccel pretraining run --config configs/pretraining_small.yaml
  medaccel pretraining run --scans [LUNA16,my_cts] --preset nvidia --output runs/nvidia
  medaccel pretraining run --config configs/pretraining_small.yaml --trainer.steps 1000 --resume
  torchrun --nproc-per-node 4 -m medaccel.cli pretraining run --config configs/pretraining_full.yaml
"""

SEGMENTATION_EXAMPLES = """examples:
  medaccel segmentation run --config configs/segmentation_small.yaml
  medaccel segmentation run --config configs/segmentation_small.yaml --jobs 2
      --select "{task: [spleen], fraction: [0.2], init: [random, instance_pixel]}"
  medaccel segmentation run --config study.yaml --backend dask --scheduler tcp://10.0.0.1:8786 --jobs 8
  medaccel segmentation run --config study.yaml --cell $SLURM_ARRAY_TASK_ID
"""

SEGMENT_EXAMPLES = """examples:
  medaccel segmentation apply --checkpoint runs/segmentation/cells/<cell>/best.pt ct.nii.gz spleen.nii.gz
  medaccel segmentation apply --checkpoint best.pt ct_dicom/ spleen.nii.gz --keep_largest 1 --report volume.json
"""

DEMO_EXAMPLES = """examples:
  medaccel demo
  medaccel demo --output demo_run --force
"""


class _Formatter(DefaultHelpFormatter):
    """Keeps the line breaks of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


def _parser(description: str, examples: str | None = None) -> ArgumentParser:
    parser = ArgumentParser(description=description, epilog=examples, formatter_class=_Formatter)
    if examples is not None:
        parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    return parser


def _add_run_options(parser: ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="start clean where the output holds another run")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run that is there; an error where there is none"
    )


def _add_apply_options(parser: ArgumentParser, function: Callable[..., Any]) -> None:
    parser.add_function_arguments(function, as_positional=True, skip={"checkpoint", "force", "progress"})
    parser.add_argument("--force", action="store_true", help="overwrite the output where it exists")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _doctor() -> ArgumentParser:
    return _parser("Says what is installed, what is built, and which kernel serves each op on each device.")


def _verify() -> ArgumentParser:
    parser = _parser("Checks every kernel against its reference on this machine, and times it.", VERIFY_EXAMPLES)
    parser.add_argument("--devices", type=list[str], help="such as [cpu] or [cuda:0]; by default all that torch sees")
    parser.add_argument("--json", type=Path, help="write the outcome to this file, for a bug report")
    parser.add_argument("--speed", type=bool, default=True, help="time the kernels too")
    return parser


def _smooth() -> ArgumentParser:
    from medaccel.smooth import smooth

    parser = _parser("Smooths a NIfTI file or a DICOM series with a Gaussian.", SMOOTH_EXAMPLES)
    _add_apply_options(parser, smooth)
    return parser


def _restoration_run() -> ArgumentParser:
    from medaccel.restoration.config import RunConfig

    parser = _parser("Fits the methods, chooses on validation studies and writes a report.", RUN_EXAMPLES)
    parser.add_class_arguments(RunConfig)
    _add_run_options(parser)
    return parser


def _restoration_score() -> ArgumentParser:
    from medaccel.restoration.config import ScoreConfig

    parser = _parser("Scores a finished run on test studies, which no choice has seen.", SCORE_EXAMPLES)
    parser.add_class_arguments(ScoreConfig, as_positional=True)
    return parser


def _restoration_apply() -> ArgumentParser:
    from medaccel.restoration.apply import apply

    parser = _parser("Restores a PET, NIfTI or DICOM, with a fitted method. For research only.", APPLY_EXAMPLES)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="what a fit stored, as checkpoints/<method>.pt"
    )
    _add_apply_options(parser, apply)
    return parser


def _pretraining_run() -> ArgumentParser:
    from medaccel.pretraining.config import PretrainingConfig

    parser = _parser("Trains the encoder of a Swin UNETR on CT without labels, and reports.", PRETRAINING_EXAMPLES)
    parser.add_class_arguments(PretrainingConfig)
    _add_run_options(parser)
    return parser


def _segmentation_run() -> ArgumentParser:
    from medaccel.segmentation.config import SegmentationConfig

    parser = _parser(
        "Compares initializations: pretrains, trains a grid of cells, tests them and reports.", SEGMENTATION_EXAMPLES
    )
    parser.add_class_arguments(SegmentationConfig)
    _add_run_options(parser)
    parser.add_argument("--cell", type=int, help="run this cell of the selected ones alone, from 0, and no report")
    return parser


def _segmentation_apply() -> ArgumentParser:
    from medaccel.segmentation.apply import apply

    parser = _parser("Segments a CT with a trained network. For research only.", SEGMENT_EXAMPLES)
    parser.add_argument("--checkpoint", type=Path, required=True, help="what a cell stored, as cells/<cell>/best.pt")
    _add_apply_options(parser, apply)
    return parser


def _demo() -> ArgumentParser:
    parser = _parser(
        "A small restoration study, a small pretraining and a few small segmentations, all on simulated phantoms.",
        DEMO_EXAMPLES,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--force", action="store_true", help="start clean where the output holds a run")
    return parser


def build_parser() -> ArgumentParser:
    """The whole command line."""
    import medaccel

    parser = ArgumentParser(
        prog="medaccel",
        description="Fast kernels for 3-D medical imaging, and the studies built on them.",
        version=medaccel.__version__,
        formatter_class=_Formatter,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("doctor", _doctor(), help="what is installed and which kernels serve")
    commands.add_subcommand("verify", _verify(), help="check and time every kernel on this machine")
    commands.add_subcommand("smooth", _smooth(), help="Gaussian smoothing of a NIfTI file or DICOM series")
    restoration = _parser("PET restoration: short exposures made to look like long ones.")
    commands.add_subcommand("restoration", restoration, help="PET restoration")
    steps = restoration.add_subcommands(required=True, dest="step")
    steps.add_subcommand("run", _restoration_run(), help="fit, choose on validation studies, and report")
    steps.add_subcommand("score", _restoration_score(), help="score a finished run on test studies")
    steps.add_subcommand("apply", _restoration_apply(), help="restore a PET with a fitted method")
    pretraining = _parser("Pretraining without labels, on CT.")
    commands.add_subcommand("pretraining", pretraining, help="pretraining on CT without labels")
    pretraining.add_subcommands(required=True, dest="step").add_subcommand(
        "run", _pretraining_run(), help="train on scans without labels, and report"
    )
    segmentation = _parser("Segmentation of CT, and what pretraining does for it.")
    commands.add_subcommand("segmentation", segmentation, help="segmentation of CT")
    steps = segmentation.add_subcommands(required=True, dest="step")
    steps.add_subcommand("run", _segmentation_run(), help="compare initializations in a grid of runs, and report")
    steps.add_subcommand("apply", _segmentation_apply(), help="segment a CT with a trained network")
    commands.add_subcommand("demo", _demo(), help="small studies, from phantoms to reports")
    return parser


def _options(namespace: Namespace, *skip: str) -> dict[str, Any]:
    values = namespace.as_dict() if isinstance(namespace, Namespace) else dict(namespace)
    return {k: v for k, v in values.items() if k not in ("config", *skip)}


def _call(arguments: Namespace) -> int:
    command = arguments.command
    chosen = arguments[command]
    handler = _COMMANDS[command if "step" not in chosen else f"{command} {chosen.step}"]
    return handler(chosen[chosen.step] if "step" in chosen else chosen) or 0


def _call_doctor(_: Namespace) -> None:
    from medaccel import doctor

    print(doctor())


def _call_verify(arguments: Namespace) -> int:
    from medaccel.data.files import write_text
    from medaccel.verify import verify

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
    from medaccel.restoration.config import RunConfig
    from medaccel.restoration.pipeline import run

    _run(arguments, RunConfig, run, ("methods", "also_seconds", "phantom_spacings"))


def _call_restoration_score(arguments: Namespace) -> None:
    from medaccel.restoration.config import ScoreConfig
    from medaccel.restoration.pipeline import score

    options = _options(arguments)
    score(ScoreConfig(methods=tuple(options.pop("methods")), **options))


def _call_restoration_apply(arguments: Namespace) -> None:
    from medaccel.restoration.apply import apply

    _apply(arguments, apply)


def _call_pretraining_run(arguments: Namespace) -> None:
    from medaccel.pretraining.config import PretrainingConfig
    from medaccel.pretraining.pipeline import run

    _run(arguments, PretrainingConfig, run, ("scans", "phantom_spacing", "spacing", "windows", "roi_size"))


def _call_segmentation_run(arguments: Namespace) -> None:
    from medaccel.segmentation.config import SegmentationConfig
    from medaccel.segmentation.pipeline import run

    _run(arguments, SegmentationConfig, run, ("inits", "fractions", "seeds"), ("cell",))


def _call_segmentation_apply(arguments: Namespace) -> None:
    from medaccel.segmentation.apply import apply

    _apply(arguments, apply)


def _call_demo(arguments: Namespace) -> None:
    from medaccel.demo import demo

    demo(arguments.output, force=arguments.force)


_COMMANDS: dict[str, Callable[[Namespace], int | None]] = {
    "doctor": _call_doctor,
    "verify": _call_verify,
    "smooth": _call_smooth,
    "restoration run": _call_restoration_run,
    "restoration score": _call_restoration_score,
    "restoration apply": _call_restoration_apply,
    "pretraining run": _call_pretraining_run,
    "segmentation run": _call_segmentation_run,
    "segmentation apply": _call_segmentation_apply,
    "demo": _call_demo,
}


def _run(
    arguments: Namespace,
    config: Callable[..., Any],
    run: Callable[..., Any],
    tuples: Sequence[str],
    apart: Sequence[str] = (),
) -> None:
    """A pipeline's run, with its options as their class has them: the parser makes lists of tuples."""
    options = _options(arguments)
    others = {name: options.pop(name) for name in ("force", "resume", *apart)}
    listed = {name: tuple(options.pop(name)) for name in tuples}
    run(config(**listed, **options), **others)


def _apply(arguments: Namespace, apply: Callable[..., Any]) -> None:
    options = _options(arguments, "quiet")
    for path in apply(**options, progress=not arguments.quiet):
        print(f"written: {path}")


def _warning_line(message: Warning | str, *details: Any, **more: Any) -> None:
    print(f"medaccel: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 where it ended well, 1 with a sentence on stderr where not, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    warnings.showwarning = _warning_line
    try:
        return _call(arguments)
    except (ValueError, OSError) as error:
        print(f"medaccel: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("medaccel: interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
