from __future__ import annotations

import numpy as np
import pytest

from decaycast.methods.self_distill import selection, theory, tuning
from decaycast.methods.self_distill.checked import clipped
from decaycast.methods.self_distill.tuning import paired_gain, tune, tune_tolerance

SHIFTS, WEIGHTS = np.geomspace(1e-3, 10.0, 8), np.array([2.0, 0.5, 0.0, -1.0])


def problem(noise: float, n: int = 60, outputs: int = 0, seed: int = 0, rate: float = 40.0):
    rng = np.random.default_rng(seed)
    points = np.sort(rng.uniform(0, 1, n))
    kernel = np.exp(-rate * (points[:, None] - points) ** 2)
    shape = (n, outputs) if outputs else n
    clean = np.sin(6 * points)
    y = (clean[:, None] if outputs else clean) + noise * rng.normal(size=shape)
    d, v = np.linalg.eigh(kernel)
    d = clipped(d)
    return v, d, v.T @ y, y


@pytest.mark.parametrize("criterion", tuning.CRITERIA)
@pytest.mark.parametrize("outputs", [0, 2])
def test_the_winner_is_the_least_of_all_scores(criterion: str, outputs: int):
    v, d, z, _ = problem(0.5, outputs=outputs)
    found = tune(v, d, z, SHIFTS, WEIGHTS, 4, criterion=criterion)
    scores = {}
    for shift in SHIFTS:
        pure = selection.leave_one_out_rounds(v, d, z, shift, 4)
        for weight in WEIGHTS:
            filters = theory.mixed_filters(d, shift, [weight] * 3)
            mixed = np.tensordot(selection.mix_powers([weight] * 3), pure, 1)
            for t in range(4):
                if filters[t].min() < -tuning.SLACK or filters[t].max() > 1 + tuning.SLACK:
                    continue
                loo = (mixed[t] ** 2).mean(0).sum()
                scores[shift, weight, t + 1] = selection.gcv(filters[t], z).sum() if criterion == "gcv" else loo
    best, plain = min(scores.values()), min(score for key, score in scores.items() if key[2] == 1)
    assert found.plain_score == pytest.approx(plain, rel=1e-9)
    won = found.gain > tuning.CLEAR * found.gain_stderr
    assert found.score == pytest.approx(best if won else plain, rel=1e-9)
    key = found.shift, found.weight, found.rounds
    assert scores[key] == pytest.approx(found.score, rel=1e-9)


def test_filters_that_no_truth_asks_for_are_not_chosen():
    # extrapolating mixes look better by leave-one-out than any of the filters in [0, 1]
    v, d, z, _ = problem(0.5, outputs=2)
    found = tune(v, d, z, SHIFTS, WEIGHTS, 4, criterion="leave_one_out")
    chosen = theory.mixed_filters(d, found.shift, [found.weight] * 3)[found.rounds - 1]
    assert chosen.min() >= -tuning.SLACK and chosen.max() <= 1 + tuning.SLACK
    free = [
        (np.tensordot(selection.mix_powers([w] * 3), selection.leave_one_out_rounds(v, d, z, shift, 4), 1) ** 2).mean(1)
        for shift in SHIFTS
        for w in WEIGHTS
    ]
    assert min(float(each.sum(-1).min()) for each in free) < 0.95 * found.score, "or the rule changes nothing here"


def test_a_gain_within_two_standard_errors_leaves_plain_ridge():
    counts = [tune(*problem(1.0, seed=seed)[:3], SHIFTS, WEIGHTS, 4) for seed in range(20)]
    unclear = [found for found in counts if found.gain <= tuning.CLEAR * found.gain_stderr]
    assert unclear and all(found.rounds == 1 and found.score == found.plain_score for found in unclear)


def test_a_fixed_number_of_rounds_falls_back_to_the_weight_that_is_plain_ridge():
    v, d, z, _ = problem(1.0)
    found = tune(v, d, z, SHIFTS, [0.0, -3.0], 3, any_round=False)
    assert found.rounds == 3 and (found.weight == 1.0) == (found.gain <= tuning.CLEAR * found.gain_stderr)
    # nothing but the shift to choose: rounds and weight stay
    found = tune(v, d, z, SHIFTS, [-3.0], 3, any_round=False)
    assert (found.rounds, found.weight) == (3, -3.0)


def test_a_clear_gain_is_taken():
    """One shift far too small: distilling is the only way to regularise."""
    v, d, z, _ = problem(1.0)
    found = tune(v, d, z, [1e-3], [0.0], 10, criterion="leave_one_out")
    assert found.rounds > 1 and found.score < found.plain_score and found.gain > tuning.CLEAR * found.gain_stderr


@pytest.mark.parametrize("criterion", tuning.CRITERIA)
@pytest.mark.parametrize("outputs", [0, 2])
def test_rounds_with_a_tolerance_below_the_noise_are_more_than_one(criterion: str, outputs: int):
    v, d, z, _ = problem(0.5, outputs=outputs, rate=2000.0)
    found = tune_tolerance(v, d, z, 0.06, [0.0], 8, criterion=criterion)
    assert found.shift is None and found.rounds > 1 and found.score < found.plain_score
    filters = theory.constrained_rounds(d, z, 0.06, 8).filters[found.rounds - 1]
    if outputs == 0:
        loo = (selection.leave_one_out(v, filters, z) ** 2).mean()
        expected = selection.gcv(filters, z) if criterion == "gcv" else loo
        assert found.score == pytest.approx(float(expected), rel=1e-9)


def test_a_tolerance_near_all_of_the_labels_stays_with_one_fit():
    v, d, z, y = problem(0.1)
    found = tune_tolerance(v, d, z, 0.5 * float((y**2).mean()), [0.0, 0.5], 5)
    assert found.rounds == 1
    fixed = tune_tolerance(v, d, z, 0.5 * float((y**2).mean()), [0.0, 0.5], 5, any_round=False)
    assert (fixed.rounds, fixed.weight) == (5, 1.0)


def test_paired_gain():
    gain, stderr = paired_gain(np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert (gain, stderr) == (2.0, 1.0)  # changes 3 and 1
    assert paired_gain(np.array([1.0]), np.array([0.0]))[1] == np.inf
    with pytest.raises(ValueError, match=r"one shape, got \(1,\) and \(2,\)"):
        paired_gain(np.zeros(1), np.zeros(2))


def test_a_criterion_is_checked_by_name():
    with pytest.raises(ValueError, match="unknown criterion 'loo'"):
        tune(np.eye(1), [1.0], [1.0], [1.0], [0.0], 1, criterion="loo")
    with pytest.raises(ValueError, match="unknown criterion 'loo'"):
        tune_tolerance(np.eye(1), [1.0], [1.0], 0.1, [0.0], 1, criterion="loo")
