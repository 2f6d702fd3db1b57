"""The scripts of docs/quickstart.md run as printed, in an empty folder, and add no more than the page says."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
NUMBER = r"[-+.\de]+"
ANSWER = re.compile(
    rf"^(None|{NUMBER}) (?:in |\()({NUMBER})(?:, | to )({NUMBER})[:)],? (trust|weak|refuse)\b.*$", re.MULTILINE
)
NOT_RUN = "optimizer_kwargs(cfg=args)"  # the lines for timm's own train.py, which timm's packages do not ship


@dataclass(frozen=True, kw_only=True)
class Section:
    """One framework: what is typed, the whole script, the short blocks after it, what the page says was printed."""

    title: str
    commands: list[str]
    script: str
    shorts: list[str]
    printed: str

    def needs(self) -> list[str]:
        """Packages that the script imports, besides decaycast."""
        return sorted({name.partition(".")[0] for name in imported(self.script)} - {"decaycast"})

    def missing(self) -> list[str]:
        return [name for name in self.needs() if importlib.util.find_spec(name) is None]

    def what_one_has(self) -> str:
        return self.script.partition("# what you add")[0]


def imported(source: str) -> list[str]:
    nodes = list(ast.walk(ast.parse(source)))
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return whole + [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(text: str) -> Section:
    (commands,), (script, *shorts), (printed,) = (blocks(text, language) for language in ("sh", "python", "text"))
    title = text.partition("\n")[0]
    return Section(title=title, commands=commands.splitlines(), script=script, shorts=shorts, printed=printed)


SECTIONS = [section(text) for text in TEXT.split("\n## ")[1:] if "```python" in text]


def marked(item: Section) -> list[pytest.MarkDecorator]:
    missing = item.missing()
    skip = [pytest.mark.skip(reason=f"not installed here: {', '.join(missing)}")] if missing else []
    return skip + [pytest.mark.timm] * ("timm" in item.needs())


CASES = [pytest.param(item, id=item.title, marks=marked(item)) for item in SECTIONS]
SHORTS = [
    pytest.param(item, short, id=f"{item.title}-{number}", marks=marked(item))
    for item in SECTIONS
    for number, short in enumerate(item.shorts)
]


def run(source: str, folder: Path) -> str:
    """What `source` prints as first.py in `folder`."""
    folder.joinpath("first.py").write_text(source, encoding="utf-8")
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "first.py"], cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_images(folder: Path) -> None:
    """Two classes of 40 noisy images, one darker than the other, for training and for validation."""
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in (0, 1):
            images = folder / "data" / split / str(label)
            images.mkdir(parents=True)
            for number in range(40):
                pixels = draws.integers(0, 156, (32, 32, 3)) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number}.png")


def prepared(item: Section, source: str, folder: Path) -> str:
    """`source`; for timm with images to read, and more epochs of the few batches that they make."""
    if "timm" not in item.needs():
        return source
    write_images(folder)
    assert source.count("num_epochs, cpu = 20,") == 1
    return source.replace("num_epochs, cpu = 20,", "num_epochs, cpu = 200,")


def answers(printed: str) -> list[tuple[float | None, float, float, str]]:
    """Weight decay, both ends of its interval and verdict, of each line that has the form of an answer."""
    return [
        (None if number == "None" else float(number), float(low), float(high), verdict)
        for number, low, high, verdict in ANSWER.findall(printed)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("item", CASES)
def test_the_script_runs_and_prints_what_the_page_shows(item: Section, tmp_path: Path):
    printed = run(prepared(item, item.script, tmp_path), tmp_path)
    if "accelerate" in item.needs():
        assert printed.endswith(item.printed)  # no training decides these numbers: a line, and updates counted
        return
    shown, found = answers(item.printed), answers(printed)
    assert len(shown) == len(found) == 1
    weight_decay, low, high, verdict = found[0]
    assert 0 < low < high
    assert verdict == "refuse" if weight_decay is None else low <= weight_decay <= high
    if "optuna" in item.needs():
        assert re.search(r" \{'dropout': [^,]+, 'weight_decay': [^,]+\}$", printed.rstrip())


@pytest.mark.slow
@pytest.mark.parametrize(("item", "short"), [case for case in SHORTS if NOT_RUN not in str(case.values[1])])
def test_a_short_block_runs_after_what_one_has(item: Section, short: str, tmp_path: Path):
    run(f"{prepared(item, item.what_one_has(), tmp_path)}\n{short}", tmp_path)


@pytest.mark.parametrize(("item", "short"), SHORTS)
def test_what_a_short_block_imports_is_there(item: Section, short: str):
    for name in imported(short):
        pytest.importorskip(name, reason=f"{name} does not load here", exc_type=ImportError)
    imports = [node for node in ast.parse(short).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), "short block", "exec"), {})


@pytest.mark.parametrize("block", blocks(TEXT, "python"))
def test_blocks_compile(block: str):
    compile(block, "block", "exec")


def added_lines(script: str) -> list[int]:
    """Line numbers, from 1, of what the reader adds: after "# what you add" up to the next comment line, and "# you add"."""
    lines, added, inside = script.splitlines(), [], False
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            inside = line.startswith("# what you add")
        elif inside or "# you add" in line:
            added.append(number)
    return added


@pytest.mark.parametrize("item", [pytest.param(item, id=item.title) for item in SECTIONS])
def test_at_most_three_commands_and_three_added_statements(item: Section):
    added = added_lines(item.script)
    statements = [
        node for node in ast.walk(ast.parse(item.script)) if isinstance(node, ast.stmt) and node.lineno in added
    ]
    assert 1 <= len(statements) <= 3
    assert len(statements) == len([number for number in added if item.script.splitlines()[number - 1]])  # a line each
    assert len(item.commands) == 3 and item.commands[2] == "env/bin/python first.py"
    assert not any("decaycast" in name for name in imported(item.what_one_has())) or item.title == "Optuna"


def test_the_page_has_these_frameworks_and_their_extras_exist():
    titles = ["Your own loop", "Lightning", "Hugging Face Trainer", "A timm script", "accelerate", "Optuna"]
    assert [item.title for item in SECTIONS] == titles
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [re.findall(r"'\./decaycast\[(\w+)\]'", item.commands[1]) for item in SECTIONS]
    assert asked == [["sklearn"], ["lightning"], ["hf"], ["timm"], ["accelerate"], ["optuna"]]
    assert all(extra in extras for (extra,) in asked)


def test_names_in_the_text_exist():
    names = re.findall(r"`(decaycast(?:\.\w+)+)\.(\w+)`", TEXT)
    assert names == [("decaycast.lab.image_files", "cifar")]
    assert all(callable(getattr(importlib.import_module(module), name)) for module, name in names)
