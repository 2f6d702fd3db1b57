"""timm's loop with our schedulers, against plain loops; resumed as timm resumes; groups, learning rates and the forecast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.core.test_param_groups import Vision
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import decaycast as dc
from decaycast.core.schedule import cosine, linear

REASON = "timm needs an environment of its own: make test-timm"
adapter = pytest.importorskip("decaycast.adapters.timm", reason=REASON, exc_type=ImportError)
script = pytest.importorskip("decaycast.adapters.timm_script", reason=REASON, exc_type=ImportError)
finder = pytest.importorskip("decaycast.adapters.timm_finder", reason=REASON, exc_type=ImportError)
timm = pytest.importorskip("timm", reason=REASON, exc_type=ImportError)
optim = pytest.importorskip("timm.optim", reason=REASON, exc_type=ImportError)
timm_schedulers = pytest.importorskip("timm.scheduler", reason=REASON, exc_type=ImportError)
timm_loader = pytest.importorskip("timm.data.loader", reason=REASON, exc_type=ImportError)

pytestmark = pytest.mark.timm

EPOCHS, PER_EPOCH = 3, 4
UPDATES = EPOCHS * PER_EPOCH
LABELS = torch.arange(64) % 3
IMAGES = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + LABELS[:, None, None, None]
OPTIONS = {"opt": "adamw", "lr": 2e-3, "weight_decay": 0.5, "layer_decay": 0.5}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False, num_classes=3, img_size=32)


def make_optimizer(model: torch.nn.Module, **changes: Any) -> torch.optim.Optimizer:
    return optim.create_optimizer_v2(model, **OPTIONS | changes)


def lr_schedule(optimizer: torch.optim.Optimizer, **changes: Any) -> Any:
    options = {"num_epochs": EPOCHS, "warmup_epochs": 1, "warmup_lr": 1e-4, "updates_per_epoch": PER_EPOCH}
    return timm_schedulers.create_scheduler_v2(optimizer, "cosine", **options | {"step_on_epochs": False} | changes)[0]


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, start: int = 0, stop: int = EPOCHS
) -> list[list[float]]:
    """Epochs as timm's training script makes them; the weight decays of each update."""
    used = []
    for epoch in range(start, stop):
        updates = epoch * PER_EPOCH
        for batch in range(PER_EPOCH):
            inputs, labels = IMAGES[batch * 16 :][:16], LABELS[batch * 16 :][:16]
            loss = functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            used.append([float(group["weight_decay"]) for group in optimizer.param_groups])
            updates += 1
            scheduler.step_update(num_updates=updates, metric=loss.item())
        scheduler.step(epoch + 1, 0.5)
    return used


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# schedules


def test_a_training_with_layer_decay_is_that_of_a_plain_loop():
    model, twin = network(), network()
    optimizer = make_optimizer(model)
    scheduler = script.TimmSchedulers(
        lr_schedule(optimizer), adapter.TimmWeightDecay(optimizer, linear(UPDATES, end=0.2))
    )
    used = train(model, optimizer, scheduler)

    other = make_optimizer(twin)
    rates, ours = lr_schedule(other), dc.WeightDecayScheduler(other, linear(UPDATES, end=0.2))
    for update in range(UPDATES):
        at = update % PER_EPOCH * 16
        loss = functional.cross_entropy(twin(IMAGES[at:][:16]), LABELS[at:][:16])
        other.zero_grad()
        loss.backward()
        other.step()
        ours.step()
        rates.step_update(update + 1)
    assert_same(model, twin)
    with torch.no_grad():
        after, at_first = (functional.cross_entropy(net(IMAGES), LABELS) for net in (model, network()))
    assert after < 0.9 * at_first  # it did train
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert len(set(scales)) > 3
    for update, row in enumerate(used):
        expected = 0.5 * (1 - 0.8 * update / UPDATES)
        assert row == pytest.approx([expected if group["weight_decay"] else 0.0 for group in optimizer.param_groups])
    last = [group["lr"] / scale for group, scale in zip(optimizer.param_groups, scales)]
    assert last == pytest.approx([last[0]] * len(last))  # and timm's own still scales the learning rate


