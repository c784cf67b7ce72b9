# SPDX-License-Identifier: Apache-2.0
"""Defines the settings of a segmentation study's parts, with their types, defaults and meanings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from medaccel.segmentation.protocol import RANDOM, SEEDS
from medaccel.studies.settings import Decay, TrainingSettings
from medaccel.studies.typed import Count, Limit, Positive, Settings, UnfitError, nearest

#: Training cases can be kept here.
CACHES = ("memory", "none")
_Cache = Annotated[str, Limit(lambda v: v in CACHES, f"one of {', '.join(CACHES)}")]


@dataclass(frozen=True, eq=False)
class PresetSettings(Settings):
    """Holds the settings of one task's network: its inputs, its training and its results.

    Args:
        preset: preset whose settings hold unless others are given: generic, Task06_Lung, Task09_Spleen,
            phantom_spleen or phantom_lung.
        spacing: voxel size that the network sees, mm, to the right, the front and up.
        window: HU that become 0 and 1.
        roi_size: voxels of a training crop and of a window of inference, multiples of 32, one of them at least 64.
            One size for both: a network with instance normalization errs in windows of another.
        overlap: share that neighbouring windows have in common.
        sw_batch_size: windows that are segmented at once.
        positive: part of the crops that are centred on foreground.
        negative: part of the crops that are centred on the rest of the body.
        flip_axes: axes along which half of the crops are flipped; 0 exchanges left and right, which makes no sense
            for an organ that has a side.
        rotate90: turn crops by multiples of 90° in the axial plane (roi_size must be square there).
        rotate: largest angle that a crop is turned by about each axis, degrees.
        zoom: largest change of a crop's size along each axis; 0.1 is 0.9 to 1.1. Voxels from outside the crop are
            background, as dark as air.
        intensity_scale: largest relative change of a crop's intensities.
        intensity_shift: largest shift of a crop's intensities, shares of the window.
        noise: largest standard deviation of added noise, share of the window.
        include_background: count the background as a class in the Dice part of the loss.
        foreground_weight: weight of a structure's voxels in the cross entropy; the background's have 1.
        foreground_prior: probability that a structure's voxels start with, by the last layer's bias (Lin et al.,
            "Focal loss", ICCV 2017); 0 leaves the bias random. Small structures are learned from the first step on.
        batch_dice: take the Dice of the batch's crops together, which rates those without foreground better.
        keep_largest: how many components are kept of each structure; 0 keeps all.
        feature_size: channels of the Swin UNETR, a multiple of 12.
        validate_every: optimizer steps between two validations.
        validation_cases: how many cases are validated on, the first ones by name; 0 takes all.
    """

    preset: str = "generic"
    spacing: tuple[float, ...] = (1.5, 1.5, 2.0)
    window: tuple[float, ...] = (-1000.0, 1000.0)
    roi_size: tuple[int, ...] = (96, 96, 96)
    overlap: float = 0.5
    sw_batch_size: int = 4
    positive: float = 1.0
    negative: float = 1.0
    flip_axes: tuple[int, ...] = ()
    rotate90: bool = False
    rotate: float = 0.0
    zoom: float = 0.0
    intensity_scale: float = 0.1
    intensity_shift: float = 0.1
    noise: float = 0.02
    include_background: bool = True
    foreground_weight: float = 1.0
    foreground_prior: float = 0.0
    batch_dice: bool = False
    keep_largest: int = 0
    feature_size: int = 48
    validate_every: int = 250
    validation_cases: int = 0


@dataclass(frozen=True, eq=False)
class SegmentationSettings(TrainingSettings, PresetSettings):
    """Holds the settings of a task's cells. The defaults are those of the preset "generic"; the other presets differ.

    Args:
        cache: where the training cases are kept: memory, or none, which reads a case for each crop.
    """

    steps: Count = 5000
    steps_per_epoch: Count = 50
    batch_size: Count = 2
    learning_rate: Positive = 4e-4
    ema_decay: Decay = 0.0  # no average: the best network on validation is chosen
    cache: _Cache = "memory"

    @classmethod
    def unknown(cls, names: Sequence[str], given: Mapping[str, Any]) -> str:
        known = sorted(cls.option_names())
        return f" names {', '.join(names)}; expected some of {', '.join(known)}{nearest(names[0], known)}"


@dataclass(frozen=True, eq=False)
class TaskOptions(Settings):
    """Describes one task of a study.

    Args:
        by_fraction: further settings at a share of the labels, by share, for every initialization alike:
            '{1.0: {steps: 1000}}', as more labels take more steps to a plateau.
        check_units: refuse data that don't look like CT in HU.
        data: folder of a Decathlon task; without it, "spleen" and "lung" are phantom tasks.
        preset: name of the preset; by default the phantoms', or "generic".
        settings: settings that differ from the preset's in this task alone, in the form of --settings.
    """

    separator: ClassVar[str] = "."

    by_fraction: dict[Any, SegmentationSettings] = field(default_factory=dict)
    check_units: bool = True
    data: Path | None = None
    preset: str | None = None
    settings: SegmentationSettings = field(default_factory=SegmentationSettings)

    def __post_init__(self) -> None:
        given = self.by_fraction
        if not isinstance(given, Mapping) or not all(isinstance(values, Mapping) for values in given.values()):
            raise UnfitError(f" is {given!r}; expected settings by fraction, {{1.0: {{…}}}}").within("by_fraction")
        super().__post_init__()


@dataclass(frozen=True, eq=False)
class PhantomSettings(Settings):
    """Describes the phantoms of a study.

    Args:
        cases: labelled cases of each phantom task.
        spacing: voxel size of the cases, mm.
        pool: how many unlabelled scans are pretrained on if `pretraining` names no scans.
        pool_spacing: voxel size of these scans, mm.
        seed: seed of the first phantom.
    """

    as_written: ClassVar[bool] = False

    cases: int = 60
    spacing: tuple[float, ...] = (4.0, 4.0, 4.0)
    pool: int = 200
    pool_spacing: tuple[float, ...] = (4.0, 4.0, 4.0)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Selection(Settings):
    """Selects the part of the grid that is run now; without a list, all of it is.

    Args:
        task: tasks.
        init: initializations.
        fraction: shares of the labels.
        seed: seeds.
    """

    as_written: ClassVar[bool] = False

    task: tuple[str, ...] = ()
    init: tuple[str, ...] = ()
    fraction: tuple[float, ...] = ()
    seed: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class PrimarySettings(Settings):
    """Names the comparison that the report begins with.

    Args:
        task: task of the comparison.
        fraction: share of the labels.
        init: initialization that is tested.
        against: initialization that it is compared with.
        seeds: seeds of the compared runs.
        expected: expected gain, Dice points.
        none: true leaves the primary comparison out.
    """

    as_written: ClassVar[bool] = False

    task: str = "spleen"
    fraction: float = 0.2
    init: str = "instance_pixel"
    against: str = RANDOM
    seeds: tuple[int, ...] = SEEDS
    expected: float = 3.0
    none: bool = False


@dataclass(frozen=True, eq=False)
class IllustrationSettings(Settings):
    """Names a scan that a cell's model is shown on.

    Args:
        image: file of the scan.
        organs: file of a label map, for the truth.
        label: value of the structure in the label map.
        task: task of the cell.
        fraction: share of the cell's labels; null is the largest.
        init: initialization of the cell; null is the primary comparison's.
        seed: seed of the cell; null is the first.
    """

    image: str = ""
    organs: str = ""
    label: int = 1
    task: str = ""
    fraction: float | None = None
    init: str | None = None
    seed: int | None = None
