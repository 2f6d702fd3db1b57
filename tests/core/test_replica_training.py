"""K trainings at once give the rows of K trainings, and what ends one of them leaves the others as they were."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from decaycast.core.decay import WeightDecayScheduler
from decaycast.core.hook import Hook, StepContext
from decaycast.core.measure import evaluate
from decaycast.core.replica_batches import SeparateBatches, ShuffledBatches
from decaycast.core.replica_training import ReplicaTraining, evaluate_replicas, mean_losses
from decaycast.core.replicas import Replicas
from decaycast.core.schedule import cosine, linear
from decaycast.core.train import DivergedError, train
from decaycast.lab import data, models
from decaycast.methods.l2.autol2 import AutoL2Hook
from decaycast.methods.label_noise.method import LabelNoise

SAMPLES, CLASSES, BATCH, STEPS = 60, 4, 12, 40
MEASURED = (1, 7, 26, STEPS)
SHAPES = {"mlp-12x2": (1, 3, 3), "cnn-3": (1, 10, 10), "cnn-bn-3": (1, 10, 10), "gpt-8x1": (6,)}
TOLERANCE = 1e-10  # relative and absolute, in float64


def samples(name: str, count: int = SAMPLES, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator, shape = torch.Generator().manual_seed(seed), (count, *SHAPES[name])
    if name.startswith("gpt"):
        return tuple(torch.randint(CLASSES, shape, generator=generator) for _ in range(2))  # type: ignore[return-value]
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


class Decay(Hook):
    """A weight decay schedule as a hook."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.scheduler = WeightDecayScheduler(optimizer, linear(STEPS))

    def on_step(self, step: int, context: StepContext) -> None:
        if step:
            self.scheduler.step()


class Ensemble:
    """The same trainings for both sides; replica k has everything of its own."""

    def __init__(self, name: str = "mlp-12x2", kind: str = "sgd", count: int = 4, **changes: Any) -> None:
        self.name, self.count = name, count
        self.models = [models.build(name, SHAPES[name], CLASSES, seed=k).double() for k in range(count)]
        self.optimizers = [self._optimizer(kind, k) for k in range(count)]
        budget = {
            "clock": "efolds",
            "budget_efolds": 1.0,
            "steps": STEPS,
            "lr": self.optimizers[3 % count].param_groups[0]["lr"],
        }
        hooks = [(), (AutoL2Hook(start=0.3, refractory=0.5, measure_every=3),), (Decay(self.optimizers[2 % count]),)]
        self.hooks: list[Any] = [*hooks, (AutoL2Hook(**budget),)][:count]
        self.schedules = [None, cosine(STEPS), linear(STEPS), None][:count]
        self.stop, self.seeds = [STEPS] * count, [10 + k for k in range(count)]
        self.measure_at: list[Any] = [MEASURED] * count
        self.__dict__.update(changes)

    def _optimizer(self, kind: str, k: int) -> torch.optim.Optimizer:
        parameters = self.models[k].parameters()
        if kind == "adamw":
            return torch.optim.AdamW(parameters, lr=0.003 * (k + 1), weight_decay=0.1 * (k + 1))
        return torch.optim.SGD(
            parameters, lr=0.01 * (k + 1), weight_decay=0.05 * k + 0.01, momentum=(0.9, 0.0, 0.5, 0.8)[k]
        )

    def separate(self, k: int) -> list[dict[str, float]]:
        return train(
            self.models[k],
            data.batches(*samples(self.name), BATCH, self.seeds[k]),
            functional.cross_entropy,
            self.optimizers[k],
            stop=self.stop[k],
            lr_schedule=self.schedules[k],
            hooks=self.hooks[k],
            evaluate=lambda model: evaluate(model, [samples(self.name, 20, seed=1)], functional.cross_entropy),
            measure_at=self.measure_at[k],
        )

    def together(self, **changes: Any) -> ReplicaTraining:
        def validate(replicas: Replicas) -> tuple[list[float], list[float]]:
            return evaluate_replicas(replicas, [samples(self.name, 20, seed=1)], functional.cross_entropy)

        options: dict[str, Any] = {
            "stop": self.stop,
            "lr_schedules": self.schedules,
            "hooks": self.hooks,
            "evaluate": validate,
            "measure_at": self.measure_at,
        }
        batches = ShuffledBatches(*samples(self.name), BATCH, self.seeds)
        return ReplicaTraining(
            self.models, batches, functional.cross_entropy, self.optimizers, **{**options, **changes}
        )


