"""`find` on real networks and real digits: it leaves no trace, treats its arms alike, and refuses what it cannot do."""

from __future__ import annotations

import math
import multiprocessing
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from decaycast.core.schedule import cosine
from decaycast.lab import data
from decaycast.methods.l2.find import _Bench, _checked_maker, find

BUDGET, LR = 120, 0.1
DECAYS = (1e-3, 1e-2, 1e-1, 1.0)


class Fancy(nn.Module):
    """Batch norm, dropout, a buffer that is not saved, and a part the user has frozen in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.frozen = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 10)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("view", torch.arange(3.0).expand(2, 3), persistent=False)
        self.frozen.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(x)
        return self.head(self.frozen(self.body(x)))


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def sgd(model: nn.Module, weight_decay: float, *, lr: float = LR, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay)


def loader(part: tuple[torch.Tensor, torch.Tensor], **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(*part), batch_size=32, **settings)


@pytest.fixture(scope="module")
def digits() -> data.Split:
    return data.load("digits", train_size=320, validation_size=100)


@pytest.fixture
def training(digits: data.Split) -> DataLoader:
    return loader(digits.train, shuffle=True, drop_last=True)


@pytest.fixture
def held_out(digits: data.Split) -> DataLoader:
    return loader(digits.validation)


@pytest.fixture(autouse=True)
def seeds() -> None:
    torch.manual_seed(11)
    random.seed(12)
    np.random.seed(13)


def snapshot(model: nn.Module, *generators: torch.Generator) -> list[Any]:
    """All that must be the same afterwards, as plain values."""
    return [
        {name: value.clone() for name, value in model.named_parameters()},
        {name: value.clone() for name, value in model.named_buffers()},
        [module.training for module in model.modules()],
        [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        [id(p) for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1:],
        [generator.get_state() for generator in generators],
    ]


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return type(one) is type(other) and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Disturbing:
    """A loss that draws from every generator, as augmentation does, and raises at a given call in training."""

    def __init__(self, error: BaseException | None = None, at: int = 25) -> None:
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        random.random(), np.random.rand(), torch.rand(())
        if torch.is_grad_enabled():
            self.calls += 1
            if self.error is not None and self.calls == self.at:
                raise self.error
        return cross_entropy(output, target)


# -- nothing is left behind


@pytest.mark.parametrize("error", [None, RuntimeError("the data set went away"), KeyboardInterrupt("Ctrl-C")], ids=repr)
@pytest.mark.parametrize("where", ["loader", "sampler", "global"])
def test_everything_is_put_back(digits: data.Split, error: BaseException | None, where: str):
    generator = torch.Generator().manual_seed(5)
    source = TensorDataset(*digits.train)
    shuffling = {
        "loader": {"shuffle": True, "generator": generator},
        "sampler": {"sampler": RandomSampler(source, generator=generator)},
        "global": {"shuffle": True},
    }[where]
    model = seeded(Fancy)
    model(digits.train[0][:40]).square().mean().backward()  # gradients, and batch statistics, from before
    model.body[4].eval()  # type: ignore[index]
    before = snapshot(model, generator)
    loss = Disturbing(error)

    def call():
        return find(
            model,
            sgd,
            loss,
            DataLoader(source, batch_size=32, **shuffling),
            loader(digits.validation),
            budget_steps=BUDGET,
        )

    if error is None:
        assert call().cost > 0.2
    else:
        with pytest.raises(type(error), match=str(error)):
            call()
        assert loss.calls == loss.at
    assert loss.calls >= 25 and same(snapshot(model, generator), before)


def test_an_error_in_make_optimizer_leaves_nothing_behind(training: DataLoader, held_out: DataLoader):
    made = []

    def breaks(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        made.append(weight_decay)
        torch.rand(3)
        if len(made) == 5:
            raise RuntimeError("out of memory")
        return sgd(model, weight_decay)

    model = seeded(Fancy)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        find(model, breaks, cross_entropy, training, held_out, budget_steps=BUDGET)
    assert same(snapshot(model), before)


def test_gradients_of_parts_that_are_not_trained_are_put_back(training: DataLoader, held_out: DataLoader):
    """Backward adds to gradients that no optimiser zeroes: it must not add to the caller's."""
    model = seeded(Fancy)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)

    def head_only(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.head.parameters(), lr=LR, weight_decay=weight_decay)  # type: ignore[union-attr]

    find(model, head_only, cross_entropy, training, held_out, budget_steps=BUDGET)
    assert same(snapshot(model), before)


