# SPDX-License-Identifier: Apache-2.0
"""Runs the cells of a study through joblib: on this machine's processes, on a cluster, or one after the other.

A cell writes all its files into its folder, result.json last. A cell that has this file isn't run again, so a grid
that was killed, or whose cluster lost a machine, continues when it is started again. A cell that fails leaves
error.txt, and the others run on.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medaccel.data import write_text
from medaccel.data.msd import MSDDataset
from medaccel.segmentation.protocol import Cell, Split
from medaccel.segmentation.run_folder import ERROR, RESULT
from medaccel.studies.lock import locked
from medaccel.studies.run_folder import remove_temporaries
from medaccel.training import ranks

# This file exists while a cell runs, and stays if its process is killed.
_BEGUN = "begun"
#: It has the signature of `medaccel.segmentation.cell.run_cell`.
RunCell = Callable[..., Mapping[str, Any]]
_PATIENCE = "20s"  # a scheduler must answer within this time


@dataclass(frozen=True)
class Work:
    """Holds a cell with everything that it needs; it can be sent to another process.

    Args:
        cell, dataset, split, settings, weights: the arguments of `run_cell`.
        folder: the cell's folder.
    """

    cell: Cell
    dataset: MSDDataset
    split: Split
    folder: Path
    settings: Mapping[str, Any]
    weights: Path | None = None

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).is_file()


def run_grid(
    works: Sequence[Work],
    *,
    jobs: int = 1,
    backend: str = "loky",
    scheduler: str | None = None,
    run: RunCell | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Runs the cells that have no result yet.

    Args:
        works: the cells, in the order in which they are begun.
        jobs: how many run at a time on this machine, one in this process, more in processes of their own, which share
            its threads. A cluster runs as many as it has threads, with its workers' own threads.
        backend: "loky", "dask", "ray" or "sequential".
        scheduler: address of the cluster, for dask and ray.
        run: replaces `medaccel.segmentation.cell.run_cell`.
        progress: show a bar over the cells.

    Returns:
        The errors of the cells that failed, by name, in a sentence each; error.txt has the whole error.

    Raises:
        ValueError: the backend's package isn't installed.
        OSError: no cluster answers at that address.
    """
    from tqdm import tqdm

    failed: dict[str, str] = {}
    waiting = [work for work in works if not work.finished]
    with tqdm(total=len(works), initial=len(works) - len(waiting), desc="cells", disable=not progress) as bar:

        def run_some(some: Sequence[Work]) -> list[Work]:
            """Returns the cells that neither ended nor failed."""
            for name, error in _in_parallel(some, jobs, backend, scheduler, run):
                bar.update()
                if error is not None:
                    failed[name] = error
            return [work for work in some if not work.finished and work.cell.name not in failed]

        while waiting := run_some(waiting):
            # A process that is killed from outside, for instance for lack of memory, takes joblib's pool with it.
            # Cells that were running at that moment are run alone: one may have asked for too much, or may only have
            # run beside it.
            alone = [work for work in waiting if (work.folder / _BEGUN).exists()] or waiting
            for work in alone:
                for lost in run_some([work]):
                    failed[lost.cell.name] = "its process was killed from outside, as for want of memory"
                    _note(lost, failed[lost.cell.name])
            waiting = [work for work in waiting if work not in alone]
    return failed


