"""`decaycast lab`: the evidence of every room. `list` shows the figures, `run` trains what they lack, `report` judges."""

from __future__ import annotations

import enum
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table

from decaycast.core.experiment import SIZES, Figure, Row, Run, Size, jsonable
from decaycast.lab.figures import export_rows, figures, price, run_figures, runs_of, select
from decaycast.lab.findings import Finding, verdict_table
from decaycast.lab.report import INDEX, write_report
from decaycast.lab.store import Store, StoreError, load_export
from decaycast.lab.table import Table as StoreTable
from decaycast.lab.where import PLACES, cores, executor

app = typer.Typer(
    no_args_is_help=True, help="The papers' figures: list them, train what they need, judge and show them."
)
out = Console()
notes = Console(stderr=True)
SHOWN_FAILURES = 3
COLOURS = {"held": "green", "not held": "red", "not enough data": "yellow"}


class SizeName(enum.StrEnum):
    """How large a figure's trainings are."""

    smoke = "smoke"
    small = "small"
    paper = "paper"


PatternArgument = Annotated[str, typer.Argument(help='a figure, a room ("l2") or a pattern ("l2/t*")')]
SizeOption = Annotated[
    SizeName, typer.Option(help="smoke: seconds; small: minutes on two cores; paper: the paper's scale")
]
StoreOption = Annotated[Path, typer.Option("--store", help="where rows are kept")]
DirOption = Annotated[Path | None, typer.Option("--data-dir", help="folder of the data files (or DECAYCAST_DATA)")]
ExportOption = Annotated[Path | None, typer.Option("--export", help="also write the rows to this .jsonl.gz file")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
USUAL_STORE = Path("decaycast-out/lab.sqlite")


@app.command("list")
def list_figures(pattern: PatternArgument = "*", store: StoreOption = USUAL_STORE, as_json: JsonOption = False) -> None:
    """The figures, what each claims, how many runs it needs, and how many of them the store has."""
    found = [_listed(figure, store) for figure in select(pattern)] if figures() else []
    if as_json:
        out.print_json(json.dumps(found))
        return
    table = Table("figure", "claim", "source", *SIZES, caption="finished runs of those needed, by size")
    for item in found:
        counts = [f"{item['done'][size]}/{item['runs'][size]}" for size in SIZES]
        table.add_row(*(escape(item[key]) for key in ("name", "claim", "source")), *counts)
    out.print(table)


@app.command()
def run(
    pattern: PatternArgument,
    size: SizeOption = SizeName.small,
    workers: Annotated[int | None, typer.Option(help="trainings at a time [2; on ray all its cores]")] = None,
    on: Annotated[str, typer.Option("--on", help=f"where to train: {', '.join(PLACES)}")] = "processes",
    address: Annotated[str | None, typer.Option("--address", help="HOST:PORT of a Ray cluster [one made here]")] = None,
    store: StoreOption = USUAL_STORE,
    data_dir: DirOption = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="train failed runs again")] = False,
    export: ExportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the runs that figures lack; the same command goes on where it was interrupted."""
    chosen, name = select(pattern), _size(size)
    if on == "processes":
        on, workers = ("here", 1) if workers == 1 else (on, 2 if workers is None else workers)
    execute = executor(on, workers=workers, address=address)
    at_once = 1 if on == "here" else workers or cores()
    runs = runs_of(chosen, name)
    with Store(store) as opened:
        missing = opened.missing(runs, retry_failed=retry_failed)
        seconds = price(missing, opened.read())
        if not as_json:
            notes.print(_plan(len(runs), seconds, at_once), highlight=False)
        with _Watch(missing, seconds, quiet=as_json) as watch:
            rows_by_figure = run_figures(
                chosen,
                name,
                opened,
                execute=execute,
                data_dir=None if data_dir is None else str(data_dir),
                retry_failed=retry_failed,
                on_row=watch.on_row,
            )
        rows = opened.rows_of(runs)
    if export is not None:
        export_rows(rows, export)
    failed = [row for row in rows if row.status == "failed"]
    counts = {figure: sum(row.status == "done" for row in found) for figure, found in rows_by_figure.items()}
    if as_json:
        numbers = {"size": name, "runs": len(runs), "trained": watch.ended, "failed": len(failed), "done": counts}
        out.print_json(json.dumps({**numbers, "expected_seconds": jsonable(sum(seconds)), "store": str(store)}))
    else:
        _print_run(counts, rows_by_figure, failed)
        _say("next", shlex.join(["decaycast", "lab", "report", pattern, "--size", name, "--store", str(store)]))
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    pattern: PatternArgument = "*",
    size: SizeOption = SizeName.small,
    store: StoreOption = USUAL_STORE,
    rows: Annotated[Path | None, typer.Option("--rows", help="read this exported .jsonl.gz file, not a store")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="folder of the pages")] = Path("decaycast-out/figures"),
    export: ExportOption = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the verdicts as a markdown table")] = False,
    as_json: JsonOption = False,
) -> None:
    """Judge figures from the rows there are and write their pages; never trains."""
    if markdown and as_json:
        raise ValueError("--markdown and --json both say what to print; give one of them")
    chosen, name = select(pattern), _size(size)
    found = _rows(runs_of(chosen, name), store, rows)
    findings = write_report(out_dir, chosen, found, name, table=None if rows is not None else _table(store))
    if export is not None:
        export_rows((row for finding in findings for row in finding.rows), export)
    if as_json:
        pages = [{**finding.to_dict(), "page": str(out_dir / finding.page)} for finding in findings]
        out.print_json(json.dumps(jsonable({"index": str(out_dir / INDEX), "figures": pages})))
    elif markdown:
        typer.echo(verdict_table(findings), nl=False)
    else:
        _print_findings(findings)
        _say("pages", str(out_dir / INDEX))
    if not as_json:
        _print_missing(findings)


class _Watch:
    """A progress display over runs, which counts each by its expected seconds so that the time left is honest."""

    def __init__(self, runs: Sequence[Run], seconds: Sequence[float], *, quiet: bool) -> None:
        known = [value for value in seconds if math.isfinite(value)]
        usual = sum(known) / len(known) if known else 1.0
        weights = [value if math.isfinite(value) else usual for value in seconds]
        self._weights = {run.key: weight for run, weight in zip(runs, weights, strict=True)}
        self.ended = self.failed = 0
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, console=notes, transient=True, disable=quiet)
        self._task = self._progress.add_task("training", total=sum(weights), note=self._note())

    def __enter__(self) -> _Watch:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def on_row(self, row: Row) -> None:
        self.ended += 1
        self.failed += row.status == "failed"
        self._progress.update(self._task, advance=self._weights[row.run.key], note=self._note())

    def _note(self) -> str:
        return f"{self.ended} of {len(self._weights)} runs" + (f", {self.failed} failed" if self.failed else "")


def _size(size: SizeName) -> Size:
    return size.value  # type: ignore[return-value]


def _listed(figure: Figure, path: Path) -> dict[str, Any]:
    runs = {size: figure.runs(size) for size in SIZES}
    done = dict.fromkeys(SIZES, 0)
    if path.exists():
        with Store(path) as store:
            done = {size: len(runs[size]) - len(store.missing(runs[size], retry_failed=True)) for size in SIZES}
    words = {key: getattr(figure, key) for key in ("name", "title", "claim", "source")}
    return {**words, "runs": {size: len(runs[size]) for size in SIZES}, "done": done}


def _rows(runs: Sequence[Run], path: Path, exported: Path | None) -> list[Row]:
    if exported is not None:
        return load_export(exported)
    if not path.exists():
        raise StoreError(f"there is no store {path}; train with `decaycast lab run`, or name a store or --rows")
    with Store(path) as store:
        return store.rows_of(runs)


def _table(path: Path) -> StoreTable:
    with Store(path) as store:
        return store.table()


def _plan(runs: int, seconds: Sequence[float], workers: int) -> str:
    text = f"{len(seconds)} of {runs} runs to train"
    known = [value for value in seconds if math.isfinite(value)]
    if known:
        text += f", about {_duration(sum(known) / max(1, workers))} with {workers} workers"
    unknown = len(seconds) - len(known)
    return text + (f" ({unknown} of them not seen before, so without an estimate)" if unknown else "")


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _print_run(counts: dict[str, int], rows: dict[str, list[Row]], failed: Sequence[Row]) -> None:
    table = Table("figure", "done", "failed")
    for figure, done in counts.items():
        table.add_row(escape(figure), str(done), str(len(rows[figure]) - done))
    out.print(table)
    for row in failed[:SHOWN_FAILURES]:
        _say("failed", f"{row.run.key}: {row.reason}")
    if len(failed) > SHOWN_FAILURES:
        _say("failed", f"{len(failed) - SHOWN_FAILURES} more; --retry-failed trains them again")


def _print_findings(findings: Sequence[Finding]) -> None:
    table = Table("figure", "verdict", "why", "runs")
    for finding in findings:
        colour, outcome = COLOURS[finding.verdict.outcome], finding.verdict.outcome
        counts = f"{finding.done} of {finding.planned}"
        table.add_row(escape(finding.figure.name), f"[{colour}]{outcome}[/]", escape(finding.verdict.reason), counts)
    out.print(table)


def _print_missing(findings: Sequence[Finding]) -> None:
    for finding in findings:
        if finding.missing:
            command = shlex.join(["decaycast", "lab", "run", finding.figure.name, "--size", finding.size])
            text = f"note: {finding.figure.name}: {finding.missing} of {finding.planned} runs are missing; {command}"
            notes.print(text, markup=False, highlight=False, soft_wrap=True)


def _say(word: str, text: str) -> None:
    out.print(f"{word:<8} {text}", markup=False, highlight=False, soft_wrap=True)
