"""Every benchmark in one command, and one table of what they found: `bench/results/all.md`, and the README.

    DECAYCAST_DATA=<data folder> python bench/all.py           # all of them: about a day on two cores
    python bench/all.py stochnorm label_noise                   # some of them (names below)
    python bench/all.py --table                                 # none: the table from the results there are
    python bench/all.py --list                                  # names, and how long they take

Each runs in a process of its own, one after the other; one that fails leaves its old result, and the command goes on and ends
with exit code 1. The GPU set (`bench/gpu.py`) needs CUDA and is left out, and said, where there is none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headlines import Headline, headlines

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
UNMEASURED = "not measured yet"
BEGIN, END = "<!-- the table: python bench/all.py --table -->", "<!-- the end of the table -->"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A script of this folder."""

    name: str
    about: str
    minutes: int
    needs: tuple[str, ...] = ()
    """"data" (DECAYCAST_DATA), "cuda", or packages that have to be importable."""
    reports: bool = True
    """Whether it has a JSON result of its name."""


BENCHES = (
    Bench(name="overhead", about="the loop, AutoL2, the import, two processes", minutes=8),
    Bench(name="replicas", about="many small runs as one batched program", minutes=10),
    Bench(name="executors", about="processes, Ray, what a sweep adds, the store", minutes=20, needs=("ray",)),
    Bench(name="kernel", about="neural tangent kernels against the textbook", minutes=20),
    Bench(name="curvature", about="Hessian traces against three libraries", minutes=30, needs=("curvlinops",)),
    Bench(name="label_noise", about="what label noise costs a step", minutes=5),
    Bench(name="large_lr", about="what activation noise costs a step; the two-layer experiment", minutes=10),
    Bench(name="self_distill", about="kernel self-distillation against refits", minutes=20, needs=("sklearn",)),
    Bench(name="stochnorm", about="stochastic normalisation beside batch norm", minutes=8),
    Bench(
        name="truth",
        about="the grid that the next three compare with",
        minutes=600,
        needs=("data",),
        reports=False,
    ),
    Bench(name="forecast", about="the forecast against searches", minutes=120, needs=("data", "optuna")),
    Bench(name="autol2", about="AutoL2 (paper) against the tuned constant", minutes=120, needs=("data",)),
    Bench(name="schedules", about="AutoL2 on e-folds under schedules", minutes=400, needs=("data",)),
    Bench(name="language", about="a small language model: audit, forecast, AutoL2", minutes=60, needs=("data",)),
    Bench(
        name="optuna_prior",
        about="the forecast as a prior of Optuna's search, on recorded runs",
        minutes=5,
        needs=("optuna",),
    ),
    Bench(name="gpu", about="replicas, StochNorm, WRN-28-10 on a GPU", minutes=60, needs=("cuda",)),
)


def missing(bench: Bench) -> str:
    """What `bench` needs and is not here; empty if nothing."""
    for need in bench.needs:
        if need == "data" and not os.environ.get("DECAYCAST_DATA"):
            return "DECAYCAST_DATA is not set"
        if need == "cuda" and not _has_cuda():
            return "there is no CUDA device"
        if need not in ("data", "cuda") and importlib.util.find_spec(need) is None:
            return f"{need} is not installed (bench/requirements*.txt)"
    return ""


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run(bench: Bench) -> str:
    """Run it; what went wrong, or nothing."""
    reason = missing(bench)
    if reason:
        return f"left out: {reason}"
    began, command = time.monotonic(), [sys.executable, str(HERE / f"{bench.name}.py")]
    if bench.name == "gpu" and os.environ.get("DECAYCAST_DATA"):
        command += ["--data-dir", os.environ["DECAYCAST_DATA"]]
    while True:
        code = subprocess.run(command, check=False).returncode
        if bench.name != "gpu" or code != 3:  # 3: pieces are left, to be made by the same command
            break
    print(f"{bench.name}: {(time.monotonic() - began) / 60:.1f} minutes, exit code {code}", flush=True)
    return f"failed with exit code {code}" if code else ""


