"""The loop: the same numbers as a loop written out by hand, resumable to the bit, and clear when it cannot go on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as functional

from decaycast.core.hook import Hook
from decaycast.core.measure import COLUMNS, evaluate
from decaycast.core.schedule import cosine
from decaycast.core.timescale import efolds
from decaycast.core.train import DivergedError, endless, train

BATCHES = 7


def data(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(12, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (12,), generator=generator))
        for _ in range(BATCHES)
    ]


def network(*, norm: bool = True, dropout: float = 0.0) -> torch.nn.Sequential:
    torch.manual_seed(3)
    layers = [torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8) if norm else torch.nn.ReLU(), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Dropout(dropout), torch.nn.Linear(8, 3)).double()


def optimizer_of(model: torch.nn.Module, kind: str = "sgd") -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def validate(model: torch.nn.Module) -> tuple[float, float]:
    return evaluate(model, data(seed=9)[:2], functional.cross_entropy)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_it_is_the_loop_one_would_write(kind: str):
    model, twin = network(), network()
    schedule = cosine(30)
    rows = train(
        model,
        endless(data()),
        functional.cross_entropy,
        optimizer_of(model, kind),
        stop=30,
        lr_schedule=schedule,
        evaluate=validate,
        measure_at=(10, 30),
    )
    optimizer = optimizer_of(twin, kind)
    initial, losses = optimizer.param_groups[0]["lr"], []
    for step, (inputs, target) in zip(range(30), itertools.cycle(data()), strict=False):
        optimizer.param_groups[0]["lr"] = initial * schedule(step)
        optimizer.zero_grad()
        loss = functional.cross_entropy(twin(inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert same(weights(model), weights(twin))
    assert [row["step"] for row in rows] == [10.0, 30.0]
    assert [row["train_loss"] for row in rows] == [losses[9], losses[29]]
    assert rows[1]["lr"] == initial * schedule(29)
    assert (rows[1]["validation_loss"], rows[1]["validation_accuracy"]) == validate(twin)


def test_rows_have_the_fixed_columns_and_count_efolds():
    model = network()
    rows = train(
        model,
        endless(data()),
        functional.cross_entropy,
        optimizer_of(model),
        stop=20,
        measure_at=range(1, 21),
        lr_schedule=cosine(20),
    )
    assert all(tuple(row) == COLUMNS for row in rows)
    rates = [0.1 * cosine(20)(step) for step in range(20)]
    for steps in (1, 7, 20):
        expected = efolds(lr=rates[:steps], weight_decay=0.01, steps=steps, momentum=0.9)
        assert rows[steps - 1]["efolds"] == pytest.approx(expected, rel=1e-12)
    assert math.isnan(rows[0]["validation_loss"])
    assert 0 <= rows[0]["train_accuracy"] <= 1


def test_efolds_follow_a_decay_that_a_hook_changes():
    class Halve(Hook):
        def on_step(self, step, context):
            if step == 10:
                for group in context.optimizer.param_groups:
                    group["weight_decay"] = 0.005

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    (row,) = train(
        model,
        endless(data()),
        functional.cross_entropy,
        optimizer,
        stop=30,
        hooks=[Halve()],
        measure_at=[30],
        efolds_spent=2.0,
    )
    assert row["efolds"] == pytest.approx(2.0 + 10 * 0.001 + 20 * 0.0005, rel=1e-12)


def test_efolds_are_missing_where_decay_has_no_rate():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    (row,) = train(model, endless(data()), functional.cross_entropy, optimizer, stop=2, measure_at=[2])
    assert math.isnan(row["efolds"])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("cut", [1, 13, 29])
def test_going_on_equals_never_stopping(kind: str, cut: int):
    def parts(*stops: int):
        model = network(dropout=0.3)
        optimizer, batches, rows, start = optimizer_of(model, kind), endless(data()), [], 0
        torch.manual_seed(11)
        for stop in stops:
            rows += train(
                model,
                batches,
                functional.cross_entropy,
                optimizer,
                start=start,
                stop=stop,
                lr_schedule=cosine(30),
                evaluate=validate,
                measure_at=[5, cut, 30],
                efolds_spent=rows[-1]["efolds"] if rows else 0.0,
            )
            start = stop
        return model, rows

    whole, whole_rows = parts(30)
    resumed, resumed_rows = parts(cut, 30)
    assert same(weights(whole), weights(resumed))
    assert [row["train_loss"] for row in resumed_rows] == [row["train_loss"] for row in whole_rows]
    assert resumed_rows[-1]["efolds"] == pytest.approx(whole_rows[-1]["efolds"], rel=1e-12)


def test_measuring_does_not_disturb_training():
    def trained(measure_at):
        model = network(dropout=0.5)
        torch.manual_seed(11)
        train(
            model,
            endless(data()),
            functional.cross_entropy,
            optimizer_of(model),
            stop=20,
            evaluate=validate,
            measure_at=measure_at,
        )
        return model

    measured, bare = trained(range(1, 21)), trained([])
    assert same(weights(measured), weights(bare))
    assert all(module.training for module in measured.modules())


def test_hooks_see_every_step_before_the_update_and_every_measurement():
    log = []

    class Watch(Hook):
        def on_batch(self, step, batch):
            log.append(("batch", step))
            inputs, target = batch
            return inputs * 0, target

        def on_step(self, step, context):
            log.append(("step", step, float(model[0].weight.detach()[0, 0]), float(context.loss)))
            assert not context.loss.requires_grad
            assert not context.output.requires_grad

        def on_measure(self, step, row):
            log.append(("measure", step, row["train_loss"]))

    model = network(norm=False)
    first = float(model[0].weight.detach()[0, 0])
    rows = train(
        model,
        endless(data()),
        functional.cross_entropy,
        optimizer_of(model),
        start=4,
        stop=6,
        hooks=[Watch()],
        measure_at=[6],
    )
    assert [entry[:2] for entry in log] == [("batch", 4), ("step", 4), ("batch", 5), ("step", 5), ("measure", 6)]
    assert log[1][2] == first  # not yet updated
    assert log[3][2] != first
    assert log[4][2] == rows[0]["train_loss"] == log[3][3]
    # inputs were zeroed on the way: the first layer saw no gradient but its decay, and the loader's batches are whole
    assert torch.count_nonzero(data()[0][0]) > 0


def test_a_learning_rate_tensor_is_written_in_place():
    model = network()
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=0.01)
    (row,) = train(
        model,
        endless(data()),
        functional.cross_entropy,
        optimizer,
        stop=10,
        lr_schedule=lambda step: 0.5**step,
        measure_at=[10],
    )
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1 * 0.5**9)
    assert row["efolds"] == pytest.approx(sum(0.001 * 0.5**step for step in range(10)), rel=1e-5)


def test_each_group_keeps_its_own_initial_rate():
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[4].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    train(model, endless(data()), functional.cross_entropy, optimizer, stop=3, lr_schedule=lambda step: 1 / (1 + step))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2 / 3, 0.1 / 3])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training_with_what_was_measured(value: float):
    model, calls = network(), itertools.count()

    def loss_fn(output, target):
        loss = functional.cross_entropy(output, target)
        return loss * value if next(calls) >= 19 else loss

    with pytest.raises(
        DivergedError, match=f"the training loss is {value} at step 19; lower the learning rate"
    ) as caught:
        train(model, endless(data()), loss_fn, optimizer_of(model), stop=50, measure_at=[5, 10, 20, 30])
    assert caught.value.step == 19
    assert [row["step"] for row in caught.value.rows] == [5.0, 10.0]
    assert isinstance(caught.value, FloatingPointError)


def test_divergence_is_seen_without_measuring():
    model = network()
    with pytest.raises(DivergedError, match="nan at step 0"):
        train(model, endless(data()), lambda output, target: output.sum() * math.nan, optimizer_of(model), stop=50)


def test_labels_out_of_range_are_refused_before_any_update():
    model = network()
    before = weights(model)
    wrong = [(inputs, target + 1) for inputs, target in data()]
    with pytest.raises(ValueError, match=r"labels run from 1 to 3, but the model has 3 outputs"):
        train(model, endless(wrong), functional.cross_entropy, optimizer_of(model, "adamw"), stop=5)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_an_empty_loader_is_refused():
    model = network()
    with pytest.raises(
        ValueError, match="the training loader is empty: it yields no batch; check the data set and drop"
    ):
        train(model, endless([]), functional.cross_entropy, optimizer_of(model), stop=5)


def test_data_that_run_dry_are_refused():
    model = network()
    with pytest.raises(ValueError, match=r"ran dry at step 7; give an iterator that repeats \(endless\(loader\)\)"):
        train(model, iter(data()), functional.cross_entropy, optimizer_of(model), stop=8)


@pytest.mark.parametrize("batch", [torch.zeros(2, 5), (torch.zeros(2, 5),), {"x": 1, "y": 2}])
def test_a_batch_must_be_a_pair(batch):
    model = network()
    with pytest.raises(ValueError, match=rf"a batch must be a pair \(inputs, target\), got {type(batch).__name__}"):
        train(model, endless([batch]), functional.cross_entropy, optimizer_of(model), stop=1)


def test_endless_goes_round_and_asks_the_loader_anew():
    class Loader:
        epochs = 0

        def __iter__(self):
            self.epochs += 1
            return iter([(self.epochs, i) for i in range(2)])

    loader = Loader()
    assert list(itertools.islice(endless(loader), 5)) == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]


def test_mixed_precision_context_and_scaler_are_used():
    model = network().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dtypes = []

    def loss_fn(output, target):
        dtypes.append(output.dtype)
        return functional.cross_entropy(output.float(), target)

    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    train(
        model,
        endless(data(dtype=torch.float32)),
        loss_fn,
        optimizer,
        stop=3,
        scaler=scaler,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    assert set(dtypes) == {torch.bfloat16}
    assert not same(before, weights(model))
    twin = network().float()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    train(
        twin,
        endless(data(dtype=torch.float32)),
        loss_fn,
        optimizer,
        stop=3,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    assert same(weights(model), weights(twin))  # the scale is a power of two: it leaves no trace


def test_a_model_in_training_mode_keeps_the_modules_its_owner_froze():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model[1].eval()
    before = model[1].running_mean.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = itertools.repeat((torch.randn(8, 3), torch.zeros(8, dtype=torch.long)))
    train(model, batches, functional.cross_entropy, optimizer, stop=3)
    assert not model[1].training and model[0].training and torch.equal(model[1].running_mean, before)


def test_a_tensor_cached_while_evaluating_can_be_trained_with():
    class Caching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = torch.nn.Linear(3, 2), None

        def forward(self, x):
            if self.scale is None:
                self.scale = torch.full((2,), 2.0)
            return self.layer(x) * self.scale

    model = Caching()
    evaluate(model, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))], functional.cross_entropy)
    model(torch.randn(4, 3)).sum().backward()
    assert model.layer.weight.grad is not None
