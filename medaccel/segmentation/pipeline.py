# SPDX-License-Identifier: Apache-2.0
"""Runs `medaccel segmentation run`: data, pretraining, the grid of cells, and the report on all finished cells.

Each part is resumed where it was: phantoms that are written, pretrainings and cells that have ended are kept. On a
without dask or ray, the cells are an array of jobs:

    medaccel segmentation run --config study.yaml --jobs 0        prepares data and pretraining sbatch --array=0-143 …
    medaccel segmentation run --config study.yaml --cell $SLURM_ARRAY_TASK_ID medaccel segmentation run --config
    study.yaml --jobs 0        reports

Several devices within a cell are Lightning's: `torchrun … -m medaccel.cli segmentation run … --cell i`, or with
`--backend sequential` for one cell after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from medaccel.data.msd import DATASET_JSON, MSDDataset
from medaccel.phantoms.ct_dataset import write_pool, write_task
from medaccel.pretraining.names import PRESETS
from medaccel.pretraining.settings import NetworkSettings
from medaccel.segmentation.config import SUPERVISED, SegmentationConfig
from medaccel.segmentation.grid import RunCell, attempt, check_backend, run_grid
from medaccel.segmentation.memory import expected_of_study, on_gpu
from medaccel.segmentation.protocol import RANDOM, Cell, write_splits
from medaccel.segmentation.run_folder import ERROR, RESULT, StudyFolder
from medaccel.segmentation.study import SegmentationStudy, check_data, options_of, settings_of
from medaccel.studies.inputs import INPUTS, check_inputs, differences, read, refuse_changes
from medaccel.studies.run_folder import REPORT
from medaccel.studies.settings import before_work, check_accelerator
from medaccel.training import ranks
from medaccel.training.memory import expect, local_processes

Say = Callable[[str], None]
#: It has the signature of `pretrain_preset`.
Pretrain = Callable[[SegmentationConfig, str, int, StudyFolder, int, Say], None]
_NAMED = 5  # an error names this many of the failed cells


def run(
    config: SegmentationConfig,
    *,
    force: bool = False,
    resume: bool = False,
    cell: int | None = None,
    say: Say = print,
    run_cell: RunCell | None = None,
    pretrain: Pretrain | None = None,
) -> Path:
    """Prepares data and pretraining, runs the chosen cells, and reports on all finished ones.

    Args:
        config: the options.
        force: start clean if the folder holds a study with other options, or a finished one.
        resume: refuse a folder that holds no study. (One that holds this study is resumed in any case.)
        cell: number of one of the chosen cells, from 0: that one alone is run, its inputs must exist, and no report
            is written.
        say: a function that is called with each line of progress.
        run_cell: replaces `medaccel.segmentation.cell.run_cell`.
        pretrain: replaces `pretrain_preset`.

    Returns:
        The path of report.html; of result.json if one cell was run; of the folder if no cell has ended yet.

    Raises:
        ValueError, OSError: options or data are bad, the folder holds something else, no cluster answers; or cells
            failed, which is raised after the others have run and the report is written.
    """
    with before_work():
        settings = check(config, cell=cell)
        expected = _expected(config, settings, cell) if run_cell is None and ranks.rank() == 0 else ""
    accelerator = str(next(iter(settings.values()))["accelerator"])
    ranks.join(accelerator)
    folder = StudyFolder(config.output)
    if cell is not None:
        with before_work():
            study = SegmentationStudy(config, folder, settings)
            _refuse_changed_data(study, cell)
        return _run_one(study, cell, say, run_cell)
    options = options_of(config, settings)
    alone = folder.session(options, force, resume, say) if ranks.rank() == 0 else nullcontext()
    with alone:
        if expected:
            say(expected)
        return _run(config, folder, settings, say, run_cell, pretrain)


def check(config: SegmentationConfig, *, cell: int | None = None) -> dict[str, dict[str, Any]]:
    """Refuses bad settings, devices, packages, data and weights before anything is made.

    Args:
        config: the options.
        cell: the `cell` of `run`.

    Returns:
        The settings of each task's cells.

    Raises:
        ValueError, OSError: something is refused.
    """
    settings = {name: settings_of(config, name) for name in config.tasks}
    for name in config.tasks:
        for fraction in config.fractions:
            settings_of(config, name, fraction)
        if config.backend in ("loky", "sequential") and (config.jobs or cell is not None):
            check_accelerator(f"task {name}: accelerator", settings[name]["accelerator"])
    for name, files in config.weights.items():
        for file in files if name in config.inits else ():
            if not Path(file).is_file():
                raise FileNotFoundError(f"weights.{name}: {file} not found")
    for key in ("image", "organs"):
        if key in config.illustration and not Path(config.illustration[key]).exists():
            raise FileNotFoundError(f"illustration.{key}: {config.illustration[key]} not found")
    check_backend(config.backend)
    if ranks.world_size() > 1 and cell is None and config.jobs and config.backend != "sequential":
        raise ValueError(
            f"torchrun started {ranks.world_size()} processes and backend is {config.backend}; expected sequential, "
            "or one --cell: all processes work on the same cell"
        )
    check_data(config)
    shown = {one.init: one for one in config.chosen() if one.init in PRESETS and one.init not in config.weights}
    for init in shown if cell is None else ():
        from medaccel.pretraining.pipeline import check as check_pretraining

        try:
            check_pretraining(config.pretraining_of(init, 0, config.output, {}))
        except ValueError as error:
            raise ValueError(f"pretraining: {error}") from error
    return settings


def _expected(config: SegmentationConfig, settings: Mapping[str, Mapping[str, Any]], cell: int | None) -> str:
    """Returns the sentence on the expected memory; empty if no cell is run on this machine."""
    if cell is None and not config.jobs:
        return ""
    beside = config.jobs if cell is None and config.backend == "loky" else 1  # cells at a time on this machine
    return expect(
        "the study" if cell is None else "a cell of the study",
        *expected_of_study(config, settings),
        gpu=on_gpu(next(iter(settings.values()))),
        processes=max(local_processes(), beside),
    ).sentence


def _inputs(config: SegmentationConfig, data: Mapping[str, MSDDataset]) -> list[Path]:
    """Lists the files that a study is given: volumes and labels of its tasks, and weights."""
    files = [Path(file) for name, given in config.weights.items() if name in config.inits for file in given]
    for name, dataset in data.items():
        if config.tasks[name].data is not None:
            files.append(dataset.folder / DATASET_JSON)
            files += [file for case in dataset.cases for file in (case.image, case.label)]
    return files


def _refuse_changed_data(study: SegmentationStudy, cell: int) -> None:
    """Checks for `--cell`, as a study's own run does, the data of one task; records nothing, since others may run
    beside it."""
    record, chosen = study.folder.path / INPUTS, study.config.chosen()
    if record.exists() and 0 <= cell < len(chosen):
        task = chosen[cell].task
        files = _inputs(study.config, {task: study.data[task]} if task in study.data else {})
        before = {name: known for name, known in read(record).items() if Path(name) in {f.resolve() for f in files}}
        refuse_changes(study.folder.path, "study", differences(before, files)[0])


def _run(
    config: SegmentationConfig,
    folder: StudyFolder,
    settings: Mapping[str, Mapping[str, Any]],
    say: Say,
    run_cell: RunCell | None,
    pretrain: Pretrain | None,
) -> Path:
    chosen = config.chosen()
    accelerator = str(next(iter(settings.values()))["accelerator"])
    with ranks.first_process() as first:
        if first:
            check_inputs(folder.path, "study", _inputs(config, check_data(config)))
            make_data(config, folder, chosen)
    study = SegmentationStudy(config, folder, settings)
    if ranks.rank() == 0:
        splits = {name: list(of_task.values()) for name, of_task in study.splits.items()}
        write_splits(folder.path / "splits.json", splits, config.fractions)
    pretrainings = {one.init + str(one.pretraining): one for one in chosen if study.pretrained(one)}
    for one in pretrainings.values():
        say(f"pretraining {one.init}, number {one.pretraining}: {study.weights(one)}")
        width = settings[one.task]["feature_size"]
        (pretrain or pretrain_preset)(config, one.init, one.pretraining, folder, width, say)
        ranks.join(accelerator)  # needed if a pretraining has left the group at its end
    donors = dict.fromkeys(study.donor(one) for one in chosen if study.supervised(one))
    failed = _run_cells(study, list(donors), say, run_cell, "to be fine-tuned from")
    if not failed and config.jobs:
        failed = _run_cells(study, chosen, say, run_cell, "of the study")
    report = folder.path / REPORT
    if ranks.rank() == 0:
        from medaccel.segmentation.report.write import write_report

        report = write_report(study, say)
    ranks.leave()
    if failed:
        raise ValueError(_failures(failed, folder.path, say))
    return report


def _run_cells(
    study: SegmentationStudy, cells: Sequence[Cell], say: Say, run_cell: RunCell | None, what: str
) -> dict[str, str]:
    works = [study.work(one) for one in cells]
    if works and ranks.rank() == 0:
        say(f"{len(works)} cells {what}, {sum(work.finished for work in works)} of them finished")
    return run_grid(
        works,
        jobs=max(study.config.jobs, 1),
        backend=study.config.backend,
        scheduler=study.config.scheduler,
        run=run_cell,
        progress=bool(works) and ranks.rank() == 0,
    )


def _run_one(study: SegmentationStudy, number: int, say: Say, run_cell: RunCell | None) -> Path:
    """Runs a single cell (`--cell`) beside others of an array, and so prepares nothing that they would prepare
    too."""
    with before_work():
        one = _prepared(study, number)
    chosen = study.config.chosen()
    say(f"cell {number} of {len(chosen)}: {one.name}")
    work = study.work(one)
    if not work.finished:
        _, error = attempt(work, run_cell, progress=True)
        if error is not None:
            raise ValueError(f"cell {one.name} failed: {error}; more is in {work.folder / ERROR}")
    ranks.leave()
    return work.folder / RESULT


def _prepared(study: SegmentationStudy, number: int) -> Cell:
    """Returns one of the chosen cells, if its inputs exist."""
    study.folder.check(options_of(study.config, study.settings))
    chosen = study.config.chosen()
    if not 0 <= number < len(chosen):
        raise ValueError(f"cell is {number}; expected 0 to {len(chosen) - 1}, one of the {len(chosen)} chosen cells")
    one = chosen[number]
    start = study.weights(one)
    for missing, path in ((one.task not in study.data, one.task), (start is not None and not start.exists(), start)):
        if missing:
            raise FileNotFoundError(
                f"cell {one.name} needs {path}, which is not there yet; the same command with --jobs 0 in place of "
                "--cell prepares data and pretraining for all cells"
            )
    return one


def _failures(failed: Mapping[str, str], path: Path, say: Say) -> str:
    for name, error in failed.items():
        say(f"{name}: {error}")
    more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    return (
        f"{len(failed)} cells failed: {', '.join(list(failed)[:_NAMED])}{more}; why is in "
        f"{path / 'cells'}/…/{ERROR}, and the same command runs them again"
    )


def pretrain_preset(
    config: SegmentationConfig, init: str, number: int, folder: StudyFolder, width: int, say: Say
) -> None:
    """Pretrains a preset; returns at once if it has ended already.

    Args:
        init: the preset.
        number: the pretraining's number, which is its seed.
        folder: the study's folder.
        width: channels of the network, unless the options set them.
        say: a function that is called with each line of progress.
    """
    from medaccel.pretraining.pipeline import run as pretrain

    more = {"scans": [str(folder.pool)], "cache_folder": folder.path / "pretraining" / "cache"}
    options = config.pretraining_of(init, number, folder.pretraining(f"{init}-{number}"), more)
    pretrain(replace(options, network=NetworkSettings(**{"feature_size": width, **options.network})), say=say)


def make_data(config: SegmentationConfig, folder: StudyFolder, cells: Sequence[Cell]) -> None:
    """Writes the phantoms that the cells need, and those of a task that was begun."""
    options = config.phantoms
    needed = {cell.task for cell in cells}
    needed |= {config.donor(cell.task) for cell in cells if cell.init == SUPERVISED}
    for name, task in config.tasks.items():
        path = folder.task(name)
        if task.data is None and (name in needed or (path / DATASET_JSON).exists()):
            write_task(path, name, options.cases, seed=options.seed, spacing=options.spacing)
    pretrained = any(cell.init not in (RANDOM, SUPERVISED, *config.weights) for cell in cells)
    if pretrained and not config.pretraining.scans:
        write_pool(folder.pool, options.pool, seed=options.seed, spacing=options.pool_spacing)
