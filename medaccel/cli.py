# SPDX-License-Identifier: Apache-2.0
"""The command `medaccel`. Each sub-command has --help with examples and takes a YAML --config with overrides."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Sequence
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
    parser.add_function_arguments(smooth, as_positional=True, skip={"force", "progress"})
    parser.add_argument("--force", action="store_true", help="overwrite the output where it exists")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _restoration_run() -> ArgumentParser:
    from medaccel.restoration.config import RunConfig

    parser = _parser("Fits the methods, chooses on validation studies and writes a report.", RUN_EXAMPLES)
    parser.add_class_arguments(RunConfig)
    parser.add_argument("--force", action="store_true", help="start clean where the output holds another run")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run that is there; an error where there is none"
    )
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
    parser.add_function_arguments(apply, as_positional=True, skip={"checkpoint", "force", "progress"})
    parser.add_argument("--force", action="store_true", help="overwrite the output where it exists")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _demo() -> ArgumentParser:
    parser = _parser("A small restoration study on simulated phantoms: about a minute or two.", DEMO_EXAMPLES)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run")
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
    commands.add_subcommand("demo", _demo(), help="a small restoration study, from phantoms to a report")
    return parser


def _options(namespace: Namespace, *skip: str) -> dict[str, Any]:
    values = namespace.as_dict() if isinstance(namespace, Namespace) else dict(namespace)
    return {k: v for k, v in values.items() if k not in ("config", *skip)}


def _call(arguments: Namespace) -> int:
    command = arguments.command
    if command == "doctor":
        from medaccel import doctor

        print(doctor())
    elif command == "verify":
        from medaccel.data.files import write_text
        from medaccel.verify import verify

        outcome = verify(devices=arguments.verify.devices, speed=arguments.verify.speed)
        print(outcome)
        if arguments.verify.json is not None:
            write_text(arguments.verify.json, outcome.json(), force=True)
        return 0 if outcome.passed else 1
    elif command == "smooth":
        from medaccel.smooth import smooth

        options = _options(arguments.smooth, "quiet")
        smooth(**options, progress=not arguments.smooth.quiet)
        print(f"written: {options['output']}")
    elif command == "restoration" and arguments.restoration.step == "apply":
        from medaccel.restoration.apply import apply

        options = _options(arguments.restoration.apply, "quiet")
        for path in apply(**options, progress=not arguments.restoration.apply.quiet):
            print(f"written: {path}")
    elif command == "restoration" and arguments.restoration.step == "score":
        from medaccel.restoration.config import ScoreConfig
        from medaccel.restoration.pipeline import score

        options = _options(arguments.restoration.score)
        score(ScoreConfig(methods=tuple(options.pop("methods")), **options))
    elif command == "restoration":
        from medaccel.restoration.config import RunConfig
        from medaccel.restoration.pipeline import run

        options = _options(arguments.restoration.run)
        force, resume = options.pop("force"), options.pop("resume")
        tuples = ("methods", "also_seconds", "phantom_spacings")
        listed: dict[str, Any] = {name: tuple(options.pop(name)) for name in tuples}
        run(RunConfig(**listed, **options), force=force, resume=resume)
    elif command == "demo":
        from medaccel.restoration.config import DEMO_RUN, DEMO_TEST_PHANTOMS, ScoreConfig
        from medaccel.restoration.pipeline import run, score

        run(dataclasses.replace(DEMO_RUN, output=arguments.demo.output), force=arguments.demo.force)
        score(ScoreConfig(arguments.demo.output, test_phantoms=DEMO_TEST_PHANTOMS))
    return 0


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
