"""Imports go one way: core <- methods <- adapters, lab <- cli; the base install needs torch and numpy alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import decaycast

PACKAGE = Path(decaycast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
VERBS = [path.stem for path in PACKAGE.glob("cli*.py")]
BASE = ("torch", "numpy")
# what may be imported from outside at module level; other imports belong inside the function that needs them
THIRD_PARTY = {"lab": {"jinja2", "markupsafe", "plotly", "rich", "sklearn"}, "cli": {"typer", "rich", "click"}}
OF_ONE_FILE = {
    "methods.self_distill.estimator": {"sklearn"},  # loaded when its public name is asked for
    "adapters.accelerate": {"accelerate"},
    "adapters.huggingface_base": {"accelerate", "transformers"},
    "adapters.lightning_base": {"lightning", "pytorch_lightning"},
    "adapters.optuna": {"optuna"},
    "adapters.timm_finder": {"timm"},
    "adapters.timm_script": {"timm"},
    "adapters.torchmetrics": {"torchmetrics"},
}


def allowed(name: str) -> tuple[str, ...]:
    """Prefixes of our own modules that the module `name` (without the package's name) may import."""
    match name.split("."):
        case ["core", *_]:
            return ("core",)
        case ["methods", room, *_]:
            return ("core", f"methods.{room}")
        case ["adapters" | "lab" as floor, *_]:
            return ("core", "methods", floor)
        case _:
            return ("core", "methods", "lab", "adapters", *VERBS)


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every imported module, with whether the import runs when the importing module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            names = [name for name, _ in imports(node)]
            yield from ((name, False) for name in names if name.partition(".")[0] == "decaycast")
        elif isinstance(node, ast.Import):
            yield from ((alias.name, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from decaycast.lab import data` may name a module: judge the longest form
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", True) for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from ((name, False) for name, _ in imports(node))
        else:
            yield from imports(node)


def offences(name: str, source: str) -> list[str]:
    """What the module `name` imports and must not."""
    floor, found = "cli" if name in VERBS else name.partition(".")[0], []
    outside = {*BASE, *THIRD_PARTY.get(floor, ()), *OF_ONE_FILE.get(name, ()), *sys.stdlib_module_names}
    for imported, at_load in imports(ast.parse(source)):
        top, _, inner = imported.partition(".")
        if not top:
            found.append(f"{name}: relative import {imported}")
        elif imported == "decaycast" and floor in ("lab", "adapters", "cli"):
            continue  # the public names are those of the floors below
        elif top == "decaycast":
            if not any(f"{inner}.".startswith(f"{prefix}.") for prefix in allowed(name)):
                found.append(f"{name}: imports {imported}")
        elif top not in outside and (at_load or floor == "core"):
            found.append(f"{name}: imports {imported}, which the base install does not have")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "public"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path):
    assert offences(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("core.a", "from decaycast.methods.l2 import autol2"),
        ("core.a", "from decaycast.lab.store import Store"),
        ("core.a", "import decaycast"),
        ("core.a", "def f():\n    import sklearn"),
        ("core.a", "from . import b"),
        ("methods.l2.a", "from decaycast.methods.stochnorm import method"),
        ("methods.l2.a", "from decaycast.methods import large_lr"),
        ("methods.l2.a", "from decaycast.methods.l2b import x"),
        ("methods.l2.a", "def f():\n    from decaycast.lab import data"),
        ("methods.l2.a", "if TYPE_CHECKING:\n    from decaycast.lab import data"),
        ("methods.l2.a", "try:\n    import plotly\nexcept ImportError:\n    pass"),
        ("methods.l2.a", "class A:\n    import scipy.linalg"),
        ("adapters.a", "import lightning"),
        ("adapters.a", "from decaycast.lab import data"),
        ("lab.a", "from decaycast import cli"),
        ("lab.a", "from decaycast.cli_lab import app"),
        ("cli_lab", "import pandas"),
        ("lab.a", "from decaycast.adapters import timm"),
        ("lab.a", "import typer"),
        ("public", "import plotly"),
    ],
)
def test_the_checker_sees_an_offence(name: str, source: str):
    assert len(offences(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("core.a", "import math, torch.nn\nimport numpy as np\nfrom decaycast.core import b"),
        ("methods.l2.a", "from decaycast.core.hook import Hook\nfrom decaycast.methods.l2.theory import f"),
        ("methods.l2.a", "def f():\n    import plotly"),
        ("methods.l2.a", "if TYPE_CHECKING:\n    import plotly"),
        ("adapters.a", "from decaycast.methods.l2 import autol2\ndef f():\n    import lightning"),
        ("lab.a", "import sklearn, jinja2\nfrom decaycast.lab.store import Store"),
        ("lab.a", "import decaycast"),
        ("cli", "import typer\nfrom decaycast.lab import data"),
        ("cli", "from decaycast import cli_lab"),
        ("cli_lab", "import typer\nfrom rich.table import Table\nfrom decaycast.lab import figures"),
    ],
)
def test_the_checker_lets_pass_what_is_meant(name: str, source: str):
    assert offences(name, source) == []


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_import_loads_neither_lab_nor_figures_nor_any_extra():
    added = modules_after("import decaycast") - modules_after("import torch, numpy")
    own = {name for name in added if name.partition(".")[0] == "decaycast"}
    assert "decaycast.core.timescale" in own
    assert not {name for name in own if name.startswith(("decaycast.lab", "decaycast.cli", "decaycast.adapters"))}
    assert not {name for name in own if name.endswith(".figures")}
    foreign = {name.partition(".")[0] for name in added} - {"decaycast", "numpy", "torch"} - sys.stdlib_module_names
    assert foreign == set()


def test_the_public_file_is_short():
    assert len((PACKAGE / "__init__.py").read_text().splitlines()) < 60
