"""`decaycast probe-lr` as people and scripts use it: what it prints, its JSON, its page, its data, and its refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")

from tests.commands import Command, command, error_line

from decaycast.core.experiment import Panel
from decaycast.lab import shortcuts
from decaycast.lab.shortcuts import ProbeRequest, probe_panels, probe_rates, read_npz, read_samples
from decaycast.methods.large_lr.probe_report import Arm, ProbeReport

TINY = ("--train-size", "300", "--model", "mlp-16x1", "--batch-size", "32", "--steps", "12", "--seeds", "2")
FIXED = (*TINY, "--difficulty", "0.5")


@pytest.fixture
def decaycast(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `decaycast probe-lr ...` in a folder of its own, through the entry point."""
    return command(monkeypatch, capfd, tmp_path, "probe-lr")


def save(path: Path, x: np.ndarray, y: np.ndarray, **more: Any) -> str:
    np.savez(path, X=x, y=y, **more)
    return str(path)


def pictures(shape: tuple[int, ...], dtype: str = "uint8") -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 255, shape).astype(dtype), np.arange(shape[0]) % 3


# -- the command


def test_it_prints_what_its_json_says(decaycast: Command, tmp_path: Path):
    printed = decaycast(*FIXED, "--rates", "0.3,0.01", "--out", "found")
    assert printed.code == 0, printed.err
    answer = decaycast(*FIXED, "--rates", "0.3, 0.01", "--out", "found", "--json")
    assert answer.code == 0 and answer.err == ""
    read = answer.json
    assert [arm["lr"] for arm in read["arms"]] == [0.3, 0.01] and read["small"] == 0.01 and read["trainings"] == 8
    words = " ".join(printed.out.split())
    for arm in read["arms"]:
        assert " ".join(arm["sentence"].split()) in words
        mean = 100 * sum(arm["alone_before"]) / 2
        assert re.search(rf"{arm['lr']:g} │ {mean:.0f} % ", words)
        assert arm["verdict"] in ("memorises shortcuts first", "does not", "cannot tell")
    assert "patch of 2 x 2 pixels, separation 0.5 as given; 12 steps, at 0.01 from step 6 on; 2 seeds" in words
    assert read["arms"][1]["difference_in_differences"] is None
    assert "page     found/probe-lr.html" in printed.out and read["page"] == "found/probe-lr.html"


def test_the_page_shows_verdicts_numbers_and_command(decaycast: Command, tmp_path: Path):
    read = decaycast(*FIXED, "--rates", "0.3,0.01", "--json").json
    page = (tmp_path / "decaycast-out" / "probe-lr.html").read_text(encoding="utf-8")
    for arm in read["arms"]:
        assert arm["sentence"].replace("'", "&#39;") in page
    for words in (
        "Which learning rates memorise shortcuts: mlp-16x1 on digits",
        "The shortcut alone",
        "Clean samples",
        "How much less the shortcut costs",
        "decaycast probe-lr --train-size 300",
        "How to read this page",
        "less than at small",
    ):
        assert words in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_it_tunes_the_shortcut_unless_told(decaycast: Command):
    tuned = decaycast(*TINY, "--json").json
    assert tuned["learnable"] is False and "the easiest tried" in tuned["difficulty"] and 8 < tuned["trainings"] <= 11
    assert [arm["lr"] for arm in tuned["arms"]] == [0.1, 0.005], "the usual rates of sgd"


def test_other_optimisers_and_a_small_rate_of_its_own(decaycast: Command):
    found = decaycast(*FIXED, "--optimizer", "adamw", "--small", "0.0001", "--json").json
    assert [arm["lr"] for arm in found["arms"]] == [0.01, 0.0003, 0.0001]


def test_a_file_of_ones_own_is_probed(decaycast: Command, tmp_path: Path):
    x, y = pictures((120, 10, 10, 3))
    save(tmp_path / "own.npz", x, y)
    options = (
        "--model",
        "mlp-16x1",
        "--batch-size",
        "16",
        "--steps",
        "8",
        "--seeds",
        "2",
        "--difficulty",
        "1",
        "--json",
    )
    read = decaycast("--data", "own.npz", *options, "--patch-size", "3").json
    assert read["what"] == "patch of 3 x 3 pixels" and read["chance"] < 0.6


def test_progress_goes_to_stderr_alone(decaycast: Command):
    ended = decaycast(*FIXED, "--json")
    assert ended.err == "" and ended.json


# -- data


def test_named_data_are_brief_and_held_out(tmp_path: Path):
    train, held_out, classes = read_samples("digits", None, None)
    assert classes == 10 and held_out is not None and len(train[0]) + len(held_out[0]) == 1400
    assert len(read_samples("digits", 500, None)[0][0]) == 500