def columns(rows: list[dict[str, float]]) -> Tensor:
    return torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)


def assert_same_rows(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [list(row) for row in found] == [list(row) for row in expected] != []
    torch.testing.assert_close(columns(found), columns(expected), equal_nan=True, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(SHAPES, ["sgd", "adamw"])))
def test_rows_and_networks_are_those_of_separate_trainings(name: str, kind: str):
    ours, theirs = Ensemble(name, kind), Ensemble(name, kind)
    training = ours.together()
    training.advance()
    assert len(training) == 0 and training.step == STEPS and sorted(training.outcomes) == [0, 1, 2, 3]
    for k, outcome in training.outcomes.items():
        assert_same_rows(outcome.rows, theirs.separate(k))
        assert outcome.error is None and outcome.final is None and outcome.seconds > 0
        for key, value in theirs.models[k].state_dict().items():
            torch.testing.assert_close(ours.models[k].state_dict()[key], value, rtol=TOLERANCE, atol=TOLERANCE)
        assert ours.models[k].training
    decays = [row["weight_decay"] for row in training.outcomes[1].rows]
    assert len(set(decays)) > 1  # AutoL2 decayed, so its state was a replica's own


def test_where_it_pauses_does_not_show():
    paused, whole = Ensemble(stop=[STEPS, 26, 7, STEPS]), Ensemble(stop=[STEPS, 26, 7, STEPS])
    one, other = paused.together(), whole.together()
    for step in (0, 1, 8, 5, 26, 39, 60):
        one.advance(step)
    other.advance()
    assert one.step == STEPS
    assert all(one.outcomes[k].rows == other.outcomes[k].rows for k in range(4))


def test_each_stops_at_its_own_step_and_the_others_go_on_as_if_alone():
    stops = [STEPS, 26, 7, STEPS]
    ours, theirs = Ensemble(stop=stops), Ensemble(stop=stops)
    ends: list[int] = []

    def test_data(replicas: Replicas) -> tuple[list[float], list[float]]:
        ends.append(len(replicas))
        return evaluate_replicas(replicas, [samples("mlp-12x2", 30, seed=2)], functional.cross_entropy)

    training = ours.together(evaluate_end=test_data)
    training.advance(8)
    assert len(training) == 3 and list(training.outcomes) == [2]
    training.advance()
    assert ends == [4, 3, 2]  # read when replicas end, and only then
    for k in range(4):
        assert_same_rows(training.outcomes[k].rows, theirs.separate(k))
        expected = evaluate(theirs.models[k], [samples("mlp-12x2", 30, seed=2)], functional.cross_entropy)
        assert training.outcomes[k].final == pytest.approx(expected, rel=1e-10)
    alone = Ensemble(count=1)
    alone.together().advance()
    for one, other in zip(alone.models[0].parameters(), ours.models[0].parameters(), strict=True):
        assert torch.equal(one, other)  # to the bit: who else is in the batch does not matter


@pytest.mark.parametrize(("measured", "at_step"), [(MEASURED, 6), ((STEPS,), 25)])
def test_one_that_diverges_ends_alone(measured: tuple[int, ...], at_step: int):
    def ensemble() -> Ensemble:
        wild = Ensemble()
        wild.measure_at[2] = measured  # the others are measured, and their losses looked at, in between
        wild.optimizers[2].param_groups[0]["lr"] = 1e200
        wild.hooks[2] = ()
        return wild

    ours, theirs = ensemble(), ensemble()
    training = ours.together()
    training.advance()
    outcome = training.outcomes[2]
    with pytest.raises(DivergedError) as separate:
        theirs.separate(2)
    assert isinstance(outcome.error, DivergedError) and str(outcome.error) == str(separate.value)
    assert outcome.error.rows is outcome.rows and outcome.error.step == separate.value.step == at_step
    assert [row["step"] for row in outcome.rows] == [step for step in measured if step <= at_step]
    torch.testing.assert_close(
        columns(outcome.rows), columns(separate.value.rows), equal_nan=True, rtol=TOLERANCE, atol=TOLERANCE
    )
    assert outcome.final is None
    calm = Ensemble()
    undisturbed = calm.together()
    undisturbed.advance()
    for k in (0, 1, 3):
        assert training.outcomes[k].rows == undisturbed.outcomes[k].rows  # to the bit
        for one, other in zip(ours.models[k].parameters(), calm.models[k].parameters(), strict=True):
            assert torch.equal(one, other)


