# SPDX-License-Identifier: Apache-2.0
"""Runs `medaccel demo`: both studies, as small as they can be, on simulated phantoms; far too short for good
networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The demo has two cells of a grid, after a pretraining of two dozen steps.
_SEGMENTATION: dict[str, Any] = {
    "tasks": {"spleen": {}},
    "phantoms": {"cases": 9, "spacing": [6.0, 6.0, 6.0], "pool": 8, "pool_spacing": [6.0, 6.0, 6.0]},
    "inits": ("random", "instance_pixel"),
    "fractions": (1.0,),
    "seeds": (0,),
    "pretraining": {
        "spacing": (6.0, 6.0, 6.0),
        "windows": ((-160.0, 240.0),),
        "roi_size": (64, 64, 32),
        "network": {"feature_size": 12},
        "trainer": {"steps": 16, "steps_per_epoch": 4, "batch_size": 2},
    },
    "pretraining_seeds": 1,
    "settings": {"steps": 40, "steps_per_epoch": 10, "validate_every": 20, "learning_rate": 4e-3},
    "primary": {"none": True},
}


def demo(output: Path, *, force: bool = False, say: Callable[[str], None] = print) -> list[Path]:
    """Runs a small restoration study, then a small pretraining with two segmentations.

    Args:
        output: folder that gets the folders restoration and segmentation, each with a report.html. Finished parts are
            not computed again.
        force: start clean if the folders hold other runs.
        say: a function that is called with each line of progress.

    Returns:
        The paths of the reports.

    Raises:
        ValueError, OSError: a folder holds something else, or can't be written.
    """
    from medaccel.restoration.config import DEMO_RUN, DEMO_TEST_PHANTOMS, ScoreConfig
    from medaccel.restoration.pipeline import run as restore
    from medaccel.restoration.pipeline import score
    from medaccel.restoration.run_folder import RunFolder
    from medaccel.segmentation.config import SegmentationConfig
    from medaccel.segmentation.pipeline import check
    from medaccel.segmentation.pipeline import run as segment
    from medaccel.segmentation.run_folder import StudyFolder
    from medaccel.segmentation.study import options_of
    from medaccel.studies.settings import before_work

    restoration = output / "restoration"
    first = dataclasses.replace(DEMO_RUN, output=restoration)
    second = SegmentationConfig(output=output / "segmentation", **_SEGMENTATION)
    with before_work():  # checks the second folder too: half an hour later is too late to refuse it
        RunFolder(first.output).refuse(first.plain(), force, False)
        StudyFolder(second.output).refuse(options_of(second, check(second)), force, False)
    say("== PET restoration: every kind of method, in its smallest fit, on phantoms")
    restore(first, force=force, say=say)
    scored = score(ScoreConfig(restoration, test_phantoms=DEMO_TEST_PHANTOMS), say=say)
    say("== CT segmentation: pretraining without labels, then with labels from there and from random weights")
    segmented = segment(second, force=force, say=say)
    reports = [scored, segmented]
    say("== look at:")
    for report in reports:
        say(f"  {report.resolve()}")
    return reports
