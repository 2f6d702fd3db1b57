"""What a page contains, that it needs nothing else, and that no text in it becomes markup."""

from __future__ import annotations

import base64
import csv
import gzip
import importlib
import io
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from tests.lab.pages import page_samples as samples

from decaycast.core.experiment import Panel, Row, Trace
from decaycast.lab.figures import figures
from decaycast.lab.findings import Finding, assess
from decaycast.lab.pages import plots, thinning
from decaycast.lab.pages.index import paper_of, papers
from decaycast.lab.pages.page import ReportError
from decaycast.lab.report import write_figure_page, write_forecast_page, write_report
from decaycast.lab.store import Store

LIMIT = 6_000_000
LOADING = {"src", "srcset", "data", "action", "poster", "background", "formaction"}


class Page(HTMLParser):
    """The elements, the visible text and the scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "style":
            self.styles.append(data)
        else:
            self.words.append(data)

    @property
    def payloads(self) -> list[dict]:
        """The embedded plots."""
        found = zip([a for tag, a in self.elements if tag == "script"], self.scripts, strict=True)
        return [json.loads(text) for attributes, text in found if attributes.get("class") == "drawn"]

    @property
    def listings(self) -> list[dict]:
        """The embedded tables of runs."""
        found = zip([a for tag, a in self.elements if tag == "script"], self.scripts, strict=True)
        return [json.loads(text) for attributes, text in found if attributes.get("class") == "cells"]

    def tables(self) -> list[str]:
        """The CSV texts on offer."""
        links = [attributes.get("href") or "" for tag, attributes in self.elements if tag == "a"]
        return [unquote(link.partition(",")[2]) for link in links if link.startswith("data:text/csv")]


def forecast_page(tmp_path, forecast=None, **changes) -> Page:
    arguments = {
        "curves": samples.curves(),
        "verification": samples.Grid(),
        "recipe": samples.RECIPE,
        "settings": samples.SETTINGS,
        "command": samples.COMMAND,
        "provenance": samples.PROVENANCE,
    }
    path = write_forecast_page(tmp_path / "page.html", forecast or samples.forecast(), **{**arguments, **changes})
    return Page(path.read_text(encoding="utf-8"))


def figure_page(tmp_path, figure=None, rows=None, size="small") -> Page:
    figure = figure or samples.SampleFigure()
    path = write_figure_page(tmp_path / "figure.html", figure, figure.rows() if rows is None else rows, size)
    return Page(path.read_text(encoding="utf-8"))


def test_forecast_page_says_what_was_forecast(tmp_path):
    page = forecast_page(tmp_path)
    for said in (
        "Weight decay for mlp on mnist",
        "0.00125",
        "90 % interval: 0.00071 to 0.0023",
        "✓ trust",
        samples.forecast().reason,
        "1.25",
        "0.8 of the run",
        "0.28 full runs",
        "failed: loss became infinite at step 312",
        "0.0021 ± 0.0009",
        "torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1.25e-3)",
        samples.COMMAND,
        "train size 512",
        "0123456789abcdef0123456789abcdef01234567-dirty",
    ):
        assert said in page.text, said
    assert page.text.count("The forecast is made from this metric.") == 1


def test_forecast_page_draws_loss_and_accuracy_against_both_axes_in_the_same_colours(tmp_path):
    loss, accuracy, grid = forecast_page(tmp_path).payloads
    for curves in (loss, accuracy):
        assert [view["label"] for view in curves["views"]] == ["steps", "e-folds"]
        assert [trace["name"] for trace in curves["figure"]["data"]] == [
            "λ = 0.0001", "λ = 0.0004", "λ = 0.0016", "λ = 0.0064", "λ = 0.0256", "λ = 0.41"]  # fmt: skip
    assert [t["meta"] for t in loss["figure"]["data"]] == [t["meta"] for t in accuracy["figure"]["data"]]
    assert len({t["meta"]["light"] for t in loss["figure"]["data"]}) == 6
    steps, efolds = loss["views"]
    assert steps["x"][2][-1] == 4000
    assert efolds["x"][2][-1] == pytest.approx(0.05 * 1.6e-3 * 4000)
    assert efolds["x"][2][0] is None  # a log axis has no zero
    assert efolds["xaxis"]["type"] == "log"
    assert efolds["shapes"][0]["x0"] == pytest.approx(1.25)  # e-folds of the full run
    assert loss["figure"]["data"][1]["y"][20] is None  # the hole stays a gap
    assert grid["figure"]["data"][0]["x"] == [1e-4, 4e-4, 1.25e-3, 4e-3, 1.2e-2]  # zero is a line of its own
    assert grid["figure"]["data"][0]["error_y"]["array"][-1] is None


def test_verification_plot_marks_the_choice_and_the_interval(tmp_path):
    layout = forecast_page(tmp_path).payloads[2]["figure"]["layout"]
    band, line, zero = layout["shapes"]
    assert (band["x0"], band["x1"]) == (7.1e-4, 2.3e-3)
    assert line["x0"] == 1.25e-3
    assert (zero["y0"], zero["y1"]) == (1.02, 1.02)
    note = next(item for item in layout["annotations"] if item["text"] == "chosen: 0.00125")
    assert note["x"] == pytest.approx(math.log10(1.25e-3))  # plotly wants exponents here and values in shapes
    assert layout["xaxis"]["type"] == "log"


def test_every_plot_offers_its_table(tmp_path):
    page = forecast_page(tmp_path)
    loss, _, grid = (list(csv.DictReader(io.StringIO(text))) for text in page.tables())
    assert len(loss) == 5 * 50 + 4
    assert loss[70] == {"weight_decay": "0.0004", "step": "1632.65", "efolds": "0.0326531", "validation_loss": ""}
    assert grid[3] == {"weight_decay": "0.00125", "validation_loss": "0.647", "standard_error": "0.006"}
    assert grid[5]["standard_error"] == ""
    assert len(figure_page(tmp_path).tables()) == 2


def test_without_curves_the_forecast_s_own_metric_is_drawn(tmp_path):
    page = forecast_page(tmp_path, curves={}, verification=None)
    (plot,) = page.payloads
    assert plot["figure"]["data"][0]["y"][0] == pytest.approx(samples.curve(1e-4)["validation_loss"][0])
    assert plot["views"][1]["x"][3][-1] == pytest.approx(0.05 * 6.4e-3 * 4000)
    assert "Was it right?" not in page.text


def test_the_y_axis_shows_where_the_arms_part(tmp_path):
    curves = samples.curves()
    exploding = samples.curve(0.2)
    exploding["validation_loss"] = [2.3 + 10.0**i for i in range(50)]
    page = forecast_page(tmp_path, curves={**curves, 0.2: exploding})
    low, high = page.payloads[0]["figure"]["layout"]["yaxis"]["range"]
    assert 0.5 < low < 0.63
    assert 0.8 < high < 2.0
    assert "double-click the plot" in page.text
    flat = {0.01: {"step": [0.0, 100.0, 200.0], "validation_loss": [0.7, 0.6, 0.5]}}
    page = forecast_page(tmp_path, curves=flat)
    assert "range" not in page.payloads[0]["figure"]["layout"]["yaxis"]


def test_a_refusal_does_not_look_like_an_answer(tmp_path):
    nothing = samples.forecast(
        verdict="refuse", weight_decay=5e-4, interval=(0.0, math.inf), efolds=None, rate_per_decay=None, cost=0.1
    )
    page = forecast_page(tmp_path, nothing, curves={}, verification=None)
    assert "No forecast; fallback weight decay λ" in page.text
    assert "Recommended" not in page.text
    assert "90 % interval: 0 to ∞" in page.text
    assert "needs the learning rate" in page.text
    assert [view["label"] for view in page.payloads[0]["views"]] == ["steps"]


@pytest.mark.parametrize("number", [math.nan, 0.0])
def test_a_forecast_without_a_place_on_a_log_axis_still_makes_a_page(tmp_path, number):
    odd = samples.forecast(weight_decay=number, interval=(math.nan, math.nan), verdict="refuse", arms=(), efolds=0.0)
    page = forecast_page(tmp_path, odd, curves={})
    assert "90 % interval: unknown to unknown" in page.text
    assert not any("ruler" in (attributes.get("class") or "") for _, attributes in page.elements)


def test_figure_page_states_claim_size_and_verdict(tmp_path):
    figure = samples.SampleFigure()
    page = figure_page(tmp_path)
    for said in (figure.title, figure.claim, figure.source, "Size shown: small", "✓ held", "slope -0.97 ± 0.04"):
        assert said in page.text, said
    assert "1 of 2 runs of this size finished; 1 failed" in page.text
    assert "loss became NaN at step 40" in page.text
    assert "2026-11-20T05:40:00Z to 2026-11-20T05:41:00Z" in page.text
    assert "✕ not held" in figure_page(tmp_path, samples.SampleFigure("not held")).text
    empty = figure_page(tmp_path, samples.SampleFigure("not enough data", panels=[]), rows=[], size="smoke")
    assert "Nothing to draw yet" in empty.text
    assert "0 of 2 runs of this size finished; 2 missing." in empty.text
    assert "Judged on what is there: 2 of 2 runs are missing." in empty.text
    assert "missing" not in page.text
    assert "decaycast lab run l2/time-to-best --size smoke" in empty.text


def test_a_figure_page_lists_its_runs_with_the_settings_that_differ(tmp_path):
    figure = samples.SampleFigure()
    done, failed = figure.rows()
    rows = [replace(done, final={"test_accuracy": 0.8125, "gap": math.nan}, seconds=4.0), failed]
    (listing,) = figure_page(tmp_path, figure, rows).listings
    assert [column["name"] for column in listing["columns"]] == [
        "status", "reason", "seed", "weight decay", "test accuracy", "gap", "seconds", "run"]  # fmt: skip
    assert listing["rows"] == [
        ["failed", "loss became NaN at step 40", "3", "0.1", "", "", "", failed.run.key],
        ["done", "", "3", "0.01", "0.8125", "", "4", done.run.key],
    ]


def test_long_traces_are_thinned_and_the_table_has_all():
    x = list(range(30_000))
    spiked = [0.0] * 29_999 + [1.0]
    spiked[12_345] = 9.0
    line = Trace(name="l", x=x, y=spiked)
    cloud = Trace(
        name="c", x=x, y=[(7919 * i) % 10_007 for i in x], low=[0.0] * len(x), high=[1.0] * len(x), mode="markers"
    )
    plot = plots.panel_plot(Panel(title="p", x_label="x", y_label="y", traces=[line, cloud], caption="Said."))
    drawn_line, drawn_cloud = plot.figure.data
    assert max(drawn_line.y) == 9.0 and drawn_line.x[-1] == 29_999 and len(drawn_line.x) <= thinning.LINE_POINTS
    assert 500 < len(drawn_cloud.x) <= thinning.MARKED_POINTS and len(drawn_cloud.error_y.array) == len(drawn_cloud.x)
    assert len(plot.rows) == 60_000 and plot.packed
    count = len(drawn_line.x) + len(drawn_cloud.x)
    assert plot.caption == f"Said. Drawn: {count:,} of 60,000 points, extremes among them."
    packed = base64.b64decode(plot.csv_uri.removeprefix("data:application/gzip;base64,"))
    assert len(list(csv.reader(io.StringIO(gzip.decompress(packed).decode())))) == 60_001


def test_bands_break_at_gaps_and_stay_on_a_log_axis():
    nan = math.nan
    trace = Trace(name="t", x=[1, 2, 3, 4], y=[5, 6, nan, 8], low=[-1, 5, nan, 7], high=[7, 8, nan, 9])
    panel = Panel(title="p", x_label="x", y_label="y", traces=[trace], y_log=True)
    first, second, line = plots.panel_plot(panel).figure.data
    assert list(first.x) == [1, 2, 2, 1]
    assert list(first.y) == [7, 8, 5, 5]  # the bound below zero is drawn at the lowest positive number
    assert list(second.y) == [9, 7]
    assert first.fill == second.fill == "toself"
    assert line.y[2] is None
    linear = plots.panel_plot(replace(panel, y_log=False)).figure.data[0]
    assert list(linear.y) == [7, 8, 5, -1]


def test_loose_markers_get_bars_and_large_families_an_ordered_scale():
    loose = Trace(name="m", x=[1, 2], y=[3.0, 4.0], low=[2.5, math.nan], high=[3.25, 5.0], mode="markers")
    (points,) = plots.panel_plot(Panel(title="p", x_label="x", y_label="y", traces=[loose])).figure.data
    assert list(points.error_y.array) == [0.25, 1.0]
    assert list(points.error_y.arrayminus) == [0.5, None]
    family = [Trace(name=str(i), x=[0, 1], y=[i, i]) for i in range(9)]
    legend = plots.panel_plot(Panel(title="p", x_label="x", y_label="y", traces=family)).legend
    greens = [int(key.colours[0].split(",")[1]) for key in legend]
    assert greens == sorted(greens)  # viridis brightens all the way
    assert len(set(greens)) == 9


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00125, "0.00125"), (3.279e-5, "3.28×10⁻⁵"), (1e-6, "10⁻⁶"), (20_000, "20,000"), (0.0, "0"), (-0.5, "-0.5"),
     (math.nan, "-"), (None, "-"), (-math.inf, "-∞"), (2.5e9, "2.5×10⁹"), (-9.99e-5, "-9.99×10⁻⁵")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert plots.pretty(value) == text


def test_a_zero_weight_decay_is_grey_and_one_colour_is_in_the_middle():
    scale = plots.Scale([0.0, 1e-4, 1e-2])
    assert scale.colours(0.0) == plots.GREY
    assert scale.colours(1e-3) == plots.Scale([5.0]).colours(5.0)


# ---- alone and safe


def assert_loads_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img", "video", "audio"), tag
        assert not LOADING & set(attributes), (tag, attributes)
        link = attributes.get("href") or ""
        assert link == "" or link.startswith(("data:", "#")), link
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    for style in page.styles:
        assert "url(" not in style
        assert "@import" not in style
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    ours = page.scripts[-1]
    assert "displaylogo: false" in ours
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?:|sendDataToCloud", ours)


def test_pages_are_alone_and_small(tmp_path):
    for write, name in ((forecast_page, "page.html"), (figure_page, "figure.html")):
        assert_loads_nothing(write(tmp_path))
        assert 3_000_000 < (tmp_path / name).stat().st_size < LIMIT  # plotly.js is in it, once


def test_many_long_arms_stay_under_the_limit(tmp_path):
    decays = [10 ** (-5 + i / 8) for i in range(40)]
    page = forecast_page(tmp_path, curves={decay: samples.curve(decay, points=3000) for decay in decays})
    assert (tmp_path / "page.html").stat().st_size < LIMIT
    assert page.payloads[0]["views"][0]["x"][17][-1] == 4000  # thinned, but to the end
    assert "evenly spaced points left out" in page.text
    rows = [attributes for tag, attributes in page.elements if tag == "tr"]
    assert len(rows) < 2 * plots.TABLE_ROWS + 200


def test_user_text_never_becomes_markup(tmp_path):
    clean = forecast_page(tmp_path)
    arms = samples.forecast().arms
    evil = samples.forecast(
        reason=samples.EVIL, metric=samples.EVIL, arms=(*arms[:-1], replace(arms[-1], reason=samples.EVIL))
    )
    page = forecast_page(
        tmp_path,
        evil,
        recipe=samples.EVIL,
        command=samples.EVIL,
        settings={**samples.SETTINGS, "model": samples.EVIL, "data": samples.EVIL},
        provenance={**samples.PROVENANCE, "torch": samples.EVIL},
        verification=replace(samples.Grid(), metric=samples.EVIL),
    )
    assert_loads_nothing(page)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in clean.elements]
    assert page.text.count("</script><script>document.title='owned'</script>") >= 7
    assert "onerror" in page.payloads[2]["figure"]["layout"]["yaxis"]["title"]["text"]
    assert "<" not in page.payloads[2]["figure"]["layout"]["yaxis"]["title"]["text"]  # plotly reads tags too


def test_a_payload_cannot_close_its_script_element():
    plot = plots.panel_plot(Panel(title="p", x_label="x", y_label="y", traces=[Trace(name="t", x=[1], y=[2])]))
    payload = replace(plot, views=({"label": "<!--" + samples.EVIL},)).payload
    assert "<" not in payload
    assert json.loads(payload)["views"][0]["label"] == "<!--" + samples.EVIL


def test_figure_text_never_becomes_markup(tmp_path):
    clean = figure_page(tmp_path)
    figure = samples.SampleFigure()
    figure.title = figure.claim = figure.source = samples.EVIL
    hostile = [
        replace(
            panel, title=samples.EVIL, x_label=samples.EVIL, y_label=samples.EVIL, caption=panel.caption and samples.EVIL,
            traces=[replace(trace, name=samples.EVIL) for trace in panel.traces],
        )
        for panel in figure.draw([])
    ]  # fmt: skip
    rows = [
        replace(row, provenance=dict.fromkeys(samples.PROVENANCE, samples.EVIL)) for row in figure.rows(samples.EVIL)
    ]
    figure.panels = hostile
    page = figure_page(tmp_path, figure, rows)
    assert_loads_nothing(page)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in clean.elements]
    assert all("<" not in trace["name"] for plot in page.payloads for trace in plot["figure"]["data"])
    assert all("</" not in script for script in page.scripts if script.startswith('{"figure"'))


# ---- the file


def test_a_page_replaces_the_last_one_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "page.html"
    figure = samples.SampleFigure()
    assert write_figure_page(str(path), figure, figure.rows(), "small") == path
    write_figure_page(path, samples.SampleFigure("not held"), figure.rows(), "small")
    assert "not held" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_a_failed_write_keeps_the_last_page(tmp_path, monkeypatch):
    figure = samples.SampleFigure()
    path = write_figure_page(tmp_path / "page.html", figure, figure.rows(), "small")
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ReportError, match=r"cannot write .*page\.html: No space left on device; choose another --out"):
        write_figure_page(path, figure, [], "small")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("place", ["file/page.html", "file/deeper/page.html", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    figure = samples.SampleFigure()
    with pytest.raises(ReportError, match=rf"cannot write .*{place}: .*; choose another --out"):
        write_figure_page(tmp_path / place, figure, figure.rows(), "small")


@pytest.mark.parametrize(
    ("missing", "module", "told"),
    [("plotly.graph_objects", "plots", "drawn with plotly"), ("jinja2", "page", "written with jinja2")],
)
def test_a_missing_extra_names_the_pip_command(monkeypatch, missing, module, told):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"decaycast.lab.pages.{module}")
    with pytest.raises(ImportError, match=rf"{told}: pip install 'decaycast\[lab\]'"):
        importlib.import_module(f"decaycast.lab.pages.{module}")


def test_rows_without_provenance_are_fine(tmp_path):
    figure = samples.SampleFigure()
    runs = [replace(run, seed=seed) for seed in range(3) for run in figure.runs("small")]
    rows = [Row(run=run, provenance={"torch": f"2.{i}"}) for i, run in enumerate(runs)]
    many = samples.SampleFigure()
    many.runs = lambda size: runs
    assert "2.0, 2.1, 2.2, 2.3 and 2 more" in figure_page(tmp_path, many, rows).text
    assert "2 of 2 runs" in figure_page(tmp_path, figure, [Row(run=run) for run in figure.runs("small")]).text


# ---- several figures


def index_page(tmp_path, figures, rows) -> Page:
    write_report(tmp_path / "pages", figures, rows, "small")
    return Page((tmp_path / "pages" / "index.html").read_text(encoding="utf-8"))


def test_a_report_has_a_page_per_figure_and_an_index_that_links_them(tmp_path):
    first, second = samples.SampleFigure(), samples.other_figure()
    page = index_page(tmp_path, [first, second], first.rows())
    links = [attributes["href"] or "" for tag, attributes in page.elements if tag == "a"]
    assert links[:4] == ["#content", "#papers", "#figures", "#runs"]
    board = ["l2/time-to-best.html", "l2/other.html"]
    table = ["l2/time-to-best.html", "l2/time-to-best.html#runs", "l2/other.html", "l2/other.html#runs"]
    assert links[4:] == [*board, *table, *["l2/time-to-best.html#runs"] * 2]
    assert all((tmp_path / "pages" / link.partition("#")[0]).is_file() for link in links[4:])
    for said in (
        first.title,
        first.claim,
        samples.EVIL,
        "✓ held",
        "✕ not held",
        "1 of 2, 1 failed",
        "0 of 1, 1 missing",
    ):
        assert said in page.text, said
    assert "Size shown: small (minutes on two cores)" in page.text
    assert "held 1 not held 1 not enough data 0" in page.text


def test_the_scoreboard_counts_claims_by_paper():
    def finding(source: str, outcome: str) -> Finding:
        figure = samples.SampleFigure(outcome)
        figure.source = source
        return assess(figure, [], "small")

    sources = [
        "A & B 2020, sec. 2",
        "our own check; A & B 2020 differ",
        "C 2021: theorem",
        "A & B 2020, fig. 3; C 2021",
        "memory",
    ]
    outcomes = ["held", "held", "not held", "not held", "not enough data"]
    board = papers([finding(*pair) for pair in zip(sources, outcomes)])
    assert [paper.name for paper in board] == ["A & B 2020", "Our own checks", "C 2021", "memory"]
    assert [len(board[0].of(outcome)) for outcome in ("held", "not held", "not enough data")] == [1, 1, 0]


def test_the_papers_of_the_real_figures_are_named():
    assert {paper_of(figure.source) for figure in figures()} >= {
        "Lewkowycz & Gur-Ari 2020", "Li, Wei & Ma 2019", "Damian, Ma & Lee 2021", "Kou, You, Long & Wang 2020",
        "Mobahi, Farajtabar & Bartlett 2020",
    }  # fmt: skip


def test_the_index_lists_every_run_failed_ones_first(tmp_path):
    figure = samples.SampleFigure()
    page = index_page(tmp_path, [figure], figure.rows())
    (listing,) = page.listings
    assert [column["name"] for column in listing["columns"]] == [
        "figure", "status", "seed", "settings that differ", "final numbers", "seconds", "reason"]  # fmt: skip
    assert listing["rows"] == [
        ["l2/time-to-best", "failed", "3", "weight decay 0.1", "", "", "loss became NaN at step 40"],
        ["l2/time-to-best", "done", "3", "weight decay 0.01", "", "", ""],
    ]
    assert listing["columns"][0]["links"] == {"l2/time-to-best": "l2/time-to-best.html#runs"}
    assert "No run of this size has a row yet" in index_page(tmp_path, [figure], []).text


def test_the_index_lists_the_rest_of_the_store_too(tmp_path):
    figure = samples.SampleFigure()
    others = samples.sweep_rows(2, 2, 1, optimizers=("sgd",))
    with Store(tmp_path / "rows.sqlite") as store:
        store.extend([*figure.rows(), *others])
        table = store.table()
    write_report(tmp_path / "pages", [figure], figure.rows(), "small", table=table)
    page = Page((tmp_path / "pages" / "index.html").read_text(encoding="utf-8"))
    rows = page.listings[0]["rows"]
    assert Counter(row[0] for row in rows) == {"l2/time-to-best": 2, "no figure": 4}
    failed, *done = [row for row in rows if row[0] == "no figure"]
    assert failed[1] == "failed" and failed[6] == f"loss became infinite {samples.EVIL}"
    assert done[0] == ["no figure", "done", "0", "weight decay 0, lr 0.01", "test loss 0.45", "2", ""]


def test_an_index_loads_nothing_and_is_small(tmp_path):
    page = index_page(tmp_path, [samples.other_figure()], [])
    relative = [attributes for tag, attributes in page.elements if tag == "a"]
    for attributes in relative:
        attributes.pop("href")
    assert_loads_nothing(page)
    assert (tmp_path / "pages" / "index.html").stat().st_size < 50_000
    clean = index_page(tmp_path, [samples.other_figure(claim="clean")], [])
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in clean.elements], "hostile text became markup"


def test_an_index_of_no_figures_says_so(tmp_path):
    assert "0 figures, size small" in index_page(tmp_path, [], []).text


@pytest.mark.parametrize("name", ["../up", "/etc/x", "l2/..", "a/b/c", "L2/x", "", "l2/x\n", "l2/x.html"])
def test_a_figures_name_cannot_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="a figure's name must be room/name in a-z, 0-9 and hyphens"):
        write_report(tmp_path / "pages", [samples.SampleFigure(), samples.other_figure(name)], [], "small")
    assert not (tmp_path / "pages").exists()
