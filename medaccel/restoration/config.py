# SPDX-License-Identifier: Apache-2.0
"""What a restoration run is told: the options of `medaccel restoration run`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHODS = ("gaussian1", "gaussian3", "gaussian_mix")


@dataclass(frozen=True)
class RunConfig:
    """Options of a run; the same options give the same figures.

    Args:
        output: folder of the run; made if missing. A second run with the same options goes on where the first ended.
        dicom: folder of a PET series; the methods are scored on simulated exposures of this patient.
        test_studies: folder of study folders to score on (`PET_30.nii.gz`, `PET_60.nii.gz`, …).
        train_studies: folder of study folders to fit on. Phantoms of the standard generator by default.
        train_phantoms: how many phantoms are fitted on where there are no `train_studies`.
        test_phantoms: how many phantoms of the shifted generator are scored on where neither `dicom` nor
            `test_studies` is given.
        realisations: independent noise realisations of the `dicom` patient.
        input_seconds: exposure to restore from, s.
        target_seconds: exposure to predict, s.
        methods: what is fitted: gaussian1, gaussian3, gaussian_mix.
        epochs: of each fit; one is up to 5 L-BFGS iterations over all training studies.
        seed: of everything: phantom i has seed + i, test phantoms start 1000 later.
        simulator: physical parameters that differ from the frozen defaults, by name.
    """

    output: Path = Path("runs/restoration")
    dicom: Path | None = None
    test_studies: Path | None = None
    train_studies: Path | None = None
    train_phantoms: int = 6
    test_phantoms: int = 20
    realisations: int = 1
    input_seconds: int = 60
    target_seconds: int = 90
    methods: tuple[str, ...] = METHODS
    epochs: int = 10
    seed: int = 0
    simulator: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.input_seconds < self.target_seconds:
            raise ValueError(
                f"input_seconds is {self.input_seconds} and target_seconds {self.target_seconds}; "
                "expected 0 < input_seconds < target_seconds"
            )
        if not self.methods or set(self.methods) - set(METHODS):
            raise ValueError(f"methods is {list(self.methods)}; expected some of {', '.join(METHODS)}")
        if self.dicom is not None and self.test_studies is not None:
            raise ValueError("dicom and test_studies are both given; expected at most one of them")
        for name in ("train_phantoms", "test_phantoms", "realisations", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a whole number >= 1")

    def plain(self) -> dict[str, Any]:
        """As plain YAML and JSON values; paths absolute, so that a run can be taken up from anywhere."""
        values = dataclasses.asdict(self)
        for name, value in values.items():
            if isinstance(value, Path):
                values[name] = str(value.resolve())
        values["methods"] = list(self.methods)
        del values["output"]  # where a run lies is no part of what it is
        return values

    def digest(self) -> str:
        """Identifies the options: 12 hexadecimal digits of SHA-256."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:12]


DEMO = RunConfig(train_phantoms=2, test_phantoms=3, epochs=4)