def table(results: Path = RESULTS) -> list[str]:
    """The page, from the JSON files in `results`."""
    lines = [
        "# All benchmarks",
        "",
        "Made by `python bench/all.py` (`--table`: from the results there are). Ratios are of two sides measured in the same",
        "run; the spread is the one that the benchmark's own page names. Each name leads to that page.",
        "",
        "| benchmark | what | value | spread | aim | reached | machine |",
        "|-|-|-|-|-|-|-|",
    ]
    known = [bench.name for bench in BENCHES if bench.reports]
    more = sorted(path.stem for path in results.glob("*.json") if path.stem not in known)
    for name in (*known, *more):
        lines += _lines(name, results)
    return lines


def in_readme(text: str, lines: list[str]) -> str:
    """`text` with the table of `lines` between its two marks; machines are left to the page."""
    rows = [line.rsplit(" | ", 1)[0] + " |" for line in lines if line.startswith("| ")]
    head, rest = text.split(BEGIN)
    shown = "\n".join([rows[0], "|-|-|-|-|-|-|", *rows[1:]])
    return (
        head
        + BEGIN
        + "\n"
        + re.sub(r"\]\((\w+\.md)\)", r"](bench/results/\1)", shown)
        + "\n"
        + END
        + rest.split(END)[1]
    )


def _lines(name: str, results: Path) -> list[str]:
    path = results / f"{name}.json"
    if not path.is_file():
        return [f"| {name} | {_about(name)} | {UNMEASURED} |  |  |  |  |"]
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        found = headlines(name, result)
    except (KeyError, TypeError, ValueError) as error:  # an older form, or a file cut off: the other lines still count
        return [f"| {name} | cannot be read ({type(error).__name__}: {error}) |  |  |  |  |  |"]
    link = f"[{name}]({name}.md)" if (results / f"{name}.md").is_file() else name
    machine = _machine(result.get("provenance", {}))
    lines = [f"| {link} | {_cells(each)} | {machine} |" for each in found]
    if not found:
        lines = [f"| {link} | {_about(name) or name}: see its page |  |  |  |  | {machine} |"]
    left = result.get("left", [])
    return lines + [f"| {link} | {what} | {UNMEASURED} |  |  |  |  |" for what in left]


def _about(name: str) -> str:
    return next((bench.about for bench in BENCHES if bench.name == name), "")


def _cells(found: Headline) -> str:
    ends = [f"{end:.3g}" for end in (found.low, found.high) if end is not None]
    spread = " to ".join(ends) if len(ends) == 2 else f"to {ends[0]}" if ends else ""
    value = f"{found.value:,.0f}" if abs(found.value) >= 1000 else f"{found.value:.4g}"
    return f"{found.what} | {value} | {spread} | {found.aim} | {found.met}"


def _machine(provenance: dict[str, Any]) -> str:
    device = str(provenance.get("device", ""))
    where = provenance.get("processor", "") if device in ("", "cpu") else device
    threads = f"{provenance['threads']} threads" if provenance.get("threads", "1") != "1" and device == "cpu" else ""
    parts = [where, threads, f"torch {provenance.get('torch', '?')}", str(provenance.get("time", ""))[:10]]
    return ", ".join(part for part in parts if part)


def main() -> None:
    """Run what was asked for, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; default: all")
    parser.add_argument("--table", action="store_true", help="run none, write the table")
    parser.add_argument("--list", action="store_true", help="say what there is, write nothing")
    asked = parser.parse_args()
    by_name = {bench.name: bench for bench in BENCHES}
    if unknown := [name for name in asked.names if name not in by_name]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(by_name)}")
    if asked.list:
        for bench in BENCHES:
            reason = missing(bench)
            note = f"  ({reason})" if reason else ""
            print(f"{bench.name:<13} about {bench.minutes:>3} min  {bench.about}{note}")
        return
    chosen = [] if asked.table else [bench for bench in BENCHES if not asked.names or bench.name in asked.names]
    problems = {bench.name: problem for bench in chosen if (problem := run(bench))}
    lines = table()
    (RESULTS / "all.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    README.write_text(in_readme(README.read_text(encoding="utf-8"), lines), encoding="utf-8")
    print("\n".join(lines))
    for name, problem in problems.items():
        print(f"{name}: {problem}", file=sys.stderr)
    if any(problem.startswith("failed") for problem in problems.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
