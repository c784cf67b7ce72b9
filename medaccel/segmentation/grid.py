# SPDX-License-Identifier: Apache-2.0
"""The cells of a study, run through joblib: on this machine's processes, on a cluster, or one after the other.

A cell leaves all that it makes in its folder, and result.json last. Where that is there, the cell isn't run again, so
a grid that was killed, or whose cluster lost a machine, goes on when it is started again. A cell that fails leaves
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

# There while a cell is run, and afterwards where its process was killed.
_BEGUN = "begun"
#: As `medaccel.segmentation.cell.run_cell`.
RunCell = Callable[..., Mapping[str, Any]]
_PATIENCE = "20s"  # until a scheduler is said not to answer


@dataclass(frozen=True)
class Work:
    """A cell with all that it needs; can be sent to another process.

    Args:
        cell, dataset, split, settings, weights: as `run_cell` takes them.
        folder: of the cell.
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
    """Runs those that have no result yet.

    Args:
        works: in the order in which they are begun.
        jobs: how many at a time on this machine, one in this process, more in processes of their own; each computes
            with as many threads as that leaves it. A cluster runs as many as it has threads, with the threads that
            its workers are given.
        backend: "loky", "dask", "ray" or "sequential".
        scheduler: address of the cluster, for dask and ray.
        run: stands for `medaccel.segmentation.cell.run_cell`.
        progress: show a bar over the cells.

    Returns:
        Of the cells that failed, by name, the error in a sentence; the whole is in their error.txt.

    Raises:
        ValueError: a backend whose package isn't installed.
        OSError: no cluster at that address.
    """
    from tqdm import tqdm

    failed: dict[str, str] = {}
    waiting = [work for work in works if not work.finished]
    with tqdm(total=len(works), initial=len(works) - len(waiting), desc="cells", disable=not progress) as bar:

        def run_some(some: Sequence[Work]) -> list[Work]:
            """Those that neither ended nor failed."""
            for name, error in _in_parallel(some, jobs, backend, scheduler, run):
                bar.update()
                if error is not None:
                    failed[name] = error
            return [work for work in some if not work.finished and work.cell.name not in failed]

        while waiting := run_some(waiting):
            # A process that is killed from outside, as for want of memory, takes joblib's pool with it. What was
            # run at that moment is run alone: it may be what asks for too much, or have stood beside it.
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
    """Names of cells as they end, with their errors; ends early where the pool breaks."""
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
            count, threads = -1, None  # the workers' own
            broken += stack.enter_context(_dask(scheduler) if backend == "dask" else _ray(scheduler))
        # One cell at a time: a process that took several would leave the others without at the end.
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
    """Runs a cell and returns its name, and what went wrong in a sentence, None where nothing did.

    Args:
        run: as `run_grid`'s.
        threads: of torch in this process; None leaves them.
        progress: show the cell's own bars.
    """
    if work.finished:  # a cluster repeats what ended on a worker that died before it was asked for the result
        return work.cell.name, None
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    work.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if ranks.rank() == 0:  # of torchrun's processes, which work on the same cell
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
    except Exception as error:  # whatever it is: the other cells are to run
        sentence = str(error).strip().partition("\n")[0] or type(error).__name__
        _note(work, traceback.format_exc())
        return work.cell.name, sentence
    finally:
        (work.folder / _BEGUN).unlink(missing_ok=True)
    (work.folder / ERROR).unlink(missing_ok=True)  # of an earlier attempt
    return work.cell.name, None


def _note(work: Work, text: str) -> None:
    write_text(work.folder / ERROR, text.rstrip() + "\n", force=True)


def check_backend(backend: str) -> None:
    """Raises ValueError where the package of a backend isn't installed."""
    package = {"dask": "distributed", "ray": "ray"}.get(backend)
    if package is not None and find_spec(package) is None:
        raise ValueError(f"backend is {backend}, and {package} is not installed here: pip install {package}")


@contextmanager
def _dask(scheduler: str | None) -> Iterator[tuple[type[Exception], ...]]:
    """joblib's jobs to a dask cluster that is there; yields what is raised where a cell took worker after worker."""
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
    """joblib's jobs to a ray cluster that is there; yields what is raised where a cell took its worker."""
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