def test_in_epochs_it_moves_with_step_alone():
    optimizer = make_optimizer(network(), layer_decay=None)
    scheduler = adapter.TimmWeightDecay(optimizer, lambda t: 1 / (1 + t), t_in_epochs=True)
    scheduler.step_update(7)
    assert max(scheduler.get_last_wd()) == 0.5
    scheduler.step(3)
    assert sorted(set(scheduler.get_last_wd())) == [0.0, 0.125]
    by_updates = adapter.TimmWeightDecay(optimizer, lambda t: 1 / (1 + t))
    by_updates.step(3)
    assert max(by_updates.get_last_wd()) == 0.5
    assert isinstance(by_updates, timm_schedulers.scheduler.Scheduler)


def test_a_tensor_is_written_in_place_and_the_initial_value_stays():
    weight, held = torch.nn.Parameter(torch.ones(2, 2)), torch.tensor(0.5)
    optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": held, "lr_scale": 0.1}], lr=0.1)
    scheduler = adapter.TimmWeightDecay(optimizer, linear(4))
    for update in (1, 2, 3):
        scheduler.step_update(update)
    assert optimizer.param_groups[0]["weight_decay"] is held
    assert float(held) == pytest.approx(0.125)


def resumed(make: Callable[[torch.optim.Optimizer], Any], saves_state: bool, loads_first: bool) -> Any:
    """A run stopped after the first epoch and taken up in new objects, as timm does; with the model, its decays."""
    model = network()
    optimizer = make_optimizer(model)
    ours = make(optimizer)
    train(model, optimizer, script.TimmSchedulers(lr_schedule(optimizer), ours), stop=1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), ours.state_dict()))

    model = network()
    model.load_state_dict(saved[0])
    optimizer = make_optimizer(model)
    if loads_first:  # timm's order
        optimizer.load_state_dict(saved[1])
    scheduler = script.TimmSchedulers(lr_schedule(optimizer), make(optimizer))
    if not loads_first:
        optimizer.load_state_dict(saved[1])
    if saves_state:
        scheduler.schedulers[1].load_state_dict(saved[2])
    scheduler.step_update(PER_EPOCH)
    return model, train(model, optimizer, scheduler, start=1)


MAKERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "schedule": lambda optimizer: adapter.TimmWeightDecay(optimizer, cosine(UPDATES, end=0.1)),
    "autol2": lambda optimizer: adapter.TimmAutoL2(optimizer, start=0.5, refractory=0.5, factor=2.0, measure_every=1),
    "autol2 in e-folds": lambda optimizer: adapter.TimmAutoL2(
        optimizer,
        clock="efolds",
        budget_efolds=0.5,
        steps=UPDATES,
        lr=script.learning_rates(lr_schedule(optimizer), UPDATES, PER_EPOCH).max(1),
        refractory=0.01,
        measure_every=1,
    ),
}


@pytest.mark.parametrize(
    ("name", "saves_state", "loads_first"),
    [
        ("schedule", False, True),
        ("schedule", False, False),
        ("schedule", True, True),
        ("autol2", True, True),
        ("autol2", True, False),
        ("autol2 in e-folds", True, True),
    ],
)
@pytest.mark.filterwarnings("ignore:the learning rate is")  # a restored state brings its own horizon
def test_a_resumed_run_is_the_uninterrupted_one(name: str, saves_state: bool, loads_first: bool):
    model = network()
    optimizer = make_optimizer(model)
    used = train(model, optimizer, script.TimmSchedulers(lr_schedule(optimizer), MAKERS[name](optimizer)))
    again, rest = resumed(MAKERS[name], saves_state, loads_first)
    assert rest == used[PER_EPOCH:]
    assert_same(model, again)
    assert len({max(row) for row in rest}) > 1  # the weight decay moved after the interruption, too


