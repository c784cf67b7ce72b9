# SPDX-License-Identifier: Apache-2.0
"""The folder of a segmentation study.

config.yaml                       the options, and all settings of the cells that follow from them
splits.json                       each task's splits, and the subsets that fractions train on
data/<task>/, data/pool/          phantoms
pretraining/<init>-<n>/           a run of `medaccel pretraining run` each, or weights of another task's network
cells/<cell>/                     result.json, best.pt; error.txt of one that failed
metrics.json|csv, figures/, report.html
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from medaccel.data import write_text

GENERATED = ("data", "pretraining", "cells", "figures")


class StudyFolder:
    """Names what is in it; `start` begins or takes up a study.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "config.yaml"

    def task(self, name: str) -> Path:
        """Of a phantom task."""
        return self.path / "data" / name

    @property
    def pool(self) -> Path:
        return self.path / "data" / "pool"

    def pretraining(self, name: str) -> Path:
        return self.path / "pretraining" / name

    def cell(self, name: str) -> Path:
        return self.path / "cells" / name

    def start(self, options: Mapping[str, Any], force: bool, resume: bool, say: Callable[[str], None]) -> None:
        """Makes the folder, or takes up the study that it holds; says which.

        Args:
            options: of the study, plain values.
            force, resume, say: as the pipeline's.

        Raises:
            ValueError: the folder holds a study with other options, or something else; or there is none to resume.
            OSError: it can't be made.
        """
        if self.record.exists():
            before = {} if force else self._read()
            if not force:
                self._check_same(options, before)
                say(f"{self.path}: going on with the study that is there (the same options)")
                return
            say(f"{self.path}: starting clean (--force); what the earlier study made is removed")
            for name in GENERATED:
                shutil.rmtree(self.path / name, ignore_errors=True)
        elif resume:
            raise ValueError(f"{self.path} holds no study to resume (no config.yaml)")
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no study (no config.yaml); choose another --output")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"the output folder can't be made: {error.strerror}", str(self.path)
            ) from error
        text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
        write_text(self.record, text, force=True)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuses to run one cell where the study was not prepared, or with other options.

        Raises:
            FileNotFoundError: no study here.
            ValueError: one with other options.
        """
        if not self.record.exists():
            raise FileNotFoundError(
                f"{self.path}: holds no study yet (no config.yaml); the same command with --jobs 0 in place of "
                "--cell prepares data and pretraining for all cells"
            )
        self._check_same(options, self._read())

    def _check_same(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        differing = [name for name in {**now, **before} if before.get(name) != now.get(name)]
        if differing:
            raise ValueError(
                f"{self.path} holds a study with other options ({', '.join(differing)} differ); choose another "
                "--output, or --force to start clean"
            )

    def _read(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load(self.record.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{self.record}: can't be read ({error}); --force starts clean") from error
        if not isinstance(values, dict):
            raise ValueError(f"{self.record}: holds no options; --force starts clean")
        return values