def test_training_afterwards_is_as_if_find_had_never_been_called(training: DataLoader, held_out: DataLoader):
    results = []
    for calls in (0, 1):
        torch.manual_seed(3)
        model = seeded(Fancy)
        if calls:
            find(model, adamw, cross_entropy, training, held_out, budget_steps=BUDGET)
        model.train()
        optimizer = adamw(model, 0.01)
        for inputs, target in training:
            optimizer.zero_grad()
            cross_entropy(model(inputs), target).backward()
            optimizer.step()
        results.append(snapshot(model)[:3])
    assert same(*results)


def test_the_same_call_gives_the_same_forecast(training: DataLoader, held_out: DataLoader):
    model = seeded(Fancy)
    one, two = (find(model, sgd, cross_entropy, training, held_out, budget_steps=BUDGET) for _ in range(2))
    assert one == two and len(one.arms) >= 3


# -- the arms


class Diary:
    """Per weight decay: the weights its optimiser was built on, and target, loss and rate of each update."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer] = sgd) -> None:
        self.make, self.weights, self.updates = make, {}, {}
        self.latest: tuple[torch.Tensor, float] | None = None

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = cross_entropy(output, target)
        if torch.is_grad_enabled():
            self.latest = target.clone(), value.item()
        return value

    def optimizer(self, model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        optimizer = self.make(model, weight_decay)
        self.weights[weight_decay] = {name: value.clone() for name, value in model.state_dict().items()}
        pages = self.updates.setdefault(weight_decay, [])
        optimizer.register_step_post_hook(
            lambda done, *_: pages.append((*self.latest, done.param_groups[0]["lr"]))  # type: ignore[misc]
        )
        return optimizer


def test_arms_start_alike_and_see_the_same_batches(training: DataLoader, held_out: DataLoader):
    diary = Diary()
    found = find(
        seeded(Fancy),
        diary.optimizer,
        diary.loss,
        training,
        held_out,
        budget_steps=BUDGET,
        candidates=DECAYS,
        max_cost=0.6,
    )
    arms = [arm.weight_decay for arm in found.arms]
    assert len(arms) >= 3 and set(arms) <= set(DECAYS)
    first, *others = sorted((diary.updates[decay] for decay in arms), key=len, reverse=True)
    assert len(first) > 12, "more than one epoch, so that the second shuffle counts too"
    for decay, updates in zip(arms[1:], others):
        assert same(diary.weights[decay], diary.weights[arms[0]])
        assert updates[0][1] == first[0][1], "same weights, same batch, same dropout mask: the same loss"
        assert all(same(one[0], two[0]) for one, two in zip(updates, first))
    assert len({updates[-1][1] for updates in (first, *others)}) == len(arms), "and then they differ"
    trained = sum(len(diary.updates[decay]) for decay in arms)
    assert found.cost == trained / BUDGET


@pytest.mark.parametrize("settings", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["here", "workers"])
def test_an_interrupted_arm_goes_on_as_if_it_had_not_been(digits: data.Split, held_out: DataLoader, settings: dict):
    budget = 1000  # so that training also pauses between two measurements

    def bench() -> Any:
        model = seeded(Fancy)
        batches = loader(digits.train, shuffle=True, drop_last=True, **settings)
        make = partial(sgd, momentum=0.9)
        return _Bench(model, make, cross_entropy, batches, held_out, cosine(budget), None, budget)

    paused, whole = bench(), bench()
    ask = paused.probe("loss")
    ask(0.01, 7)
    ask(0.1, 7)
    ask(0.01, 13)
    ask(0.001, 5)
    steps, values = ask(0.01, 61)
    expected = dict(zip(*whole.probe("loss")(0.01, 61)))
    got = dict(zip(steps, values))
    assert {step: got[step] for step in expected} == expected and len(expected) > 6
    assert same(snapshot(paused.model)[:3], snapshot(whole.model)[:3])
    paused.restore()
    whole.restore()


def test_worker_processes_end_with_the_call(digits: data.Split, held_out: DataLoader):
    batches = loader(digits.train, shuffle=True, num_workers=1)
    find(seeded(plain), sgd, cross_entropy, batches, held_out, budget_steps=20, max_cost=0.5)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("make", "rate"),
    [(sgd, LR), (partial(sgd, lr=0.02, momentum=0.9), 0.2), (adamw, 0.01)],
    ids=["sgd", "momentum", "adamw"],
)
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_optimisers_with_a_shrink_rate_are_accepted(training, held_out, make: Any, rate: float, metric: Any):
    found = find(seeded(plain), make, cross_entropy, training, held_out, budget_steps=BUDGET, metric=metric)
    assert found.rate_per_decay == pytest.approx(rate * BUDGET)
    assert found.efolds == pytest.approx(found.weight_decay * rate * BUDGET)
    assert found.higher_is_better is (metric == "accuracy") and found.metric == f"validation {metric}"
    assert 0.2 < found.cost <= 0.3 and all(arm.status == "ok" for arm in found.arms)
    values = [value for arm in found.arms for value in arm.values]
    assert min(values) >= 0 and (max(values) <= 1 or metric == "loss")


def test_a_decay_that_make_optimizer_scales_is_counted_as_given(training: DataLoader, held_out: DataLoader):
    """Some divide weight_decay by the rate: then a step shrinks by what make_optimizer was given."""

    def independent(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        return sgd(model, weight_decay / LR)

    found = find(seeded(plain), independent, cross_entropy, training, held_out, budget_steps=BUDGET)
    assert found.rate_per_decay == pytest.approx(BUDGET)


def test_groups_without_decay_stay_so(training: DataLoader, held_out: DataLoader):
    made = []

    def two_groups(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) is decays]} for decays in (True, False)]
        groups[0]["weight_decay"] = weight_decay  # type: ignore[assignment]
        groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
        made.append((weight_decay, torch.optim.SGD(groups, lr=LR)))
        return made[-1][1]

    found = find(seeded(Fancy), two_groups, cross_entropy, training, held_out, budget_steps=BUDGET)
    assert found.rate_per_decay == pytest.approx(LR * BUDGET)
    for weight_decay, optimizer in made:
        assert [group["weight_decay"] for group in optimizer.param_groups] == [weight_decay, 0.0]
    assert {arm.weight_decay for arm in found.arms} <= {weight_decay for weight_decay, _ in made}


def test_a_group_with_a_decay_of_its_own_does_not_count(training: DataLoader, held_out: DataLoader):
    def mixed(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        weight, *rest = model.parameters()
        return torch.optim.SGD(
            [{"params": rest, "weight_decay": weight_decay}, {"params": [weight], "weight_decay": 0.05, "lr": 1.0}],
            lr=LR,
        )

    found = find(seeded(plain), mixed, cross_entropy, training, held_out, budget_steps=BUDGET)
    assert found.rate_per_decay == pytest.approx(LR * BUDGET)


def test_the_learning_rate_schedule_is_used(training: DataLoader, held_out: DataLoader):
    diary, schedule = Diary(), cosine(BUDGET)
    found = find(
        seeded(plain),
        diary.optimizer,
        diary.loss,
        training,
        held_out,
        budget_steps=BUDGET,
        lr_schedule=schedule,
        max_cost=0.9,
    )
    assert found.rate_per_decay == pytest.approx(LR * sum(schedule(step) for step in range(BUDGET)))
    reference = sgd(seeded(plain), 0.0)
    official = LambdaLR(reference, schedule)
    longest = max((diary.updates[arm.weight_decay] for arm in found.arms), key=len)
    assert len(longest) > 10
    for _, _, used in longest:
        assert used == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)
        reference.step()
        official.step()


def test_mixed_precision_is_used(training: DataLoader, held_out: DataLoader):
    types = set()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        types.add((torch.is_grad_enabled(), output.dtype))
        return cross_entropy(output, target)

    model = seeded(plain)
    before = snapshot(model)
    found = find(model, sgd, loss, training, held_out, budget_steps=BUDGET, amp_dtype=torch.bfloat16)
    assert types == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert same(snapshot(model), before) and found.cost > 0.2
    assert all(math.isfinite(value) for arm in found.arms for value in arm.values)


def test_an_arm_that_diverges_fails_and_the_forecast_goes_on(training: DataLoader, held_out: DataLoader):
    model = seeded(Fancy)
    before = snapshot(model)
    found = find(model, sgd, cross_entropy, training, held_out, budget_steps=BUDGET, candidates=[1e-3, 1e-2, 1e4])
    failed = [arm for arm in found.arms if arm.status == "failed"]
    assert [arm.weight_decay for arm in failed] == [1e4] and "not finite at step" in failed[0].reason
    assert found.weight_decay < 1e4 and found.verdict != "trust"
    assert same(snapshot(model), before)


def test_a_loss_that_is_always_nan_is_refused(training: DataLoader, held_out: DataLoader):
    def broken(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output, target) * math.nan

    found = find(seeded(plain), sgd, broken, training, held_out, budget_steps=BUDGET)
    assert found.verdict == "refuse" and "0 of" in found.reason and "not finite at step 1" in found.reason


def test_a_regression_has_a_loss_but_no_accuracy(digits: data.Split):
    inputs, target = digits.train
    pairs = DataLoader(TensorDataset(inputs, target.float()[:, None]), batch_size=32, shuffle=True)
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1)))
    make = partial(sgd, lr=0.01)
    assert find(model, make, nn.functional.mse_loss, pairs, pairs, budget_steps=BUDGET).arms[0].status == "ok"
    found = find(model, make, nn.functional.mse_loss, pairs, pairs, budget_steps=BUDGET, metric="accuracy")
    assert found.verdict == "refuse" and "not finite" in found.reason


# -- bad input


def test_coupled_adam_is_refused(training: DataLoader, held_out: DataLoader):
    def adam(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), weight_decay=weight_decay)

    with pytest.raises(ValueError, match=r"Adam couples weight decay into an adaptive step.* Use AdamW"):
        find(seeded(plain), adam, cross_entropy, training, held_out, budget_steps=BUDGET)


@pytest.mark.parametrize("fixed", [0.0, 5e-4])
def test_a_make_optimizer_that_ignores_the_decay_is_refused(training: DataLoader, held_out: DataLoader, fixed: float):
    with pytest.raises(ValueError, match="no parameter group a shrink rate that depends on weight_decay; pass it on"):
        find(
            seeded(plain), lambda m, weight_decay: sgd(m, fixed), cross_entropy, training, held_out, budget_steps=BUDGET
        )


@pytest.mark.parametrize("fresh", [0, 2])
def test_an_optimiser_handed_out_twice_is_refused(training: DataLoader, held_out: DataLoader, fresh: int):
    model = seeded(plain)
    made: list[torch.optim.Optimizer] = []

    def caching(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        if len(made) <= fresh:
            made.append(sgd(model, weight_decay))
        made[-1].param_groups[0]["weight_decay"] = weight_decay
        return made[-1]

    with pytest.raises(ValueError, match="make_optimizer handed out the same optimiser twice; build a new one"):
        find(model, caching, cross_entropy, training, held_out, budget_steps=BUDGET)


def test_an_empty_loader_is_refused(digits: data.Split, training: DataLoader, held_out: DataLoader):
    few = tuple(part[:20] for part in digits.train)
    with pytest.raises(
        ValueError, match="the training loader is empty: it yields no batch; check the data set and drop"
    ):
        find(seeded(plain), sgd, cross_entropy, loader(few, drop_last=True), held_out, budget_steps=BUDGET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is nothing to evaluate on: the validation data are empty"):
        find(seeded(plain), sgd, cross_entropy, training, loader(few, drop_last=True), budget_steps=BUDGET)  # type: ignore[arg-type]


def test_a_loader_shorter_than_the_probe_starts_over(digits: data.Split, held_out: DataLoader):
    two_batches = loader(tuple(part[:64] for part in digits.train), shuffle=True)  # type: ignore[arg-type]
    found = find(seeded(plain), sgd, cross_entropy, two_batches, held_out, budget_steps=BUDGET)
    assert found.cost > 0.2 and all(arm.status == "ok" for arm in found.arms)


@pytest.mark.parametrize("which", ["train_loader", "val_loader"])
def test_a_one_shot_iterator_is_refused(training: DataLoader, held_out: DataLoader, which: str):
    def once(source: DataLoader) -> Iterator[Any]:
        yield from source

    loaders = {"train_loader": training, "val_loader": held_out}
    loaders[which] = once(loaders[which])  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"{which} is an iterator, which can be gone through only once"):
        find(seeded(plain), sgd, cross_entropy, **loaders, budget_steps=BUDGET)  # type: ignore[arg-type]


def test_a_loader_that_runs_dry_in_disguise_is_refused(training: DataLoader, held_out: DataLoader):
    class Once:
        """Looks like a loader, but hands out one and the same iterator."""

        def __init__(self) -> None:
            self.batches = iter(list(training)[:4])

        def __iter__(self) -> Iterator[Any]:
            return self.batches

    with pytest.raises(ValueError, match="the training loader is empty: it yields no batch"):
        find(seeded(plain), sgd, cross_entropy, Once(), held_out, budget_steps=BUDGET)


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_out_of_range_are_refused(digits: data.Split, held_out: DataLoader, shift: int):
    inputs, target = digits.train
    wrong = DataLoader(TensorDataset(inputs, target + shift), batch_size=len(target))
    expected = f"labels run from {max(shift, -1) if shift < 0 else 1} to {9 + shift}, but the model has 10 outputs"
    with pytest.raises(ValueError, match=expected):
        find(seeded(plain), sgd, cross_entropy, wrong, held_out, budget_steps=BUDGET)


@pytest.mark.parametrize(
    ("reshape", "got"),
    [
        (lambda x, y: {"inputs": x, "labels": y}, "dict"),
        (lambda x, y: (x, y, y), "tuple"),
        (lambda x, y: x, "Tensor"),
        (lambda x, y: ([x, x], y), r"\(list, Tensor\)"),
    ],
)
@pytest.mark.parametrize("which", ["train", "val"])
def test_batches_of_another_structure_are_refused(digits: data.Split, reshape: Any, got: str, which: str):
    good = [tuple(part[:32] for part in digits.train)]
    bad = [reshape(*good[0])]
    loaders = (bad, good) if which == "train" else (good, bad)
    with pytest.raises(
        ValueError, match=rf"a loader must yield pairs of tensors \(inputs, target\), got {got}; wrap it"
    ):
        find(seeded(plain), sgd, cross_entropy, *loaders, budget_steps=BUDGET)


def test_a_model_without_parameters_is_refused(training: DataLoader, held_out: DataLoader):
    with pytest.raises(ValueError, match="the model has no parameters, so there is nothing to decay"):
        find(nn.Flatten(), sgd, cross_entropy, training, held_out, budget_steps=BUDGET)


@pytest.mark.parametrize("budget", [9, 0, -1, 10.5, math.nan, True, "100"])
def test_the_budget_is_checked(training: DataLoader, held_out: DataLoader, budget: Any):
    with pytest.raises(ValueError, match="budget_steps must be a whole number >= 10, got "):
        find(seeded(plain), sgd, cross_entropy, training, held_out, budget_steps=budget)


def test_names_and_shares_are_checked(training: DataLoader, held_out: DataLoader):
    call = partial(find, seeded(plain), sgd, cross_entropy, training, held_out, budget_steps=BUDGET)
    with pytest.raises(ValueError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        call(metric="acuracy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_cost must be in \(0, 1\]"):
        call(max_cost=0.0)
    with pytest.raises(ValueError, match="candidates must be at least two different positive weight decays"):
        call(candidates=[0.0, 0.1])
    with pytest.raises(ValueError, match="lr must be finite and >= 0 at every step, got -0.1"):
        call(lr_schedule=lambda step: -1.0)


def test_a_maker_of_parameters_and_decay_is_called_with_the_parameters():
    seen = []

    def maker(params, weight_decay):
        seen.append(params)
        return torch.optim.SGD(params, lr=0.1, weight_decay=weight_decay)

    model = torch.nn.Linear(2, 2)
    optimizer = _checked_maker(maker)(model, 0.5)
    assert [id(p) for p in seen[0]] == [id(p) for p in model.parameters()]
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_maker_that_cannot_be_called_with_model_and_decay_is_refused():
    loader = [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))]
    model = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"must take \(model, weight_decay\) and return an optimiser, got one that takes \(wd\)"
    ):
        find(model, lambda wd: None, cross_entropy, loader, loader, budget_steps=100)  # type: ignore[arg-type]