@pytest.mark.parametrize("name", ["schedule", "autol2"])
def test_accumulated_micro_batches_are_one_update(name: str):
    """timm's loop calls `step_update` after an update, not after each of the micro-batches that make it."""
    whole, parts = network(), network()
    decays = []
    for model, pieces in ((whole, 1), (parts, 4)):
        optimizer = make_optimizer(model, layer_decay=None)
        ours = MAKERS[name](optimizer)
        for update in range(UPDATES):
            inputs, labels = IMAGES[update % 4 * 16 :][:16], LABELS[update % 4 * 16 :][:16]
            optimizer.zero_grad()
            losses = [
                functional.cross_entropy(model(part), wanted) / pieces
                for part, wanted in zip(inputs.chunk(pieces), labels.chunk(pieces))
            ]
            torch.stack(losses).sum().backward()
            optimizer.step()
            ours.step_update(update + 1, sum(loss.item() for loss in losses))
            decays.append(max(ours.get_last_wd()))
    assert decays[:UPDATES] == decays[UPDATES:]
    assert len(set(decays)) > 1
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)  # float32, and Adam divides by small numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schedule", "autol2"])
def test_a_compiled_model_trains_alike_and_is_compiled_once(name: str):
    model, twin = network(), network()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        optimizer = make_optimizer(model)
        used = train(torch.compile(model, backend="eager"), optimizer, MAKERS[name](optimizer))
    torch._dynamo.reset()
    other = make_optimizer(twin)
    assert used == train(twin, other, MAKERS[name](other))
    assert len({max(row) for row in used}) > 1
    assert_same(model, twin)


# AutoL2


def test_autol2_is_that_of_a_plain_loop_one_update_later():
    optimizer, other = make_optimizer(network()), make_optimizer(network())
    settings = {"start": 0.5, "refractory": 0.5, "factor": 2.0, "measure_every": 2}
    ours, plain = adapter.TimmAutoL2(optimizer, **settings), dc.AutoL2(other, **settings)
    losses, errors = [1.0, 0.9, 1.1, 1.2, 1.3, 1.0, 1.4, 1.5], [0.5, 0.4, 0.4, 0.5, 0.6, 0.5, 0.6, 0.7]
    for update, (loss, error) in enumerate(zip(losses, errors)):
        assert ours.due == plain.due == (update % 2 == 0)
        plain.step(loss, error)
        ours.step_update(update + 1, (loss, error) if ours.due else None)
        ours.step(0)
        assert ours.get_last_wd() == plain.get_last_wd()
    assert max(ours.get_last_wd()) < 0.5
    assert ours.state_dict() == plain.state_dict()


@pytest.mark.parametrize("as_given", [float, torch.tensor])
def test_autol2_with_the_loss_alone(as_given: Any):
    optimizer = make_optimizer(network())
    ours = adapter.TimmAutoL2(optimizer, start=2.0, refractory=1.0, factor=2.0, measure_every=1)
    used = []
    for update, loss in enumerate([1.0, 0.9, 0.8, 0.7, 1.5, 1.5]):
        ours.step_update(update + 1, metric=as_given(loss))
        used.append(max(ours.get_last_wd()))
    assert used[3] == 2.0 and used[-1] == 1.0


def test_autol2_looks_through_lookahead():
    optimizer = make_optimizer(network(), opt="lookahead_adamw")
    ours = adapter.TimmAutoL2(optimizer, start=0.3)
    assert max(group["weight_decay"] for group in optimizer.param_groups) == 0.3
    assert ours.held.optimizer is optimizer._base_optimizer
    with pytest.raises(ValueError, match="couples weight decay into an adaptive step"):
        adapter.TimmAutoL2(make_optimizer(network(), opt="adam"))


def test_autol2_refuses_updates_it_has_not_seen():
    ours = adapter.TimmAutoL2(make_optimizer(network()), start=0.3)
    ours.step_update(0)  # a run that starts
    with pytest.raises(ValueError, match=r"has seen 0 updates, and step_update says 40; .* load its state_dict"):
        ours.step_update(40, 1.0)
    with pytest.raises(ValueError, match="measures at this update: give metric=loss"):
        ours.step_update(1)
    assert ours.state_dict()["steps"] == 0


