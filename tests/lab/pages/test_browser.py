"""The pages in a real browser: plots are drawn, tables are searched, nothing is wider than a phone, nothing is requested."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.lab.pages import page_samples as samples
from tests.lab.pages.page_browser import MARKS, chromium, look

from decaycast.lab.report import write_figure_page, write_forecast_page

pytestmark = MARKS
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
MEASURE = """
const wide = () => [...document.querySelectorAll("main *")]
  .filter(item => !item.closest(".scroll, pre, svg") && item.getBoundingClientRect().right > innerWidth + 1)
  .map(item => item.tagName + "." + item.className);
const lines = () => [...document.querySelectorAll(".plot")].map(plot => plot.querySelectorAll(".scatterlayer .trace").length);
const plots = document.querySelectorAll(".plot").length;
const first = lines();
const drawn = [...document.querySelectorAll(".plot")].filter(plot => plot.querySelector(".plotly .main-svg")).length;
const axis = () => document.querySelector(".xtitle")?.textContent;
const before = axis();
document.querySelectorAll("details").forEach(item => { item.open = true; });
document.querySelector("[data-view='1']")?.click();
const after = axis();
document.querySelector(".chip")?.click();
const said = {
  title: document.title, plots, drawn, first, before, after,
  hidden: lines(), wide: wide(), inner: innerWidth, scroll: document.documentElement.scrollWidth,
  rows: document.querySelectorAll("details tbody tr").length, cloud: document.querySelectorAll("a[href^=http]").length,
};
setTimeout(() => {
  said.resources = performance.getEntriesByType("resource").map(item => item.name).filter(name => !name.startsWith("data:"));
  tell(said);
}, 300);
"""


def pages(folder: Path) -> dict[str, Path]:
    """A usual page of each kind, and one whose every text is hostile."""
    common = {"curves": samples.curves(), "recipe": samples.RECIPE, "command": samples.COMMAND}
    usual = write_forecast_page(
        folder / "usual.html", samples.forecast(), verification=samples.Grid(), settings=samples.SETTINGS,
        provenance=samples.PROVENANCE, **common,
    )  # fmt: skip
    hostile = write_forecast_page(
        folder / "hostile.html",
        samples.forecast(reason=samples.EVIL * 5),
        verification=replace(samples.Grid(), metric=samples.EVIL),
        settings={**samples.SETTINGS, "model": "x" * 300, samples.EVIL: samples.EVIL},
        provenance={"platform": samples.EVIL + "y" * 500},
        **common,
    )
    figure = samples.SampleFigure()
    drawn = write_figure_page(folder / "figure.html", figure, figure.rows(samples.EVIL), "small")
    return {"usual": usual, "hostile": hostile, "figure": drawn}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict]:
    """What the measuring script says of each page, by page name and width."""
    folder = tmp_path_factory.mktemp("pages")
    return look(folder, pages(folder), MEASURE, (390, 1280))


PAGES = [f"{name}-{width}" for name in ("usual", "hostile", "figure") for width in (390, 1280)]


@pytest.mark.parametrize("page", PAGES)
def test_every_plot_is_drawn_without_faults(seen, page):
    note = seen[page]
    assert note["faults"] == []
    assert note["drawn"] == note["plots"] == (2 if page.startswith("figure") else 3)
    assert note["first"][0] == (4 if page.startswith("figure") else 6)
    assert note["rows"] > 10
    assert note["cloud"] == 0
    assert note["resources"] == []


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_wider_than_the_screen(seen, page):
    note = seen[page]
    assert note["inner"] == int(page.rpartition("-")[2])
    assert note["scroll"] <= note["inner"]
    assert note["wide"] == []


def test_the_axis_switches_and_a_legend_entry_hides_its_arm_in_both_plots(seen):
    note = seen["usual-1280"]
    assert (note["before"], note["after"]) == ("optimiser steps", "e-folds of weight decay spent")
    assert note["first"][:2] == [6, 6]
    assert note["hidden"][:2] == [5, 5]


def test_hostile_text_did_not_run(seen):
    assert seen["hostile-390"]["title"] != "owned"
    assert seen["hostile-390"]["plots"] == 3


def requests(folder: Path, page: Path) -> list[str]:
    """Addresses that `page` asked the network for; requests of the browser's own have no origin and are left out."""
    log = folder / "net.json"
    chromium(folder, page, f"--log-net-log={log}")
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    addresses = [item["url"] for item in asked if item["initiator"] != "not an origin"]
    return [address for address in addresses if not address.startswith(("file:", "data:", "blob:"))]


def test_pages_ask_for_nothing_even_without_their_policy(tmp_path):
    frames = ""
    for page in samples.every_page(tmp_path).values():
        text, removed = POLICY.subn("", page.read_text(encoding="utf-8"))
        assert removed == 1
        page.write_text(text, encoding="utf-8")
        frames += f'<iframe src="{page.relative_to(tmp_path).as_posix()}"></iframe>'
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html>{frames}", encoding="utf-8")
    assert requests(tmp_path, outer) == []
    page.write_text(text.replace("</main>", '<img src="http://page.invalid/x.png"></main>'), encoding="utf-8")
    assert requests(tmp_path, outer) == ["http://page.invalid/x.png"]  # the log does see what a page asks for
