# SPDX-License-Identifier: Apache-2.0
"""`segmentation run` with cells that take no time: files, what is run again, what is refused."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medaccel.segmentation.pipeline import run
from medaccel.segmentation.report import examples as report_examples
from medaccel.segmentation.study import settings_of
from medaccel.studies.lock import locked
from tests.segmentation.fake_cells import fake_cell, fake_pretraining
from tests.segmentation.made import NONE, make_config, run_fake, runs


def test_the_folder_holds_all_that_was_promised(tmp_path: Path, task: Path):
    config = make_config(tmp_path / "study", task)
    report, lines = run_fake(config)
    assert report == config.output / "report.html"
    options = yaml.safe_load((config.output / "config.yaml").read_text())
    assert options["seeds"] == [0, 1, 2]
    splits = json.loads((config.output / "splits.json").read_text())["spleen"]
    assert [split["seed"] for split in splits] == [0, 1, 2]
    assert len(splits[0]["subsets"]["0.34"]) == 1
    assert sorted(runs(config.output)) == sorted(
        [*(cell.name for cell in config.cells()), "instance_pixel-0", "instance_pixel-1"]
    )
    with (config.output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 3
    assert {row["cell"] for row in rows} == {cell.name for cell in config.cells()}
    metrics = json.loads((config.output / "metrics.json").read_text())
    assert metrics["cells"] == {"planned": 12, "finished": 12}
    assert metrics["config_digest"] == config.digest()
    means = {(g["init"], g["fraction"]): g["dice"]["mean"] for g in metrics["groups"]}
    assert metrics["primary"]["result"]["difference"] == pytest.approx(
        means["instance_pixel", 0.34] - means["random", 0.34]
    )
    assert len(list((config.output / "figures").glob("*.png"))) >= 5
    assert "Primary comparison" in lines[-2]


def test_seeds_take_the_weights_in_turn(tmp_path: Path, task: Path):
    config = make_config(tmp_path, task)
    assert [c.pretraining for c in config.cells() if c.init == "instance_pixel" and c.fraction == 1] == [0, 1, 0]
    given = replace(config, inits=("random", "published"), weights={"published": ["a.pt"]}, primary=NONE)
    assert {c.pretraining for c in given.cells()} == {0}


def test_more_labels_may_have_more_steps(tmp_path: Path, task: Path):
    tasks = {"spleen": {"data": str(task), "settings": {"steps": 400}, "by_fraction": {1.0: {"steps": 900}}}}
    config = make_config(tmp_path / "run", task, tasks=tasks, inits=("random",), primary=NONE)
    path, _ = run_fake(config)
    seen = {file.parent.name: json.loads(file.read_text()) for file in (path.parent / "cells").glob("*/result.json")}
    assert len(seen) == 6
    for content in seen.values():
        assert content["settings"]["steps"] == (900 if content["cell"]["fraction"] == 1.0 else 400)
    assert settings_of(config, "spleen")["steps"] == 400


def test_a_second_run_runs_nothing_again_and_reports_the_same(tmp_path: Path, task: Path):
    config = make_config(tmp_path / "study", task)
    run_fake(config)
    before = (config.output / "metrics.csv").read_bytes(), (config.output / "metrics.json").read_bytes()
    (config.output / "cells" / config.cells()[4].name / "result.json").unlink()
    _, lines = run_fake(config)
    assert "resuming the study that is there" in lines[0]
    counts = runs(config.output)
    assert counts.pop(config.cells()[4].name) == 2
    assert {name: count for name, count in counts.items() if count != 1 and "-seed" in name} == {}
    assert before == ((config.output / "metrics.csv").read_bytes(), (config.output / "metrics.json").read_bytes())


def test_a_part_of_the_grid_is_run_first_and_the_rest_later(tmp_path: Path, task: Path):
    part = make_config(tmp_path / "study", task, select={"fraction": [0.34], "init": ["random"]})
    _, lines = run_fake(part)
    assert len(runs(part.output)) == 3  # and no pretraining
    assert "not complete, no figure is given. Of instance_pixel there are runs of the seeds []; expected" in lines[-2]
    whole = replace(part, select={}, jobs=2, backend="sequential")
    run_fake(whole)
    assert set(runs(part.output).values()) == {1}
    assert json.loads((part.output / "metrics.json").read_text())["cells"]["finished"] == 12


@pytest.mark.slow
def test_a_study_with_other_options_is_refused_unless_forced(tmp_path: Path, task: Path):
    config = make_config(tmp_path / "study", task)
    run_fake(config)
    other = replace(config, settings={"steps": 50})
    with pytest.raises(
        ValueError, match=r"holds a study with other options \(settings, cells differ\); choose another"
    ):
        run_fake(other)
    run_fake(other, force=True)
    assert set(runs(config.output).values()) == {1}
    with pytest.raises(ValueError, match="holds no study to resume"):
        run_fake(make_config(tmp_path / "none", task), resume=True)
    with pytest.raises(ValueError, match="is not empty and holds no study"):
        run_fake(make_config(tmp_path, task))
    record = yaml.safe_load((config.output / "config.yaml").read_text())
    record["cells"]["spleen"]["learning_rate"] = 0.5  # as another version's preset could have had it
    (config.output / "config.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(ValueError, match=r"other options \(cells differ\)"):
        run_fake(other)
    (config.output / "config.yaml").write_text("[]")
    with pytest.raises(ValueError, match="holds no options; --force starts clean"):
        run_fake(config)


def test_cells_of_an_array_of_jobs_are_run_one_by_one_and_reported_later(tmp_path: Path, task: Path):
    config = make_config(tmp_path / "study", task)
    with pytest.raises(FileNotFoundError, match=r"holds no study yet .* with --jobs 0 in place of --cell"):
        run_fake(config, cell=0)
    path, lines = run_fake(replace(config, jobs=0))
    assert path == config.output
    assert "no cell has ended yet" in lines[-1]
    for number, cell in enumerate(config.cells()):
        path, _ = run_fake(config, cell=number)
        assert path == config.output / "cells" / cell.name / "result.json"
        run_fake(config, cell=number)
    assert not (config.output / "report.html").exists()
    path, _ = run_fake(replace(config, jobs=0))
    assert path.name == "report.html"
    assert {count for name, count in runs(config.output).items() if "seed" in name} == {1}
    with pytest.raises(ValueError, match="cell is 12; expected 0 to 11, one of the 12 chosen cells"):
        run_fake(config, cell=12)


def test_one_cell_does_not_prepare_what_others_would_prepare_too(tmp_path: Path, task: Path):
    config = make_config(tmp_path / "study", task, select={"init": ["random"]})
    run_fake(replace(config, jobs=0))
    with pytest.raises(FileNotFoundError, match=r"needs .*instance_pixel-0.*weights.pt, which is not there yet"):
        run_fake(replace(config, select={"init": ["instance_pixel"]}), cell=0)


def test_cells_that_fail_are_named_after_the_others_have_run(
    tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_config(tmp_path / "study", task)
    monkeypatch.setenv("FAKE_FAILURE", "spleen-random-034-seed1")
    with pytest.raises(ValueError, match=r"1 cells failed: spleen-random-034-seed1; why is in .*error.txt"):
        run_fake(config)
    assert json.loads((config.output / "metrics.json").read_text())["cells"]["finished"] == 11
    assert (config.output / "report.html").exists()
    with pytest.raises(ValueError, match="cell spleen-random-034-seed1 failed: the loss is nan"):
        run_fake(config, cell=1)
    monkeypatch.delenv("FAKE_FAILURE")
    run_fake(config)
    assert json.loads((config.output / "metrics.json").read_text())["cells"]["finished"] == 12


def test_supervised_pretraining_is_another_tasks_network(tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch):
    # What stands for networks here can't segment the report's examples.
    monkeypatch.setattr(report_examples, "_segmented", lambda checkpoint, scan: np.zeros(scan.shape, np.uint8))
    seen: dict[str, Path] = {}

    def watched(cell: Any, dataset: Any, split: Any, folder: Path, **options: Any) -> Any:
        seen[cell.name] = options["weights"]
        (folder / "best.pt").parent.mkdir(parents=True, exist_ok=True)
        (folder / "best.pt").touch()
        return fake_cell(cell, dataset, split, folder, **options)

    data = {"data": str(task)}
    config = make_config(
        tmp_path / "study",
        task,
        tasks={"one": data, "two": data},
        inits=("random", "supervised"),
        primary=NONE,
        select={"task": ["one"], "init": ["supervised"], "fraction": [0.34]},
    )
    run(config, run_cell=watched, pretrain=fake_pretraining, say=lambda line: None)
    donor = config.output / "cells" / "two-random-100-seed0"
    assert seen["one-supervised-034-seed0"] == donor / "best.pt"
    assert seen["two-random-100-seed0"] is None
    assert runs(config.output) == {
        **{f"one-supervised-034-seed{seed}": 1 for seed in range(3)},
        **{f"two-random-100-seed{seed}": 1 for seed in range(2)},
    }


@pytest.mark.slow
def test_a_grid_that_is_killed_goes_on_to_the_same_figures(tmp_path: Path, task: Path):
    """kill -9 while cells are run, twice; finished cells are not run again."""
    undisturbed = make_config(tmp_path / "undisturbed", task)
    run_fake(undisturbed)
    config = replace(undisturbed, output=tmp_path / "killed")
    script = (
        "from pathlib import Path\n"
        "from tests.segmentation.test_pipeline import make_config, run_fake\n"
        f"run_fake(make_config(Path({str(config.output)!r}), Path({str(task)!r})))\n"
    )
    environment = os.environ | {"FAKE_SECONDS": "0.2", "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    for enough in (3, 7):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2], env=environment)
        while len(list(config.output.glob("cells/*/result.json"))) < enough:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finished = {path.parent.name for path in config.output.glob("cells/*/result.json")}
    assert len(finished) < 12
    run_fake(config)
    counts = {name: count for name, count in runs(config.output).items() if "seed" in name}
    assert sum(counts.values()) <= 12 + 2  # what was run at the time of a kill is run again
    assert {counts[name] for name in finished} <= {1, 2}
    for name in ("metrics.csv", "splits.json"):
        assert (config.output / name).read_bytes() == (undisturbed.output / name).read_bytes()
    mine, its = (json.loads((c.output / "metrics.json").read_text()) for c in (config, undisturbed))
    assert mine["groups"] == its["groups"]


def test_data_that_changed_is_named(tmp_path: Path, task: Path):
    shutil.copytree(task, tmp_path / "task")
    config = make_config(tmp_path / "study", tmp_path / "task", inits=("random",), primary=NONE)
    run_fake(config)
    image, other = sorted((tmp_path / "task" / "imagesTr").iterdir())[:2]
    image.touch()
    run_fake(config)
    shutil.copy(other, image)
    for cell in (None, *range(6)):
        with pytest.raises(ValueError, match=rf"a study of other data: .*{image.name} has changed"):
            run_fake(config, cell=cell)


def test_cells_of_one_folder_run_side_by_side_but_not_the_same_one_twice(tmp_path: Path, task: Path):
    config = make_config(tmp_path / "study", task, inits=("random",), primary=NONE)
    run_fake(replace(config, jobs=0))
    busy = config.output / "cells" / config.cells()[0].name
    busy.mkdir(parents=True)
    with locked(busy, "cell"):
        with pytest.raises(ValueError, match=rf"failed: .*process {os.getpid()} on .* is working on this cell"):
            run_fake(config, cell=0)
        run_fake(config, cell=1)
        with locked(config.output, "study"):  # `--cell` beside a process that works on the rest
            run_fake(config, cell=2)
        with pytest.raises(ValueError, match="a process is working there; wait until it has ended"):
            run_fake(config, force=True)
    assert sorted(runs(config.output)) == sorted(cell.name for cell in config.cells()[1:3])
    run_fake(config)
    assert set(runs(config.output).values()) == {1}