# what a script needs


def test_schedulers_in_one_are_all_called_and_saved():
    optimizer = make_optimizer(network())
    both = script.TimmSchedulers(
        None, lr_schedule(optimizer, step_on_epochs=True), adapter.TimmWeightDecay(optimizer, linear(8))
    )
    both.step_update(4)
    both.step(2)
    rate, decay = max(g["lr"] for g in optimizer.param_groups), max(g["weight_decay"] for g in optimizer.param_groups)
    assert decay == 0.25 and rate == pytest.approx(2e-3 * (1 + np.cos(np.pi * 2 / 3)) / 2, rel=1e-6)
    state = both.state_dict()
    both.step_update(6)
    both.load_state_dict(state)
    assert max(g["weight_decay"] for g in optimizer.param_groups) == 0.25
    with pytest.raises(ValueError, match="at least one scheduler, got none"):
        script.TimmSchedulers(None)
    with pytest.raises(ValueError, match="the state is of 2 schedulers, but there are 1"):
        script.TimmSchedulers(adapter.TimmWeightDecay(optimizer, linear(8))).load_state_dict(state)
    with pytest.raises(ValueError, match=r"no state of TimmSchedulers: missing \['schedulers'\]"):
        both.load_state_dict({})


@pytest.mark.parametrize("in_epochs", [True, False])
@pytest.mark.parametrize("noise", [None, [0.4, 0.9]])
def test_learning_rates_are_those_that_timm_sets(in_epochs: bool, noise: Any):
    optimizer = make_optimizer(network())
    scheduler = lr_schedule(optimizer, step_on_epochs=in_epochs, noise=noise)
    before = [dict(group) for group in optimizer.param_groups]
    found = script.learning_rates(scheduler, UPDATES, PER_EPOCH)
    assert [{**group} for group in optimizer.param_groups] == before
    set_by_timm = []
    for update in range(UPDATES):
        set_by_timm.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step_update(update + 1)
        if (update + 1) % PER_EPOCH == 0:
            scheduler.step((update + 1) // PER_EPOCH)
    np.testing.assert_allclose(found, set_by_timm, rtol=1e-12)
    assert len(set(found[:, -1])) == (EPOCHS if in_epochs else UPDATES)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_learning_rates_that_cannot_be_told():
    optimizer = make_optimizer(network())
    with pytest.raises(ValueError, match="PlateauLRScheduler waits for a metric"):
        script.learning_rates(timm_schedulers.PlateauLRScheduler(optimizer), 5, 5)
    with pytest.raises(TypeError, match="expected a scheduler of timm, got ExponentialLR"):
        script.learning_rates(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), 5, 5)
    with pytest.raises(ValueError, match="is one of 'weight_decay'; give that of the learning rate"):
        script.learning_rates(adapter.TimmWeightDecay(optimizer, linear(8)), 5, 5)
    with pytest.raises(ValueError, match="updates_per_epoch must be a whole number >= 1, got 0"):
        script.learning_rates(lr_schedule(optimizer), 5, 0)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_groups_are_timms_where_timm_is_right(layer_decay: float | None):
    model = network()
    found = script.param_groups(model, 0.5, layer_decay=layer_decay)
    theirs = make_optimizer(model, layer_decay=layer_decay).param_groups

    def summary(groups: Any) -> list[Any]:
        return sorted((g["weight_decay"], g.get("lr_scale", 1.0), len(g["params"])) for g in groups)

    assert summary(found) == summary(theirs)
    assert not dc.explain_param_groups(model, optim.create_optimizer_v2(found, opt="adamw", lr=1e-3)).wrong()


