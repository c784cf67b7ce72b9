# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: begun once, taken up by the same options, and refused to others."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from medaccel.data.files import write_text


class OptionsFolder:
    """A folder whose config.yaml says which options made what is in it.

    Args:
        path: the folder.

    Attributes:
        record: the path of config.yaml.
    """

    #: What messages call that which the folder holds.
    noun: ClassVar[str] = "run"
    #: Files and folders that a clean start removes, and folders that every start makes.
    generated: ClassVar[tuple[str, ...]] = ()
    folders: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "config.yaml"

    def start(self, options: Mapping[str, Any], force: bool, resume: bool, say: Callable[[str], None]) -> None:
        """Makes the folder, or takes up what it holds; says which.

        Args:
            options: plain YAML values.
            force: begin anew where the folder holds a run, of whatever options.
            resume: refuse a folder that holds nothing.
            say: told what happens, a line at a time.

        Raises:
            ValueError: the folder holds a run with other options, or something else; or there is none to resume.
            OSError: it can't be made.
        """
        if self.record.exists():
            if not force:
                self.check_same(options, self.options())
                if not self.ended:
                    said = f"resuming the {self.noun} that is there (the same options); --force starts clean"
                    say(f"{self.path}: {said}")
                return
            say(f"{self.path}: starting clean (--force); what the earlier {self.noun} made is removed")
            for name in self.generated:
                path = self.path / name
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        elif resume:
            raise ValueError(f"{self.path} holds no {self.noun} to resume (no config.yaml)")
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(
                f"{self.path} is not empty and holds no {self.noun} (no config.yaml); choose another --output"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in self.folders:
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"the output folder can't be made: {error.strerror}", str(self.path)
            ) from error
        self.write(options)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to resume, where that can be told before anything is read."""
        return False

    def check_same(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Refuses options that are not those of the folder.

        Raises:
            ValueError: names those that differ.
        """
        differing = [name for name in {**now, **before} if before.get(name) != now.get(name)]
        if differing:
            raise ValueError(
                f"{self.path} holds a {self.noun} with other options ({', '.join(differing)} differ); choose another "
                "--output, or --force to start clean"
            )

    def options(self) -> dict[str, Any]:
        """Those that the folder was begun with."""
        return self.read()

    def read(self) -> dict[str, Any]:
        """All that config.yaml holds.

        Raises:
            ValueError: it can't be read, or holds no options.
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
