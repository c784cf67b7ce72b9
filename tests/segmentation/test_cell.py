# SPDX-License-Identifier: Apache-2.0
"""Cells of the study: reproducible, resumable, and alike but for what they start from."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from medaccel.data.msd import read_dataset
from medaccel.segmentation.cell import run_cell
from medaccel.segmentation.model import checkpoint
from medaccel.segmentation.model.presets import make_settings
from medaccel.segmentation.model.training import make_network
from medaccel.segmentation.protocol import Cell, Split
from tests.segmentation.cells import SETTINGS, run_tiny

ROOT = Path(__file__).parents[2]
Finished = tuple[Path, dict[str, Any]]


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that must be the same whenever a cell is run."""
    return {key: value for key, value in result.items() if "seconds" not in key and key != "settings"}


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | more


def test_a_cell_says_what_it_found(tiny_cell: Finished):
    folder, result = tiny_cell
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "csv", "result.json", "tensorboard"]
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["cases"] == {"training": 3, "validation": 2, "test": 2}
    assert [point["step"] for point in result["curve"]] == [2, 4]
    best = max(result["curve"], key=lambda point: (point["dice"], -point["step"]))
    assert result["best"] == {"step": best["step"], "dice": best["dice"]}
    assert len(result["rows"]) == 2
    dice = sum(row["dice"] for row in result["rows"]) / 2
    assert result["dice"] == {"spleen": pytest.approx(dice)}
    assert {"hausdorff95_mm", "volume_ml", "boundary_dice"} < set(result["rows"][0])
    assert result["seconds"] > result["training_seconds"] > 0 < result["seconds_per_step"]
    assert result["initialization"] is None


