"""Schedules as functions, and the weight-decay scheduler: zeros stay, resume is exact, tensors are written in place."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from decaycast.core import schedule as sc
from decaycast.core.names import choose

KNOWN = ["constant", "linear", "cosine", "step_decay"]


def sgd(*weight_decays: float | torch.Tensor, lr: float | torch.Tensor = 0.1, **options) -> torch.optim.SGD:
    groups = [
        {"params": [torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))], "weight_decay": weight_decay}
        for weight_decay in weight_decays
    ]
    return torch.optim.SGD(groups, lr=lr, **options)


def decays(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["weight_decay"]) for group in optimizer.param_groups]


# names


def test_a_known_name_is_returned_and_the_nearest_is_offered():
    assert choose("cosine", KNOWN, "schedule") == "cosine"
    message = "unknown schedule 'Cosin'; did you mean 'cosine'\\? known: constant, linear, cosine, step_decay$"
    with pytest.raises(ValueError, match=message):
        choose("Cosin", KNOWN, "schedule")


def test_a_name_like_none_of_them_gets_the_list_only():
    with pytest.raises(ValueError, match="^unknown data 'zzzz'; known: digits, mnist$"):
        choose("zzzz", iter(["digits", "mnist"]), "data")


# functions of the step


@given(total=st.integers(1, 10_000), end=st.floats(0, 5), name=st.sampled_from(["linear", "cosine"]))
def test_falls_from_one_to_its_end_and_stays_there(total, end, name):
    value = getattr(sc, name)(total, end)
    assert value(0) == 1.0 == value(-3)
    assert value(total) == end == value(total + 7)
    middle = value(total // 2)
    assert min(1, end) - 1e-12 <= middle <= max(1, end) + 1e-12


def test_linear_and_cosine_off_the_ends():
    assert sc.linear(8, 0.2)(3) == pytest.approx(1 - 0.8 * 3 / 8, rel=1e-15)
    assert sc.cosine(8, 0.2)(3) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 3 / 8)), rel=1e-15)


def test_cosine_is_the_one_torch_uses_for_learning_rates():
    optimizer = sgd(0.0, lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=37, eta_min=0.25)
    ours = sc.cosine(37, 0.25)
    for step in range(38):
        assert ours(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("total", [10, 70, 200, 9600])
def test_step_decay_drops_at_the_papers_milestones(total):
    value = sc.step_decay(total)
    for drops, at in enumerate((3 * total // 10, 6 * total // 10, 9 * total // 10)):
        assert value(at - 1) == pytest.approx(0.2**drops)
        assert value(at) == pytest.approx(0.2 ** (drops + 1))


def test_step_decay_between_whole_steps_acts_at_the_next():
    value = sc.step_decay(15, milestones=(0.3,), factor=0.5)  # 4.5 steps
    assert [value(step) for step in (4, 5)] == [1.0, 0.5]


def test_step_decay_is_not_late_by_a_rounding_error():
    assert 0.55 * 100 > 55  # in float64
    value = sc.step_decay(100, milestones=(0.55,), factor=0.5)
    assert [value(step) for step in (54, 55)] == [1.0, 0.5]


def test_warmup_multiplies_and_keeps_the_horizon():
    value = sc.warmup(sc.linear(100), 5)
    assert [value(step) for step in (0, 1)] == pytest.approx([0.2, 0.4 * 0.99])
    assert value(4) == pytest.approx(0.96)
    assert value(50) == 0.5
    assert sc.warmup(sc.linear(100), 0)(50) == 0.5


def test_join_restarts_each_piece_at_its_boundary():
    value = sc.join([sc.linear(10), sc.constant(), sc.linear(4, end=3.0)], [5, 8])
    assert [value(step) for step in (4, 5, 7, 8, 10, 99)] == pytest.approx([0.6, 1.0, 1.0, 1.0, 2.0, 3.0])
    assert sc.join([sc.linear(10)], [])(5) == 0.5


@pytest.mark.parametrize("name", KNOWN)
def test_by_name_gives_the_default_shape(name):
    expected = {
        "constant": sc.constant(),
        "linear": sc.linear(40),
        "cosine": sc.cosine(40),
        "step_decay": sc.step_decay(40),
    }[name]
    assert sc.NAMES == tuple(KNOWN)
    assert [sc.by_name(name, 40)(step) for step in range(45)] == [expected(step) for step in range(45)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sc.linear(0), "total_steps must be a whole number >= 1, got 0"),
        (lambda: sc.cosine(2.5), "total_steps must be a whole number >= 1, got 2.5"),
        (lambda: sc.cosine(math.inf), "total_steps must be a whole number >= 1, got inf"),
        (lambda: sc.step_decay("9"), "total_steps must be a whole number >= 1, got '9'"),
        (lambda: sc.by_name("constant", True), "total_steps must be a whole number >= 1, got True"),
        (lambda: sc.linear(5, end=-0.1), "end must be a finite number >= 0, got -0.1"),
        (lambda: sc.cosine(5, end=math.nan), "end must be a finite number >= 0, got nan"),
        (lambda: sc.step_decay(5, factor=math.inf), "factor must be a finite number >= 0, got inf"),
        (lambda: sc.step_decay(5, milestones=(0.5, 0.2)), "milestones must be rising fractions .* got \\(0.5, 0.2\\)"),
        (lambda: sc.step_decay(5, milestones=(0.5, 1.2)), "milestones must be rising fractions"),
        (lambda: sc.warmup(sc.constant(), -1), "warmup_steps must be a whole number >= 0, got -1"),
        (lambda: sc.join([sc.constant()], [3]), "1 pieces need 0 boundaries between them, got 1"),
        (lambda: sc.join([sc.constant()] * 3, [4, 4]), "boundaries must rise, got \\[4, 4\\]"),
        (lambda: sc.join([sc.constant()] * 2, [0]), "a boundary must be a whole number >= 1, got 0"),
        (lambda: sc.by_name("cosin", 5), "unknown schedule 'cosin'; did you mean 'cosine'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_whole_numbers_of_other_types_pass():
    assert sc.linear(np.int64(10))(5) == 0.5 == sc.linear(10.0)(5)


# the scheduler


def test_each_group_is_scaled_from_its_own_initial_value_and_zero_stays_zero():
    optimizer = sgd(0.1, 0.0, 0.004)
    scheduler = sc.WeightDecayScheduler(optimizer, lambda step: 3.0 / (step + 1))
    assert decays(optimizer) == pytest.approx([0.3, 0.0, 0.012])
    assert [group["initial_weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.004]
    optimizer.step()
    scheduler.step()
    assert decays(optimizer) == scheduler.get_last_wd() == pytest.approx([0.15, 0.0, 0.006])
    assert decays(optimizer)[1] == 0.0
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_a_learning_rate_scheduler_beside_it_is_not_disturbed():
    optimizer = sgd(0.1)
    ours = sc.WeightDecayScheduler(optimizer, sc.linear(4))
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=2)
    for _ in range(2):
        optimizer.step()
        theirs.step()
        ours.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert decays(optimizer) == pytest.approx([0.05])


def test_a_group_added_later_joins_with_its_own_value():
    optimizer = sgd(0.1)
    scheduler = sc.WeightDecayScheduler(optimizer, sc.linear(4))
    scheduler.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.8})
    scheduler.step()
    assert decays(optimizer) == pytest.approx([0.05, 0.4])


def test_last_step_goes_on_after_it_as_torch_does():
    optimizer = sgd(0.1)
    first = sc.WeightDecayScheduler(optimizer, sc.linear(10))
    for _ in range(4):
        first.step()
    again = sc.WeightDecayScheduler(optimizer, sc.linear(10), last_step=4)
    assert again.last_step == 5
    assert decays(optimizer) == pytest.approx([0.05])


def test_built_after_the_optimizers_state_was_loaded_it_believes_the_initial_value_in_it():
    before = sgd(0.1)
    scheduler = sc.WeightDecayScheduler(before, sc.linear(10))
    for _ in range(5):
        scheduler.step()
    after = sgd(0.7)
    after.load_state_dict(before.state_dict())
    assert decays(after) == [0.05]
    assert sc.WeightDecayScheduler(after, sc.constant()).get_last_wd() == [0.1]


def test_an_optimizer_state_saved_without_a_scheduler_does_not_compound():
    plain = sgd(0.1)
    optimizer = sgd(0.1)
    scheduler = sc.WeightDecayScheduler(optimizer, sc.linear(4))
    scheduler.step()
    state = plain.state_dict()
    state["param_groups"][0]["weight_decay"] = 0.025
    optimizer.load_state_dict(state)  # groups without "initial_weight_decay"
    scheduler.step()
    assert decays(optimizer) == pytest.approx([0.05])


def train(steps: int, scheduler: sc.WeightDecayScheduler, optimizer, model, start: int = 0) -> list[float]:
    used: list[float] = []
    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: used.append(decays(opt)[0]))
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        scheduler.step()
    handle.remove()
    return used


def fresh(weight_decay: float = 0.3):
    torch.manual_seed(5)
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    groups = [{"params": [model.weight], "weight_decay": weight_decay}, {"params": [model.bias], "weight_decay": 0.0}]
    return model, torch.optim.SGD(groups, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("order", ["scheduler built first", "optimizer loaded first", "scheduler loaded first"])
def test_resume_equals_uninterrupted_bit_for_bit(order):
    whole_model, optimizer = fresh()
    expected = train(20, sc.WeightDecayScheduler(optimizer, sc.cosine(20, 0.1)), optimizer, whole_model)

    model, optimizer = fresh()
    scheduler = sc.WeightDecayScheduler(optimizer, sc.cosine(20, 0.1))
    used = train(8, scheduler, optimizer, model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    text = json.dumps(scheduler.state_dict())

    model, optimizer = fresh(weight_decay=9.0)  # what the constructor got must not matter after a resume
    model.load_state_dict(saved[0])
    if order == "optimizer loaded first":
        optimizer.load_state_dict(saved[1])
    scheduler = sc.WeightDecayScheduler(optimizer, sc.cosine(20, 0.1))
    if order == "scheduler loaded first":
        scheduler.load_state_dict(json.loads(text))
    if order != "optimizer loaded first":
        optimizer.load_state_dict(saved[1])
    if order != "scheduler loaded first":
        scheduler.load_state_dict(json.loads(text))
    used += train(12, scheduler, optimizer, model, start=8)

    assert used == expected
    assert len(set(expected)) == 20
    for ours, theirs in zip(model.parameters(), whole_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_loading_writes_the_restored_value_at_once():
    optimizer = sgd(0.1, 0.0)
    scheduler = sc.WeightDecayScheduler(optimizer, sc.linear(10))
    scheduler.load_state_dict({"last_step": 5, "initial_weight_decay": [0.4, 0.0]})
    assert decays(optimizer) == [0.2, 0.0] == scheduler.get_last_wd()
    assert optimizer.param_groups[0]["initial_weight_decay"] == 0.4
    assert scheduler.state_dict() == {"last_step": 5, "initial_weight_decay": [0.4, 0.0]}


def test_gradient_accumulation_counts_updates():
    inputs = torch.randn(20, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for pieces in (1, 4):
        model, optimizer = fresh()
        scheduler = sc.WeightDecayScheduler(optimizer, sc.linear(5))
        for batch in inputs[:5]:
            optimizer.zero_grad()
            for micro in batch.chunk(pieces):
                (model(micro).square().mean() / pieces).backward()
            optimizer.step()
            scheduler.step()
        results.append((scheduler.last_step, scheduler.get_last_wd(), model.weight.detach()))
    assert results[0][:2] == results[1][:2] == (5, [0.0, 0.0])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-12, atol=0)


# tensor-valued hyper-parameters and torch.compile


def test_tensors_are_filled_in_place_and_lr_is_left_alone():
    weight_decay, lr = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    optimizer = sgd(weight_decay, 0.0, lr=lr)
    scheduler = sc.WeightDecayScheduler(optimizer, sc.linear(4))
    address = weight_decay.data_ptr()
    for _ in range(3):
        scheduler.step()
    group = optimizer.param_groups[0]
    assert group["weight_decay"] is weight_decay
    assert weight_decay.data_ptr() == address
    assert weight_decay.item() == 0.125
    assert group["lr"] is lr
    assert (lr.item(), lr._version) == (0.1, 0)
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert json.loads(json.dumps(scheduler.state_dict()))["initial_weight_decay"] == [0.5, 0.0]


def count_compilations(weight_decay: float | torch.Tensor, make, steps: int = 6) -> list[int]:
    """Graphs compiled so far, after each of `steps` optimiser steps with a different weight decay each."""
    torch._dynamo.reset()
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 0.5)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=weight_decay, foreach=False)
    scheduler = sc.WeightDecayScheduler(optimizer, sc.linear(10))
    counter, compiled = CompileCounter(), []
    step = make(optimizer, counter)
    for _ in range(steps):
        step()
        scheduler.step()
        compiled.append(counter.frame_count)
    torch._dynamo.reset()
    return compiled


def compiled_optimizer_step(optimizer, counter):
    return torch.compile(optimizer.step, backend=counter)


def compiled_decay_loop(optimizer, counter):
    @torch.no_grad()
    def shrink():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])

    return torch.compile(shrink, backend=counter, fullgraph=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch while it compiles
@pytest.mark.parametrize("make", [compiled_optimizer_step, compiled_decay_loop])
def test_a_tensor_weight_decay_never_recompiles_where_a_float_does(make):
    with_tensor = count_compilations(torch.tensor(0.5), make)
    with_float = count_compilations(0.5, make)
    assert with_tensor[0] >= 1
    # the first call of an Adam step builds its state, which the second call's graph already finds
    assert len(set(with_tensor[1:])) == 1
    assert with_float[-1] > with_float[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_sees_the_new_value():
    torch._dynamo.reset()
    optimizer = sgd(torch.tensor(0.5, dtype=torch.float64))
    scheduler = sc.WeightDecayScheduler(optimizer, sc.linear(4))
    shrink = compiled_decay_loop(optimizer, CompileCounter())
    expected = 2.0
    for step in range(4):
        shrink()
        expected *= 1 - 0.1 * 0.5 * (1 - step / 4)
        scheduler.step()
    assert optimizer.param_groups[0]["params"][0][0].item() == pytest.approx(expected, rel=1e-14)
    torch._dynamo.reset()


# refusals


def test_what_is_no_optimizer_or_no_function_is_refused():
    with pytest.raises(TypeError, match="WeightDecayScheduler needs a torch optimizer, got Linear"):
        sc.WeightDecayScheduler(torch.nn.Linear(1, 1), sc.constant())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fn must be a function step -> multiplier, got float"):
        sc.WeightDecayScheduler(sgd(0.1), 0.5)  # type: ignore[arg-type]


def test_groups_without_a_usable_weight_decay_are_refused():
    with pytest.raises(ValueError, match="parameter group 0 has no 'weight_decay'; use an optimizer that decays"):
        sc.WeightDecayScheduler(torch.optim.Rprop([torch.nn.Parameter(torch.ones(1))]), sc.constant())
    optimizer = sgd(0.1, 0.1)
    optimizer.param_groups[1]["weight_decay"] = math.nan
    with pytest.raises(ValueError, match="weight_decay of parameter group 1 must be a finite number >= 0, got nan"):
        sc.WeightDecayScheduler(optimizer, sc.constant())
    assert "initial_weight_decay" not in optimizer.param_groups[0]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, None])
def test_a_bad_multiplier_is_refused_and_changes_nothing(bad):
    optimizer = sgd(0.1)
    scheduler = sc.WeightDecayScheduler(optimizer, lambda step: 1.0 if step < 2 else bad)
    scheduler.step()
    with pytest.raises(ValueError, match=r"fn\(2\) must be a finite number >= 0, got"):
        scheduler.step()
    assert (scheduler.last_step, decays(optimizer)) == (1, [0.1])


def test_going_on_needs_groups_of_an_earlier_run():
    with pytest.raises(ValueError, match="last_step=3 goes on with an earlier run, but a group has no"):
        sc.WeightDecayScheduler(sgd(0.1), sc.constant(), last_step=3)
    with pytest.raises(ValueError, match="last_step must be a whole number >= -1, got -2"):
        sc.WeightDecayScheduler(sgd(0.1), sc.constant(), last_step=-2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"last_step": 3}, r"no state of WeightDecayScheduler: missing \['initial_weight_decay'\], unexpected \[\]"),
        ({"last_step": 3, "initial_weight_decay": [0.1], "x": 1}, r"missing \[\], unexpected \['x'\]"),
        ({"last_step": 3, "initial_weight_decay": [0.1, 0.1]}, "holds 2 parameter groups but the optimizer has 1"),
        ({"last_step": 3, "initial_weight_decay": [-0.1]}, r"saved initial_weight_decay\[0\] must be a finite number"),
        ({"last_step": -1, "initial_weight_decay": [0.1]}, "last_step must be a whole number >= 0, got -1"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(state, message):
    optimizer = sgd(0.2)
    scheduler = sc.WeightDecayScheduler(optimizer, sc.linear(10))
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == {"last_step": 0, "initial_weight_decay": [0.2]}
    assert decays(optimizer) == [0.2]
