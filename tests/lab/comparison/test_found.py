"""The verdict of a comparison claims no more than the seeds show; its page and its card say the same."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from tests.lab.comparison.compared_models import (
    BASE,
    CLEAR,
    FAINT,
    NOISE,
    found,
    made,
    plus,
    tiny,
)

from decaycast.core.experiment import Row
from decaycast.lab import data
from decaycast.lab.comparison.arms import ARMS
from decaycast.lab.comparison.found import assess
from decaycast.lab.comparison.page import comparison_plots, write_comparison_page
from decaycast.lab.comparison.paired import p_value, t_quantile
from decaycast.lab.store import load_export


def test_no_difference_is_called_so():
    comparison = found(("sam", plus(NOISE)), ("stochnorm", plus(FAINT)))
    assert p_value(FAINT) < 0.05 < comparison.arms[2].p == 2 * p_value(FAINT)
    assert comparison.outcome == "no difference"
    assert comparison.verdict.startswith(
        "No difference: none of 2 arms can be told from 'no regulariser' in test accuracy."
    )
    assert "Corrected for 2 comparisons (Holm, 5 %); with 5 seeds a difference below about" in comparison.verdict
    spread = [arm.gain.stderr * t_quantile(0.025, 4) for arm in comparison.compared]
    assert comparison.resolution == pytest.approx(sum(spread) / 2)
    alone = found(("stochnorm", plus(FAINT)))
    assert alone.outcome == "better", "one arm alone needs no correction"


def test_better_and_worse_arms_are_named_with_their_gains():
    comparison = found(("sam", plus(CLEAR)), ("stochnorm", plus([-g for g in CLEAR])), ("label-noise", plus(NOISE)))
    assert comparison.outcome == "better"
    assert [arm.standing for arm in comparison.compared] == ["better", "worse", "no difference"]
    assert (
        "Better than 'no regulariser' in test accuracy: SAM, radius 0.05 (yardstick) (+2.20 points)."
        in comparison.verdict
    )
    assert "Worse: StochNorm, p = 0.5 (-2.20 points)." in comparison.verdict
    assert "No difference was found for the other arm." in comparison.verdict
    both = found(("sam", plus(CLEAR)), ("label-noise", plus([2 * g for g in CLEAR])))
    assert "The better ones were not compared with each other." in both.verdict
    none = found(("stochnorm", plus([-g for g in CLEAR])))
    assert none.outcome == "none better" and none.verdict.startswith("No arm is better than")


def test_a_loss_gains_by_falling():
    comparison = found(("sam", plus(CLEAR)), metric="loss")
    sam = comparison.arms[1]
    assert sam.gain.mean == pytest.approx(0.022) and sam.standing == "better"
    assert "in test loss: SAM, radius 0.05 (yardstick) (-0.0220)." in comparison.verdict
    assert sam.better_share == 1 and comparison.cells(sam)[2].startswith("+0.0220 (+0.0")


def test_an_arm_that_lost_seeds_is_never_better():
    values: list[float | None] = [*plus(CLEAR)]
    values[2] = None
    comparison = found(("sam", values), ("label-noise", [None] * 5))
    sam, noise = comparison.arms[1:]
    assert sam.p < 0.05 and sam.standing == "failed" and comparison.outcome == "no difference"
    assert sorted(sam.gains) == [0, 1, 3, 4] and comparison.cells(sam)[3] == "4 of 4"
    assert comparison.cells(noise)[:2] == ("label noise, flip 0.2", "failed") and math.isnan(noise.p)
    assert "sam: 1 of 5 failed, DivergedError: the training loss is nan" in comparison.notes()
    assert "label-noise: 5 of 5 failed, DivergedError: the training loss is nan" in str(comparison)
    assert "1 of 5 seeds of 'SAM, radius 0.05 (yardstick)' failed." in comparison.verdict


def test_nothing_is_worse_than_a_baseline_that_lost_seeds():
    values = [2 * base - better for base, better in zip(BASE, plus(CLEAR))]  # as much worse as `plus` is better
    assert found(("sam", values)).arms[1].standing == "worse"
    base: list[float | None] = [*BASE]
    base[2] = None
    sam = found(("sam", values), base=base).arms[1]
    assert sam.p < 0.05 and sam.gain.mean < 0 and sam.standing == "no difference"


def test_without_a_baseline_there_is_no_verdict():
    comparison = found(("sam", BASE), base=[None, None, None, None, 0.8])
    assert comparison.outcome == "no verdict"
    assert comparison.verdict.startswith("No verdict: only 1 of 5 seeds of the baseline 'no regulariser' finished (Div")
    other = found(("sam", [None, None, None, None, 0.9]))
    assert other.verdict == "No verdict: no other arm has finished two of the baseline's seeds."
    with pytest.raises(ValueError, match="no row is of the baseline 'sam'; there are none"):
        assess(made("none", BASE), baseline="sam")


def test_two_seeds_that_agree_by_accident_prove_nothing():
    comparison = found(("sam", [0.9, 0.92]), base=[0.8, 0.82])
    sam = comparison.arms[1]
    assert sam.p == 0.5 and sam.gain.high == math.inf and comparison.cells(sam)[2] == "+10.00 (?)"
    assert "with 2 seeds a difference of any size is not seen" in comparison.verdict


def test_the_table_and_the_dictionary_say_the_same():
    comparison = found(("sam", plus(CLEAR)), left_out={"stochnorm": "no batch norm"})
    head, none, sam = (line.split() for line in comparison.lines())
    assert head[0] == "arm" and none == ["none", "81.00", "0.1900", "81.00", "1.00x"]
    assert sam[:2] == ["sam", "83.20"] and sam[-5:] == ["<", "0.001", "0.1680", "83.20", "1.00x"]
    read = comparison.to_dict()
    assert [arm["standing"] for arm in read["arms"]] == ["baseline", "better"]
    assert read["arms"][1]["gain"] == pytest.approx(0.022) and read["arms"][1]["pairs"] == 5
    assert read["arms"][0]["gain"] is None and read["left_out"] == {"stochnorm": "no batch norm"}
    assert (
        read["arms"][1]["by_seed"]["0"]["test_accuracy"] == pytest.approx(0.82) and read["arms"][1]["yardstick"] is True
    )
    assert "stochnorm: left out, no batch norm" in str(comparison)


def test_time_is_the_median_ratio_of_pairs():
    ratios = (1.0, 2.0, 2.0, 9.0, 2.0)
    slow = [made("sam", BASE, train_seconds=ratio * (2.0 + seed))[seed] for seed, ratio in enumerate(ratios)]
    comparison = assess([*made("none", BASE), *slow], baseline="none")
    assert comparison.arms[1].time == 2.0 and comparison.baseline.time == 1.0


def test_the_page_shows_verdict_table_and_command(tmp_path: Path):
    comparison = tiny(["label-smoothing", "sam"])
    path = write_comparison_page(tmp_path / "compare.html", comparison, command="decaycast compare --model '<m>'")
    page = path.read_text(encoding="utf-8")
    for words in (
        comparison.verdict.replace("'", "&#39;"),
        "SAM, radius 0.05 (yardstick)",
        "decaycast compare --model &#39;&lt;m&gt;&#39;",
        "How to read this page",
        "Gain over the baseline",
        "Validation accuracy on the way",
        "20 gradients for each arm, 2 seeds",
    ):
        assert words in page, words
    for arm in comparison.arms:
        assert all(cell in page for cell in comparison.cells(arm))
    gains, curves = comparison_plots(comparison)
    assert [row[0] for row in gains.rows] == ["label smoothing 0.1 (yardstick)", "SAM, radius 0.05 (yardstick)"]
    assert gains.rows[1][2] == pytest.approx(100 * comparison.arms[2].gain.mean)
    assert max(row[1] for row in curves.rows) == 20 and len(curves.legend) == 3


def test_a_page_without_a_finished_run(tmp_path: Path):
    comparison = found(("sam", [None] * 5), base=[None] * 5)
    page = write_comparison_page(tmp_path / "compare.html", comparison, command="c").read_text(encoding="utf-8")
    assert comparison_plots(comparison) == [] and "No verdict" in page and "10 failed" in page


def test_a_forecasts_curve_ends_where_its_seeds_do_on_average():
    rows = made("none", [0.5, 0.7])
    spent = ([5.0, 9.0], [7.0, 9.0])
    for row, gradients in zip(rows, spent):
        object.__setattr__(row, "curve", {"gradients": gradients, "validation_accuracy": [0.1, 0.2]})
    (curve,) = comparison_plots(assess(rows, baseline="none"))
    assert [row[1] for row in curve.rows] == [6.0, 9.0]


DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_tables_of_the_card_are_what_its_rows_give():
    rows, text = load_export(DOCS / "rows" / "compare.jsonl.gz"), (DOCS / "compare.md").read_text(encoding="utf-8")
    groups: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=lambda row: [*ARMS].index(str(row.run.config["arm"]))):
        groups.setdefault((row.run.config["model"], row.run.seed >= 5), []).append(row)
    labels = len(data.load("digits").test[1])
    assert len(groups) == 3 and len(rows) == 100
    for (_, fresh), own in groups.items():
        comparison = assess(own, baseline="label-smoothing" if fresh else "none", test_samples=labels)
        for line in [*comparison.lines(), f"> {comparison.verdict}"]:
            assert line in text, f"the card needs\n{line}"
    (plain_net,) = (own for (model, fresh), own in groups.items() if str(model) == "mlp-256x3" and not fresh)
    assert f"> {assess(plain_net, baseline='none', metric='loss').verdict}" in text


def test_the_card_names_every_arm():
    text = (DOCS / "compare.md").read_text(encoding="utf-8")
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == [*ARMS]


def test_the_code_on_the_card_runs(capsys: pytest.CaptureFixture[str]):
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "compare.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, "block", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:2] == ["arm", "accuracy"] and printed[-1] in ("better", "none better", "no difference")
