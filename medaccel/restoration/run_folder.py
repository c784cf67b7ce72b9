# SPDX-License-Identifier: Apache-2.0
"""Keeps the folder of a run: its options, its split, its choices, and a record of every scoring.

config.yaml the options and, once they are made, the choices and their hashes (`frozen`)
splits.json          which studies were fitted on and chosen on, and `inputs`: size, time and SHA-256 of their files
studies/             simulated ones, in the layout of `medaccel.restoration.study`
fits/<method>/       logs and what an interrupted fit goes on from
checkpoints/         one file a fitted method
scored/<name>/       results on test studies, and inputs.json of these; scored.json says when, and with what
metrics.json|csv, figures/, report.html    on the validation studies
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from medaccel.data.files import read_json
from medaccel.restoration.config import RestorationConfig
from medaccel.studies.digest import digest, file_sha256
from medaccel.studies.lock import LOCK
from medaccel.studies.run_folder import OptionsFolder
from medaccel.studies.tables import write_json


class RunFolder(OptionsFolder):
    """`start` begins or resumes a run, `frozen` is what a score needs."""

    generated = (
        *("studies", "fits", "checkpoints", "validation", "scored", "figures", "scored.json", "splits.json"),
        *("metrics.json", "metrics*.csv", "coverage.csv", "costs.csv", "curve.csv", "detectability.csv"),
    )
    folders = ("checkpoints",)
    worth = ("checkpoints/*.pt", "fits/*/last.ckpt")
    parts = ("scored/*",)

    def options(self) -> dict[str, Any]:
        values = self.read()
        values.pop("frozen", None)
        return values

    def freeze(self, config: RestorationConfig, choices: Mapping[str, Any], best: str) -> None:
        """Records the choices, and the hashes that reveal a later change.

        Args:
            choices: plain values by method.
            best: the method chosen among all.
        """
        content: dict[str, Any] = {
            "options": config.digest(),
            "best": best,
            "choices": dict(choices),
            "checkpoints": self.hashes(config),
        }
        if (self.path / "scored.json").exists() and self.read().get("frozen", {}).get("digest") != digest(content):
            raise ValueError(
                f"{self.path}: this run has been scored on test studies with other choices; --force starts clean"
            )
        self.write(config.plain() | {"frozen": content | {"digest": digest(content)}})

    def frozen(self) -> tuple[RestorationConfig, dict[str, Any]]:
        """Returns the options and the choices.

        Raises:
            FileNotFoundError: the folder holds no run, or its fits have not ended.
            ValueError: a checkpoint or a choice is not the one that was frozen.
        """
        if not self.record.exists():
            raise FileNotFoundError(f"{self.path}: holds no run (no config.yaml)")
        values = self.read()
        content = values.pop("frozen", None)
        if content is None:
            raise FileNotFoundError(
                f"{self.path}: this run has not ended (nothing is frozen); run `medaccel restoration run` again first"
            )
        config = RestorationConfig.of(self.path, values)
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
        """Adds an entry to scored.json with the time; returns how often the run has been scored on these studies by
        now."""
        path = self.path / "scored.json"
        # Scorings under other names may end at the same time.
        lock = self.path / "scored" / LOCK
        with FileLock(lock, timeout=60):
            entries = read_json(path) if path.exists() else []
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            entries.append({"time": now, **entry})
            write_json(path, entries)
            lock.unlink(missing_ok=True)
        return sum(e["studies_digest"] == entry["studies_digest"] for e in entries)

    def hashes(self, config: RestorationConfig) -> dict[str, str]:
        """Returns the SHA-256 of each method's checkpoint that exists."""
        found = {}
        for name in config.methods:
            path = self.checkpoint(name)
            if path.exists():
                found[name] = file_sha256(path)
        return found