def _in_parallel(
    works: Sequence[Work], jobs: int, backend: str, scheduler: str | None, run: RunCell | None
) -> Iterator[tuple[str, str | None]]:
    """Yields the names of cells as they end, with their errors; ends early if the pool breaks."""
    if backend == "sequential":
        yield from (attempt(work, run) for work in works)
        return
    import joblib
    from joblib.externals.loky.process_executor import BrokenProcessPool

    broken: tuple[type[Exception], ...] = (BrokenProcessPool,)
    with ExitStack() as stack:
        if backend == "loky":
            count, threads = jobs, max((os.cpu_count() or 1) // jobs, 1)
            stack.enter_context(joblib.parallel_config(backend="loky", inner_max_num_threads=threads))
        else:
            count, threads = -1, None  # the workers keep their own threads
            broken += stack.enter_context(_dask(scheduler) if backend == "dask" else _ray(scheduler))
        # Each process takes one cell at a time: one that took several would leave the others idle at the end.
        # joblib's ray backend has no generator: its cells are counted when all have ended.
        order = "list" if backend == "ray" else "generator_unordered"
        parallel = joblib.Parallel(n_jobs=count, batch_size=1, pre_dispatch="all", return_as=order, verbose=0)
        try:
            yield from parallel(joblib.delayed(attempt)(work, run, threads) for work in works)
        except broken:
            return


def attempt(
    work: Work, run: RunCell | None = None, threads: int | None = None, *, progress: bool = False
) -> tuple[str, str | None]:
    """Runs a cell and returns its name, and the error in a sentence, or None if it succeeded.

    Args:
        run: the `run` of `run_grid`.
        threads: torch's threads in this process; None leaves their number.
        progress: show the cell's own bars.
    """
    if work.finished:  # a cluster repeats cells of a worker that died before it delivered their results
        return work.cell.name, None
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    work.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if ranks.rank() == 0:  # only one of torchrun's processes, which work on the same cell
            try:
                stack.enter_context(locked(work.folder, "cell"))
            except ValueError as error:
                return work.cell.name, str(error)
            remove_temporaries(work.folder)
        return _attempt(work, run, progress)


def _attempt(work: Work, run: RunCell | None, progress: bool) -> tuple[str, str | None]:
    (work.folder / _BEGUN).touch()
    try:
        if run is None:
            from medaccel.segmentation.cell import run_cell

            run = run_cell
        run(
            work.cell,
            work.dataset,
            work.split,
            work.folder,
            settings=work.settings,
            weights=work.weights,
            progress=progress,
        )
    except Exception as error:  # the other cells run after any error
        sentence = str(error).strip().partition("\n")[0] or type(error).__name__
        _note(work, traceback.format_exc())
        return work.cell.name, sentence
    finally:
        (work.folder / _BEGUN).unlink(missing_ok=True)
    (work.folder / ERROR).unlink(missing_ok=True)  # left by an earlier attempt
    return work.cell.name, None


def _note(work: Work, text: str) -> None:
    write_text(work.folder / ERROR, text.rstrip() + "\n", force=True)


def check_backend(backend: str) -> None:
    """Raises ValueError if the package of a backend isn't installed."""
    package = {"dask": "distributed", "ray": "ray"}.get(backend)
    if package is not None and find_spec(package) is None:
        raise ValueError(f"backend is {backend}, and {package} is not installed here: pip install {package}")


@contextmanager
def _dask(scheduler: str | None) -> Iterator[tuple[type[Exception], ...]]:
    """Sends joblib's jobs to an existing dask cluster; yields the errors that mean a cell took down worker after
    worker."""
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise ValueError(
            "backend is dask, and dask.distributed is not installed here: pip install distributed"
        ) from error
    import joblib

    try:
        client = Client(scheduler, timeout=_PATIENCE, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise OSError(f"no dask scheduler answers at {scheduler} ({error})") from error
    with client, joblib.parallel_config(backend="dask", client=client):
        yield (KilledWorker,)


@contextmanager
def _ray(scheduler: str | None) -> Iterator[tuple[type[Exception], ...]]:
    """Sends joblib's jobs to an existing ray cluster; yields the errors that mean a cell took down its worker."""
    try:
        import ray
        from ray.exceptions import RayActorError
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise ValueError("backend is ray, and ray is not installed here: pip install ray") from error
    import joblib

    ray.init(address=scheduler or "auto", ignore_reinit_error=True)
    register_ray()
    with joblib.parallel_config(backend="ray"):
        yield (RayActorError,)
