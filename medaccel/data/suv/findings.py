# SPDX-License-Identifier: Apache-2.0
"""Collects what a reader of SUV has to be told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Collects sentences: they become warnings and stand in `suv.json`."""

    warnings: list[str] = field(default_factory=list)
    _topics: set[str] = field(default_factory=set)

    def warn(self, sentence: str, *, topic: str | None = None) -> None:
        """Notes a sentence; of a topic, which each slice may raise, the first alone."""
        if (topic or sentence) not in self._topics:
            self._topics.add(topic or sentence)
            self.warnings.append(sentence)
