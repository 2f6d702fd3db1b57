"""The weight-decay scheduler: zeros stay, resume is exact, tensors are written in place."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from decaycast.core import schedule as sc
from decaycast.core.decay import WeightDecayScheduler
from decaycast.core.timescale import efolds


def sgd(*weight_decays: float | torch.Tensor, lr: float | torch.Tensor = 0.1, **options) -> torch.optim.SGD:
    groups = [
        {"params": [torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))], "weight_decay": weight_decay}
        for weight_decay in weight_decays
    ]
    return torch.optim.SGD(groups, lr=lr, **options)


def decays(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["weight_decay"]) for group in optimizer.param_groups]


def test_each_group_is_scaled_from_its_own_initial_value_and_zero_stays_zero():
    optimizer = sgd(0.1, 0.0, 0.004)
    scheduler = WeightDecayScheduler(optimizer, lambda step: 3.0 / (step + 1))
    assert decays(optimizer) == pytest.approx([0.3, 0.0, 0.012])
    assert [group["initial_weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.004]
    optimizer.step()
    scheduler.step()
    assert decays(optimizer) == scheduler.get_last_wd() == pytest.approx([0.15, 0.0, 0.006])
    assert decays(optimizer)[1] == 0.0
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_a_learning_rate_scheduler_beside_it_is_not_disturbed():
    optimizer = sgd(0.1)
    ours = WeightDecayScheduler(optimizer, sc.linear(4))
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=2)
    for _ in range(2):
        optimizer.step()
        theirs.step()
        ours.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert decays(optimizer) == pytest.approx([0.05])


def test_a_group_added_later_joins_with_its_own_value():
    optimizer = sgd(0.1)
    scheduler = WeightDecayScheduler(optimizer, sc.linear(4))
    scheduler.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.8})
    scheduler.step()
    assert decays(optimizer) == pytest.approx([0.05, 0.4])


def test_last_step_goes_on_after_it_as_torch_does():
    optimizer = sgd(0.1)
    first = WeightDecayScheduler(optimizer, sc.linear(10))
    for _ in range(4):
        first.step()
    again = WeightDecayScheduler(optimizer, sc.linear(10), last_step=4)
    assert again.last_step == 5
    assert decays(optimizer) == pytest.approx([0.05])


def test_built_after_the_optimizers_state_was_loaded_it_believes_the_initial_value_in_it():
    before = sgd(0.1)
    scheduler = WeightDecayScheduler(before, sc.linear(10))
    for _ in range(5):
        scheduler.step()
    after = sgd(0.7)
    after.load_state_dict(before.state_dict())
    assert decays(after) == [0.05]
    assert WeightDecayScheduler(after, sc.constant()).get_last_wd() == [0.1]


def test_an_optimizer_state_saved_without_a_scheduler_does_not_compound():
    plain = sgd(0.1)
    optimizer = sgd(0.1)
    scheduler = WeightDecayScheduler(optimizer, sc.linear(4))
    scheduler.step()
    state = plain.state_dict()
    state["param_groups"][0]["weight_decay"] = 0.025
    optimizer.load_state_dict(state)  # groups without "initial_weight_decay"
    scheduler.step()
    assert decays(optimizer) == pytest.approx([0.05])


def train(steps: int, scheduler: WeightDecayScheduler, optimizer, model, start: int = 0) -> list[float]:
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
    expected = train(20, WeightDecayScheduler(optimizer, sc.cosine(20, 0.1)), optimizer, whole_model)

    model, optimizer = fresh()
    scheduler = WeightDecayScheduler(optimizer, sc.cosine(20, 0.1))
    used = train(8, scheduler, optimizer, model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    text = json.dumps(scheduler.state_dict())

    model, optimizer = fresh(weight_decay=9.0)  # what the constructor got must not matter after a resume
    model.load_state_dict(saved[0])
    if order == "optimizer loaded first":
        optimizer.load_state_dict(saved[1])
    scheduler = WeightDecayScheduler(optimizer, sc.cosine(20, 0.1))
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
    scheduler = WeightDecayScheduler(optimizer, sc.linear(10))
    scheduler.load_state_dict({"last_step": 5, "initial_weight_decay": [0.4, 0.0]})
    assert decays(optimizer) == [0.2, 0.0] == scheduler.get_last_wd()
    assert optimizer.param_groups[0]["initial_weight_decay"] == 0.4
    assert scheduler.state_dict() == {"last_step": 5, "initial_weight_decay": [0.4, 0.0]}


def test_gradient_accumulation_counts_updates():
    inputs = torch.randn(20, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for pieces in (1, 4):
        model, optimizer = fresh()
        scheduler = WeightDecayScheduler(optimizer, sc.linear(5))
        for batch in inputs[:5]:
            optimizer.zero_grad()
            for micro in batch.chunk(pieces):
                (model(micro).square().mean() / pieces).backward()
            optimizer.step()
            scheduler.step()
        results.append((scheduler.last_step, scheduler.get_last_wd(), model.weight.detach()))
    assert results[0][:2] == results[1][:2] == (5, [0.0, 0.0])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-12, atol=0)


# the decay each schedule spends


@pytest.mark.parametrize("lr_name", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", sc.WEIGHT_DECAY_NAMES)
def test_a_real_optimizer_spends_the_efolds_of_the_product_schedule(name, make, lr_name):
    lr, weight_decay, steps = 0.03, 0.2, 50
    lr_schedule = sc.lr_by_name(lr_name, steps)
    shape = sc.by_name(name, steps, lr_schedule=lr_schedule)
    parameter = torch.nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = make([parameter], lr=lr, weight_decay=weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_schedule)
    scheduler, spent = WeightDecayScheduler(optimizer, shape), 0.0
    for _ in range(steps):
        before = parameter.item()
        optimizer.step()
        spent += 1 - parameter.item() / before
        rates.step()
        scheduler.step()
    product = efolds(lr=lambda step: lr * lr_schedule(step) * shape(step), weight_decay=weight_decay, steps=steps)
    assert spent == pytest.approx(product, rel=1e-11)
    assert spent > 0


# tensor-valued hyper-parameters and torch.compile


def test_tensors_are_filled_in_place_and_lr_is_left_alone():
    weight_decay, lr = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    optimizer = sgd(weight_decay, 0.0, lr=lr)
    scheduler = WeightDecayScheduler(optimizer, sc.linear(4))
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
    scheduler = WeightDecayScheduler(optimizer, sc.linear(10))
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
    scheduler = WeightDecayScheduler(optimizer, sc.linear(4))
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
        WeightDecayScheduler(torch.nn.Linear(1, 1), sc.constant())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fn must be a function step -> multiplier, got float"):
        WeightDecayScheduler(sgd(0.1), 0.5)  # type: ignore[arg-type]


def test_groups_without_a_usable_weight_decay_are_refused():
    with pytest.raises(ValueError, match="parameter group 0 has no 'weight_decay'; use an optimizer that decays"):
        WeightDecayScheduler(torch.optim.Rprop([torch.nn.Parameter(torch.ones(1))]), sc.constant())
    optimizer = sgd(0.1, 0.1)
    optimizer.param_groups[1]["weight_decay"] = math.nan
    with pytest.raises(ValueError, match="weight_decay of parameter group 1 must be a finite number >= 0, got nan"):
        WeightDecayScheduler(optimizer, sc.constant())
    assert "initial_weight_decay" not in optimizer.param_groups[0]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, None])
def test_a_bad_multiplier_is_refused_and_changes_nothing(bad):
    optimizer = sgd(0.1)
    scheduler = WeightDecayScheduler(optimizer, lambda step: 1.0 if step < 2 else bad)
    scheduler.step()
    with pytest.raises(ValueError, match=r"fn\(2\) must be a finite number >= 0, got"):
        scheduler.step()
    assert (scheduler.last_step, decays(optimizer)) == (1, [0.1])


def test_going_on_needs_groups_of_an_earlier_run():
    with pytest.raises(ValueError, match="last_step=3 goes on with an earlier run, but a group has no"):
        WeightDecayScheduler(sgd(0.1), sc.constant(), last_step=3)
    with pytest.raises(ValueError, match="last_step must be a whole number >= -1, got -2"):
        WeightDecayScheduler(sgd(0.1), sc.constant(), last_step=-2)


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
    scheduler = WeightDecayScheduler(optimizer, sc.linear(10))
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == {"last_step": 0, "initial_weight_decay": [0.2]}
    assert decays(optimizer) == [0.2]