def test_a_finished_cell_is_read_not_run(tiny_task: Path, tiny_cell: Finished):
    folder, result = tiny_cell
    before = (folder / "best.pt").stat().st_mtime_ns
    (folder / "last.ckpt").write_bytes(b"left by a cell that was killed before it removed it")
    assert run_tiny(tiny_task, folder) == result
    assert not (folder / "last.ckpt").exists()
    assert (folder / "best.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"result\.json: of another cell's seed; delete it to run the cell anew"):
        run_tiny(tiny_task, folder, seed=2)
    with pytest.raises(ValueError, match=r"result\.json: of another learning_rate; delete it"):
        run_tiny(tiny_task, folder, learning_rate=1e-5)


def test_a_damaged_result_is_named(tiny_task: Path, tmp_path: Path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"result\.json: not a cell's result .*; delete it to run the cell anew"):
        run_tiny(tiny_task, tmp_path)


@pytest.mark.slow
def test_a_killed_cell_ends_with_the_same_figures(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    command = [sys.executable, "-m", "tests.segmentation.cells", str(tiny_task), str(tmp_path / "cell")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    last, limit = tmp_path / "cell" / "last.ckpt", time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < torch.load(last, weights_only=True)["global_step"] < 4
    assert not (tmp_path / "cell" / "result.json").exists()
    result = run_tiny(tiny_task, tmp_path / "cell", checkpoint_minutes=0.0, accelerator="cpu")
    _same(figures(result), figures(tiny_cell[1]))
    assert not last.exists()


def _same(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            _same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            _same(one, other)
    else:
        assert first == (pytest.approx(second, rel=1e-3, abs=1e-4) if isinstance(second, float) else second)


def test_killed_between_training_and_result(tiny_task: Path, tiny_cell: Finished, tmp_path: Path, monkeypatch):
    from medaccel.segmentation import cell

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cell, "_tested", killed)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tiny_task, tmp_path)
    _same(figures(run_tiny(tiny_task, tmp_path)), figures(tiny_cell[1]))


def test_weights_are_all_that_an_initialization_changes(tiny_task: Path, tmp_path: Path, monkeypatch):
    """Same crops in the same order, the same random head; what was loaded is counted."""
    from medaccel.segmentation import cell

    class Seen(Exception):
        pass

    def seen(module, items, folder, *, seed, **_):
        raise Seen(module.network.state_dict(), [items[n]["image"].sum().item() for n in range(3)], seed)

    monkeypatch.setattr(cell, "train", seen)
    other = make_network(make_settings(SETTINGS), 2, seed=99)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "weights.pt")
    starts = []
    for init, weights in (("random", None), ("instance", tmp_path / "weights.pt")):
        with pytest.raises(Seen) as caught:
            run_tiny(tiny_task, tmp_path / init, init=init, weights=weights)
        starts.append(caught.value.args)
    (random, crops, seed), (loaded, the_same_crops, the_same_seed) = starts
    assert (crops, seed) == (the_same_crops, the_same_seed)
    for key, value in loaded.items():
        expected = random if key.startswith("out.") else other.state_dict()
        assert torch.equal(value, expected[key]), key
    assert not torch.equal(random["out.conv.conv.weight"], other.state_dict()["out.conv.conv.weight"])


def test_the_result_says_which_weights_were_loaded(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    weights = tiny_cell[0] / "best.pt"  # a cell's network: pretraining on labels
    result = run_tiny(tiny_task, tmp_path, init="supervised", weights=weights, steps=1, steps_per_epoch=1)
    report = result["initialization"]
    tensors = len(checkpoint.load(weights).state_dict)
    assert (report["loaded"], report["skipped"], report["missing"]) == (tensors - 2, 2, 2)
    assert len(report["sha256"]) == 64
    changed = tmp_path / "changed.pt"
    content = torch.load(weights, weights_only=True)
    content["state_dict"]["swinViT.patch_embed.proj.bias"] += 1
    torch.save(content, changed)
    with pytest.raises(ValueError, match=r"result\.json: of another weights; delete it"):
        run_tiny(tiny_task, tmp_path, init="supervised", weights=changed, steps=1, steps_per_epoch=1)


def test_weights_that_fit_nothing_are_refused(tiny_task: Path, tmp_path: Path):
    torch.save({"state_dict": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match=r"no weight of .*other\.pt fits the model"):
        run_tiny(tiny_task, tmp_path / "cell", init="nvidia", weights=tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pt"):
        run_tiny(tiny_task, tmp_path / "cell", init="nvidia", weights=tmp_path / "none.pt")


def test_cells_that_make_no_sense_are_refused(tiny_task: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="starts from 'instance', but none are given; expected weights"):
        run_tiny(tiny_task, tmp_path, init="instance")
    with pytest.raises(ValueError, match=r"starts from 'random', but .*w\.pt is given"):
        run_tiny(tiny_task, tmp_path, weights=tmp_path / "w.pt")
    with pytest.raises(ValueError, match="settings names epochs; expected some of"):
        run_tiny(tiny_task, tmp_path, epochs=3)
    dataset = read_dataset(tiny_task)
    names = tuple(case.name for case in dataset.cases)
    for fraction, split, message in (
        (0.1, Split(0, names[:3], names[3:5], names[5:]), "which leaves no case"),
        (1.0, Split(0, ("a",), names[3:5], names[5:]), "split names a; expected cases of PhantomSpleen"),
    ):
        with pytest.raises(ValueError, match=message):
            run_cell(Cell("spleen", "random", fraction, 0), dataset, split, tmp_path, settings=SETTINGS)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tiny_task: Path, tiny_cell: Finished, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    program = ["-m", "tests.segmentation.cells", str(tiny_task), str(tmp_path / "cell")]
    command = [sys.executable, *torchrun, *program]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "cell" / "result.json").read_text())
    one, two = figures(tiny_cell[1]), figures(result)
    assert [row["case"] for row in two["rows"]] == [row["case"] for row in one["rows"]]
    for key in ("loss", "dice"):
        found, expected = ([point[key] for point in r["curve"]] for r in (two, one))
        assert found == pytest.approx(expected, abs=2e-2)
