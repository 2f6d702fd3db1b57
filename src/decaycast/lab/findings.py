"""What a figure finds in the rows there are: a verdict, panels, and how many rows are missing. Nothing here trains or writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from decaycast.core.experiment import Figure, Panel, Row, Size, Verdict
from decaycast.lab.figures import by_key

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(/[a-z0-9][a-z0-9-]*)?")  # rooms are named like packages


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A figure with the rows it has so far, judged and drawn."""

    figure: Figure
    size: Size
    rows: Sequence[Row]
    planned: int
    verdict: Verdict
    panels: Sequence[Panel]

    @property
    def done(self) -> int:
        """Runs that finished."""
        return sum(row.status == "done" for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        """Rows of runs that failed."""
        return [row for row in self.rows if row.status == "failed"]

    @property
    def missing(self) -> int:
        """Runs without any row."""
        return self.planned - len(self.rows)

    @property
    def page(self) -> str:
        """Where its page lies below the folder of a report.

        Raises:
            ValueError: the figure's name is not fit to be a file name.
        """
        if not NAME.fullmatch(self.figure.name):
            raise ValueError(
                "a figure's name must be room/name in a-z, 0-9 and hyphens (the room with underscores), got "
                f"{self.figure.name!r}; rename it"
            )
        return f"{self.figure.name}.html"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        counts = {"planned": self.planned, "done": self.done, "failed": len(self.failed), "missing": self.missing}
        words = {name: getattr(self.figure, name) for name in ("name", "title", "claim", "source")}
        verdict = {
            "outcome": self.verdict.outcome,
            "reason": self.verdict.reason,
            "numbers": dict(self.verdict.numbers),
        }
        return {**words, "size": self.size, **counts, **verdict}


def assess(figure: Figure, rows: Iterable[Row], size: Size) -> Finding:
    """Judge and draw `figure` from those of `rows` that belong to its runs at `size`.

    Where rows are missing and the figure cannot cope, that is a verdict ("not enough data"); with all rows there, its
    exception is raised.
    """
    found = by_key(rows)
    runs = figure.runs(size)
    own = [found[run.key] for run in runs if run.key in found]
    try:
        verdict, panels = figure.judge(own), figure.draw(own)
    except Exception as error:
        if len(own) == len(runs) and all(row.status == "done" for row in own):
            raise
        reason = f"these {len(own)} of {len(runs)} rows cannot be judged ({type(error).__name__}: {error})"
        verdict, panels = Verdict(outcome="not enough data", reason=reason), []
    return Finding(figure=figure, size=size, rows=own, planned=len(runs), verdict=verdict, panels=panels)


def verdict_table(findings: Sequence[Finding]) -> str:
    """The findings as a table in markdown, one line each, with a final newline."""
    head = ["figure", "claim", "verdict", "why", "size", "runs"]
    lines = [head, ["---"] * len(head)]
    for finding in findings:
        runs = f"{finding.done} of {finding.planned}"
        cells = (finding.figure.name, finding.figure.claim, finding.verdict.outcome, finding.verdict.reason)
        lines.append([*(_cell(cell) for cell in cells), finding.size, runs])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"([\\|*_~<`\[\]])", r"\\\1", " ".join(text.split()))
