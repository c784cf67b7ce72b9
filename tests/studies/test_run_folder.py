# SPDX-License-Identifier: Apache-2.0
"""A run's folder is begun, continued, replaced, held by one process, and cleaned of a killed run's remains."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

from medaccel.data import write_text
from medaccel.studies import run_folder
from medaccel.studies.inputs import check_inputs, differences, record
from medaccel.studies.lock import busy, locked
from medaccel.studies.run_folder import OptionsFolder

OLD, NEW = {"seed": 0}, {"seed": 1}


class Folder(OptionsFolder):
    generated: ClassVar[tuple[str, ...]] = ("fits", "metrics.json")
    folders: ClassVar[tuple[str, ...]] = ("fits",)
    worth: ClassVar[tuple[str, ...]] = ("fits/*.ckpt",)
    parts: ClassVar[tuple[str, ...]] = ("scored/*",)


def _quiet(_: str) -> None:
    pass


def _finished(path: Path) -> Folder:
    folder = Folder(path)
    with folder.session(OLD, False, False, _quiet):
        (path / "fits" / "a.ckpt").write_text("old")
        (path / "metrics.json").write_text("old")
        (path / "report.html").write_text("old")
    (path / "notes.txt").write_text("mine")
    return folder


def _fail(folder: Folder, options: dict[str, int], made: str, error: type[BaseException] = ValueError) -> list[str]:
    """A clean start that makes a file and fails; what it says."""
    said: list[str] = []

    def start() -> None:
        with folder.session(options, True, False, said.append):
            (folder.path / made).write_text("hours of work")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        start()
    return said


def _is_the_old_run(path: Path) -> bool:
    return all((path / name).read_text() == "old" for name in ("fits/a.ckpt", "metrics.json", "report.html"))


def test_a_folder_is_left_without_a_trace_of_the_lock(tmp_path: Path):
    _finished(tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["config.yaml", "fits", "metrics.json", "notes.txt", "report.html"]


def test_the_earlier_run_goes_when_the_new_one_has_its_report(tmp_path: Path):
    folder = _finished(tmp_path / "run")
    with folder.session(NEW, True, False, _quiet):
        aside = next(tmp_path.glob("run.replaced-*"))
        assert _is_the_old_run(aside)
        assert not (folder.path / "report.html").exists()
        (folder.path / "report.html").write_text("new")
    assert not aside.exists()
    assert folder.options() == NEW
    assert (folder.path / "notes.txt").read_text() == "mine"
    assert not (folder.path / "metrics.json").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_the_earlier_run_comes_back_where_nothing_was_made(error: type[BaseException], tmp_path: Path):
    folder = _finished(tmp_path / "run")
    _fail(folder, NEW, "metrics.json", error)
    assert _is_the_old_run(folder.path)
    assert folder.options() == OLD
    assert list(tmp_path.glob("run.replaced-*")) == []


def test_the_earlier_run_is_kept_and_named_beside_one_to_go_on_from(tmp_path: Path):
    folder = _finished(tmp_path / "run")
    said = _fail(folder, NEW, "fits/b.ckpt")
    aside = next(tmp_path.glob("run.replaced-*"))
    assert _is_the_old_run(aside)
    assert str(aside) in said[-1]
    with folder.session(NEW, False, False, _quiet):  # the same command without --force goes on
        assert (folder.path / "fits" / "b.ckpt").exists()
        (folder.path / "report.html").write_text("new")
    assert not aside.exists()


def test_two_clean_starts_in_a_row_lose_neither_run(tmp_path: Path):
    folder = _finished(tmp_path / "run")
    for number in range(2):
        _fail(folder, {"seed": number + 1}, f"fits/{number}.ckpt")
    kept = {path.name for path in tmp_path.glob("run.replaced-*/fits/*")}
    assert kept == {"a.ckpt", "0.ckpt"}
    with folder.session({"seed": 2}, False, False, _quiet):
        (folder.path / "report.html").write_text("new")
    assert list(tmp_path.glob("run.replaced-*")) == []


@pytest.mark.parametrize("renames", range(5))
def test_a_kill_while_the_earlier_run_is_moved_aside_is_undone(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, rename, done = _finished(tmp_path / "run"), os.rename, []

    def killed(source: Path, target: Path) -> None:
        if len(done) == renames:
            os._exit(9)
        done.append(source)
        rename(source, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(run_folder.os, "rename", killed)
        monkeypatch.setattr(Folder, "write", lambda *_: os._exit(9))
        try:
            with folder.session(NEW, True, False, _quiet):
                pass
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with folder.session(OLD, False, True, _quiet):
        assert _is_the_old_run(folder.path)
    assert list(tmp_path.glob("run.replaced-*")) == []


def test_a_folder_whose_parent_can_not_be_written_keeps_the_earlier_run_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, access = _finished(tmp_path / "run"), os.access
    refused = str(tmp_path.resolve())
    monkeypatch.setattr(
        run_folder.os, "access", lambda path, mode, **more: str(path) != refused and access(path, mode, **more)
    )
    with folder.session(NEW, True, False, _quiet):
        assert _is_the_old_run(next(folder.path.glob("replaced-*")))
        (folder.path / "report.html").write_text("new")
    assert list(folder.path.glob("replaced-*")) == []


def test_what_is_refused_makes_and_removes_nothing(tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years")
    _finished(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    for name, options, force, resume in (
        ("none", OLD, False, True),
        ("other", OLD, True, False),
        ("run", NEW, False, False),
        ("run/notes.txt", OLD, False, False),
        ("run/notes.txt/below", OLD, True, False),
    ):
        with pytest.raises((ValueError, OSError)), Folder(tmp_path / name).session(options, force, resume, _quiet):
            pytest.fail("begun")
    assert sorted(tmp_path.rglob("*")) == before


HOLDER = """
import sys, time
from pathlib import Path
from tests.studies.test_run_folder import Folder, OLD
with Folder(Path(sys.argv[1])).session(OLD, False, False, lambda _: None):
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_works_in_the_folder_and_a_killed_one_holds_nothing(tmp_path: Path):
    path = tmp_path / "run"
    holder = _holder(path)
    try:
        sentence = rf"process {holder.pid} on {socket.gethostname()} is working on this run"
        start = time.monotonic()
        for force in (False, True):
            with pytest.raises(ValueError, match=sentence), Folder(path).session(OLD, force, False, _quiet):
                pytest.fail("begun")
        assert time.monotonic() - start < 5
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with Folder(path).session(OLD, False, True, _quiet):
        assert busy(path)
    assert not busy(path)