class Failing(Hook):
    def __init__(self, where: str, step: int = 7) -> None:
        self.where, self.step = where, step

    def _maybe(self, where: str, step: int) -> None:
        if (where, step) == (self.where, self.step):
            raise LookupError(f"{where} at {step}")

    def on_batch(self, step: int, batch: Any) -> Any:
        self._maybe("on_batch", step)
        return batch

    def on_step(self, step: int, context: StepContext) -> None:
        self._maybe("on_step", step)

    def on_measure(self, step: int, row: Any) -> None:
        self._maybe("on_measure", step)


@pytest.mark.parametrize("where", ["on_batch", "on_step", "on_measure"])
def test_a_hook_that_raises_ends_its_own_replica(where: str):
    ours, calm = Ensemble(), Ensemble()
    ours.hooks[1] = (Failing(where),)
    calm.hooks[1] = ()
    training, undisturbed = ours.together(), calm.together()
    training.advance(9)
    assert list(training.outcomes) == [1] and str(training.outcomes[1].error) == f"{where} at 7"
    assert [row["step"] for row in training.outcomes[1].rows] == [1, 7]
    training.advance()
    undisturbed.advance()
    assert all(training.outcomes[k].rows == undisturbed.outcomes[k].rows for k in (0, 2, 3))


def test_an_interrupt_is_no_replicas_failure():
    class Interrupting(Hook):
        def on_step(self, step: int, context: StepContext) -> None:
            raise KeyboardInterrupt

    ours = Ensemble()
    ours.hooks[1] = (Interrupting(),)
    training = ours.together()
    with pytest.raises(KeyboardInterrupt):
        training.advance()
    assert training.outcomes == {} and len(training) == 4


def test_label_noise_is_each_replicas_own():
    def noisy() -> Ensemble:
        ours = Ensemble()
        ours.hooks = [
            (LabelNoise(0.1 * k, CLASSES, torch.Generator().manual_seed(k)), *hooks)
            for k, hooks in enumerate(ours.hooks)
        ]
        return ours

    training, theirs = noisy().together(), noisy()
    training.advance()
    for k in range(4):
        assert_same_rows(training.outcomes[k].rows, theirs.separate(k))


def test_hooks_see_their_own_batch():
    seen: dict[int, list[tuple[float, float]]] = {0: [], 1: []}

    class Watch(Hook):
        def __init__(self, place: int) -> None:
            self.place = place

        def on_step(self, step: int, context: StepContext) -> None:
            plain = StepContext(
                loss=context.loss, output=context.output, target=context.target, optimizer=context.optimizer
            )
            loss = functional.cross_entropy(context.output, context.target)
            assert float(context.loss) == pytest.approx(float(loss)) and not context.output.requires_grad
            seen[self.place].append((float(context.error()), float(plain.error())))

    ours = Ensemble()
    ours.hooks = [(Watch(0),), (Watch(1),), (), ()]
    ours.together().advance(5)
    assert all(mine == plain for values in seen.values() for mine, plain in values)
    assert seen[0] != seen[1] and len(seen[0]) == 5


@pytest.mark.parametrize("batch_size", [7, 60, 90])
def test_batches_come_in_the_order_of_the_lab(batch_size: int):
    inputs, target = samples("mlp-12x2")
    batches = ShuffledBatches(inputs, target, batch_size, [3, 4, 5])
    separate = [data.batches(inputs, target, batch_size, seed) for seed in (3, 4, 5)]
    for step in range(20):
        if step == 11:  # in the middle of an epoch
            batches.keep([2, 0])
            separate = [separate[2], separate[0]]
        x, y = batches.next()
        for place, (own_x, own_y) in enumerate(next(one) for one in separate):
            assert torch.equal(x[place], own_x) and torch.equal(y[place], own_y)


