"""The index of a report: the papers' claims as a scoreboard, the figures with their verdicts, and every run behind them."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decaycast.core.experiment import Row, Run, Scalar, Size
from decaycast.lab.findings import Finding
from decaycast.lab.pages.listing import MOST_ROWS, groups_listing
from decaycast.lab.pages.page import OUTCOMES, write_page
from decaycast.lab.pages.sweep_grid import HEAD
from decaycast.lab.table import Table
from decaycast.lab.trial import DEFAULTS

OWN = "Our own checks"
OTHER = "no figure"  # what runs belong to that no figure of the report asks for
SIZE_NOTES = {
    "smoke": "seconds of training, enough to see that everything works, not to judge the claim",
    "small": "minutes on two cores",
    "paper": "the scale of the paper",
}
_CITED = re.compile(r"[^;:]*?\b(?:19|20)\d\d\b")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A line of the scoreboard: a paper and what became of its claims."""

    name: str
    findings: tuple[Finding, ...]

    def of(self, outcome: str) -> list[Finding]:
        """Its findings with this outcome."""
        return [finding for finding in self.findings if finding.verdict.outcome == outcome]


def write_index_page(
    path: str | os.PathLike[str], findings: Sequence[Finding], size: Size, *, table: Table | None = None
) -> Path:
    """Write the index of several figures: scoreboard, verdicts and runs, with links to their pages beside it.

    Args:
        path: the HTML file to write, in the folder below which the pages lie; replaced in one step.
        findings: what to list.
        size: the size they were judged at.
        table: `Store.table()`; its runs that no finding has are listed too.

    Returns:
        The path written.

    Raises:
        ReportError: the file cannot be written.
    """
    counts = Counter(finding.verdict.outcome for finding in findings)
    groups = {finding.figure.name: finding.rows for finding in findings if finding.rows}
    if table is not None:
        groups[OTHER] = _others(table, findings)
    links = {finding.figure.name: finding.page for finding in findings}
    page = {
        "kind": "index",
        "title": "Figures and verdicts",
        "subtitle": f"{len(findings)} figures, size {size}",
        "size": size,
        "size_note": SIZE_NOTES[size],
        "findings": findings,
        "papers": papers(findings),
        "counts": [(outcome, str(counts[outcome]), "") for outcome in OUTCOMES],
        "runs": groups_listing(groups, links, "Runs of all figures"),
    }
    return write_page(path, page)


def papers(findings: Sequence[Finding]) -> list[Paper]:
    """The findings by the paper whose claim they judge, in the order in which papers are met."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(paper_of(finding.figure.source), []).append(finding)
    return [Paper(name=name, findings=tuple(group)) for name, group in groups.items()]


def paper_of(source: str) -> str:
    """Authors and year out of a figure's source.

    Example:
        >>> paper_of("Lewkowycz & Gur-Ari 2020, sec. 2, fig. 2a"), paper_of("our own check; Pareek 2024 differs")
        ('Lewkowycz & Gur-Ari 2020', 'Our own checks')
    """
    if source.lower().startswith("our own"):
        return OWN
    cited = _CITED.match(source)
    return cited.group().strip() if cited else source


def _others(table: Table, findings: Sequence[Finding]) -> list[Row]:
    known = {row.run.key for finding in findings for row in finding.rows}
    chosen = [place for place, key in enumerate(table["key"].tolist()) if key not in known]
    return table_rows(table.take(np.array(chosen[-MOST_ROWS:], dtype=int)))


def table_rows(table: Table) -> list[Row]:
    """The rows of a table as far as it knows them: without curves and provenance, and with keys that are not the store's.

    A table does not say which numbers were settings: those of `decaycast.lab.trial.DEFAULTS` and all texts are taken for such.
    """
    names = [name for name in table.columns if name not in HEAD and not name.startswith("last_")]
    texts = {name for name in names if name in DEFAULTS or table[name].dtype == object}
    found = []
    for place in range(len(table)):
        values = {name: _plain(table[name][place]) for name in names}
        values = {name: value for name, value in values.items() if value is not None}
        found.append(
            Row(
                run=Run(
                    config={name: value for name, value in values.items() if name in texts},
                    seed=_plain(table["seed"][place]) or 0,  # type: ignore[arg-type]
                ),
                status="done" if table["status"][place] == "done" else "failed",
                reason=str(table["reason"][place]),
                final={name: float(value) for name, value in values.items() if name not in texts},  # type: ignore[arg-type]
                seconds=float(table["seconds"][place]),
            )
        )
    return found


def _plain(value: object) -> Scalar:
    """A cell of a table as a plain value; whole numbers, which a table keeps as floats, are whole again."""
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() else float(value)
    return value  # type: ignore[return-value]