def test_large_sets_are_cut_and_keep_what_is_held_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shortcuts, "_SMALL_SETS", ())
    monkeypatch.setattr(shortcuts, "BRIEF", 700)
    train, held_out, _ = read_samples("digits", None, None)
    assert held_out is not None and (len(train[0]), len(held_out[0])) == (700, 700)


@pytest.mark.parametrize("shape", [(120, 9, 10), (120, 1, 9, 10), (120, 9, 10, 1)])
def test_grey_images_of_any_layout_are_the_same(shape: tuple[int, ...], tmp_path: Path):
    x, y = pictures((120, 9, 10))
    images, labels = read_npz(save(tmp_path / "a.npz", x.reshape(shape), y))
    assert images.shape == (120, 1, 9, 10) and labels.tolist() == y.tolist()
    wanted = (x - x.mean()) / x.std(ddof=1)
    assert np.allclose(images[:, 0].numpy(), wanted, atol=1e-5)


def test_colour_images_are_made_standard_channel_by_channel(tmp_path: Path):
    x, y = pictures((120, 9, 10, 3), "float64")
    x = x * [1.0, 2.0, 0.0] + [5.0, 0.0, 7.0]
    images, _ = read_npz(save(tmp_path / "a.npz", x, y))
    assert images.shape == (120, 3, 9, 10)
    assert np.allclose(images.mean((0, 2, 3)).numpy(), 0, atol=1e-5)
    assert np.allclose(images.std((0, 2, 3)).numpy(), [1, 1, 0], atol=1e-4), "a constant channel stays one"


def test_whole_numbers_of_two_dimensions_are_tokens(tmp_path: Path):
    x, y = pictures((120, 9))
    tokens, _ = read_npz(save(tmp_path / "a.npz", x, y))
    assert tokens.shape == (120, 9) and tokens.tolist() == x.tolist()


def test_part_of_a_file_is_chosen_at_random_and_always_the_same(tmp_path: Path):
    path = save(tmp_path / "a.npz", *pictures((120, 9, 10)))
    one, two = (read_samples(path, 40, None)[0] for _ in range(2))
    assert len(one[0]) == 40 and one[1].tolist() == two[1].tolist() and len(set(one[1].tolist())) == 3


def test_a_text_is_probed_with_a_language_model(tmp_path: Path):
    (tmp_path / "text").mkdir()
    letters = np.random.default_rng(0).integers(0, 4, 64 * 260)
    (tmp_path / "text" / "tinyshakespeare.txt").write_text("".join("abcd"[i] for i in letters), encoding="utf-8")
    request = ProbeRequest(
        data="shakespeare",
        data_dir=str(tmp_path),
        model="gpt-8x1",
        optimizer="adamw",
        steps=4,
        seeds=2,
        batch_size=8,
        train_size=60,
        difficulty=2,
        out=tmp_path,
    )
    assert len(read_samples("shakespeare", 60, str(tmp_path))[0][0]) == 60
    report, page = probe_rates(request)
    assert report.what.startswith("key of two tokens") and page.is_file() and report.trainings == 8


# -- panels


def made_up(seeds: int = 2, **more: Any) -> ProbeReport:
    curves = {"step": (1.0, 2.0), "alone": (0.1, 0.9), "clean": (0.3, 0.4), "control": (0.3, 0.5)}
    clean = tuple(0.4 + 0.1 * i for i in range(seeds))
    arms = [
        Arm(
            lr=lr,
            alone_before=(0.1,) * seeds,
            alone_after=(0.9,) * seeds,
            clean_after=clean,
            control_clean=(0.5,) * seeds,
            curves=curves,
        )
        for lr in (0.3, 0.01)
    ]
    return ProbeReport(
        **{"what": "patch", "difficulty": "separation 1", "learnable": True, "small": 0.01, "steps": 2, "anneal_at": 1,
           "chance": 0.1, "arms": arms, "seeds": seeds, "trainings": 8, "seconds": 1.0, **more}
    )  # fmt: skip


def test_panels_show_the_curves_and_the_interval():
    alone, clean, spared = probe_panels(made_up())
    assert [trace.name for trace in alone.traces] == ["0.3", "0.01"] and alone.traces[0].y == (0.1, 0.9)
    assert [trace.name for trace in clean.traces][:2] == ["0.3, with shortcut", "0.3, control"]
    assert list(spared.traces[0].x) == [0.3] and spared.traces[0].y == [pytest.approx(0)]


def test_what_is_missing_is_not_drawn():
    titles: Callable[[list[Panel]], list[str]] = lambda panels: [panel.title for panel in panels]  # noqa: E731
    assert titles(probe_panels(made_up(seeds=1))) == ["The shortcut alone", "Clean samples"]
    failed = [Arm(lr=0.3, failed="diverged"), made_up().arms[1]]
    assert titles(probe_panels(made_up(arms=failed))) == ["The shortcut alone", "Clean samples"]
    assert probe_panels(made_up(arms=[Arm(lr=0.3, failed="diverged"), Arm(lr=0.01, failed="diverged")])) == []


