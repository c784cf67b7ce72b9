# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its options, its split, what it chose, and a record of every time that it was scored.

config.yaml          the options and, once the choices are made, `frozen`: what was chosen, and hashes of it
splits.json          which studies were fitted on and chosen on
studies/             simulated ones, in the layout of `medaccel.restoration.study`
fits/<method>/       logs and what an interrupted fit goes on from
checkpoints/         one file a fitted method
scored/<name>/       results on test studies; scored.json says when they were made, and with what
metrics.json|csv, figures/, report.html    on the validation studies
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from medaccel.data.files import write_text
from medaccel.restoration.config import RunConfig
from medaccel.training.digest import digest

GENERATED = ("studies", "fits", "checkpoints", "validation", "scored", "figures")


class RunFolder:
    """Opens what is there; `start` begins or takes up a run, `frozen` is what a score needs.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "config.yaml"

    def start(self, config: RunConfig, force: bool, resume: bool, say: Callable[[str], None]) -> None:
        """Makes the folder, or takes up the run that it holds; says which.

        Raises:
            ValueError: the folder holds a run with other options, or something else; or there is none to resume.
            OSError: it can't be made.
        """
        if self.record.exists():
            before = {} if force else self._read()
            before.pop("frozen", None)
            now = config.plain()
            if before == now:
                say(f"{self.path}: resuming the run that is there (the same options); --force starts clean")
                return
            if not force:
                differing = [k for k in {**now, **before} if before.get(k) != now.get(k)]
                raise ValueError(
                    f"{self.path} holds a run with other options ({', '.join(differing)} differ); "
                    "choose another --output, or --force to start clean"
                )
            say(f"{self.path}: starting clean (--force); what the earlier run made is removed")
            for name in GENERATED:
                shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / "scored.json").unlink(missing_ok=True)
        elif resume:
            raise ValueError(f"{self.path} holds no run to resume (no config.yaml)")
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run (no config.yaml); choose another --output")
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"the output folder can't be made: {error.strerror}", str(self.path)
            ) from error
        self._write(config.plain())

    def freeze(self, config: RunConfig, choices: Mapping[str, Any], best: str) -> None:
        """Records what was chosen, and the hashes that hold it fast.

        Args:
            choices: by method, plain values.
            best: the method chosen among all.
        """
        content: dict[str, Any] = {
            "options": config.digest(),
            "best": best,
            "choices": dict(choices),
            "checkpoints": self.hashes(config),
        }
        if (self.path / "scored.json").exists() and self._read().get("frozen", {}).get("digest") != digest(content):
            raise ValueError(
                f"{self.path}: this run has been scored on test studies with other choices; --force starts clean"
            )
        self._write(config.plain() | {"frozen": content | {"digest": digest(content)}})

    def frozen(self) -> tuple[RunConfig, dict[str, Any]]:
        """The options and what was chosen.

        Raises:
            FileNotFoundError: no run here, or its fits have not ended.
            ValueError: a checkpoint or a choice is not the one that was frozen.
        """
        if not self.record.exists():
            raise FileNotFoundError(f"{self.path}: holds no run (no config.yaml)")
        values = self._read()
        content = values.pop("frozen", None)
        if content is None:
            raise FileNotFoundError(
                f"{self.path}: this run has not ended (nothing is frozen); run `medaccel restoration run` again first"
            )
        config = RunConfig.of(self.path, values)
        recorded = content.pop("digest")
        if digest(content) != recorded:
            raise ValueError(f"{self.record}: what was chosen has been changed since (its digest is not {recorded})")
        if content["options"] != config.digest():
            raise ValueError(f"{self.record}: its options have been changed since the choices were made")
        changed = [name for name, found in self.hashes(config).items() if content["checkpoints"].get(name) != found]
        if changed:
            raise ValueError(
                f"{self.path / 'checkpoints'}: {', '.join(changed)} changed since the choices were made; expected "
                "the files that were chosen"
            )
        return config, content | {"digest": recorded}

    def checkpoint(self, method: str) -> Path:
        return self.path / "checkpoints" / f"{method}.pt"

    def note_score(self, entry: Mapping[str, Any]) -> int:
        """Adds to scored.json that the run was scored, with the time; returns how often on these studies by now."""
        path = self.path / "scored.json"
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entries.append({"time": now, **entry})
        write_text(path, json.dumps(entries, indent=1, ensure_ascii=False) + "\n", force=True)
        return sum(e["studies_digest"] == entry["studies_digest"] for e in entries)

    def hashes(self, config: RunConfig) -> dict[str, str]:
        """SHA-256 of each method's checkpoint that is there."""
        found = {}
        for name in config.methods:
            path = self.checkpoint(name)
            if path.exists():
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def _read(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load(self.record.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{self.record}: can't be read ({error}); --force starts clean") from error
        if not isinstance(values, dict):
            raise ValueError(f"{self.record}: holds no options; --force starts clean")
        return values

    def _write(self, values: Mapping[str, Any]) -> None:
        write_text(self.record, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), force=True)