def test_replicas_with_data_of_their_own():
    parts = [samples("mlp-12x2", seed=k) for k in range(3)]
    batches = SeparateBatches([iter([part] * 3) for part in parts])
    assert torch.equal(batches.next()[0][1], parts[1][0])
    batches.keep([2, 0])
    assert torch.equal(batches.next()[0][0], parts[2][0]) and torch.equal(batches.next()[1][1], parts[0][1])
    with pytest.raises(
        ValueError, match=r"the training data of a replica ran dry; give iterators that repeat \(endless"
    ):
        batches.next()


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_nothing_are_refused(size: int):
    with pytest.raises(ValueError, match=f"need samples and a batch size >= 1, got 60 samples and {size}"):
        ShuffledBatches(*samples("mlp-12x2"), size, [0])
    with pytest.raises(ValueError, match="need samples and a batch size >= 1, got 0 samples and 4"):
        ShuffledBatches(torch.empty(0, 2), torch.empty(0), 4, [0])


@pytest.mark.parametrize("kind", ["classes", "ignored", "probabilities", "text", "squared"])
def test_losses_are_those_of_the_loss_function(kind: str):
    torch.manual_seed(0)
    output, loss_fn = torch.randn(3, 6, 4, dtype=torch.float64), functional.cross_entropy
    target = torch.randint(4, (3, 6))
    if kind == "ignored":
        target[0, :2] = target[2, 3] = -100
    elif kind == "probabilities":
        target = torch.rand(3, 6, 4, dtype=torch.float64).softmax(-1)
    elif kind == "text":
        output, target = torch.randn(3, 6, 4, 5), torch.randint(4, (3, 6, 5))
    elif kind == "squared":
        target, loss_fn = torch.randn(3, 6, 4, dtype=torch.float64), functional.mse_loss
    expected = torch.stack([loss_fn(o, t) for o, t in zip(output, target, strict=True)])
    torch.testing.assert_close(mean_losses(loss_fn, output, target), expected)


@pytest.mark.parametrize("name", ["mlp-12x2", "cnn-bn-3", "gpt-8x1"])
def test_evaluation_is_that_of_each_network(name: str):
    ensemble = Ensemble(name)
    for model in ensemble.models:
        model(samples(name)[0])  # batch norm has statistics
    inputs, target = samples(name, 23)
    pairs = list(zip(inputs.split(10), target.split(10), strict=True))
    losses, accuracies = evaluate_replicas(Replicas(ensemble.models), pairs, functional.cross_entropy)
    for k, model in enumerate(ensemble.models):
        loss, accuracy = evaluate(model, pairs, functional.cross_entropy)
        assert losses[k] == pytest.approx(loss, rel=1e-12) and accuracies[k] == accuracy


def test_evaluation_of_numbers_and_of_nothing():
    replicas = Replicas([nn.Linear(3, 2), nn.Linear(3, 2)])
    losses, accuracies = evaluate_replicas(replicas, [(torch.ones(4, 3), torch.ones(4, 2))], functional.mse_loss)
    assert len(losses) == 2 and all(math.isnan(value) for value in accuracies)
    with pytest.raises(ValueError, match="there is nothing to evaluate on: the validation data are empty"):
        evaluate_replicas(replicas, [], functional.mse_loss)


def test_training_on_numbers_has_no_accuracy():
    models_ = [nn.Linear(3, 1), nn.Linear(3, 1)]
    batches = ShuffledBatches(torch.randn(8, 3), torch.randn(8, 1), 4, [0, 1])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models_]
    training = ReplicaTraining(models_, batches, functional.mse_loss, optimizers, stop=[3, 3], measure_at=[{3}, {3}])
    training.advance()
    assert all(math.isnan(training.outcomes[k].rows[0]["train_accuracy"]) for k in range(2))


def test_labels_outside_the_outputs_concern_all():
    ensemble = Ensemble()
    training = ensemble.together()
    training.batches.target = training.batches.target + 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="labels run from 1 to 4, but the model has 4 outputs"):
        training.advance()


def test_lists_that_do_not_fit_are_refused():
    ensemble = Ensemble()
    with pytest.raises(ValueError, match="hooks must have one entry per network, 4, got 2"):
        ensemble.together(hooks=[(), ()])
    with pytest.raises(ValueError, match="a replica must make at least 1 step, got stop=0"):
        ensemble.together(stop=[3, 0, 3, 3])
