"""The probe for shortcuts: its trainings, its tuning, its verdicts on numbers made up, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from decaycast.methods.large_lr import probe
from decaycast.methods.large_lr.patch import Shares, TokenKey
from decaycast.methods.large_lr.planted import generator_for
from decaycast.methods.large_lr.probe import paper_sgd, probe_shortcuts
from decaycast.methods.large_lr.probe_report import Arm, ProbeReport

QUICK: dict[str, Any] = {"steps": 8, "batch_size": 16, "seeds": 2, "difficulty": 0.5}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 80, channels: int = 1, side: int = 8) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 2
    return torch.randn(count, channels, side, side, generator=seeded()) + labels.view(-1, 1, 1, 1), labels


def network(seed: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2)) if seed < 0 else nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def sequences(count: int = 80) -> tuple[Tensor, Tensor]:
    return torch.randint(12, (count, 6), generator=seeded()), torch.arange(count) % 4


class Language(nn.Module):
    """Scores of the next token at each place, from the token and the ones before it."""

    def __init__(self, classes: int = 4, tokens: int = 12) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(tokens, 8), nn.Linear(8, classes)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.embed(codes).cumsum(1)).transpose(1, 2)


# trainings


def test_a_probe_trains_every_rate_with_and_without_the_shortcut():
    told: list[tuple[str, float]] = []
    report = probe_shortcuts(
        network, images(), [0.01, 0.3, 0.1], **QUICK, on_row=lambda words, row: told.append((words, row["step"]))
    )
    assert [arm.lr for arm in report.arms] == [0.3, 0.1, 0.01] and report.small == 0.01
    assert report.trainings == 12 and report.seeds == 2 and report.learnable is None
    assert [words for words, step in told if step == 8] == [
        f"rate {rate:g}, seed {seed}, {word}"
        for rate in (0.3, 0.1, 0.01)
        for seed in (0, 1)
        for word in ("shortcut", "control")
    ]
    for arm in report.arms:
        columns = (
            arm.alone_before,
            arm.alone_after,
            arm.clean_before,
            arm.clean_after,
            arm.control_alone,
            arm.control_clean,
        )
        assert all(len(column) == 2 and 0 <= min(column) <= max(column) <= 1 for column in columns)
        assert arm.curves["step"] == (1, 2, 3, 4, 5, 6, 7, 8)
    assert (report.steps, report.anneal_at, report.chance) == (8, 4, 0.6)
    assert "patch of 2 x 2 pixels, separation 0.5 as given; 8 steps, at 0.01 from step 4 on; 2 seeds" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_before_is_the_last_measurement_at_the_candidate_rate():
    rows: dict[str, list[dict[str, float]]] = {}
    report = probe_shortcuts(
        network,
        images(),
        [0.3, 0.01],
        **QUICK,
        anneal_at=3,
        on_row=lambda words, row: rows.setdefault(words, []).append(row),
    )
    for arm in report.arms:
        for seed in (0, 1):
            own, control = (rows[f"rate {arm.lr:g}, seed {seed}, {word}"] for word in ("shortcut", "control"))
            before = next(row for row in own if row["step"] == 3)
            assert before["lr"] == pytest.approx(arm.lr) and own[-1]["lr"] == pytest.approx(0.01)
            assert (arm.alone_before[seed], arm.clean_before[seed]) == (
                before["alone_accuracy"],
                before["clean_accuracy"],
            )
            assert (arm.alone_after[seed], arm.clean_after[seed]) == (
                own[-1]["alone_accuracy"],
                own[-1]["clean_accuracy"],
            )
            assert (arm.control_alone[seed], arm.control_clean[seed]) == (
                control[-1]["alone_accuracy"], control[-1]["clean_accuracy"]
            )  # fmt: skip


def test_numbers_go_where_they_belong(monkeypatch: pytest.MonkeyPatch):
    def made_up(model: Any, optimizer: Any, task: Any, course: Any, *, planted: bool, seed: int, **options: Any) -> Any:
        base = 0.1 * seed + (0.5 if planted else 0.0) + (0.2 if course.lr > 0.1 else 0.0)
        steps = range(8)
        return {
            "step": [float(step + 1) for step in steps],
            "alone_accuracy": [base + 0.01 * step for step in steps],
            "clean_accuracy": [base + 0.001 * step for step in steps],
        }

    monkeypatch.setattr(probe, "train_planted", made_up)
    large, small = probe_shortcuts(network, images(), [0.3, 0.01], **QUICK, anneal_at=3).arms
    for arm, more in ((large, 0.2), (small, 0.0)):
        assert arm.alone_before == pytest.approx((0.52 + more, 0.62 + more))
        assert arm.alone_after == pytest.approx((0.57 + more, 0.67 + more))
        assert arm.clean_before == pytest.approx((0.502 + more, 0.602 + more))
        assert arm.clean_after == pytest.approx((0.507 + more, 0.607 + more))
        assert arm.control_alone == pytest.approx((0.07 + more, 0.17 + more))
        assert arm.control_clean == pytest.approx((0.007 + more, 0.107 + more))
        assert arm.curves["alone"][0] == pytest.approx(0.55 + more)
        assert arm.curves["clean"][7] == pytest.approx(0.557 + more)
        assert arm.curves["control"][7] == pytest.approx(0.057 + more)


def test_a_probe_repeats_itself_and_leaves_the_random_numbers_of_others_alone():
    def noisy(seed: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = probe_shortcuts(noisy, images(), [0.3, 0.01], **QUICK)
    assert torch.equal(torch.rand(2), expected)
    second = probe_shortcuts(noisy, images(), [0.3, 0.01], **QUICK)
    assert first.arms == second.arms
    assert first.arms[0].clean_after[0] != first.arms[0].clean_after[1] or first.arms[0] != first.arms[1]


def test_the_small_rate_is_an_arm_and_may_lie_below_the_candidates():
    report = probe_shortcuts(network, images(), [0.3], small=0.02, **QUICK)
    assert [arm.lr for arm in report.arms] == [0.3, 0.02]


def test_every_seed_has_a_shortcut_and_a_model_of_its_own(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int, float]] = []

    def make(seed: int) -> nn.Module:
        seen.append((seed, torch.initial_seed(), float(torch.rand(1))))
        return network(seed)

    drawn: list[float] = []
    real = probe.draw_patch
    monkeypatch.setattr(probe, "draw_patch", lambda *a, **k: drawn.append(float((p := real(*a, **k)).base.sum())) or p)
    probe_shortcuts(make, images(), [0.3, 0.01], **QUICK)
    assert [(seed, initial) for seed, initial, _ in seen] == [(0, 0), (0, 0), (1, 1), (1, 1)] * 2
    assert len({number for *_, number in seen}) == 2 and len(set(drawn)) == 2


def test_an_optimiser_of_ones_own_gets_the_rate():
    rates: list[float] = []

    def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
        rates.append(lr)
        return torch.optim.AdamW(parameters, lr=lr)

    probe_shortcuts(network, images(), [0.03, 0.001], **QUICK, make_optimizer=adam)
    assert rates == [0.03] * 4 + [0.001] * 4
    group = paper_sgd([nn.Parameter(torch.zeros(1))], 0.4).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.4, 0.9, True, 5e-4)


def test_held_out_samples_are_a_quarter_or_those_given():
    train, other = images(80), images(40)
    assert probe_shortcuts(network, train, [0.3, 0.01], **QUICK).chance == 0.6  # 12 of 20
    assert probe_shortcuts(network, train, [0.3, 0.01], held_out=other, **QUICK).chance == 0.5
    parts = probe._parts(train, None)
    assert [len(part[0]) for part in parts] == [60, 20]
    rows = torch.cat([part[0] for part in parts]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 80
    assert probe._parts(train, other)[0][0] is train[0]


def test_a_rate_that_diverges_is_told_and_the_others_are_there():
    report = probe_shortcuts(network, images(), [1e30, 0.01], **QUICK)
    bad, good = report.arms
    assert "diverged (rate 1e+30, seed 0, shortcut): the training loss is" in bad.failed and not good.failed
    assert report.standing(1e30)[0] == "cannot tell" and report.trainings == 5
    assert "failed" in str(report) and report.sentence(1e30).startswith("at 1e+30 the probe cannot tell")
    json.dumps(report.to_dict(), allow_nan=False)


# text


def test_sequences_with_a_label_each_get_a_key():
    report = probe_shortcuts(lambda seed: AtTheEnd(Language()), sequences(), [0.3, 0.01], **{**QUICK, "difficulty": 2})
    assert report.what == "key of two tokens at the start of a sequence" and "switches 2 as given" in str(report)


def test_windows_of_a_language_model_are_read_at_their_last_place():
    inputs, labels = sequences()
    windows = torch.randint(4, (80, 6), generator=seeded(3))
    windows[:, -1] = labels
    options = {**QUICK, "difficulty": 2}
    of_windows = probe_shortcuts(lambda seed: Language(), (inputs, windows), [0.3, 0.01], **options)
    of_labels = probe_shortcuts(lambda seed: AtTheEnd(Language()), (inputs, labels), [0.3, 0.01], **options)
    assert of_windows.arms == of_labels.arms


def test_a_language_model_may_have_tokens_that_do_not_occur():
    inputs, _ = sequences()
    windows = torch.randint(4, (80, 6), generator=seeded(3))
    windows[0, -1] = 11  # a class that no input has as a token, and many that nothing has
    options = {**QUICK, "difficulty": 2}
    report = probe_shortcuts(lambda seed: Language(12), (inputs % 3, windows), [0.3, 0.01], **options)
    assert report.trainings == 8
    with pytest.raises(ValueError, match="a key for 12 classes needs as many token numbers, and the vocabulary has 3"):
        probe_shortcuts(lambda seed: AtTheEnd(Language(12)), (inputs % 3, windows[:, -1]), [0.3, 0.01], **options)


class AtTheEnd(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor) -> Tensor:
        return self.model(codes)[:, :, -1]


# tuning


@pytest.mark.parametrize("needed", [0.01, 0.05, 0.15, 0.4, 1.0, 1.6, 2.0])
def test_tuning_finds_the_hardest_shortcut_that_the_small_rate_memorises(
    needed: float, monkeypatch: pytest.MonkeyPatch
):
    tried: list[float] = []

    def learns(self: Any, course: Any, difficulty: float) -> bool:
        assert course.lr == course.small == 0.01
        tried.append(difficulty)
        return difficulty >= needed

    monkeypatch.setattr(probe._Bench, "_learns", learns)
    report = probe_shortcuts(network, images(), [0.3, 0.01], **{**QUICK, "difficulty": None, "seeds": 1})
    able = [separation for separation in probe.SEPARATIONS if separation >= needed]
    assert f"separation {min(able, default=1.6):g} " in report.difficulty and len(tried) <= 3
    assert report.learnable is bool(able)
    assert ("tuned on another seed" in report.difficulty) == bool(able)
    assert ("not memorised in time" in report.difficulty) != bool(able)


def test_tuning_goes_through_the_switches_that_there_are_classes_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe._Bench, "_learns", lambda self, course, difficulty: difficulty <= 2)
    report = probe_shortcuts(lambda seed: Language(), sequences(), [0.3, 0.01], **{**QUICK, "difficulty": None})
    assert "switches 2 (tuned" in report.difficulty


def test_tuning_looks_at_the_small_rate_before_annealing_on_a_seed_that_is_not_reported(
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[tuple[int, Any, bool]] = []
    real = probe.train_planted

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append((options["seed"], options["stop"], options["planted"]))
        return real(*arguments, **options)

    monkeypatch.setattr(probe, "train_planted", watched)
    report = probe_shortcuts(network, images(), [0.3, 0.01], **{**QUICK, "difficulty": None, "seeds": 1})
    tuning = [(stop, planted) for seed, stop, planted in seen if seed == probe.TUNING_SEED]
    assert tuning == [(4, True)] * len(tuning) and 1 <= len(tuning) <= 3
    assert report.trainings == len(seen) == len(tuning) + 4


def test_tuning_wants_nine_tenths_above_chance(monkeypatch: pytest.MonkeyPatch):
    for accuracy, wanted in ((0.95, False), (0.97, True)):  # chance 0.6: 0.96 is nine tenths of the way
        monkeypatch.setattr(
            probe, "train_planted", lambda *a, accuracy=accuracy, **k: {name: [accuracy] * 8 for name in
            ("step", "alone_accuracy", "clean_accuracy")}
        )  # fmt: skip
        report = probe_shortcuts(network, images(), [0.3, 0.01], **{**QUICK, "difficulty": None, "points": 8})
        assert report.learnable is wanted


# verdicts


def arm(lr: float, before: Sequence[float], *, after: float = 0.99, clean: Any = 0.5, control: Any = 0.6) -> Arm:
    count = len(before)

    def column(value: Any) -> tuple[float, ...]:
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * count

    wobble = tuple(0.001 * (i % 2) for i in range(count))
    return Arm(
        lr=lr, alone_before=tuple(before), alone_after=tuple(after - w for w in wobble), clean_before=column(0.4),
        clean_after=tuple(c + w for c, w in zip(column(clean), wobble, strict=True)), control_alone=column(0.1),
        control_clean=column(control),
    )  # fmt: skip


def report_of(large: Arm, small: Arm, seeds: int = 5) -> ProbeReport:
    return ProbeReport(
        what="patch", difficulty="separation 0.2", learnable=True, small=small.lr, steps=100, anneal_at=50, chance=0.1,
        arms=[large, small], seeds=seeds, trainings=20, seconds=1.0,
    )  # fmt: skip


HIGH, LOW, MIXED = [0.97, 0.99, 0.98, 0.96, 1.0], [0.11, 0.13, 0.09, 0.12, 0.3], [0.2, 0.9, 0.4, 0.8, 0.5]


@pytest.mark.parametrize(
    ("large", "standing", "words"),
    [
        (arm(0.4, HIGH), "memorises shortcuts first", "98 % right on the shortcut alone before annealing"),
        (arm(0.4, LOW), "does not", "15 % right on the shortcut alone before annealing, and 99 % at the end"),
        (arm(0.4, LOW, after=0.2), "does not", "and 20 % at the end"),
        (arm(0.4, MIXED), "cannot tell", "before annealing, too uncertain with 5 seeds; give more of them"),
        (arm(0.4, LOW, clean=0.1), "cannot tell", "also on clean samples it has learnt next to nothing; train longer"),
        (Arm(lr=0.4, failed="diverged at once"), "cannot tell", "diverged at once"),
    ],
    ids=["high", "low", "never", "mixed", "nothing learnt", "diverged"],
)
def test_a_rate_is_judged_by_what_it_knew_before_annealing(large: Arm, standing: str, words: str):
    report = report_of(large, arm(0.02, HIGH))
    found = report.standing(0.4)
    assert found[0] == standing and words in found[1]
    said = {"memorises shortcuts first": "at 0.4 your network memorises shortcuts first: ",
            "does not": "at 0.4 your network does not memorise shortcuts first: ",
            "cannot tell": "at 0.4 the probe cannot tell whether your network memorises shortcuts first: "}[standing]  # fmt: skip
    assert report.sentence(0.4).startswith(said) and words in report.sentence(0.4)


def test_what_nobody_learns_says_nothing_about_a_rate():
    nobody = report_of(arm(0.4, LOW, after=0.2), arm(0.02, LOW, after=0.2))
    assert nobody.standing(0.4)[0] == "cannot tell"
    assert (
        "no rate has learnt the shortcut in this time; train longer or plant an easier one" in nobody.standing(0.4)[1]
    )
    assert report_of(arm(0.4, LOW), arm(0.02, LOW, after=0.2)).standing(0.4)[0] == "does not", "its own end shows it"


def test_skill_is_above_chance():
    guessed = replace(report_of(arm(0.4, [0.91] * 5), arm(0.02, HIGH)), chance=0.9)
    assert guessed.standing(0.4)[0] != "memorises shortcuts first", "91 % is chance where one class has 90 %"
    of_two = replace(report_of(arm(0.4, [0.9, 0.89, 0.91, 0.9, 0.9]), arm(0.02, HIGH)), chance=0.5)
    assert of_two.standing(0.4)[0] == "memorises shortcuts first", "90 % of two classes is eight tenths of the way"


def test_one_seed_is_no_verdict():
    report = report_of(arm(0.4, [1.0]), arm(0.02, [1.0]), seeds=1)
    assert report.standing(0.4)[0] == "cannot tell" and "one seed has no interval" in report.standing(0.4)[1]
    assert math.isinf(report.spared(0.4).low) and "Difference" not in report.sentence(0.4)
    assert report.to_dict()["arms"][0]["difference_in_differences"]["low"] is None
    assert "?" in str(report)


def test_the_difference_in_differences_is_that_of_scipy():
    generator = np.random.default_rng(1)
    with_, without, small_with, small_without = generator.uniform(0.3, 0.6, (4, 5))
    report = report_of(
        Arm(lr=0.4, alone_before=LOW, alone_after=HIGH, clean_after=tuple(with_), control_clean=tuple(without)),
        Arm(
            lr=0.02,
            alone_before=HIGH,
            alone_after=HIGH,
            clean_after=tuple(small_with),
            control_clean=tuple(small_without),
        ),
    )
    values = (with_ - without) - (small_with - small_without)
    found = report.spared(0.4)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("clean", "words"),
    [
        (0.55, "the shortcut costs less clean accuracy than at 0.02"),
        (0.35, "the shortcut costs more clean accuracy than at 0.02"),
        ([0.3, 0.6, 0.45, 0.5, 0.45], "not resolved, 5 seeds tell 13.5 points here"),
    ],
)
def test_the_sentence_tells_what_the_shortcut_costs(clean: Any, words: str):
    report = report_of(arm(0.4, LOW, clean=clean), arm(0.02, HIGH, clean=0.45))
    assert words in report.sentence(0.4) and "Difference in differences" in report.sentence(0.4)
    assert "Difference" not in report.sentence(0.02)


def test_two_seeds_and_networks_that_learnt_nothing_resolve_nothing():
    two = report_of(arm(0.4, LOW[:2], clean=0.55), arm(0.02, HIGH[:2], clean=0.45), seeds=2)
    assert two.spared(0.4).low > 0 and "not resolved, 2 seeds, too few to believe, tell 0.0 points" in two.sentence(0.4)
    dull = report_of(arm(0.4, LOW, clean=0.1, control=0.12), arm(0.02, HIGH, clean=0.45))
    assert "it says nothing, since a control has learnt next to nothing" in dull.sentence(0.4)
    assert "it says nothing" in report_of(arm(0.4, LOW), arm(0.02, HIGH, control=0.1)).sentence(0.4)


def test_the_table_shows_percents_and_points():
    large, small = str(report_of(arm(0.4, LOW, clean=0.55), arm(0.02, HIGH, clean=0.45))).splitlines()[2:4]
    assert large.split()[:9] == ["0.4", "15", "%", "99", "%", "10", "%", "55", "%"]
    assert (
        "60 %    +5.0  +10.00 (+10.00 to +10.00)" in " ".join(large.split("  ")).replace("   ", "    ")
        or "+10.00" in large
    )
    assert small.split()[0] == "0.02" and "(" not in small


def test_a_rate_that_was_not_probed_is_said():
    with pytest.raises(ValueError, match=r"0.3 is none of the rates probed: 0.4, 0.02"):
        report_of(arm(0.4, LOW), arm(0.02, HIGH)).standing(0.3)


# the whole


@pytest.mark.slow
def test_a_shortcut_that_is_easy_is_seen_and_one_that_cannot_be_learnt_is_not():
    def mlp(seed: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    options: dict[str, Any] = {"steps": 200, "batch_size": 32, "seeds": 2}
    easy = probe_shortcuts(mlp, images(800), [0.05, 0.02], difficulty=3.0, **options)
    assert {easy.standing(rate)[0] for rate in (0.05, 0.02)} == {"memorises shortcuts first"}
    hopeless = probe_shortcuts(mlp, images(800), [0.05, 0.02], difficulty=1e-4, **options)
    assert (
        hopeless.standing(0.05)[0] == "cannot tell" and "no rate has learnt the shortcut" in hopeless.standing(0.05)[1]
    )
    assert all(abs(value - 0.5) < 0.3 for one in easy.arms for value in one.control_alone)


# refusals


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (images(), {"size": 9}, "a patch of 9 x 9 pixels does not fit into images of 8 x 8; choose a size from 1 to 8"),
        ((torch.zeros(80, 64), images()[1]), {}, r"a patch needs images of shape \(n, channels, height, width\), got samples"),
        ((torch.full((80, 1, 8, 8), float("nan")), images()[1]), {}, r"training images hold values that are not finite \(NaN\)"),
        ((images()[0], torch.zeros(80, dtype=torch.long)), {}, "all training samples are of one class, 0"),
        ((images()[0], images()[1].double()), {}, "labels must be a tensor of whole numbers, got torch.float64"),
        ((images()[0], images()[1].tolist()), {}, "labels must be a tensor of whole numbers, got list"),
        ((images()[0], images()[1] - 1), {}, "labels must be 0 or above, got -1"),
        ((images()[0], images()[1][:7]), {}, r"80 samples and labels of shape \(7,\); one each"),
        ((images()[0][:0], images()[1][:0]), {}, r"0 samples and labels of shape \(0,\)"),
        (images()[0], {}, r"the training data must be a pair \(samples, labels\), got Tensor"),
        (images(), {"held_out": images(side=9)}, r"training and held-out samples differ: torch.float32 of shape \(80, 1, 8, 8\)"),
        (images(), {"batch_size": 61}, "a batch of 61 needs as many samples, got 60; lower the batch size"),
        (images(), {"anneal_at": 8}, "the training ends at step 8, before it anneals at step 8"),
        (images(), {"steps": 1}, "the training ends at step 1, before it anneals at step 1"),
        (images(), {"steps": 2.0}, "steps must be a whole number >= 1, got 2.0"),
        (images(), {"seeds": 0}, "seeds must be a whole number >= 1, got 0"),
        (images(), {"rates": []}, r"rates must be at least one finite learning rate > 0, got \[\]"),
        (images(), {"rates": [0.1, -0.1]}, "rates must be at least one finite learning rate > 0"),
        (images(), {"rates": [0.1, float("nan")]}, "rates must be at least one finite learning rate > 0"),
        (images(), {"rates": [0.1]}, "one rate, 0.1, has nothing to be compared with"),
        (images(), {"small": 0.1}, r"small must be a rate > 0 and not above the candidates \[0.01, 0.3\], got 0.1"),
        (images(), {"small": 0.0}, "small must be a rate > 0"),
        (images(), {"difficulty": -1.0}, "separation must be a finite number > 0, got -1.0"),
        (sequences(), {"difficulty": 1.5}, "the difficulty of a key is its number of switches, a whole number, got 1.5"),
        (sequences(), {"difficulty": 5}, "switches must be a whole number from 1 to the 4 classes, got 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed_is_refused_before_anything_is_trained(train: Any, options: dict[str, Any], message: str):
    def never(seed: int) -> nn.Module:
        raise AssertionError("a model was made")

    rates = options.pop("rates", [0.3, 0.01])
    with pytest.raises(ValueError, match=message):
        probe_shortcuts(never, train, rates, **{**QUICK, **options})


def test_arrays_are_no_tensors():
    inputs, labels = images()
    array: Any = inputs.numpy()
    with pytest.raises(TypeError, match="expected images as a torch tensor, got ndarray"):
        probe_shortcuts(network, (array, labels), [0.3, 0.01], **QUICK)


def test_shares_of_ones_own_are_used(monkeypatch: pytest.MonkeyPatch):
    seen = []
    real = probe.train_planted
    monkeypatch.setattr(
        probe, "train_planted", lambda m, o, task, *a, **k: seen.append(task) or real(m, o, task, *a, **k)
    )
    shares = Shares(clean=0.5, alone=0.1, both=0.4)
    probe_shortcuts(lambda seed: Language(), sequences(), [0.3, 0.01], **{**QUICK, "difficulty": 2}, shares=shares)
    assert {task.shares for task in seen} == {shares} and all(isinstance(task.shortcut, TokenKey) for task in seen)
    assert generator_for("a", 1).initial_seed() != generator_for("b", 1).initial_seed()