def test_groups_leave_out_what_timm_misses_and_keep_its_options():
    model = Vision()
    options = {"fallback_list": ["*.bias", "pos_embed"]}
    found = script.param_groups(model, 0.5, no_decay=["head.weight"] if hasattr(model, "head") else (), **options)
    by_timm = optim.param_groups_weight_decay(model, 0.5, **options)
    table = dc.explain_param_groups(model, optim.create_optimizer_v2(by_timm, opt="sgd", lr=0.1))
    missed = {row.names[0] for row in table.wrong()}
    assert "pos_embed" in missed
    optimizer = optim.create_optimizer_v2(found, opt="sgd", lr=0.1)
    dc.assert_no_decay(model, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    listed = [names[id(p)] for group in found for p in group["params"]]
    assert sorted(listed) == sorted(names.values())  # each once
    fallback = {names[id(p)] for group in found if group.get("use_fallback") for p in group["params"]}
    assert fallback == {names[id(p)] for group in by_timm if group.get("use_fallback") for p in group["params"]}
    assert any(group["weight_decay"] == 0.5 for group in found)
    with pytest.raises(ValueError, match="weight_decay must be a finite number >= 0, got -1"):
        script.param_groups(model, -1)


# the forecast


def loaders(workers: int = 0, kind: Any = None) -> Any:
    """timm's loaders over bytes, which its prefetcher turns into normalised floats."""
    images = ((IMAGES - IMAGES.min()) * 20).clamp(0, 255).to(torch.uint8)
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    inner = (kind or DataLoader)(TensorDataset(images, LABELS), batch_size=16, shuffle=True, **options)
    held_out = DataLoader(TensorDataset(images[:32], LABELS[:32]), batch_size=32)
    return [timm_loader.PrefetchLoader(loader, device=torch.device("cpu")) for loader in (inner, held_out)]


def test_the_forecast_is_that_of_find_and_everything_is_put_back():
    model = network()
    before, options = copy.deepcopy(model.state_dict()), OPTIONS | {"lr": 1e-3}
    scheduler = lr_schedule(make_optimizer(network(), lr=1e-3), num_epochs=10)
    train_loader, eval_loader = loaders()
    torch.manual_seed(3)
    found = finder.find_weight_decay(model, options, train_loader, eval_loader, scheduler, epochs=10)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1) == drawn
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)

    def scaled(net: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        optimizer = make_optimizer(net, lr=1e-3, weight_decay=weight_decay)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        return optimizer

    def multiplier(step: int) -> float:  # timm's warm-up from 1e-4 over one epoch, which is cut off its cosine
        warm = 0.1 + 0.9 * step / PER_EPOCH
        return warm if step < PER_EPOCH else (1 + np.cos(np.pi * step / 10 / PER_EPOCH)) / 2

    torch.manual_seed(3)
    by_hand = dc.find(
        model, scaled, functional.cross_entropy, *loaders(), budget_steps=10 * PER_EPOCH, lr_schedule=multiplier
    )
    assert found.forecast.weight_decay == pytest.approx(by_hand.weight_decay, rel=1e-3)
    assert found.verdict == by_hand.verdict and found.forecast.cost == by_hand.cost
    for ours, theirs in zip(found.forecast.arms, by_hand.arms, strict=True):
        assert ours.values == pytest.approx(theirs.values, rel=1e-3)


def test_without_a_scheduler_the_rate_is_constant():
    found = finder.find_weight_decay(network(), OPTIONS, *loaders(), None, epochs=3, max_cost=0.6)
    assert found.forecast.rate_per_decay == pytest.approx(UPDATES * 2e-3)


@pytest.mark.parametrize("kind", [DataLoader, timm_loader.MultiEpochsDataLoader])
def test_arms_that_take_turns_see_the_same_batches_from_persistent_workers(kind: Any):
    used_before = loaders(1, kind)[0]
    list(used_before)
    loader = finder._apart(used_before)
    torch.manual_seed(0)
    first = iter(loader)
    batches = [next(first)[1]]
    torch.manual_seed(0)
    second = iter(loader)
    theirs = [next(second)[1]]
    for _ in range(3):
        batches.append(next(first)[1])
        theirs.append(next(second)[1])
    assert all(torch.equal(a, b) for a, b in zip(batches, theirs))
    assert torch.cat(batches).bincount().tolist() == LABELS.bincount().tolist()
