# SPDX-License-Identifier: Apache-2.0
"""The grid of cells: nothing is run twice, nothing is lost, whatever is killed; on processes and on a cluster."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from medaccel.data.msd import MSDDataset
from medaccel.segmentation import grid
from medaccel.segmentation.grid import Work, run_grid
from medaccel.segmentation.protocol import Cell, make_grid, split_cases
from tests.segmentation.fake_cells import fake_cell

NAMES = [f"case_{number:02d}" for number in range(12)]
DATASET = MSDDataset("Fake", Path("nowhere"), {0: "background", 1: "spleen"}, ())


def make_works(folder: Path, cells: list[Cell] | None = None) -> list[Work]:
    cells = cells or make_grid(["spleen"], ["random"], [0.5, 1.0], [0, 1, 2])
    return [
        Work(cell, DATASET, split_cases(NAMES, cell.seed), folder / cell.name, {"steps": 10}, None) for cell in cells
    ]


@pytest.fixture(autouse=True)
def _six_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every test as many cores, so that joblib keeps its processes from one test to the next."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)


def times_run(work: Work) -> int:
    path = work.folder / "runs.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def threads_cell(cell: Cell, dataset: Any, split: Any, folder: Path, **options: Any) -> dict[str, Any]:
    import torch

    fake_cell(cell, dataset, split, folder, **options)
    (folder / "threads.txt").write_text(str(torch.get_num_threads()))
    return {}


def deadly_cell(cell: Cell, dataset: Any, split: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Kills its process: once where the seed is 1, always where it is 2."""
    if cell.seed and not (cell.seed == 1 and (folder / "killed").exists()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return fake_cell(cell, dataset, split, folder, **options)


@pytest.mark.parametrize("backend", ["sequential", "loky"])
def test_finished_cells_are_not_run_again(tmp_path: Path, backend: str):
    works = make_works(tmp_path)
    fake_cell(works[2].cell, DATASET, works[2].split, works[2].folder, settings={})
    assert run_grid(works, jobs=2, backend=backend, run=fake_cell, progress=False) == {}
    assert [times_run(work) for work in works] == [1] * 6
    run_grid(works, jobs=2, backend=backend, run=fake_cell, progress=False)
    assert [times_run(work) for work in works] == [1] * 6


def test_processes_find_what_one_after_the_other_finds(tmp_path: Path):
    for backend in ("sequential", "loky"):
        run_grid(make_works(tmp_path / backend), jobs=2, backend=backend, run=fake_cell, progress=False)
    for work in make_works(tmp_path / "loky"):
        other = tmp_path / "sequential" / work.cell.name / "result.json"
        assert (work.folder / "result.json").read_bytes() == other.read_bytes()


def test_processes_share_the_cores(tmp_path: Path):
    works = make_works(tmp_path)
    run_grid(works, jobs=2, run=threads_cell, progress=False)
    assert {(work.folder / "threads.txt").read_text() for work in works} == {"3"}


def test_a_cell_that_fails_is_recorded_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    works = make_works(tmp_path)
    monkeypatch.setenv("FAKE_FAILURE", works[1].cell.name)
    failed = run_grid(works, backend="sequential", run=fake_cell, progress=False)
    assert failed == {works[1].cell.name: "the loss is nan; training stops here"}
    assert "Traceback" in (works[1].folder / "error.txt").read_text()
    assert [work.finished for work in works] == [True, False, True, True, True, True]
    monkeypatch.delenv("FAKE_FAILURE")
    assert run_grid(works, backend="sequential", run=fake_cell, progress=False) == {}
    assert not (works[1].folder / "error.txt").exists()
    assert [times_run(work) for work in works] == [1, 2, 1, 1, 1, 1]


def test_a_process_that_is_killed_takes_no_other_cell_with_it(tmp_path: Path):
    works = make_works(tmp_path, make_grid(["spleen"], ["random"], [1.0], [0, 1, 2]))
    failed = run_grid(works, jobs=2, run=deadly_cell, progress=False)
    assert set(failed) == {works[2].cell.name}
    for work in works:
        assert work.finished == (work.cell.seed != 2)
        assert (work.folder / "error.txt").exists() == (work.cell.seed == 2)
    assert "killed from outside" in (works[2].folder / "error.txt").read_text()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_loses_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("FAKE_SECONDS", "0.4")
    works = make_works(tmp_path, make_grid(["spleen"], ["random"], [0.2, 0.5, 1.0], [0, 1, 2, 3]))
    killed: list[int] = []

    def kill_one() -> None:
        running: list[Work] = []
        while not running or sum(work.finished for work in works) < 2:
            time.sleep(0.02)
            running = [work for work in works if times_run(work) and not work.finished]
        killed.append(int((running[0].folder / "runs.txt").read_text().split()[0]))
        os.kill(killed[0], signal.SIGKILL)

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        killer = threading.Thread(target=kill_one)
        killer.start()
        failed = run_grid(works, backend="dask", scheduler=cluster.scheduler_address, run=fake_cell, progress=False)
        killer.join()
    assert failed == {}
    assert all(work.finished for work in works)
    processes = [(work.folder / "runs.txt").read_text().split() for work in works]
    assert {pid for pids in processes for pid in pids} > {str(killed[0])}  # others took over
    assert sum(len(pids) for pids in processes) == len(works) + 1  # the lost cell alone was begun twice
    assert json.loads((works[0].folder / "result.json").read_text())["cell"]["task"] == "spleen"


def test_a_ray_cluster_runs_each_cell_and_outlives_a_killed_worker(tmp_path: Path):
    """The test needs ray: pip install ray."""
    ray = pytest.importorskip("ray")
    works = make_works(tmp_path, make_grid(["spleen"], ["random"], [1.0], [0, 1, 2]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        failed = run_grid(works, backend="ray", run=deadly_cell, progress=False)
    finally:
        ray.shutdown()
    assert set(failed) == {works[2].cell.name}
    assert [work.finished for work in works] == [True, True, False]


def test_a_cluster_that_is_not_there_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(grid, "_PATIENCE", "1s")
    with pytest.raises(OSError, match=r"no dask scheduler answers at tcp://127\.0\.0\.1:1"):
        run_grid(make_works(tmp_path), backend="dask", scheduler="tcp://127.0.0.1:1", run=fake_cell, progress=False)


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_backend_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, package: str
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"backend is {backend}, and .* not installed here: pip install {package}"):
        run_grid(make_works(tmp_path), backend=backend, scheduler="tcp://x:1", run=fake_cell, progress=False)