def test_a_page_without_any_result_can_be_written(tmp_path: Path):
    report = made_up(arms=[Arm(lr=0.3, failed="<b>diverged</b>"), Arm(lr=0.01, failed="diverged")])
    page = shortcuts.write_probe_page(
        tmp_path / "page.html", report, panels=[], settings={"data": "<i>"}, command="x", provenance={}
    )
    text = page.read_text(encoding="utf-8")
    assert "<b>diverged" not in text and "&lt;b&gt;diverged" in text
    assert "<td>&lt;i&gt;</td>" in text


# -- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digts"], "unknown data set 'digts'; did you mean 'digits'?"),
        (["--model", "mpl-256x3"], "unknown model 'mpl-256x3'; did you mean 'mlp-256x3'?"),
        (["--model", "gpt-64x2"], "gpt-64x2 does not fit samples of shape (1, 8, 8)"),
        (["--optimizer", "adam"], "unknown optimizer 'adam'; did you mean 'adamw'?"),
        (["--momentum", "1"], "the momentum must be in [0, 1), got 1.0"),
        (["--rates", "0.1,x"], "--rates must be numbers with commas between them, such as 0.1,0.005, got '0.1,x'"),
        (["--rates", "0.1"], "one rate, 0.1, has nothing to be compared with"),
        (["--rates", "0.1,nan"], "rates must be at least one finite learning rate > 0"),
        (["--small", "1"], "small must be a rate > 0 and not above the candidates [0.005, 0.1], got 1.0"),
        (["--steps", "10", "--anneal-at", "10"], "the training ends at step 10, before it anneals at step 10"),
        (["--seeds", "0"], "seeds must be a whole number >= 1, got 0"),
        (["--patch-size", "9"], "a patch of 9 x 9 pixels does not fit into images of 8 x 8"),
        (["--difficulty", "0"], "separation must be a finite number > 0, got 0.0"),
        (["--batch-size", "5000"], "a batch of 5000 needs as many samples"),
        (["--train-size", "5000"], "digits has 1400 samples to train and validate on"),
        (["--data", "no.npz"], "no.npz cannot be read as an .npz file"),
        (["--data", "text.npz"], "text.npz cannot be read as an .npz file"),
        (["--data", "empty.npz"], "empty.npz has no array X and no y; write it with numpy.savez(path, X=X, y=y)"),
        (["--data", "floats.npz"], "y in floats.npz must hold class numbers, got float64"),
        (["--data", "words.npz"], "X in words.npz must hold numbers, got 4 of <U1"),
        (["--data", "number.npz"], "one class number a sample, got shapes () and (100,)"),
        (["--data", "large.npz"], "hold values that are not finite"),
        (["--data", "objects.npz"], "objects.npz cannot be read as an .npz file (Object arrays cannot be loaded"),
        (["--data", "one.npz"], "all training samples are of one class, 0"),
        (["--data", "vectors.npz"], "a patch needs images of shape (n, channels, height, width), got samples of shape"),
        (["--data", "nan.npz"], "hold values that are not finite (NaN)"),
        (["--data", "one.npz", "--train-size", "500"], "one.npz has 100 samples, but 500 were asked for; lower train_size"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_cannot_be_probed_is_one_line(decaycast: Command, tmp_path: Path, arguments: list[str], message: str):
    pixels, labels = np.zeros((100, 6, 6)), np.arange(100) % 2
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "empty.npz", Z=pixels)
    save(tmp_path / "floats.npz", pixels, labels / 2)
    save(tmp_path / "words.npz", np.array(list("abcd")), labels[:4])
    save(tmp_path / "objects.npz", np.array([{}, {}], dtype=object), labels[:2])
    save(tmp_path / "one.npz", np.random.default_rng(0).normal(size=(100, 6, 6)), 0 * labels)
    save(tmp_path / "vectors.npz", np.zeros((100, 36)), labels)
    save(tmp_path / "nan.npz", np.where(np.arange(36).reshape(6, 6) == 7, np.nan, pixels), labels)
    save(tmp_path / "number.npz", np.array(1.0), labels)
    save(tmp_path / "large.npz", pixels + 1e300, labels)
    before = sorted(tmp_path.iterdir())
    assert message in error_line(decaycast(*arguments))
    assert sorted(tmp_path.iterdir()) == before, "nothing was written"


def test_a_page_that_cannot_be_written_is_one_line(decaycast: Command, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    ended = decaycast(*FIXED, "--seeds", "1", "--out", "file")
    assert ended.code == 2 and "cannot write file/probe-lr.html" in ended.err.splitlines()[-1]
