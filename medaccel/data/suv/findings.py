# SPDX-License-Identifier: Apache-2.0
"""Collects what a reader of SUV has to be told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Collects sentences: they become warnings and stand in `suv.json`."""

    warnings: list[str] = field(default_factory=list)

    def warn(self, sentence: str) -> None:
        """Notes a sentence, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)
