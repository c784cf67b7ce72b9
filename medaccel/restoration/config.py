# SPDX-License-Identifier: Apache-2.0
"""Defines the options of `medaccel restoration run` and `score`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medaccel.restoration.methods import METHODS
from medaccel.restoration.settings import (
    ConditionalSettings,
    GaussianSettings,
    SDEditSettings,
    SettingsByMethod,
    SwinSettings,
    TrainerSettings,
    UNetSettings,
)
from medaccel.restoration.simulation.config import SimulatorConfig
from medaccel.studies.digest import digest
from medaccel.studies.settings import check_seeds_range, check_written
from medaccel.studies.typed import check_fields, plain

# A scoring's folder has such a name: it doesn't lead elsewhere, isn't hidden, and doesn't begin like an option.
_NAME = re.compile(r"\w(?:[\w .+-]{0,98}[\w+-])?")
_RESERVED = {
    *("config.yaml", "splits.json", "scored.json", "metrics.json", "metrics.csv", "report.html"),
    *("checkpoints", "fits", "studies", "scored", "validation", "figures"),
}
# A measured patient's simulated studies would be mixed with these.
_STUDIES = ("train", "validation", "test")


@dataclass(frozen=True)
class RestorationConfig:
    """Holds the options of a run; the same options give the same figures (for one number of threads and one
    processor).

    Args:
        output: folder of the run; made if missing. A second run with the same options continues where the first
            ended.
        train_studies: folder of study folders to fit on (`PET_60.nii.gz`, `PET_90.nii.gz`, …). Phantoms of the
            standard generator by default.
        validation_studies: folder of study folders to choose on. By default, some patients of `train_studies`.
        validation_fraction: share of the patients of `train_studies` that are set aside, at least one.
        train_phantoms: how many phantoms are fitted on if `train_studies` is not given.
        validation_phantoms: how many further phantoms of the same generator serve to choose on.
        phantom_spacings: voxel sizes of those phantoms, mm, in turn; they cover 384 × 288 × 448 mm.
        input_seconds: exposure to restore from, s.
        also_seconds: further exposures that the same methods restore from, s, such as [30].
        target_seconds: exposure to predict, s.
        methods: the methods to fit: gaussian1, gaussian3, gaussian_mix, nlm, tv, bm4d and bm4d_noise (if the package
            bm4d is installed), unet, swin_unetr, diffusion_sdedit, diffusion_conditional.
        settings: settings of single methods, where they differ from the defaults: '{swin_unetr: {feature_size: 24}}'.
        trainer: settings of all methods that have them, unless a method's own say otherwise. For several devices,
            start the command with `torchrun`.
        check_units: refuse `train_studies` and `validation_studies` that can't be in SUV, or whose CT is not in HU.
        seed: seed of everything: phantom i has seed + i, validation phantoms start 500 later, test phantoms 1000.
        simulator: physical parameters of the simulated scanner; the defaults are frozen.
    """

    output: Path = Path("runs/restoration")
    train_studies: Path | None = None
    validation_studies: Path | None = None
    validation_fraction: float = 0.2
    train_phantoms: int = 6
    validation_phantoms: int = 2
    phantom_spacings: tuple[tuple[float, float, float], ...] = ((4.0, 4.0, 4.0),)
    input_seconds: int = 60
    also_seconds: tuple[int, ...] = ()
    target_seconds: int = 90
    methods: tuple[str, ...] = ("gaussian1", "gaussian3", "gaussian_mix")
    settings: SettingsByMethod = field(default_factory=SettingsByMethod)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    check_units: bool = True
    seed: int = 0
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        for seconds in (self.input_seconds, *self.also_seconds):
            if not 0 < seconds < self.target_seconds:
                raise ValueError(
                    f"input_seconds is {self.input_seconds}, also_seconds {list(self.also_seconds)} and "
                    f"target_seconds {self.target_seconds}; expected exposures above 0 and below the target's"
                )
        if not self.methods or set(self.methods) - set(METHODS) or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods is {list(self.methods)}; expected some of {', '.join(METHODS)}, each once")
        for name in ("train_phantoms", "validation_phantoms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a whole number >= 1")
        # Seeds start at 0 for training, 500 for validation, 1000 for test.
        if self.train_phantoms > 500 or self.validation_phantoms > 500:
            raise ValueError(
                f"train_phantoms is {self.train_phantoms} and validation_phantoms {self.validation_phantoms}; "
                "expected at most 500 of each, so that no person is in two sets"
            )
        for spacing in self.phantom_spacings:
            if len(spacing) != 3 or not all(0 < step <= 6 for step in spacing):
                raise ValueError(f"phantom_spacings holds {list(spacing)}; expected three sizes in mm, at most 6")
        if not self.phantom_spacings:
            raise ValueError("phantom_spacings is empty; expected at least one voxel size")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; expected a share in (0, 1)")
        check_seeds_range("seed", self.seed)
        if self.validation_studies is not None and self.train_studies is None:
            raise ValueError("validation_studies is given without train_studies; expected both, or neither")

    @property
    def exposures(self) -> tuple[int, ...]:
        """Returns all exposures to restore from, the primary one first."""
        return (self.input_seconds, *self.also_seconds)

    def plain(self) -> dict[str, Any]:
        """Returns the options as plain YAML and JSON values; paths are absolute, so that a run can be continued from
        anywhere."""
        values = _plain(self)
        if self.check_units:  # runs from before the option existed can continue
            del values["check_units"]
        del values["output"]  # a run may be moved: its folder does not identify it
        return values

    def digest(self) -> str:
        """Identifies the options by 12 hexadecimal digits of SHA-256."""
        return digest(self.plain())

    @classmethod
    def of(cls, output: Path, plain: Mapping[str, Any]) -> RestorationConfig:
        """Rebuilds the options from the result of `plain` and a folder.

        Raises:
            ValueError: this version does not know some of the options.
        """
        values = dict(plain)
        check_written(output / "config.yaml", values, cls)
        return cls(**{**values, "output": output})


RunConfig = RestorationConfig  # its name in earlier versions


@dataclass(frozen=True)
class ScoreConfig:
    """Options of a scoring of a finished run, which by default takes phantoms of the shifted generator.

    Args:
        run: folder of a finished `medaccel restoration run`.
        dicom: folder of a PET series; exposures of this patient are simulated.
        realisations: independent noise realisations of the `dicom` patient.
        truth: how the noise of the `dicom` patient's own image is removed before exposures of it are simulated:
            non-local means, a Gaussian or total variation. Each favours methods that are like it; once several are
            scored, the report says whether the ranking of the methods holds.
        test_studies: folder of study folders.
        test_phantoms: how many phantoms of the shifted generator, if neither `dicom` nor `test_studies` is given.
        methods: some of the run's; by default all.
        samples: how many samples the diffusion methods draw of a volume; by default as many as their settings say.
        sampled_studies: number of studies, from the first on, on which those methods are scored; by default all.
        curve_seconds: further exposures, s, such as [10, 30, 45, 60, 75], on which the methods that restore any
            exposure are scored: the share of the limit as a curve. Classical methods take their nearest fitted
            strength.
        curve_studies: number of studies, from the first on, of that curve; by default all.
        observer_phantoms: number of test phantoms with faint lesions, which model observers look for in noise
            realisations with and without them; 0 for none.
        observer_realisations: noise realisations of each of those phantoms with its lesions, and as many without.
        name: name of the results' folder in the run's `scored`; by default it says what the studies are. It is a
            plain name, and not one of the run's own files.
        check_units: refuse studies that can't be in SUV, or whose CT is not in HU.
    """

    run: Path
    dicom: Path | None = None
    realisations: int = 10
    truth: Literal["nlm", "gaussian", "tv"] = "nlm"
    test_studies: Path | None = None
    test_phantoms: int = 20
    methods: tuple[str, ...] = ()
    samples: int | None = None
    sampled_studies: int | None = None
    curve_seconds: tuple[int, ...] = ()
    curve_studies: int | None = None
    observer_phantoms: int = 0
    observer_realisations: int = 8
    name: str | None = None
    check_units: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dicom is not None and self.test_studies is not None:
            raise ValueError("dicom and test_studies are both given; expected at most one of them")
        for name in ("test_phantoms", "realisations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a whole number >= 1")
        if self.samples is not None and self.samples < 2:
            raise ValueError(f"samples is {self.samples}; expected at least 2, so that they have a deviation")
        for name in ("sampled_studies", "curve_studies"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a whole number >= 1")
        if self.truth != "nlm" and self.dicom is None:
            raise ValueError(f"truth is {self.truth!r} without dicom; only a measured patient's truth is made so")
        if any(t < 1 for t in self.curve_seconds) or len(set(self.curve_seconds)) != len(self.curve_seconds):
            raise ValueError(f"curve_seconds is {list(self.curve_seconds)}; expected exposures > 0 in s, each once")
        if self.observer_phantoms < 0 or self.observer_realisations < 3:
            raise ValueError(
                f"observer_phantoms is {self.observer_phantoms} and observer_realisations "
                f"{self.observer_realisations}; expected 0 or more, and 3 or more, so that there is a deviation"
            )
        if self.observer_phantoms and (self.dicom is not None or self.test_studies is not None):
            raise ValueError(
                "observer_phantoms is given with dicom or test_studies; expected it with simulated phantoms alone, "
                "whose lesions can be left out"
            )
        if not _NAME.fullmatch(self.label):
            source = f"name is {self.label!r}" if self.name is not None else f"test_studies is {self.test_studies}"
            advice = "" if self.name is not None else "; --name gives one"
            raise ValueError(
                f"{source}; expected the name of a folder, without a path: letters, digits, and _ . + - and spaces "
                f"within{advice}"
            )
        if self.label.lower() in _RESERVED or (self.dicom is not None and self.label in _STUDIES):
            raise ValueError(f"name is {self.label!r}, which the run's own files have; expected another --name")

    @property
    def label(self) -> str:
        """Returns the name of the results' folder."""
        if self.name is not None:
            return self.name
        if self.dicom is not None:
            return "patient" if self.truth == "nlm" else f"patient_{self.truth}"
        return "phantoms" if self.test_studies is None else self.test_studies.resolve().name

    def plain(self) -> dict[str, Any]:
        """Returns the options as plain YAML and JSON values, without the run that they are applied to."""
        values = _plain(self)
        if self.check_units:
            del values["check_units"]
        del values["run"]
        # Scorings from before these options existed can continue.
        for name in ("truth", "curve_seconds", "curve_studies", "observer_phantoms", "observer_realisations"):
            if getattr(self, name) == self.__dataclass_fields__[name].default:
                del values[name]
        return values


