# SPDX-License-Identifier: Apache-2.0
"""Defines the options of `medaccel segmentation run`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from medaccel.phantoms.ct_dataset import TASKS
from medaccel.pretraining.config import COARSEST, PretrainingConfig
from medaccel.pretraining.names import PRESETS
from medaccel.segmentation.protocol import (
    FRACTIONS,
    INITIALIZATIONS,
    RANDOM,
    SEEDS,
    Cell,
    check_seeds,
    make_grid,
    select,
    split_cases,
)
from medaccel.segmentation.settings import (
    IllustrationSettings,
    PhantomSettings,
    PrimarySettings,
    SegmentationSettings,
    Selection,
    TaskOptions,
)
from medaccel.studies.digest import digest
from medaccel.studies.settings import check_seeds_range
from medaccel.studies.typed import UnfitError, check_fields, nearest, plain

BACKENDS = ("loky", "dask", "ray", "sequential")
#: This initialization pretrains on the labels of another task.
SUPERVISED = "supervised"
# These options say how the work is done and what is shown beside it; figures don't depend on them.
_NO_OPTIONS = ("output", "jobs", "backend", "scheduler", "select", "illustration")
_NAME = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class SegmentationConfig:
    """Holds the options of a study; the same options give the same figures (for one number of threads and one
    processor).

    Args:
        output: folder of the run; made if missing. A second run with the same options continues where the first
            ended.
        tasks: the tasks, by name: '{spleen: {data: data/Task09_Spleen, preset: Task09_Spleen}}'. Without data,
            "spleen" and "lung" are phantom tasks.
        phantoms: the cases of phantom tasks, and the scans that are pretrained on where there are no others.
        inits: initializations: random, the presets of pretraining (nvidia, instance, instance_pixel, pixpro, all),
            supervised (pretraining on the labels of another task of the study), and any name that `weights` has.
        fractions: shares of the training half's labels.
        seeds: seeds of the runs, one split each.
        weights: given weights of initializations, by name, one file or several, which the seeds take in turn:
            '{published: [model_swinvit.pt]}'. An initialization without weights is pretrained.
        pretraining: options of `medaccel pretraining run` that all presets share. The study sets output, preset,
            tasks and seed itself.
        pretraining_seeds: how many times each preset is pretrained; seeds take the weights in turn.
        settings: settings that differ from the presets', in all tasks; the defaults below are those of "generic".
        select: the part of the grid to run now: '{task: [spleen], fraction: [0.2], init: [random]}'. The report
            covers all finished cells.
        jobs: cells at a time on this machine. 0 runs none: data and pretraining are prepared, and finished cells are
            reported.
        backend: joblib's backend: loky (processes on this machine), dask or ray (an existing cluster that sees the
            same folders), or sequential.
        scheduler: the cluster's address, such as tcp://10.0.0.1:8786.
        primary: the comparison that the report begins with, named before anything is run.
        illustration: a scan that a cell's model is shown on; no figure of the study.
    """

    #: Options of a pretraining that are none of its user's here.
    set_elsewhere: ClassVar[dict[str, tuple[str, ...]]] = {"pretraining": ("output", "preset", "tasks", "seed")}

    output: Path = Path("runs/segmentation")
    tasks: dict[str, TaskOptions] = field(default_factory=lambda: {name: TaskOptions() for name in TASKS})
    phantoms: PhantomSettings = field(default_factory=PhantomSettings)
    inits: tuple[str, ...] = INITIALIZATIONS
    fractions: tuple[float, ...] = FRACTIONS
    seeds: tuple[int, ...] = SEEDS
    weights: dict[str, list[str]] = field(default_factory=dict)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    pretraining_seeds: int = 2
    settings: SegmentationSettings = field(default_factory=SegmentationSettings)
    select: Selection = field(default_factory=Selection)
    jobs: int = 1
    backend: str = "loky"
    scheduler: str | None = None
    primary: PrimarySettings = field(default_factory=PrimarySettings)
    illustration: IllustrationSettings = field(default_factory=IllustrationSettings)

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except UnfitError as unfit:
            raise self._of_task(unfit) from None
        self._check_tasks()
        self._check_inits()
        if self.pretraining_seeds < 1:
            raise ValueError(f"pretraining_seeds is {self.pretraining_seeds}; expected a whole number >= 1")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; expected whole numbers >= 0")
        check_seeds_range("seeds", *self.seeds)
        if self.jobs < 0:
            raise ValueError(f"jobs is {self.jobs}; expected how many cells run at a time, or 0 to run none")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; expected one of {', '.join(BACKENDS)}")
        if self.backend == "dask" and self.scheduler is None:
            raise ValueError("backend is dask and scheduler is missing; expected its address, as tcp://10.0.0.1:8786")
        if self.scheduler is not None and self.backend not in ("dask", "ray"):
            raise ValueError(f"scheduler is {self.scheduler} and backend {self.backend}; expected dask or ray")
        self.chosen()  # refuses an empty grid, and an unknown selection
        self._check_primary()
        self._check_illustration()

    def cells(self) -> list[Cell]:
        """Returns the whole grid, in its fixed order."""
        counts = {init: len(self.weights.get(init, ())) or self.pretraining_seeds for init in self.inits}
        return make_grid(list(self.tasks), self.inits, self.fractions, self.seeds, counts)

    def chosen(self) -> list[Cell]:
        """Returns the cells to run now; `--cell i` is the i-th of them, from 0."""
        return select(self.cells(), self.select)

    @property
    def comparison(self) -> dict[str, Any] | None:
        """Returns the complete primary comparison; None if none is asked for."""
        if self.primary.none:
            return None
        return {name: value for name, value in self.primary.whole().items() if name != "none"}

    def pretraining_of(self, init: str, number: int, output: Path, more: Mapping[str, Any]) -> PretrainingConfig:
        """Returns the options of a preset's pretraining.

        Args:
            number: the pretraining's number, which is its seed.
            output: folder of the run.
            more: options that `pretraining` may override.

        Raises:
            ValueError: pretraining doesn't have the options, or the study sets them.
        """
        own = set(self.set_elsewhere["pretraining"]) & set(self.pretraining)
        if own:
            raise ValueError(f"pretraining names {sorted(own)}, which the study sets itself; expected other options")
        values = {**more, **self.pretraining}
        try:
            return PretrainingConfig.of(output, {**values, "preset": init, "seed": number})
        except ValueError as error:
            raise ValueError(f"pretraining: {error}") from error

    def overrides(self, task: str, fraction: float | None = None) -> dict[str, Any]:
        """Returns the settings of a task's cells that differ from its preset's: for all, or for those at one
        fraction."""
        options = self.tasks[task]
        found = {**self.settings, **options.settings}
        for key, values in options.by_fraction.items():
            if fraction is not None and float(key) == fraction:
                found.update(values)
        return found

    def donor(self, task: str) -> str:
        """Returns the task whose labels `supervised` pretrains on for a task: the next one."""
        names = list(self.tasks)
        return names[(names.index(task) + 1) % len(names)]

    def plain(self) -> dict[str, Any]:
        """Returns the options that define a run, as plain YAML and JSON values with absolute paths; those on how and
        where it runs are left out."""
        names = [one.name for one in dataclasses.fields(self) if one.name not in _NO_OPTIONS]
        values: dict[str, Any] = {name: plain(getattr(self, name)) for name in names}
        for task in values["tasks"].values():
            if task.get("data") is not None:
                task["data"] = str(Path(task["data"]).resolve())
        values["weights"] = {
            name: [str(Path(file).resolve()) for file in files] for name, files in values["weights"].items()
        }
        return json.loads(json.dumps(values, default=str))

    def digest(self) -> str:
        """Identifies the options by 12 hexadecimal digits of SHA-256."""
        return digest(self.plain())

    def _of_task(self, unfit: UnfitError) -> ValueError:
        """Returns an error in the settings of cells as a task's."""
        where = unfit.path
        if where[0] == "settings":
            task, inner = next(iter(self.tasks), ""), where[1:]
        elif where[0] == "tasks" and len(where) > 2 and where[2] in ("settings", "by_fraction"):
            task, inner = where[1], where[3 if where[2] == "settings" else 4 :]
        else:
            return unfit
        if not inner and not unfit.problem.startswith(" names"):  # no settings at all
            return unfit
        return ValueError(f"task {task}: {inner[-1] if inner else 'settings'}{unfit.problem}")

    def _check_tasks(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty; expected at least one")
        for name, task in self.tasks.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"tasks names {name!r}; expected letters, digits and _")
            if task.data is None and name not in TASKS:
                raise ValueError(
                    f"tasks.{name} has no data; expected a folder, or one of the phantoms' {list(TASKS)}"
                )
            self._check_by_fraction(name)
        for name in ("spacing", "pool_spacing"):
            steps = getattr(self.phantoms, name)
            if len(steps) != 3 or not all(0 < step <= COARSEST for step in steps):
                raise ValueError(
                    f"phantoms.{name} is {list(steps)}; expected three sizes in mm, above 0 and at most {COARSEST:g}"
                )
        check_seeds_range("phantoms.seed", self.phantoms.seed)
        for name in ("cases", "pool"):
            count = getattr(self.phantoms, name)
            if not 1 <= count <= 1000:
                raise ValueError(f"phantoms.{name} is {count!r}; expected a whole number from 1 to 1000")
        if any(task.data is None for task in self.tasks.values()):
            check_fractions([f"{i:03d}" for i in range(self.phantoms.cases)], self.fractions, "the phantom tasks")

    def _check_by_fraction(self, task: str) -> None:
        for key, values in self.tasks[task].by_fraction.items():
            if "feature_size" in values:
                raise ValueError(f"tasks.{task}.by_fraction sets feature_size; expected one for all")
            try:
                known = float(key) in self.fractions
            except (TypeError, ValueError):
                known = False
            if not known:
                raise ValueError(
                    f"tasks.{task}.by_fraction names {key!r}; expected some of {', '.join(map(str, self.fractions))}"
                )

    def _check_inits(self) -> None:
        known = (RANDOM, SUPERVISED, *PRESETS, *self.weights)
        unknown = [init for init in self.inits if init not in known]
        if unknown:
            raise ValueError(
                f"inits names {unknown}; expected some of {', '.join(dict.fromkeys(known))}"
                f"{nearest(unknown[0], known)}"
            )
        if RANDOM in self.weights:
            raise ValueError(f"weights has files for {RANDOM!r}; expected another name: that is without any")
        for init in self.inits:
            if init in PRESETS and init not in self.weights:
                self.pretraining_of(init, 0, self.output, {})
        for name, files in self.weights.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"weights names {name!r}; expected letters, digits and _")
            if not files:
                raise ValueError(f"weights.{name} is {files!r}; expected a list of files, at least one")
        if SUPERVISED in self.inits and SUPERVISED not in self.weights and len(self.tasks) < 2:
            raise ValueError("inits has 'supervised' and there is one task; expected a second one to pretrain on")

    def _check_primary(self) -> None:
        primary = self.comparison
        if primary is None:
            return
        for key, values in (
            ("task", tuple(self.tasks)),
            ("fraction", self.fractions),
            ("init", self.inits),
            ("against", self.inits),
        ):
            if primary[key] not in values:
                raise ValueError(
                    f"primary.{key} is {primary[key]!r}; expected one of the study's, {', '.join(map(str, values))}, "
                    "or primary: {none: true}"
                )
        if primary["init"] == primary["against"]:
            raise ValueError(f"primary compares {primary['init']!r} with itself; expected two initializations")
        check_seeds(self.seeds, primary["seeds"])

    def _check_illustration(self) -> None:
        if not self.illustration:
            return
        missing = {"image", "task"} - set(self.illustration)
        if missing or ("organs" in self.illustration) != ("label" in self.illustration):
            raise ValueError(
                f"illustration is {dict(self.illustration)}; expected image and task, and organs together with label"
            )
        if self.illustration.task not in self.tasks:
            raise ValueError(
                f"illustration.task is {self.illustration.task!r}; expected one of {', '.join(self.tasks)}"
            )


def check_fractions(names: Sequence[str], fractions: Sequence[float], whose: str) -> None:
    """Refuses fractions that leave no case to train on.

    Raises:
        ValueError: a fraction leaves no case, or there are too few cases to split.
    """
    try:
        split = split_cases(names, 0)
        for fraction in fractions:
            split.subset(fraction)
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from error
