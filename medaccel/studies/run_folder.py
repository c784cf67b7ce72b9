# SPDX-License-Identifier: Apache-2.0
"""Keeps the folder of a run, which is begun once, continued with the same options, and refused to others."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import yaml

from medaccel.data.files import write_text
from medaccel.studies.inputs import INPUTS
from medaccel.studies.lock import LOCK, OWNER, busy, locked
from medaccel.studies.settings import before_work

REPORT = "report.html"
# This file lists the folders that hold the runs which this one replaces.
_REPLACED = ".replaced"
_TEMPORARY = ".tmp-"
# If several runs write at the same time, a temporary file counts as abandoned after so many seconds.
_SHARED, _GIVEN_UP = "cache", 600.0


class OptionsFolder:
    """Describes a folder whose config.yaml records the options that made its content.

    Args:
        path: the folder.

    Attributes:
        record: the path of config.yaml.
    """

    #: Messages call the folder's content by this name.
    noun: ClassVar[str] = "run"
    #: These patterns match files and folders that a clean start moves aside, and folders that every start makes.
    generated: ClassVar[tuple[str, ...]] = ()
    folders: ClassVar[tuple[str, ...]] = ()
    #: These patterns match files that an interrupted run continues from, and folders that other processes work in.
    worth: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "config.yaml"

    @contextmanager
    def session(
        self, options: Mapping[str, Any], force: bool, resume: bool, say: Callable[[str], None]
    ) -> Iterator[None]:
        """Makes the folder, or takes up its content, and keeps every other process out of it for the block.

        With `force`, an earlier run's files are moved aside, and removed when the new run has its report. If the
        block fails before it has made anything to continue from, the earlier run comes back.

        Args:
            options: plain YAML values.
            force: begin anew if the folder holds a run, whatever its options.
            resume: refuse a folder that holds nothing.
            say: a function that is called with each line of progress.

        Raises:
            ValueError: the folder holds a run with other options, or something else; it holds no run to resume;
                another process is working in it.
            OSError: the folder can't be made.
        """
        with before_work():
            self.refuse(options, force, resume)
        missing = next((one for one in reversed((self.path, *self.path.parents)) if not one.exists()), None)
        with before_work():
            self._make()
        with ExitStack() as stack:
            try:
                with before_work():
                    stack.enter_context(locked(self.path, self.noun))
                    self._undo_interrupted()
                    self.refuse(options, force, resume)  # another process may have come in between
                    self._refuse_busy(force)
            except BaseException:
                if missing is not None:
                    with suppress(OSError):
                        self.path.rmdir()
                raise
            remove_temporaries(self.path)
            self._start(options, force, say)
            try:
                yield
            except BaseException:
                self._settle(say, failed=True)
                raise
            self._settle(say)

    def refuse(self, options: Mapping[str, Any], force: bool, resume: bool) -> None:
        """Refuses everything that `session` would refuse; makes and removes nothing.

        Raises:
            ValueError: `session` would raise it.
            OSError: the folder can't be made, or written.
        """
        if self.record.exists():
            if not force:
                self.check_same(options, self.options())
        elif (self.path / _REPLACED).exists():
            return  # killed while it moved a run aside, which `session` undoes
        elif resume:
            raise ValueError(f"{self.path} holds no {self.noun} to resume (no config.yaml)")
        elif self.path.exists() and (not self.path.is_dir() or any(map(self._foreign, self.path.iterdir()))):
            raise ValueError(
                f"{self.path} is not empty and holds no {self.noun} (no config.yaml); choose another --output"
            )
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            number = errno.EACCES if there.is_dir() else errno.ENOTDIR
            raise OSError(number, f"the output folder can't be made: {os.strerror(number)}", str(self.path))

    def _foreign(self, path: Path) -> bool:
        """Tells whether a file in a folder without config.yaml comes from elsewhere, and not from a start that was
        killed."""
        begun = path.name in self.folders and path.is_dir() and not any(path.iterdir())
        return not (begun or path.name in (LOCK, OWNER) or path.name.startswith(_TEMPORARY))

    def _refuse_busy(self, force: bool) -> None:
        """Raises if other processes work in a part of the folder, since a clean start would pull it away from under
        them."""
        for pattern in self.parts if force else ():
            for part in self.path.glob(pattern):
                if busy(part):
                    raise ValueError(f"{part}: a process is working there; wait until it has ended, then use --force")

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"the output folder can't be made: {error.strerror}", str(self.path)
            ) from error

    def _start(self, options: Mapping[str, Any], force: bool, say: Callable[[str], None]) -> None:
        if self.record.exists() and not force:
            if not self.ended:
                said = f"resuming the {self.noun} that is there (the same options); --force starts clean"
                say(f"{self.path}: {said}")
        else:
            if self.record.exists():
                aside = self._move_aside()
                say(
                    f"{self.path}: starting clean (--force); what the earlier {self.noun} made is kept in {aside} "
                    "until this one has its report"
                )
            self.write(options)
        for name in self.folders:
            (self.path / name).mkdir(exist_ok=True)

    def _settle(self, say: Callable[[str], None], failed: bool = False) -> None:
        """Removes the replaced runs if the folder has a report; brings them back if it has nothing to continue
        from."""
        asides = self._asides()
        if not asides:
            return
        if (self.path / REPORT).exists():
            for aside in asides:
                shutil.rmtree(aside, ignore_errors=True)
            (self.path / _REPLACED).unlink(missing_ok=True)
        elif failed and not any(any(self.path.glob(pattern)) for pattern in self.worth):
            self._bring_back()
            say(f"{self.path}: nothing was made; the earlier {self.noun} is back")
        else:
            say(
                f"{', '.join(map(str, asides))}: the earlier {self.noun}, kept until this one has its report (the "
                "same command without --force goes on)"
            )

    def _asides(self) -> list[Path]:
        """Lists the folders that the replaced runs were moved to."""
        record = self.path / _REPLACED
        if not record.exists():
            return []
        return [Path(line) for line in record.read_text(encoding="utf-8").splitlines() if Path(line).is_dir()]

    def _move_aside(self) -> Path:
        """Renames a run's files one after the other; config.yaml goes last, and so shows that all have gone."""
        whole = self.path.resolve()
        # Beside the folder, unless that is another file system or not ours to write.
        beside = whole.parent.stat().st_dev == whole.stat().st_dev and os.access(whole.parent, os.W_OK | os.X_OK)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for number in itertools.count():
            name = f"replaced-{stamp}" + (f"-{number}" if number else "")
            aside = whole.with_name(f"{whole.name}.{name}") if beside else whole / name
            if not aside.exists():
                break
        listed = [*map(str, self._asides()), str(aside)]
        write_text(self.path / _REPLACED, "\n".join(listed) + "\n", force=True)
        aside.mkdir()
        for entry in self._made():
            os.rename(entry, aside / entry.name)
        os.rename(self.record, aside / self.record.name)
        return aside

    def _made(self) -> list[Path]:
        """Lists a run's files, without its config.yaml."""
        names = [path for pattern in (*self.generated, INPUTS, REPORT) for path in self.path.glob(pattern)]
        return list(dict.fromkeys(names))

    def _bring_back(self) -> None:
        *others, aside = self._asides()
        for entry in (*self._made(), self.record):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        self._move_back(aside, others)

    def _undo_interrupted(self) -> None:
        """Undoes the start of a process that was killed while it moved a run aside, or before it began its own: it
        left no run here."""
        asides = self._asides()
        if asides and not (self.record.exists() and (asides[-1] / self.record.name).exists()):
            self._move_back(asides[-1], asides[:-1])
        elif not asides:
            (self.path / _REPLACED).unlink(missing_ok=True)

    def _move_back(self, aside: Path, others: Sequence[Path]) -> None:
        for entry in sorted(aside.iterdir(), key=lambda path: path.name == self.record.name):
            os.rename(entry, self.path / entry.name)
        aside.rmdir()
        if others:
            write_text(self.path / _REPLACED, "\n".join(map(str, others)) + "\n", force=True)
        else:
            (self.path / _REPLACED).unlink(missing_ok=True)

    @property
    def ended(self) -> bool:
        """Tells whether nothing is left to resume, as far as that shows before anything is read."""
        return False

    def check_same(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Refuses options that differ from the folder's.

        Raises:
            ValueError: some options differ; the message names them.
        """
        differing = [name for name in {**now, **before} if before.get(name) != now.get(name)]
        if differing:
            raise ValueError(
                f"{self.path} holds a {self.noun} with other options ({', '.join(differing)} differ); choose another "
                "--output, or --force to start clean"
            )

    def options(self) -> dict[str, Any]:
        """Returns the options that the folder was begun with."""
        return self.read()

    def read(self) -> dict[str, Any]:
        """Returns the whole content of config.yaml.

        Raises:
            ValueError: the file can't be read, or holds no options.
        """
        try:
            values = yaml.safe_load(self.record.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{self.record}: can't be read ({error}); --force starts clean") from error
        if not isinstance(values, dict):
            raise ValueError(f"{self.record}: holds no options; --force starts clean")
        return values

    def write(self, values: Mapping[str, Any]) -> None:
        """Replaces config.yaml, atomically."""
        write_text(self.record, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), force=True)


def remove_temporaries(folder: Path) -> None:
    """Removes files that killed processes left half-written in a folder and below; leaves parts where a process works
    alone."""
    for root, folders, files in os.walk(folder):
        here = Path(root)
        for name in [name for name in (*folders, *files) if name.startswith(_TEMPORARY)]:
            with suppress(OSError):
                path = here / name
                if here.name == _SHARED and time.time() - path.stat().st_mtime < _GIVEN_UP:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        folders[:] = [name for name in folders if not name.startswith(_TEMPORARY) and not busy(here / name)]