def test_a_clean_start_waits_for_those_who_work_in_a_part(tmp_path: Path):
    folder = _finished(tmp_path / "run")
    (folder.path / "scored" / "mine").mkdir(parents=True)
    with locked(folder.path / "scored" / "mine", "scoring"):
        sentence = r"scored/mine: a process is working there"
        with pytest.raises(ValueError, match=sentence), folder.session(NEW, True, False, _quiet):
            pytest.fail("begun")
        with folder.session(OLD, False, False, _quiet):  # beside it is no harm
            pass
    assert _is_the_old_run(folder.path)


def test_what_a_kill_left_half_written_is_removed_but_not_what_others_write(tmp_path: Path):
    folder = _finished(tmp_path / "run")
    here = folder.path
    for name in ("scored/mine", "scored/other", "cache", "fits/deep/.tmp-folder"):
        (here / name).mkdir(parents=True)
    left = [".tmp-1.yaml", "fits/.tmp-2.pt", "fits/deep/.tmp-3.nii.gz", "scored/mine/.tmp-4", "cache/.tmp-5.pt"]
    for name in (*left, "scored/other/.tmp-6", "cache/.tmp-7.pt"):
        (here / name).write_text("half")
    os.utime(here / "cache/.tmp-5.pt", (0, 0))
    with locked(here / "scored" / "other", "scoring"), folder.session(OLD, False, False, _quiet):
        pass
    found = {str(path.relative_to(here)) for path in here.rglob(".tmp-*")}
    assert found == {"scored/other/.tmp-6", "cache/.tmp-7.pt"}


def test_a_start_that_was_killed_at_once_is_begun_anew(tmp_path: Path):
    path = tmp_path / "run"
    (path / "fits").mkdir(parents=True)
    (path / ".tmp-123456.yaml").write_text("half")
    with Folder(path).session(OLD, False, False, _quiet):
        pass
    assert sorted(p.name for p in path.iterdir()) == ["config.yaml", "fits"]


def test_inputs_are_known_by_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        file.write_text(file.name)
    (tmp_path / "run").mkdir()
    check_inputs(tmp_path / "run", "run", files)
    before = record(files)
    with monkeypatch.context() as patch:  # same size and time: not read again
        patch.setattr("medaccel.studies.inputs._known_by", lambda _: pytest.fail("read again"))
        check_inputs(tmp_path / "run", "run", files)
    os.utime(files[0], (0, 0))
    check_inputs(tmp_path / "run", "run", files)
    files[1].write_text("B")  # as long as before
    os.utime(files[1], (1, 1))
    files[2].unlink()
    write_text(tmp_path / "d", "d")
    said, _ = differences(before, [*files[:2], tmp_path / "d"])
    assert [line.removeprefix(f"{tmp_path}/") for line in said] == [
        "b has changed",
        "c was there and is not now",
        "d is new",
    ]
    with pytest.raises(ValueError, match=r"holds a run of other data: .*b has changed, .*c was there"):
        check_inputs(tmp_path / "run", "run", files[:2])
    (tmp_path / "run" / "inputs.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a record of input files"):
        check_inputs(tmp_path / "run", "run", files[:1])
