"""Figures of the patch experiment: what they train, by a second route, what they draw, and how they judge rows made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from scipy import stats

from decaycast.core.experiment import SIZES, Figure, Row, Run
from decaycast.methods.large_lr.figures import patch_training
from decaycast.methods.large_lr.figures.patch import PatchCost, PatchNoise, PatchOrder
from decaycast.methods.large_lr.figures.patch_networks import WideResNet, network
from decaycast.methods.large_lr.figures.patch_runs import ARMS, LARGE, NOISE, PLANS, SMALL
from decaycast.methods.large_lr.figures.patch_training import (
    by_arm,
    course_of,
    finals,
    late_accuracy,
    spared,
    train_patch,
)
from decaycast.methods.large_lr.insert import insert_activation_noise
from decaycast.methods.large_lr.noise import activation_noises
from decaycast.methods.large_lr.patch import Shares, draw_patch
from decaycast.methods.large_lr.planted import COLUMNS, Task, clean_accuracy, generator_for, train_planted

ORDER, COST, MITIGATION = FIGURES = (PatchOrder(), PatchCost(), PatchNoise())
CLASSES = 3


# networks


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_papers_network_has_its_size_and_its_noisy_places():
    with torch.device("meta"):
        model = WideResNet(3, 10, depth=16, widen=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 17_116_634
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)
    noisy = insert_activation_noise(network("wrn-16-1", 3, 10, seeded()), 0.4, report=None)
    assert len(activation_noises(noisy)) == 13, "2 in each of 6 blocks, and the last"


def test_a_wide_network_is_the_one_written_out():
    model = network("wrn-10-2", 3, 4, seeded()).double().eval()
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0, generator=seeded(i))  # type: ignore[arg-type]
        torch.nn.init.normal_(norm.bias, generator=seeded(99 + i))
    state, x = model.state_dict(), torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=seeded(1))

    def relu(name: str, x: torch.Tensor) -> torch.Tensor:
        own = [state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")]
        return (own[2] * (x - own[0]) / (own[1] + 1e-5).sqrt() + own[3]).relu()

    hidden = functional.conv2d(x, state["stem.weight"], padding=1)
    for i, stride in enumerate((1, 2, 2)):
        name = f"stages.{i}"
        first = relu(f"{name}.norm1", hidden)
        inner = functional.conv2d(first, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        inner = functional.conv2d(relu(f"{name}.norm2", inner), state[f"{name}.conv2.weight"], padding=1)
        hidden = functional.conv2d(first, state[f"{name}.shortcut.weight"], stride=stride) + inner
    scores = relu("norm", hidden).mean((2, 3)) @ state["head.weight"].T + state["head.bias"]
    assert torch.allclose(model(x), scores, rtol=1e-12)


def test_the_small_network_is_the_one_written_out():
    model = network("conv-4-5", 2, 3, seeded()).double().eval()
    state, x = model.state_dict(), torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=seeded(1))
    weights = [value for name, value in state.items() if value.ndim == 4]
    hidden = functional.conv2d(x, weights[0], padding=1) / (1 + 1e-5) ** 0.5
    hidden = functional.conv2d(functional.max_pool2d(hidden.relu(), 2), weights[1], padding=1) / (1 + 1e-5) ** 0.5
    scores = hidden.relu().mean((2, 3)) @ next(v for v in state.values() if v.ndim == 2).T
    assert torch.allclose(model(x), scores, rtol=1e-12)
    assert float(weights[1].std()) == pytest.approx((2 / 36) ** 0.5, rel=0.25)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet-8", "unknown network 'resnet-8'; names are conv-WIDTH-WIDTH-... and wrn-DEPTH-WIDEN"),
        ("conv-", "unknown network 'conv-'"),
        ("wrn-15-1", r"a WRN has depth 6n \+ 4 \(10, 16, 22, 28\) and widening >= 1, got 15, 1"),
        ("wrn-16-0", "got 16, 0"),
    ],
)
def test_no_other_networks(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        network(name, 3, 10, seeded())


# the plan


def test_figures_share_their_runs_and_their_training():
    assert PatchOrder.train is PatchCost.train is PatchNoise.train is train_patch
    for size in SIZES:
        keys = [{run.key for run in figure.runs(size)} for figure in FIGURES]
        assert keys[0] == keys[1] < keys[2]


@pytest.mark.parametrize("size", ["small", "paper"])
def test_every_arm_has_five_seeds_and_a_control_for_each(size: Any):
    runs = MITIGATION.runs(size)
    for arm in ARMS:
        for patch in (True, False):
            seeds = [run.seed for run in runs if (run.config["arm"], run.config["patch"]) == (arm, patch)]
            assert len(seeds) >= 5 and seeds == list(range(len(seeds)))
    assert [run.seed for run in runs] == sorted(run.seed for run in runs), "an early end leaves whole seeds"


def test_arms_differ_in_their_arm_alone():
    for size in SIZES:
        shared = {
            tuple(sorted((name, value) for name, value in run.config.items() if name not in ("arm", "patch", "noise")))
            for run in MITIGATION.runs(size)
        }
        assert len(shared) == 1
        assert {run.config["arm"] for run in MITIGATION.runs(size) if "noise" in run.config} == {NOISE}


def test_the_papers_size_has_the_numbers_of_the_papers_code():
    run = next(run for run in MITIGATION.runs("paper") if run.config["arm"] == NOISE)
    wanted: dict[str, Any] = {"network": "wrn-16-10", "lr": 0.1, "small_lr": 0.004, "batch_size": 128, "momentum": 0.9}
    wanted |= {"weight_decay": 5e-4, "patch_size": 7, "separation": 0.1, "scale": 1.25, "noise": 0.4, "pool": 1}
    wanted |= {"clean_share": 0.2, "alone_share": 0.16}
    assert wanted.items() <= run.config.items()
    epoch = 48_000 // 128
    assert (run.config["steps"], run.config["anneal_at"]) == (60 * epoch, 29 * epoch)


# training


@dataclass(frozen=True)
class Images:
    """What the lab hands to a figure: parts of made-up images whose class shows in their mean."""

    train: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: int = CLASSES

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train[0].shape[1:])


def part(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % CLASSES
    return torch.randn(count, 2, 8, 8, generator=seeded(seed)) + labels.view(-1, 1, 1, 1), labels


DATA = Images(part(60, 1), part(30, 2), part(45, 3))
CONFIG: dict[str, Any] = {
    **PLANS["small"].config, "data": "made-up", "train_size": 60, "network": "conv-4-6", "steps": 8, "anneal_at": 5,
    "batch_size": 12, "patch_size": 3, "points": 4, "lr": 0.2, "small_lr": 0.05,
}  # fmt: skip


def run_of(arm: str, patch: bool, seed: int = 0, **more: Any) -> Run:
    own = {"noise": 0.4} if arm == NOISE else {}
    return Run(config={**CONFIG, **own, "arm": arm, "patch": patch, **more}, seed=seed)


@pytest.mark.parametrize("patch", [True, False])
@pytest.mark.parametrize("arm", [LARGE, SMALL])
def test_a_run_is_the_training_its_config_describes(arm: str, patch: bool):
    row = train_patch(None, run_of(arm, patch, seed=2), DATA)
    shortcut = draw_patch(
        DATA.train[0], CLASSES, generator=generator_for("patch", 2), size=3, separation=CONFIG["separation"]
    )
    task = Task(train=DATA.train, held_out=DATA.validation, shortcut=shortcut, shares=Shares())
    model = network("conv-4-6", 2, CLASSES, generator_for("network", 2))
    rate = 0.2 if arm == LARGE else 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    course = course_of(run_of(arm, patch).config)
    assert (course.lr, course.small, course.steps, course.anneal_at) == (rate, 0.05, 8, 5)
    curve = train_planted(model, optimizer, task, course, planted=patch, seed=2)
    assert tuple(row.curve) == COLUMNS and row.curve["step"] == [3, 5, 7, 8]
    assert row.curve["train_loss"] == pytest.approx(curve["train_loss"], rel=1e-3)  # another memory format
    assert row.curve["lr"] == pytest.approx([rate, rate, 0.05, 0.05])
    assert row.final["alone_before"] == row.curve["alone_accuracy"][1]
    assert row.final["clean_before"] == row.curve["clean_accuracy"][1]
    assert row.final["alone"] == row.curve["alone_accuracy"][-1]
    assert row.final["accuracy"] == pytest.approx(clean_accuracy(model, DATA.test), abs=0.05)


def test_the_arm_with_noise_has_it_until_the_others_anneal(monkeypatch: pytest.MonkeyPatch):
    levels: list[set[float]] = []

    def watched(model: torch.nn.Module, *arguments: Any, hooks: Any, **options: Any) -> Any:
        for step in range(8):
            hooks[0].on_batch(step, None)
            levels.append({noise.std for noise in activation_noises(model).values()})
        return train_planted(model, *arguments, hooks=hooks, **options)

    monkeypatch.setattr(patch_training, "train_planted", watched)
    row = train_patch(None, run_of(NOISE, True), DATA)
    assert levels == [{0.4}] * 5 + [{0.0}] * 3 and row.curve["lr"] == [0.05] * 4
    monkeypatch.undo()
    assert train_patch(None, run_of(NOISE, True), DATA).final == train_patch(None, run_of(NOISE, True), DATA).final
    assert train_patch(None, run_of(SMALL, True), DATA).curve["train_loss"] != row.curve["train_loss"]


def test_arms_of_a_seed_start_alike_and_those_of_others_do_not():
    first = {arm: train_patch(None, run_of(arm, False, steps=2, anneal_at=1, points=2), DATA) for arm in (LARGE, SMALL)}
    assert first[LARGE].curve["train_loss"][0] == first[SMALL].curve["train_loss"][0]
    other = train_patch(None, run_of(SMALL, False, seed=1, steps=2, anneal_at=1, points=2), DATA)
    assert other.curve["train_loss"][0] != first[SMALL].curve["train_loss"][0]


def test_the_papers_size_needs_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="trains on a GPU, which torch does not find here; take --size small"):
        train_patch(None, run_of(SMALL, True, device="cuda"), DATA)


# judging

Level = Callable[[str, bool], float]


def noise_of(*names: object) -> float:
    return float(np.random.default_rng(list(repr(names).encode())).standard_normal())


def rows(
    before: dict[str, float] | None = None,
    taken: dict[str, float] | None = None,
    *,
    seeds: int = 5,
    spread: float = 0.002,
    shift: float = 0.02,
) -> list[Row]:
    """Rows in which an arm knows `before` of the patch before annealing, and the patch takes `taken` of clean accuracy."""
    before = {LARGE: 0.1, SMALL: 0.98, NOISE: 0.2, **(before or {})}
    taken = {LARGE: 0.03, SMALL: 0.08, NOISE: 0.04, **(taken or {})}
    plan, found = replace(PLANS["small"], seeds=dict.fromkeys(ARMS, seeds)), []
    for run in plan.runs():
        arm, patch = str(run.config["arm"]), bool(run.config["patch"])
        own = spread * noise_of(run.seed, arm, patch)
        level = 0.5 + shift * noise_of(run.seed) + {LARGE: 0.05}.get(arm, 0.0) + own
        alone = before[arm] + own if patch else 0.1
        accuracy = level - (taken[arm] if patch else 0.0)
        curve = {"step": [900.0, 1100.0, 1488.0], "alone_accuracy": [alone, 1.0, 1.0]}
        curve["clean_accuracy"] = [0.2, 0.3, accuracy]
        final = {"alone_before": alone, "clean_before": 0.4, "alone": 1.0, "accuracy": accuracy, "loss": 1 - accuracy}
        found.append(Row(run=run, curve=curve, final=final))
    return found


def without(found: Iterable[Row], arm: str, patch: bool) -> list[Row]:
    return [row for row in found if (row.run.config["arm"], row.run.config["patch"]) != (arm, patch)]


def failed(found: Iterable[Row]) -> list[Row]:
    return [replace(row, status="failed", reason="made up", curve={}, final={}) for row in found]


def test_claims_are_held_where_they_are_true():
    for figure in FIGURES:
        assert figure.judge(rows()).outcome == "held", figure.judge(rows()).reason
    assert COST.judge(rows()).numbers["costs the small rate more than the large"] == pytest.approx(0.05, abs=0.004)
    assert MITIGATION.judge(rows()).numbers["costs less with noise than without"] == pytest.approx(0.04, abs=0.004)


@pytest.mark.parametrize(
    ("figure", "before", "taken", "outcome"),
    [
        (ORDER, {SMALL: 0.85}, {}, "not held"),
        (ORDER, {LARGE: 0.55}, {}, "not held"),
        (ORDER, {SMALL: 0.9}, {}, "not enough data"),
        (ORDER, {SMALL: 0.92, LARGE: 0.48}, {}, "held"),
        (ORDER, {NOISE: 0.9}, {LARGE: 0.2}, "held"),
        (COST, {}, {LARGE: 0.08}, "not held"),
        (COST, {}, {LARGE: 0.1}, "not held"),
        (COST, {}, {LARGE: 0.075}, "not enough data"),
        (COST, {LARGE: 1.0}, {}, "held"),
        (MITIGATION, {NOISE: 0.6}, {}, "not held"),
        (MITIGATION, {}, {NOISE: 0.1}, "not held"),
        (MITIGATION, {NOISE: 0.5}, {}, "not enough data"),
    ],
)
def test_each_claim_is_judged_by_its_own_numbers(figure: Figure, before: Any, taken: Any, outcome: str):
    assert figure.judge(rows(before, taken)).outcome == outcome, figure.judge(rows(before, taken)).reason


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
@pytest.mark.parametrize("few", [rows(seeds=4), rows(seeds=1), failed(rows()), []], ids=["4", "1", "failed", "none"])
def test_too_little_is_no_verdict(figure: Figure, few: list[Row]):
    assert figure.judge(few).outcome == "not enough data"


@pytest.mark.parametrize("arm", [LARGE, SMALL])
@pytest.mark.parametrize("patch", [True, False])
def test_costs_are_not_judged_without_a_control(arm: str, patch: bool):
    verdict = COST.judge(without(rows(), arm, patch))
    assert verdict.outcome == "not enough data" and "each with the patch and without, with 5 seeds" in verdict.reason
    assert ORDER.judge(without(rows(), arm, False)).outcome == "held", "the order needs no control"


def test_noise_that_hides_the_effect_is_no_verdict():
    assert COST.judge(rows(spread=0.06)).outcome == "not enough data"
    assert COST.judge(rows(shift=0.3)).outcome == "held", "seeds may differ among themselves: pairs are compared"


def test_differences_are_made_in_pairs_and_numbers_are_those_of_scipy():
    found = rows(spread=0.02)
    own = {(r.run.config["arm"], r.run.config["patch"], r.run.seed): r.final["accuracy"] for r in found}
    values = [own[LARGE, True, s] - own[LARGE, False, s] - own[SMALL, True, s] + own[SMALL, False, s] for s in range(5)]
    assert list(spared(by_arm(found), LARGE, SMALL).values()) == pytest.approx(values)
    numbers = COST.judge(found).numbers
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    name = "costs the small rate more than the large"
    assert (numbers[name], numbers[f"{name}_low"], numbers[f"{name}_high"]) == pytest.approx(
        (np.mean(values), low, high), abs=1e-4
    )
    thinned = [
        row for row in found if (row.run.config["arm"], row.run.config["patch"], row.run.seed) != (SMALL, False, 3)
    ]
    assert list(spared(by_arm(thinned), LARGE, SMALL)) == [0, 1, 2, 4] and "4 pairs" in COST.judge(thinned).reason


def test_the_reason_tells_raw_gaps_and_what_two_seeds_are_worth():
    found = rows(spread=0.01)
    reason = COST.judge(found).reason
    values = list(spared(by_arm(found), LARGE, SMALL).values())
    two = 100 * stats.t.ppf(0.975, 1) * np.std(values, ddof=1) / 2**0.5
    seeds = int(np.ceil((196 * np.std(values, ddof=1)) ** 2))
    assert (
        f"Two seeds with this scatter tell it to +-{two:.0f} points; to tell one point takes about {seeds}." in reason
    )
    late = list(spared(by_arm(found), LARGE, SMALL, late_accuracy).values())
    assert np.mean(late) == pytest.approx(np.mean(values) / 2, abs=1e-9), "the mean of a reading of 0.3 and the last"
    assert f"Mean of all readings after annealing, validation images: {100 * np.mean(late):+.2f} (" in reason
    for words in (
        "Large over small, raw: +9.",
        "with the patch, +5.",
        "without.",
        "Clean accuracy at the end: large 5",
        "noise",
    ):
        assert words in reason
    assert "The large rate is spared" in MITIGATION.judge(found).reason and "The large rate is spared" not in reason
    told = ORDER.judge(found).reason
    assert "Small: seeds 0.9" in told and "mean 1.00 at the end, control 0.10 before; large: seeds" in told
    assert finals(by_arm(found), LARGE, "alone_before", patch=False) == dict.fromkeys(range(5), 0.1)


# drawing


def test_panels_show_the_numbers():
    found = rows()
    alone, seeds = ORDER.draw(found)
    assert [trace.name for trace in alone.traces] == [LARGE, SMALL, NOISE] and list(alone.traces[0].x) == [
        900,
        1100,
        1488,
    ]
    assert alone.traces[1].y[0] == pytest.approx(0.98, abs=0.005)
    assert seeds.traces[1].y == list(finals(by_arm(found), SMALL, "alone_before").values())
    assert "conv-24-48-96 on 4,000 images of cifar10; large rate 0.8, small rate 0.04" in alone.caption
    clean, difference = COST.draw(found)
    assert [trace.name for trace in clean.traces][:2] == ["large, with the patch", "large, without"]
    points, band = difference.traces
    assert points.y == pytest.approx([100 * value for value in spared(by_arm(found), LARGE, SMALL).values()])
    assert band.low and band.high and band.low[0] < band.y[0] < band.high[0]
    assert band.y[0] == pytest.approx(np.mean(points.y))
    assert len(MITIGATION.draw(found)) == 3


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_whatever_there_is_can_be_drawn(figure: Figure):
    whole = rows()
    assert figure.draw([]) == [] and figure.draw(failed(whole)) == []
    parts = [whole[:1], whole[:4], without(whole, SMALL, True), without(whole, LARGE, False), whole[-1:], rows(seeds=1)]
    for part_ in parts:
        for panel in figure.draw(part_):
            assert panel.traces and panel.title and panel.x_label and panel.y_label
            assert all(np.isfinite(trace.y).all() and len(trace.x) == len(trace.y) > 0 for trace in panel.traces)
