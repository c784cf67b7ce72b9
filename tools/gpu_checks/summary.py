# SPDX-License-Identifier: Apache-2.0
"""Makes the summary of all records: tables as text, and one page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_checks import records
from gpu_checks.records import Record

# Their checks decide about the exit status 0; a timing can fail without that.
DECISIVE = ("facts", "build", "warm", "numbers", "executed", "contracts", "sanitizer", "network")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 2rem; font-size: 13px; }
td, th { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: #b00; font-weight: 600; } .good { color: #070; } .none { color: #777; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } td, th { border-color: #444; } }
"""


@dataclass
class Table:
    """Holds a title, a header and rows."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """Holds all that the records say."""

    found: list[Record]
    broken: int  # lines that hold no record
    planned: Sequence[str]

    @classmethod
    def of(cls, found: Iterable[Record], broken: int, *, planned: Sequence[str]) -> Outcome:
        """Reads the records, without those that a later attempt replaced."""
        return cls(records.latest(found), broken, planned)

    def _of_kind(self, kind: str) -> list[Record]:
        return [r for r in self.found if r.get("kind") == kind]

    @property
    def device(self) -> str:
        """The run's device."""
        runs = self._of_kind("run")
        return str(runs[-1].get("device", "")) if runs else ""

    @property
    def failed(self) -> list[Record]:
        """The checks that do not hold."""
        return [r for r in self._of_kind("check") if r["held"] is False]

    @property
    def unfinished(self) -> list[tuple[str, str, str]]:
        """Stage, item and reason of everything that did not run to its end."""
        ended = [r for r in self._of_kind("end") if r["status"] != "done"]
        found = [(r["stage"], r["item"], f"{r['status']}: {r.get('error', '')}") for r in ended]
        stages = {r["stage"]: r for r in self._of_kind("stage")}
        for name in self.planned:
            status = stages[name]["status"] if name in stages else "not run"
            if status != "done":
                found.append((name, "", f"{status}: {stages.get(name, {}).get('error', '')}"))
        return found

    @property
    def status(self) -> int:
        """The command's exit status."""
        if self.failed or any(stage.partition(":")[0] in DECISIVE for stage, _, _ in self.unfinished):
            return 1
        return 3 if self.unfinished else 0

    @property
    def verdict(self) -> str:
        """One sentence about the whole."""
        checks = self._of_kind("check")
        ran = [r for r in checks if r["held"] is not None]
        held = sum(r["held"] is True for r in ran)
        start = "" if self.device.startswith("cuda") else "DRY RUN on the CPU, which says nothing of a GPU: "
        text = f"{start}{held} of {len(ran)} checks hold, {len(checks) - len(ran)} were not run"
        left = len(self.unfinished)
        return f"{text}; {left} steps did not finish" if left else text

    def tables(self) -> list[Table]:
        """Returns the tables of the summary."""
        made = [Table("Facts", ("what", "value"), [(r["name"], r["value"]) for r in self._of_kind("fact")])]
        groups: dict[tuple[str, str], list[Record]] = {}
        for r in self._of_kind("check"):
            kind, _, op = r["stage"].partition(":")
            groups.setdefault((kind, op), []).append(r)
        checks = Table("Checks", ("stage", "op", "held", "failed", "not run", "worst error / allowed"))
        for (kind, op), group in groups.items():
            counts = [sum(r["held"] is state for r in group) for state in (True, False, None)]
            shares = [r["share"] for r in group if isinstance(r.get("share"), int | float)]
            checks.rows.append((kind, op, *counts, round(max(shares), 2) if shares else ""))
        made.append(checks)
        made.append(
            Table("What does not hold", ("stage", "check", "why"),
                  [(r["stage"], r["name"], _reason(r)) for r in self.failed])
        )  # fmt: skip
        made.append(Table("What did not finish", ("stage", "step", "how it ended"), list(self.unfinished)))
        reasons: dict[tuple[str, str], int] = {}
        for r in self._of_kind("check"):
            if r["held"] is None:
                key = (r["stage"].partition(":")[0], r["note"])
                reasons[key] = reasons.get(key, 0) + 1
        rows = [(kind, count, why) for (kind, why), count in reasons.items()]
        made.append(Table("What was not run", ("stage", "checks", "why"), rows))
        return [*(table for table in made if table.rows), *self._speeds()]

    def _speeds(self) -> list[Table]:
        works: dict[tuple[str, str, bool], list[Record]] = {}
        for r in self._of_kind("speed"):
            works.setdefault((r["work"], r.get("dtype", ""), r.get("training", False)), []).append(r)
        header = (
            "work",
            "contender",
            "ms",
            "× the first's",
            "peak MiB",
            "host µs",
            "of ceiling",
            "measured by, note",
        )
        table = Table("Speed", header)
        for (work, dtype, training), group in works.items():
            first = next((r["ms"] for r in group if isinstance(r["ms"], int | float)), None)
            name = ", ".join(filter(None, [work, dtype, "forward + backward" if training else ""]))
            for r in group:
                ms = r["ms"] if isinstance(r["ms"], int | float) else None
                ratio = f"{ms / first:.2f}" if ms and first else ""
                share = f"{100 * r['ceiling_share']:.0f} %" if isinstance(r.get("ceiling_share"), int | float) else ""
                note = ", ".join(filter(None, [r.get("by", ""), r.get("note", "")]))
                row = (_rounded(ms, 4), ratio, _rounded(r.get("peak_mib"), 1), _rounded(r.get("host_us"), 0))
                table.rows.append((name, r["contender"], *row, share, note))
        return [table] if table.rows else []

    def text(self) -> str:
        """Returns the summary for a terminal; facts and failures first, speeds last."""
        lines = [self.verdict, ""]
        for table in self.tables():
            cells = [[str(c) for c in row] for row in [table.header, *table.rows]]
            widths = [min(64, max(len(row[i]) for row in cells)) for i in range(len(table.header))]
            lines += [table.title, "-" * len(table.title)]
            lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
            lines.append("")
        if self.broken:
            lines += [f"{self.broken} lines of the results are cut off: a process was killed while it wrote", ""]
        return "\n".join([*lines, self.verdict]) + "\n"

    def html(self) -> str:
        """Returns the page."""
        good = self.status == 0
        parts = [
            "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
            "<title>medaccel on this GPU</title>", f"<style>{STYLE}</style>", "</head>", "<body>",
            "<h1>medaccel on this GPU</h1>",
            f'<p class="{"good" if good else "bad"}">{html.escape(self.verdict)}</p>',
        ]  # fmt: skip
        for table in self.tables():
            parts.append(f"<h2>{html.escape(table.title)}</h2>")
            parts.append("<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in table.header) + "</tr>")
            parts += ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows]
            parts.append("</table>")
        if self.broken:
            parts.append(f"<p>{self.broken} lines of the results are cut off.</p>")
        return "\n".join([*parts, "</body>", "</html>"]) + "\n"


def _reason(check: Record) -> str:
    share = check.get("share")
    return str(check.get("note") or (f"error is {share} of the allowed one" if share is not None else ""))


def _rounded(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    number = text.replace(".", "", 1).replace(" %", "").isdigit()
    return f'<td class="number">{html.escape(text)}</td>' if number else f"<td>{html.escape(text)}</td>"
