# SPDX-License-Identifier: Apache-2.0
"""Every method on every study: rows that are kept as they are made, the tables of them, and the files they go to."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medaccel.data.files import write_text
from medaccel.restoration import metrics
from medaccel.restoration.calibration import Calibration, StudyCoverage, study_coverage
from medaccel.restoration.evaluation import StudyEvaluator, SummaryRow, summarize
from medaccel.restoration.methods.base import Method, Restoration
from medaccel.restoration.report_text import IDENTITY, NOISE_FREE, ORACLE
from medaccel.restoration.study import Study, load_study


@dataclass
class Scored:
    """What scoring found; for each exposure, rows by method, one a study in the order of `studies`.

    Attributes:
        studies: names.
        rows: seconds: method: rows of `evaluation.evaluate`.
        coverage: seconds: method: coverage of its calibrated intervals, one a study.
        seconds_per_volume: method: mean time of a restoration.
    """

    studies: list[str] = field(default_factory=list)
    rows: dict[int, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    coverage: dict[int, dict[str, list[StudyCoverage]]] = field(default_factory=dict)
    seconds_per_volume: dict[str, float] = field(default_factory=dict)
