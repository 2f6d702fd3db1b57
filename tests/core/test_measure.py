"""Measuring: right numbers by hand, and nothing of the training disturbed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.core.measure import check_labels, evaluate, measuring_steps


def batch_norm_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 3)
    )


def samples(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def test_unequal_batches_weigh_by_their_samples():
    model, (inputs, target) = batch_norm_model(), samples(17)
    whole = evaluate(model, [(inputs, target)], functional.cross_entropy)
    parts = evaluate(model, zip(inputs.split(5), target.split(5), strict=True), functional.cross_entropy)
    assert parts == pytest.approx(whole, rel=1e-6)
    model.eval()
    with torch.no_grad():
        output = model(inputs)
    by_hand = -torch.log_softmax(output, 1)[torch.arange(17), target].mean()
    assert whole[0] == pytest.approx(float(by_hand), rel=1e-6)
    assert whole[1] == sum(int(row.argmax()) == int(label) for row, label in zip(output, target, strict=True)) / 17


def test_measuring_leaves_buffers_random_state_and_gradients_alone():
    model, (inputs, target) = batch_norm_model(), samples(8)
    functional.cross_entropy(model(inputs), target).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    random_state = torch.get_rng_state()
    evaluate(model, [samples(8, seed=2)], functional.cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("training", [True, False])
def test_every_modules_mode_is_put_back(training: bool):
    model = batch_norm_model().train(training)
    model[1].eval()  # batch norm frozen by its user
    evaluate(model, [samples(8)], functional.cross_entropy)
    assert [module.training for module in model] == [training, False, training, training]

    def failing(output, target):
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        evaluate(model, [samples(8)], failing)
    assert [module.training for module in model] == [training, False, training, training]


def test_accuracy_of_a_regression_is_missing():
    model = torch.nn.Linear(4, 2)
    inputs, _ = samples(6)
    loss, accuracy = evaluate(model, [(inputs, torch.zeros(6, 2))], functional.mse_loss)
    assert loss > 0
    assert math.isnan(accuracy)


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))]])
def test_no_validation_data_are_refused(batches):
    with pytest.raises(ValueError, match="there is nothing to evaluate on.*give at least one sample"):
        evaluate(torch.nn.Linear(4, 3), batches, lambda output, target: output.sum())


@pytest.mark.parametrize(("labels", "seen"), [([0, 3], "0 to 3"), ([-1, 2], "-1 to 2"), ([7, 7], "7 to 7")])
def test_labels_outside_the_outputs_are_refused(labels: list[int], seen: str):
    message = rf"labels run from {seen}, but the model has 3 outputs \(0 to 2\); check the data set or the last layer"
    with pytest.raises(ValueError, match=message):
        check_labels(torch.zeros(2, 3), torch.tensor(labels))
    with pytest.raises(ValueError, match=message):
        evaluate(torch.nn.Linear(4, 3), [(torch.zeros(2, 4), torch.tensor(labels))], functional.cross_entropy)


def test_labels_that_are_fine_or_no_classes_pass():
    for output, target in [
        (torch.zeros(2, 3), torch.tensor([0, 2])),
        (torch.zeros(2, 3), torch.tensor([-100, 2])),  # ignored by the loss
        (torch.zeros(2, 3), torch.tensor([9.0, -5.0])),
        (torch.zeros(2, 3), torch.full((2, 3), 9)),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
    ]:
        assert check_labels(output, target) is None


@settings(deadline=None)
@given(total=st.integers(1, 5000), points=st.integers(2, 100))
def test_measuring_steps_rise_end_at_the_end_and_are_dense_early(total: int, points: int):
    steps = measuring_steps(total, points)
    assert steps == sorted(set(steps))
    assert steps[0] >= 1
    assert steps[-1] == total
    assert len(steps) <= points + 1
    if total >= 8 * points:
        early = sum(step <= total / 4 for step in steps)
        assert abs(early - points // 2) <= 1


def test_measuring_steps_by_hand():
    assert measuring_steps(100, 8, dense_until=0.4) == [10, 20, 30, 40, 55, 70, 85, 100]


@pytest.mark.parametrize(("total", "points"), [(0, 10), (10, 1)])
def test_measuring_nothing_is_refused(total: int, points: int):
    with pytest.raises(ValueError, match=f"need total_steps >= 1 and points >= 2, got {total} and {points}"):
        measuring_steps(total, points)
