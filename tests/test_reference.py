"""The API reference can be built, and names everything public with its documentation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import decaycast as dc

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "reference.py"


@pytest.mark.slow
def test_the_reference_has_every_public_name(tmp_path: Path):
    pytest.importorskip("pdoc", reason="pdoc is not installed (the extra 'docs')")
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    reference.build(tmp_path, rooms=("core",))
    page = (tmp_path / "decaycast.html").read_text(encoding="utf-8")
    modules = {"infinite_width", "transfer"}  # these have pages of their own
    for name in sorted(set(dc.__all__) - modules):
        assert f'<section id="{name}">' in page, f"{name} is not in the reference"
        entry = page[page.index(f'<section id="{name}">') :]
        assert 'class="docstring"' in entry[: entry.index("</section>")], f"{name} has no documentation"
    assert (tmp_path / "decaycast" / "core" / "timescale.html").is_file()
