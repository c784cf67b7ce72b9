# SPDX-License-Identifier: Apache-2.0
"""Makes the parsers of the commands: each one's options, help and examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medaccel._examples import (
    APPLY_EXAMPLES,
    DEMO_EXAMPLES,
    DOCTOR_EXAMPLES,
    FINETUNE_EXAMPLES,
    INFO_EXAMPLES,
    PRETRAINING_EXAMPLES,
    RUN_EXAMPLES,
    SCORE_EXAMPLES,
    SEGMENT_EXAMPLES,
    SEGMENTATION_EXAMPLES,
    SMOOTH_EXAMPLES,
    VALIDATE_EXAMPLES,
    VERIFY_EXAMPLES,
    WEIGHTS_EXAMPLES,
)
from medaccel._parser import Formatter, Parser, add_options


def plain_parser(description: str, examples: str) -> Parser:
    parser = Parser(description=description, epilog=examples, formatter_class=Formatter)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    return parser


def add_run_options(parser: Parser) -> None:
    parser.add_argument("--force", action="store_true", help="start clean if the output holds another run")
    parser.add_argument(
        "--resume", action="store_true", help="resume the run in the output; an error if there is none"
    )


def add_apply_options(parser: Parser, function: Callable[..., Any]) -> None:
    parser.add_function_arguments(function, as_positional=True, skip={"checkpoint", "force", "progress"})
    parser.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def doctor() -> Parser:
    return plain_parser(
        "Says what is installed, what is built, and which kernel serves each op on each device.", DOCTOR_EXAMPLES
    )


def info() -> Parser:
    from medaccel.info import info

    parser = plain_parser(
        "Says what a file or folder is, what will be read, units, the rule of SUV, its geometry and warnings. "
        "The exit status is 0 if it can be read, with or without warnings, and 1 if it is refused.",
        INFO_EXAMPLES,
    )
    parser.add_function_arguments(info, as_positional=True)
    return parser


def verify() -> Parser:
    parser = plain_parser("Checks every kernel against its reference on this machine, and times it.", VERIFY_EXAMPLES)
    parser.add_argument(
        "--devices", type=list[str], help="such as cpu or cuda:0 cuda:1; default: all that torch sees"
    )
    parser.add_argument("--json", type=Path, help="write the outcome to this file, for a bug report")
    parser.add_argument("--speed", type=bool, default=True, help="time the kernels too")
    return parser


def smooth() -> Parser:
    from medaccel.smooth import smooth

    parser = plain_parser("Smooths a NIfTI file or a DICOM series with a Gaussian.", SMOOTH_EXAMPLES)
    add_apply_options(parser, smooth)
    return parser


def restoration_run() -> Parser:
    from medaccel.restoration.config import RestorationConfig

    parser = plain_parser("Fits the methods, chooses on validation studies and writes a report.", RUN_EXAMPLES)
    add_options(parser, RestorationConfig)
    add_run_options(parser)
    return parser


def restoration_score() -> Parser:
    from medaccel.restoration.config import ScoreConfig

    parser = plain_parser("Scores a finished run on test studies, which no choice has seen.", SCORE_EXAMPLES)
    add_options(parser, ScoreConfig)
    return parser


def restoration_apply() -> Parser:
    from medaccel.restoration.apply import apply

    parser = plain_parser(
        "Restores a PET, NIfTI or DICOM: with the package's own weights, or a fitted method. For research only.",
        APPLY_EXAMPLES,
    )
    parser.add_argument("--checkpoint", type=Path, help="a fitted method, such as checkpoints/<method>.pt of a run")
    parser.add_argument(
        "--model", help="instead of --checkpoint: a name that `medaccel weights list` has, or the path of a file"
    )
    add_apply_options(parser, apply)
    return parser


def restoration_validate() -> Parser:
    from medaccel.restoration.validate import validate

    parser = plain_parser(
        "Measures a model on one's own exposures, and says whether to fine-tune it.", VALIDATE_EXAMPLES
    )
    parser.add_function_arguments(validate, as_positional=True, skip={"progress"})
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def restoration_finetune() -> Parser:
    from medaccel.restoration.finetune import finetune

    parser = plain_parser("Trains a model's weights further on studies of one's own scanner.", FINETUNE_EXAMPLES)
    add_apply_options(parser, finetune)
    return parser


def weights_list() -> Parser:
    return plain_parser(
        "Lists trained weights: their names, their purposes, and whether they are here.", WEIGHTS_EXAMPLES
    )


def weights_get() -> Parser:
    parser = plain_parser("Fetches weights that the package doesn't hold, and verifies them.", WEIGHTS_EXAMPLES)
    parser.add_argument("name", type=str, help="a name of `medaccel weights list`")
    parser.add_argument(
        "--from_file", "--from-file", type=Path, help="take this copy of the file; no internet is used"
    )
    parser.add_argument("--mirror", type=str, help="fetch from this address of a folder: https, http or file")
    parser.add_argument("--force", action="store_true", help="fetch weights again that are here already")
    return parser


def weights_path() -> Parser:
    parser = plain_parser("Prints the path of weights, after verifying them.", WEIGHTS_EXAMPLES)
    parser.add_argument("name", type=str, help="a name of `medaccel weights list`")
    return parser


def pretraining_run() -> Parser:
    from medaccel.pretraining.config import PretrainingConfig

    parser = plain_parser(
        "Trains the encoder of a Swin UNETR on CT without labels, and reports.", PRETRAINING_EXAMPLES
    )
    add_options(parser, PretrainingConfig)
    add_run_options(parser)
    return parser


def segmentation_run() -> Parser:
    from medaccel.segmentation.config import SegmentationConfig

    parser = plain_parser(
        "Compares initializations: pretrains, trains a grid of cells, tests them and reports.", SEGMENTATION_EXAMPLES
    )
    add_options(parser, SegmentationConfig)
    add_run_options(parser)
    parser.add_argument(
        "--cell", type=int, help="run only this one of the selected cells, counted from 0, and write no report"
    )
    return parser


def segmentation_apply() -> Parser:
    from medaccel.segmentation.apply import apply

    parser = plain_parser("Segments a CT with a trained network. For research only.", SEGMENT_EXAMPLES)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a trained network, such as cells/<cell>/best.pt of a study"
    )
    add_apply_options(parser, apply)
    return parser


def demo() -> Parser:
    parser = plain_parser(
        "A small restoration study, a small pretraining and a few small segmentations, all on simulated phantoms.",
        DEMO_EXAMPLES,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--force", action="store_true", help="start clean if the output holds a run")
    return parser
