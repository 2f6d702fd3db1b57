"""A card for every method: what it does, how to use it, suggested values, costs, when not to, evidence, source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CARDS = ("find", "autol2", "stochnorm", "label-noise", "large-lr", "self-distill")
SECTIONS = ("How to use it", "Suggested values", "What it costs", "When .*not.*", "Evidence", "Source")


@pytest.mark.parametrize("card", CARDS)
def test_a_card_answers_what_its_reader_asks(card: str):
    text = (ROOT / "docs" / f"{card}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    missing = [section for section in SECTIONS if not any(re.fullmatch(section, heading) for heading in headings)]
    assert missing == []
    assert f"docs/{card}.md" in (ROOT / "README.md").read_text(encoding="utf-8")