def _plain(config: Any) -> dict[str, Any]:
    values = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    resolved = {name: str(v.resolve()) if isinstance(v, Path) else plain(v) for name, v in values.items()}
    found: dict[str, Any] = json.loads(json.dumps(resolved))
    return found


# The demo has enough steps to show in a minute or two that everything works; far too few for a good network.
DEMO_RUN = RestorationConfig(
    train_phantoms=2,
    validation_phantoms=1,
    methods=(
        "gaussian1",
        "gaussian3",
        "gaussian_mix",
        "nlm",
        "unet",
        "swin_unetr",
        "diffusion_sdedit",
        "diffusion_conditional",
    ),
    settings=SettingsByMethod(
        unet=UNetSettings(weights="pet_restoration"),
        gaussian1=GaussianSettings(epochs=4),
        gaussian3=GaussianSettings(epochs=4),
        gaussian_mix=GaussianSettings(epochs=4),
        # So few steps can't do much; small ones keep the network near the denoised copy that it starts from.
        swin_unetr=SwinSettings(steps=15, steps_per_epoch=5, learning_rate=1e-4, base="nlm"),
        diffusion_sdedit=SDEditSettings(
            steps=20,
            steps_per_epoch=5,
            roi_size=(32, 32, 32),
            channels=(8, 16, 32),
            t0=(10, 40),
            samples=2,
            sampling_steps=3,
        ),
        diffusion_conditional=ConditionalSettings(
            steps=20,
            steps_per_epoch=5,
            roi_size=(32, 32, 32),
            channels=(8, 16, 32),
            samples=2,
            sampling_steps=3,
        ),
    ),
)
DEMO_TEST_PHANTOMS = 3
