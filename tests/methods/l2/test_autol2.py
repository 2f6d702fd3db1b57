"""AutoL2: the paper's traces, an independent re-implementation, and what hand-written schedulers get wrong."""

from __future__ import annotations

import copy
import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.core.hook import StepContext
from decaycast.methods.l2.autol2 import AutoL2, AutoL2Hook, reference_units
from decaycast.methods.l2.rule import AutoL2Rule

Trace = list[tuple[int, float, float]]


def every_ten(losses, accuracies) -> Trace:
    return [(10 * n, loss, 1.0 - accuracy) for n, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True))]


STEADY = 1200
TRACES: dict[str, tuple[Trace, list[int]]] = {
    "constant": (every_ten([1.0] * STEADY, [0.5] * STEADY), [20, 40, 150, 1160, 11170]),
    "one decay": (
        every_ten([3, 2.5, 2.6, 2.4, 2.3, 2.45, 2.35, 2.2], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        [60],
    ),
    "both improve": (every_ten([2 - n / 2000 for n in range(STEADY)], [n / STEADY for n in range(STEADY)]), []),
    "accuracy saturates": (
        every_ten([2 - n / 2000 for n in range(STEADY)], [min(0.05 * n, 1.0) for n in range(STEADY)]),
        [220, 240, 350, 1360, 11370],
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_reference_traces(name):
    trace, expected = TRACES[name]
    rule = AutoL2Rule()
    for step, loss, error in trace:
        coefficient = rule.update(step, loss, error)
        assert coefficient == rule.coefficient
        assert coefficient == pytest.approx(0.1 / 10 ** sum(step >= decay for decay in expected), rel=1e-15)
    assert rule.decays == expected


def test_the_one_decay_trace_ends_with_its_lagging_records():
    rule = AutoL2Rule()
    for point in TRACES["one decay"][0]:
        rule.update(*point)
    state = rule.state_dict()
    assert state["best_loss"] == 2.3
    assert state["best_error"] == pytest.approx(1 - 0.7, rel=1e-15)


def test_equality_does_not_fire_whatever_the_units():
    # the defaults, and the same schedule in other units: equal steps, one decay further than the reference trace
    for start in (0.1, 2.0, 1.0, 0.02):
        rule = AutoL2Rule(start=start, refractory=start)
        for step in range(0, 111_300, 10):
            rule.update(step, 1.0, 0.5)
        assert rule.decays == [20, 40, 150, 1160, 11170, 111180], start


@pytest.mark.parametrize("name", ["one decay", "accuracy saturates"])
def test_traces_across_a_restore_at_every_point(name):
    trace, expected = TRACES[name]
    trace = trace[:140]
    first = AutoL2Rule()
    for cut in range(len(trace)):
        resumed = AutoL2Rule(
            start=7.0, factor=3.0, measure_every=4, refractory=9.0
        )  # overwritten by the saved settings
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert resumed.coefficient == first.coefficient
        for point in trace[cut:]:
            resumed.update(*point)
        assert resumed.decays == [step for step in expected if step <= trace[-1][0]]
        first.update(*trace[cut])


def test_any_first_step_and_calls_between_measurements_decide_alike():
    sparse, dense, shifted = AutoL2Rule(), AutoL2Rule(), AutoL2Rule()
    for step in range(400):
        if step % 10 == 0:
            sparse.update(step, 1.0, 0.5)
        # what is passed between measurements is never looked at
        dense.update(step, *((1.0, 0.5) if step % 10 == 0 else (math.nan, None)))
        shifted.update(step + 7, 1.0, 0.5)
    assert sparse.decays == dense.decays == [20, 40, 150]
    assert shifted.decays == [27, 47, 157]


def test_a_step_given_twice_is_measured_once():
    once, twice = AutoL2Rule(), AutoL2Rule()
    for step in range(0, 60, 10):
        once.update(step, 1.0, 0.5)
        twice.update(step, 1.0, 0.5)
        assert not twice.due(step)
        twice.update(step, math.nan, 2.0)
    assert once.state_dict() == twice.state_dict()


def test_memory_does_not_grow_with_the_run():
    rule = AutoL2Rule()
    sizes = []
    for step in range(0, 8000, 10):
        rule.update(step, 1.0 + step % 7, 0.5)
        sizes.append(len(json.dumps(rule.state_dict())))
    assert sizes[-1] <= max(sizes[120:140]) + 20


# an independent machine, from the paper's description: whole lists, exact fractions


def straightforward(points: Trace, start: Fraction, factor: int, every: int, refractory: Fraction):
    """Steps of the decays, the lowest loss and the highest accuracy at the end."""
    coefficient, s0, lowest, highest = start, points[0][0], None, None
    losses: list[float] = []
    accuracies: list[Fraction] = []
    fired: list[int] = []
    measured = None
    for step, loss, error in points:
        if measured is not None and step < measured + every:
            continue
        measured = step
        losses.append(loss)
        accuracies.append(1 - Fraction(error))
        if len(losses) >= 3 and Fraction(step) > s0 + refractory / coefficient:
            worse_loss = losses[-2] >= lowest and losses[-1] >= lowest
            worse_accuracy = accuracies[-2] <= highest and accuracies[-1] <= highest
            if worse_loss or worse_accuracy:
                coefficient, s0 = coefficient / factor, step
                fired.append(step)
                continue
        if len(losses) >= 2:
            lowest = losses[-2] if lowest is None else min(lowest, losses[-2])
            highest = accuracies[-2] if highest is None else max(highest, accuracies[-2])
    return fired, lowest, highest


def noisy_training(seed: int) -> Trace:
    """Loss and error that fall at their own pace under noise, in eighths and sixty-fourths so that ties are common."""
    dice = random.Random(seed)
    pace, noise, step, points = (dice.uniform(0.2, 2.0), dice.uniform(0.2, 2.0)), dice.choice([0, 1, 4, 16]), 0, []
    for n in range(dice.choice([1, 2, 3, 10, 40, 160])):
        level = [max(0, round(64 * (1 - n / 160) ** p) + dice.randint(-noise, noise)) for p in pace]
        points.append((step, level[0] / 8, min(level[1], 64) / 64))
        step += dice.randint(1, 12)
    return points


def points_of(sequence) -> Trace:
    step, points = 0, []
    for gap, loss, error in sequence:
        points.append((step, loss, error))
        step += gap
    return points


@pytest.mark.parametrize("start", [Fraction(1, 10), Fraction(1), Fraction(2)])
@pytest.mark.parametrize("factor", [2, 3, 10])
@pytest.mark.parametrize("every", [1, 5, 10])
@pytest.mark.parametrize("refractory", [Fraction(1, 10), Fraction(2), Fraction(20)])
def test_decides_as_the_straightforward_machine(start, factor, every, refractory):
    for seed in range(12):
        points = noisy_training(seed)
        rule = AutoL2Rule(float(start), float(factor), every, refractory=float(refractory))
        values = [rule.update(*point) for point in points]
        state = rule.state_dict()
        accuracy = None if state["best_error"] is None else 1 - Fraction(state["best_error"])
        decays_and_records = rule.decays, state["best_loss"], accuracy
        assert decays_and_records == straightforward(points, start, factor, every, refractory), seed
        assert values == sorted(values, reverse=True)
        assert rule.coefficient == pytest.approx(float(start / factor ** len(rule.decays)), rel=1e-15)


@settings(deadline=None)
@given(
    sequence=st.lists(st.tuples(st.integers(1, 30), st.floats(0, 10), st.floats(0, 1)), min_size=2, max_size=80),
    data=st.data(),
)
def test_resume_equals_uninterrupted_and_never_rises(sequence, data):
    points = points_of(sequence)
    cut = data.draw(st.integers(0, len(points) - 1))
    straight, resumed = AutoL2Rule(), AutoL2Rule()
    expected = [straight.update(*point) for point in points]
    values = [resumed.update(*point) for point in points[:cut]]
    text = json.dumps(resumed.state_dict())
    resumed = AutoL2Rule(start=3.0)
    resumed.load_state_dict(json.loads(text))
    values += [resumed.update(*point) for point in points[cut:]]
    assert values == expected
    assert resumed.state_dict() == straight.state_dict()
    assert len(json.loads(text)["decays"]) == sum(decay < points[cut][0] for decay in straight.decays)
    assert all(later <= earlier for earlier, later in zip(values, values[1:], strict=False))


def test_a_state_is_a_copy_on_both_ways():
    rule, other = AutoL2Rule(), AutoL2Rule()
    for step in range(30):
        rule.update(step, 1.0, 0.5)
    state = rule.state_dict()
    other.load_state_dict(state)
    for step in range(30, 60):
        rule.update(step, 1.0, 0.5)
        other.update(step, 1.0, 0.5)
    rule.decays.append(99)
    assert rule.decays == other.decays == [20, 40]
    assert state["decays"] == [20]


def test_tensors_are_read_only_when_measuring():
    class Watched:
        reads = 0

        def item(self) -> float:
            Watched.reads += 1
            return 0.5

    by_tensor, by_number = AutoL2Rule(), AutoL2Rule()
    for step in range(45):
        by_tensor.update(step, Watched(), torch.tensor(0.5))  # type: ignore[arg-type]
        by_number.update(step, 0.5, 0.5)
    assert Watched.reads == 5  # steps 0, 10, 20, 30, 40
    assert by_tensor.state_dict() == by_number.state_dict()


# refusals of the rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, "start must be a positive number between 1e-50 and 1e50, got 0.0"),
        ({"start": math.nan}, "start must be a positive number .* got nan"),
        ({"refractory": -1.0}, "refractory must be a positive number .* got -1.0"),
        ({"factor": math.inf}, "factor must be a positive number .* got inf"),
        ({"factor": 1.0}, "factor must be > 1, got 1.0; the coefficient is divided by it"),
        ({"measure_every": 0}, "measure_every must be a whole number >= 1, got 0"),
        ({"measure_every": 2.5}, "measure_every must be a whole number >= 1, got 2.5"),
        ({"start": "0.1"}, "start must be a positive number .* got 0.1"),
        ({"start": [0.1, 0.2]}, "start must be a positive number .* got "),
        ({"factor": None}, "factor must be a positive number .* got None"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AutoL2Rule(**options)
    with pytest.raises(ValueError, match=message):
        AutoL2Hook(**options)


@pytest.mark.parametrize(
    ("step", "loss", "error", "message"),
    [
        (29, 1.0, 0.5, "step must be >= 0 and never go backwards, got 29 after 30"),
        (40, math.nan, 0.5, "loss must be finite, got nan at step 40; the training has diverged"),
        (40, -math.inf, 0.5, "loss must be finite, got -inf at step 40"),
        (40, torch.tensor(math.inf), 0.5, "loss must be finite, got inf at step 40"),
        (40, 1.0, 1.01, r"error must be a share of wrong predictions in \[0, 1\], got 1.01 at step 40"),
        (40, 1.0, -0.01, "error must be a share of wrong predictions"),
        (40, 1.0, math.nan, "error must be a share of wrong predictions .* got nan"),
        (40, None, 0.5, "loss must be one number at step 40, where AutoL2 measures, got NoneType"),
        (40, 1.0, torch.zeros(2), "error must be one number at step 40, where AutoL2 measures, got Tensor"),
    ],
)
def test_bad_measurements_leave_the_state_alone(step, loss, error, message):
    rule = AutoL2Rule()
    for earlier in range(0, 40, 10):
        rule.update(earlier, 1.0, 0.5)
    before = rule.state_dict()
    with pytest.raises(ValueError, match=message):
        rule.update(step, loss, error)
    assert rule.state_dict() == before
    rule.update(40, 1.0, 0.5)
    assert rule.decays == [20, 40]


def test_a_bad_first_measurement_or_step_leaves_the_rule_fresh():
    rule = AutoL2Rule()
    with pytest.raises(ValueError, match="step must be >= 0 and never go backwards, got -1 after None"):
        rule.update(-1, 1.0, 0.5)
    with pytest.raises(ValueError, match="loss must be finite"):
        rule.update(0, math.nan, 0.5)
    assert rule.state_dict() == AutoL2Rule().state_dict()


def test_a_foreign_state_leaves_the_rule_alone():
    rule = AutoL2Rule()
    rule.update(0, 1.0, 0.5)
    before = rule.state_dict()
    with pytest.raises(
        ValueError, match=r"this is no state of AutoL2Rule: missing \['best_error'.* unexpected \['x'\]"
    ):
        rule.load_state_dict({"x": 1})
    with pytest.raises(ValueError, match="start must be a positive number"):
        rule.load_state_dict(before | {"start": -1.0})
    assert rule.state_dict() == before


# the optimiser's side


def sgd(*weight_decays, lr=0.1, **options) -> torch.optim.SGD:
    groups = [
        {"params": [torch.nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64))], "weight_decay": weight_decay}
        for weight_decay in weight_decays
    ]
    return torch.optim.SGD(groups, lr=lr, **options)


def decays(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["weight_decay"]) for group in optimizer.param_groups]


def test_the_largest_group_gets_the_coefficient_the_others_their_ratio_and_zero_stays_zero():
    optimizer = sgd(5e-4, 0.0, 1e-4)
    scheduler = AutoL2(optimizer)
    assert decays(optimizer) == scheduler.get_last_wd() == pytest.approx([0.1, 0.0, 0.02], rel=1e-15)
    for step in range(45):
        scheduler.step(loss=1.0, error=0.5)
        coefficient = 0.1 if step < 20 else 0.01 if step < 40 else 0.001
        assert decays(optimizer) == pytest.approx([coefficient, 0.0, coefficient / 5], rel=1e-15)
        assert decays(optimizer)[:2] == [scheduler.rule.coefficient, 0.0]
        optimizer.step()
    assert scheduler.rule.decays == [20, 40]
    assert [group["initial_weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0, 1e-4]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_a_decay_acts_on_the_very_update_whose_batch_was_measured():
    optimizer = sgd(1.0)
    parameter = optimizer.param_groups[0]["params"][0]
    scheduler = AutoL2(optimizer, start=0.5, refractory=0.5)
    expected = 2.0
    for step in range(22):
        parameter.grad = torch.zeros_like(parameter)
        scheduler.step(loss=1.0, error=0.5)
        optimizer.step()
        expected *= 1 - 0.1 * (0.5 if step < 20 else 0.05)
    assert parameter[0].item() == pytest.approx(expected, rel=1e-14)


def test_a_group_added_later_keeps_its_ratio_to_the_largest():
    optimizer = sgd(5e-4)
    scheduler = AutoL2(optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": 1e-3})
    scheduler.step(loss=1.0, error=0.5)
    assert decays(optimizer) == pytest.approx([0.1, 0.2], rel=1e-15)


class Training:
    """A tiny noisy classification whose AutoL2 decays several times in 300 steps."""

    def __init__(self, weight_decay: float = 5e-4, start: float = 0.1) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        biases = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.start = start
        self.scheduler: AutoL2 | None = None
        self.used: list[list[float]] = []
        self.optimizer.register_step_pre_hook(lambda opt, args, kwargs: self.used.append(decays(opt)))

    def build(self) -> None:
        self.scheduler = AutoL2(self.optimizer, start=self.start)

    def run(self, start: int, stop: int, pieces: int = 1) -> None:
        assert self.scheduler is not None
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(16, 4, generator=generator, dtype=torch.float64)
            target = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
            self.optimizer.zero_grad()
            loss = error = torch.zeros((), dtype=torch.float64)
            for x, y in zip(inputs.chunk(pieces), target.chunk(pieces), strict=True):
                output = self.model(x)
                part = torch.nn.functional.cross_entropy(output, y) / pieces
                part.backward()
                loss = loss + part.detach()
                error = error + (output.argmax(1) != y).double().mean() / pieces
            self.scheduler.step(loss=loss, error=error)
            self.optimizer.step()


@pytest.mark.parametrize("order", ["scheduler built first", "optimizer loaded first", "scheduler loaded first"])
@pytest.mark.parametrize("cut", [1, 47, 205])
def test_training_resumed_equals_uninterrupted_bit_for_bit(order, cut):
    straight = Training()
    straight.build()
    straight.run(0, 300)
    assert straight.scheduler is not None and len(straight.scheduler.rule.decays) >= 3

    first = Training()
    first.build()
    first.run(0, cut)
    assert first.scheduler is not None
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict()))
    text = json.dumps(first.scheduler.state_dict())

    second = Training(weight_decay=0.7, start=9.0)  # what the constructors got must not matter after a resume
    second.model.load_state_dict(saved[0])
    if order == "optimizer loaded first":
        second.optimizer.load_state_dict(saved[1])
    second.build()
    assert second.scheduler is not None
    if order == "scheduler loaded first":
        second.scheduler.load_state_dict(json.loads(text))
    if order != "optimizer loaded first":
        second.optimizer.load_state_dict(saved[1])
    if order != "scheduler loaded first":
        second.scheduler.load_state_dict(json.loads(text))
    assert decays(second.optimizer) == decays(first.optimizer)
    second.run(cut, 300)

    assert first.used + second.used == straight.used
    assert second.scheduler.state_dict() == straight.scheduler.state_dict()
    for ours, theirs in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_optimizer_loaded_last_from_elsewhere_does_not_bring_its_own_value():
    training = Training()
    training.build()
    training.run(0, 60)
    assert training.scheduler is not None
    expected = decays(training.optimizer)
    training.optimizer.load_state_dict(Training(weight_decay=0.7).optimizer.state_dict())
    assert decays(training.optimizer) == [0.7, 0.0]
    training.run(60, 61)
    assert training.used[-1] == expected


def test_gradient_accumulation_counts_updates():
    at_once, in_pieces = Training(), Training()
    for training, pieces in ((at_once, 1), (in_pieces, 4)):
        training.build()
        training.run(0, 120, pieces)
    assert at_once.scheduler is not None and in_pieces.scheduler is not None
    assert in_pieces.scheduler.steps == 120
    assert in_pieces.scheduler.rule.decays == at_once.scheduler.rule.decays != []
    for ours, theirs in zip(in_pieces.model.parameters(), at_once.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_a_tensor_weight_decay_is_filled_in_place_and_only_when_it_changes():
    weight_decay, lr = torch.tensor(5e-4, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    optimizer = sgd(weight_decay, 0.0, lr=lr)
    scheduler = AutoL2(optimizer)
    address, versions = weight_decay.data_ptr(), []
    for _ in range(25):
        scheduler.step(loss=1.0, error=0.5)
        versions.append(weight_decay._version)
    assert optimizer.param_groups[0]["weight_decay"] is weight_decay
    assert weight_decay.data_ptr() == address
    assert weight_decay.item() == 0.01
    assert versions == [1] * 20 + [2] * 5
    assert optimizer.param_groups[0]["lr"] is lr
    assert (lr.item(), lr._version) == (0.1, 0)
    json.dumps(scheduler.state_dict())


def test_due_tells_when_the_numbers_are_needed():
    scheduler = AutoL2(sgd(0.1))
    due = []
    for _ in range(21):
        due.append(scheduler.due)
        if scheduler.due:
            scheduler.step(loss=1.0, error=0.5)
        else:
            scheduler.step()
    assert [step for step, wanted in enumerate(due) if wanted] == [0, 10, 20]
    assert scheduler.get_last_wd() == [0.01]


def test_a_refused_measurement_does_not_count_as_a_step():
    optimizer = sgd(0.1)
    scheduler = AutoL2(optimizer)
    with pytest.raises(ValueError, match="loss must be one number at step 0, where AutoL2 measures, got NoneType"):
        scheduler.step()
    assert scheduler.steps == 0
    scheduler.step(loss=1.0, error=0.5)
    assert scheduler.steps == 1


def test_optimizers_it_cannot_steer_are_refused_untouched():
    parameters = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="AutoL2 needs a torch optimizer, got list"):
        AutoL2(parameters)  # type: ignore[arg-type]
    coupled = torch.optim.Adam(parameters, weight_decay=0.1)
    with pytest.raises(ValueError, match="Adam couples weight decay into an adaptive step"):
        AutoL2(coupled)
    none = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(
        ValueError, match="every parameter group has weight_decay 0, so AutoL2 has nothing to set; give"
    ):
        AutoL2(none)
    for optimizer, weight_decay in ((coupled, 0.1), (none, 0)):
        assert optimizer.param_groups[0]["weight_decay"] == weight_decay
        assert "initial_weight_decay" not in optimizer.param_groups[0]
    assert AutoL2(torch.optim.AdamW(parameters, weight_decay=0.01)).get_last_wd() == [0.1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial_weight_decay": [0.1, 0.2]}, "AutoL2 holds 2 parameter groups but the optimizer has 1"),
        ({"initial_weight_decay": [math.nan]}, r"saved initial_weight_decay\[0\] must be a finite number >= 0"),
        ({"largest": 0.0}, "saved largest must be a positive number"),
        ({"steps": -3}, "saved steps must be a whole number >= 0, got -3"),
        ({"rule": {}}, "this is no state of AutoL2Rule: missing"),
        ({"extra": 1}, r"this is no state of AutoL2: missing \[\], unexpected \['extra'\]"),
    ],
)
def test_a_foreign_state_changes_nothing(change, message):
    optimizer = sgd(0.3)
    scheduler = AutoL2(optimizer)
    scheduler.step(loss=1.0, error=0.5)
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(before | change)
    assert scheduler.state_dict() == before
    assert decays(optimizer) == [0.1]


# the hook


def run_hook(hook: AutoL2Hook, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    used = []
    for step in range(start, stop):
        context = StepContext(
            loss=torch.tensor(1.0), output=torch.eye(2), target=torch.tensor([0, 0]), optimizer=optimizer
        )
        hook.on_step(step, context)
        used.append(decays(optimizer)[0])
    return used


def test_the_hook_steers_the_optimizer_and_resumes():
    optimizer = sgd(0.3)
    hook = AutoL2Hook(start=0.2, refractory=0.2)
    assert hook.state_dict() == {}
    used = run_hook(hook, optimizer, 0, 25)
    assert used == [0.2] * 20 + [0.02] * 5

    restored = AutoL2Hook()
    restored.load_state_dict(json.loads(json.dumps(hook.state_dict())))
    assert restored.state_dict() == hook.state_dict()  # kept until the optimiser is known
    assert run_hook(restored, sgd(9.0), 25, 50) == run_hook(hook, optimizer, 25, 50) == [0.02] * 15 + [0.002] * 10

    hook.load_state_dict(restored.state_dict())
    assert hook.state_dict() == restored.state_dict()
    hook.load_state_dict({})  # a state saved before the first step
    assert run_hook(hook, optimizer, 0, 1) == [0.2]


# units


@pytest.mark.parametrize(("eta", "l2", "classes"), [(0.2, 0.01, 10), (0.7, 3e-4, 3)])
def test_one_step_in_the_papers_units_is_one_torch_step(eta, l2, classes):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(5, classes, generator=generator, dtype=torch.float64)
    inputs = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (12,), generator=generator)

    reference = weights.clone().requires_grad_()
    velocity = torch.zeros_like(weights)
    lr, weight_decay = reference_units(eta, l2, classes)
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.SGD([parameter], lr=lr, weight_decay=weight_decay, momentum=0.9)
    for _ in range(3):
        log_probabilities = (inputs @ reference).log_softmax(1)
        one_hot = torch.nn.functional.one_hot(target, classes)
        objective = (-one_hot * log_probabilities).mean() + l2 * reference.square().sum()
        (gradient,) = torch.autograd.grad(objective, reference)
        velocity = 0.9 * velocity + gradient
        reference = (reference - eta * velocity).detach().requires_grad_()

        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(inputs @ parameter, target).backward()
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), reference.detach(), rtol=1e-13, atol=1e-14)
    assert lr * weight_decay == pytest.approx(2 * eta * l2, rel=1e-15)


def test_units_out_of_range():
    with pytest.raises(ValueError, match="classes must be a whole number >= 1, got 0"):
        reference_units(0.2, 0.1, 0)
    with pytest.raises(ValueError, match="eta must be finite and > 0 and l2 finite and >= 0, got eta=-0.2, l2=0.1"):
        reference_units(-0.2, 0.1, 10)
    with pytest.raises(ValueError, match="eta must be finite"):
        reference_units(0.2, math.nan, 10)


def test_settings_may_be_of_numpy_or_torch():
    for kind in (np.float32, np.array, torch.tensor):
        rule = AutoL2Rule(start=kind(0.5), factor=kind(2.0), refractory=kind(0.25), measure_every=np.int64(5))
        assert rule.state_dict() == AutoL2Rule(0.5, 2.0, 5, 0.25).state_dict()


def test_an_int_beyond_floats_is_no_loss():
    with pytest.raises(ValueError, match="loss must be one number at step 0, where AutoL2 measures, got int"):
        AutoL2Rule().update(0, 10**400, 0.5)
