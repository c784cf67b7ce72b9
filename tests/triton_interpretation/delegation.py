# SPDX-License-Identifier: Apache-2.0
"""Tests marked `interpreted` run in a process that has TRITON_INTERPRET=1, those marked `fake_cuda` in one whose
torch believes in a GPU; their results show in this one.

Triton decides at import whether @triton.jit interprets or compiles, and torch whether there is a GPU, so these tests
cannot share a process with others. Here each marked test is replaced, after collection, by a stand-in of the same
name. The first stand-in of a file to run starts one child pytest for all the marked tests that were selected in that
file (of one kind); under pytest-xdist the other workers wait for its answer. Use: import the hooks below into a
conftest.py.

To debug one test in the ordinary way: `TRITON_INTERPRET=1 pytest FILE -k NAME`; or, with the library's path (it is in
the tests' cache), `MEDACCEL_FAKE_CUDA=… pytest -p tests.fake_cuda.preload FILE -k NAME`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cuda.library import library

CHILD_FOLDER = "MEDACCEL_INTERPRETED_TESTS"  # set in a child: where its orders lie and its reports go
TIMEOUT_S = 900.0
KINDS = {  # the marker of a kind, and the variable that is set in its child
    "interpreted": "TRITON_INTERPRET",
    "fake_cuda": "MEDACCEL_FAKE_CUDA",  # the library that fakes a GPU
}

_ANSWERS = pytest.StashKey["_Answers"]()


def pytest_configure(config: pytest.Config) -> None:
    for kind, variable in KINDS.items():
        config.addinivalue_line("markers", f"{kind}: runs in a process of its own with {variable}")
    folder = os.environ.get(CHILD_FOLDER)
    if folder and not config.pluginmanager.has_plugin("interpreted-recorder"):
        config.pluginmanager.register(_Recorder(config, Path(folder)), "interpreted-recorder")


@pytest.hookimpl(trylast=True)  # after -k, -m and --deselect
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(os.environ.get(variable, "0") != "0" for variable in KINDS.values()):
        return
    wanted: dict[Path, list[str]] = {}
    kinds: dict[Path, str] = {}
    for number, item in enumerate(items):
        kind = next((kind for kind in KINDS if item.get_closest_marker(kind)), None)
        if isinstance(item, pytest.Function) and kind is not None:
            assert kinds.setdefault(item.path, kind) == kind, f"{item.path} has tests of two kinds"
            wanted.setdefault(item.path, []).append(item.nodeid)
            assert item.parent is not None  # a function lies in a module
            items[number] = _StandIn.from_parent(item.parent, name=item.name, location=item.reportinfo())
    if wanted:
        config.stash[_ANSWERS] = _Answers(config, wanted, kinds)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _ANSWERS in config.stash:
        config.stash[_ANSWERS].clean_up()


class _Recorder:
    """In the child: keeps to the ordered tests, and writes each report down as it comes."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.ordered = set(json.loads((folder / "tests.json").read_text()))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.ordered]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with (self.folder / "reports.jsonl").open("a") as file:
            file.write(json.dumps(data, default=str) + "\n")


class _Failed(Exception):
    """Holds the child's message on a test, to be shown unchanged."""


class _StandIn(pytest.Item):
    """Shows the child's result of the test whose name it bears."""

    def __init__(self, *, location: tuple[Any, int | None, str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._location_of_test = location

    def runtest(self) -> None:
        reports, output = self.config.stash[_ANSWERS].of(self.path, self.nodeid)
        if not any(report.when == "teardown" for report in reports):
            raise _Failed(f"{self.nodeid} did not finish in its process:\n{output}")
        for report in reports:
            if report.failed:
                raise _Failed("\n".join([report.longreprtext, *(f"{n}:\n{text}" for n, text in report.sections)]))
        for report in reports:
            if report.skipped and hasattr(report, "wasxfail"):
                pytest.xfail(report.wasxfail)
            if report.skipped:
                pytest.skip(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, _Failed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self._location_of_test


class _Answers:
    """The children's reports, by file; one child a file, whichever worker needs it first."""

    def __init__(self, config: pytest.Config, wanted: dict[Path, list[str]], kinds: dict[Path, str]) -> None:
        self.config, self.wanted, self.kinds = config, wanted, kinds
        self._known: dict[Path, tuple[dict[str, list[pytest.TestReport]], str]] = {}
        # Under pytest-xdist each worker's --basetemp is a folder inside the run's common one.
        shared: str | None = config.getoption("basetemp") if "PYTEST_XDIST_WORKER" in os.environ else None
        self.alone = shared is None
        self.folder = Path(shared).parent / "interpreted" if shared else Path(tempfile.mkdtemp())

    def clean_up(self) -> None:
        if self.alone:
            shutil.rmtree(self.folder, ignore_errors=True)

    def of(self, path: Path, nodeid: str) -> tuple[list[pytest.TestReport], str]:
        """Returns (reports of one test, tail of the child's output)."""
        if path not in self._known:
            folder = self._answer_folder(path)
            reports: dict[str, list[pytest.TestReport]] = {}
            for report in self._read(folder / "reports.jsonl"):
                reports.setdefault(report.nodeid, []).append(report)
            self._known[path] = reports, (folder / "output.txt").read_text()[-6000:]
        known, output = self._known[path]
        return known.get(nodeid, []), output

    def _read(self, file: Path) -> Iterable[pytest.TestReport]:
        for line in file.read_text().splitlines() if file.exists() else ():
            data = json.loads(line)
            yield self.config.hook.pytest_report_from_serializable(config=self.config, data=data)

    def _answer_folder(self, path: Path) -> Path:
        folder = self.folder / path.relative_to(self.config.rootpath).as_posix().replace("/", "-")
        done = folder / "output.txt"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            deadline = time.monotonic() + TIMEOUT_S
            while not done.exists():
                if time.monotonic() > deadline:
                    raise _Failed(f"another worker's interpreting process gave no answer on {path}") from None
                time.sleep(0.2)
            return folder
        output = self._run_child(path, folder)
        (folder / "output.tmp").write_text(output)
        os.replace(folder / "output.tmp", done)  # the other workers must not see half of it
        return folder

    def _run_child(self, path: Path, folder: Path) -> str:
        (folder / "tests.json").write_text(json.dumps(self.wanted[path]))
        ours = ("PYTEST_XDIST", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {CHILD_FOLDER: str(folder)}
        command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider"]
        if self.kinds[path] == "interpreted":
            environment |= {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        else:
            try:
                environment |= {"MEDACCEL_FAKE_CUDA": str(library())}
            except RuntimeError as error:
                return f"the fake GPU can't be built:\n{error}"
            command += ["-p", "tests.fake_cuda.preload"]
        command += ["-p", "no:hypothesispytest"]  # three seconds for a summary that nobody reads
        command += ["-o", "addopts=--strict-markers", f"--rootdir={self.config.rootpath}"]
        if self.config.inipath:
            command += ["-c", str(self.config.inipath)]
        try:
            run = subprocess.run(
                command,
                cwd=self.config.rootpath,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as late:
            return f"no end after {TIMEOUT_S:.0f} s\n{late.output or ''}"
        return run.stdout + f"\nexit status {run.returncode}"
