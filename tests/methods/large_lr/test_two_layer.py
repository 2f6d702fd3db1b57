"""The two-layer experiment: against a plain network and autograd, and what its seeds, noise and stops do."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from decaycast.methods.large_lr import theory, two_layer
from decaycast.methods.large_lr.anneal import AtStep, BelowLoss
from decaycast.methods.large_lr.two_layer import Setting, run

PATTERNS = theory.Patterns(dimension=6, p_only=0.2, q_only=0.3, margin=0.5, lowest=0.3, scale=3.0, separation=0.3)
SMALL = Setting(
    patterns=PATTERNS,
    examples=60,
    test_examples=200,
    p_neurons=10,
    q_neurons=40,
    p_std=0.5,
    q_std=2.0,
    large=0.4,
    small=0.1,
    anneal=AtStep(8),
    grouped=1,
    longest=20,
    stop_loss=1e-9,
)


def with_autograd(setting: Setting, seed: int, rates: list[float]) -> list[float]:
    """Training losses of a network on all 2d coordinates, by torch's own derivative and SGD; without noise."""
    generator = torch.Generator().manual_seed(seed)
    drawn = theory.sample(setting.patterns, setting.examples, generator)
    for kind in theory.KINDS:
        theory.sample(setting.patterns, setting.test_examples, generator, kind)
    start = two_layer._paired_weights(setting, generator, torch.float64)
    d = setting.patterns.dimension
    plane = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]  # Q's plane, anywhere in its d coordinates
    rest = torch.randn(setting.q_neurons, d - 2, dtype=torch.float64)
    p, q = start.p.clone().requires_grad_(), (torch.cat([start.q, rest], 1) @ plane.T).requires_grad_()
    x2 = drawn.x2 @ plane[:, :2].T
    optimizer = torch.optim.SGD([p, q], lr=0.1, weight_decay=setting.weight_decay)
    losses = []
    for rate in [*rates, 0.0]:
        output = functional.relu(drawn.x1 @ p.T) @ start.p_signs + functional.relu(x2 @ q.T) @ start.q_signs
        loss = torch.log1p(torch.exp(-drawn.labels * output)).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return losses


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("algorithm", ["L-S", "S"])
def test_against_autograd_on_all_coordinates(algorithm: str, decay: float):
    setting = dataclasses.replace(SMALL, noise=0.0, weight_decay=decay)
    rates = [0.4] * 8 + [0.1] * 12 if algorithm == "L-S" else [0.1] * 20
    # both members of a batch, whose numbers of examples with P differ
    for found in run(setting, [2, 5], algorithm, measure_at=range(21), dtype=torch.float64):
        assert [row["step"] for row in found.rows] == list(range(21))
        assert [row["lr"] for row in found.rows[:-1]] == rates
        assert found.last["time"] == pytest.approx(sum(rates))
        wanted = with_autograd(setting, found.seed, rates)
        assert [row["train_loss"] for row in found.rows] == pytest.approx(wanted, rel=1e-10)
        assert found.rows[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-12)
        assert wanted[-1] < 0.98 * wanted[0]


def test_rows_agree_with_each_other():
    start, *_, last = run(SMALL, [3], "L-S", measure_at=[0], dtype=torch.float64)[0].rows
    assert [start[f"{kind}_test_loss"] for kind in theory.KINDS] == pytest.approx([math.log(2)] * 3, abs=1e-12)
    drawn = theory.sample(PATTERNS, 60, torch.Generator().manual_seed(3))
    shares = torch.bincount(drawn.kind, minlength=3).double() / 60
    by_kind = sum(share.item() * last[f"{kind}_train_loss"] for share, kind in zip(shares, theory.KINDS))
    assert by_kind == pytest.approx(last["train_loss"])
    errors = [last[f"{kind}_test_error"] for kind in theory.KINDS]
    assert last["mixture_test_error"] == pytest.approx(0.2 * errors[0] + 0.3 * errors[1] + 0.5 * errors[2])
    alone = dataclasses.replace(SMALL, patterns=dataclasses.replace(PATTERNS, p_only=0.0, q_only=1.0), longest=1)
    assert math.isnan(run(alone, [3], "S")[0].last["p_only_train_loss"])


def test_a_seed_does_not_depend_on_its_company():
    setting = dataclasses.replace(SMALL, longest=400, stop_loss=0.6, anneal=BelowLoss(0.66, window=2))
    together = run(setting, [4, 0, 7], "L-S", dtype=torch.float64)
    assert [each.seed for each in together] == [4, 0, 7]
    assert len({each.last["step"] for each in together}) > 1 and len({each.annealed_at for each in together}) > 1
    for each in together:
        alone = run(setting, [each.seed], "L-S", dtype=torch.float64)[0]
        assert alone.annealed_at == each.annealed_at and alone.reached
        assert alone.last == pytest.approx(each.last, rel=1e-9)
    assert setting.anneal.state_dict()["seen"] == 0, "the setting's own trigger is not used up"


def trained(setting: Setting, algorithm: str, updates: int) -> two_layer._Member:
    member = two_layer._Member(setting, 1, algorithm, (), (), torch.float64)
    batch = two_layer._Batch(setting, [member])
    with torch.no_grad():
        for _ in range(updates):
            member.look(batch.forward()[0])
            batch.update()
    return member


@pytest.mark.parametrize(
    ("algorithm", "grouped", "updates", "lr"), [("L-S", 1, 8, 0.4), ("S", 1, 24, 0.1), ("S", 8, 3, 0.1)]
)
def test_the_noise_has_its_spread_and_is_shared_by_pairs(algorithm: str, grouped: int, updates: int, lr: float):
    setting = dataclasses.replace(SMALL, noise=0.5, grouped=grouped, q_neurons=20_000, p_neurons=2000)
    noisy, quiet = (trained(each, algorithm, updates) for each in (setting, dataclasses.replace(setting, noise=0.0)))
    assert noisy.step == updates * grouped
    for name, spread in (("p", 0.5), ("q", 2.0)):
        found, start = getattr(noisy.weights, name), getattr(quiet.weights, name)
        half = len(found) // 2
        moved = (found[:half] + found[half:] - start[:half] - start[half:]) / 2.0
        noise_std = setting.noise_std * spread
        wanted = theory.weight_std(noisy.step, initial_std=0.0, noise_std=noise_std, lr=lr)
        assert moved.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(2 * moved.numel()))
        assert abs(moved.mean().item()) < 5 * wanted / math.sqrt(moved.numel())
        # members of a pair part by their gradients alone, which are small beside the noise
        assert (found[:half] - found[half:]).abs().max().item() < 0.1 * wanted


def test_groups_of_steps_follow_the_single_steps():
    def loss(small: float, grouped: int) -> float:
        setting = dataclasses.replace(
            SMALL, noise=0.0, small=small, grouped=grouped, longest=round(6.4 / small), weight_decay=0.02
        )
        return run(setting, [1], "S", dtype=torch.float64)[0].last["train_loss"]

    fine, coarse, coarser = loss(0.01, 1), loss(0.01, 8), loss(0.01, 16)
    assert fine != coarse and coarse == pytest.approx(fine, rel=2e-3)
    assert coarse == loss(0.08, 1), "a group is one step of the sum of its rates"
    assert abs(coarser - fine) / abs(coarse - fine) == pytest.approx(15 / 7, rel=0.3), "first order in the step"


def test_where_training_ends_and_what_is_measured():
    setting = dataclasses.replace(SMALL, noise=0.0, longest=5000, stop_loss=0.5)
    found = run(setting, [1], "S", losses=[0.55, 0.6], measure_at=[3])[0]
    assert found.reached and found.annealed_at is None and found.algorithm == "S"
    assert found.rows[0]["step"] == 3
    losses = [row["train_loss"] for row in found.rows[1:]]
    assert all(0 < wanted - got < 0.01 for wanted, got in zip([0.6, 0.55, 0.5], losses, strict=True))
    # at the large rate a loss counts without noise alone, and ends nothing
    late = dataclasses.replace(setting, anneal=AtStep(300))
    quiet = run(late, [1], "L-S", losses=[0.6])[0]
    assert 0 < quiet.rows[0]["step"] < 100 and quiet.rows[0]["lr"] == 0.4 and 0.59 < quiet.rows[0]["train_loss"] <= 0.6
    noisy = run(dataclasses.replace(late, noise=1e-6), [1], "L-S", losses=[0.6])[0]
    assert noisy.rows[0]["step"] == 300 and quiet.annealed_at == noisy.annealed_at == 300
    given_up = run(dataclasses.replace(setting, longest=10), [1], "S")[0]
    assert not given_up.reached and given_up.last["step"] == 10


def test_noise_in_the_activations():
    quiet = run(SMALL, [1], "S")[0]
    assert run(dataclasses.replace(SMALL, activation_noise=lambda step: 0.0), [1], "S")[0] == quiet
    seen: list[int] = []

    def early(step: int) -> float:
        seen.append(step)
        return 3.0 if step < 10 else 0.0

    loud = run(dataclasses.replace(SMALL, activation_noise=early, stop_loss=10.0), [1], "S")[0]
    assert loud.last["step"] == 10 and set(seen) == set(range(11)), "no end while there is noise"
    assert loud.last["q_only_test_loss"] != quiet.last["q_only_test_loss"]
    # the noise is in the training loss, and not in what is measured
    first = run(dataclasses.replace(SMALL, activation_noise=early, longest=1, noise=0.0), [1], "S", measure_at=[0])[
        0
    ].rows[0]
    assert first["train_loss"] == pytest.approx(math.log(2), abs=1e-6), "pairs share it as long as they are equal"
    assert first["p_only_test_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_a_large_rate_first_learns_p_better():
    setting = dataclasses.replace(Setting(), stop_loss=0.05)
    large, small = (run(setting, [11, 12], algorithm) for algorithm in ("L-S", "S"))
    for first, second in zip(large, small):
        assert first.reached and second.reached
        assert first.last["p_only_test_error"] < 0.75 * second.last["p_only_test_error"]
        assert first.last["p_only_test_loss"] < second.last["p_only_test_loss"] - 0.15
        assert max(each.last[f"{kind}_test_error"] for each in (first, second) for kind in ("q_only", "both")) < 0.005


BAD: list[tuple[Any, str]] = [
    (lambda: run(SMALL, [1], "M"), "algorithm must be 'L-S' or 'S', got 'M'"),
    (lambda: run(SMALL, []), r"seeds must be one or more different numbers, got \[\]"),
    (lambda: run(SMALL, [1, 1]), r"different numbers, got \[1, 1\]"),
    (lambda: dataclasses.replace(SMALL, p_neurons=3), "p_neurons must be even, as neurons come in pairs, got 3"),
    (lambda: dataclasses.replace(SMALL, q_neurons=0), "q_neurons must be a whole number >= 2, got 0"),
    (lambda: dataclasses.replace(SMALL, noise=-0.1), "noise must be a finite number >= 0"),
    (lambda: dataclasses.replace(SMALL, weight_decay=-0.1), "weight_decay must be a finite number >= 0"),
    (lambda: dataclasses.replace(SMALL, small=0.0), "small must be > 0"),
    (lambda: dataclasses.replace(SMALL, grouped=0), "grouped must be a whole number >= 1"),
    (
        lambda: run(dataclasses.replace(SMALL, activation_noise=lambda step: -1.0), [1], "S"),
        r"activation_noise\(0\) must be a finite number >= 0, got -1",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_run_that_diverges_says_so():
    wild = dataclasses.replace(copy.copy(SMALL), large=1e200, anneal=AtStep(19))
    with pytest.raises(
        FloatingPointError, match=r"seed 1, L-S: the training loss is (nan|inf) at step \d+; lower the learning"
    ):
        run(wild, [1], "L-S")


def test_relaxations_are_those_of_the_defaults():
    setting, papers = Setting(), theory.paper_patterns(64, math.sqrt(64 / 512))  # N = 8d
    assert setting.patterns.scale != papers.scale and setting.patterns.separation != papers.separation
    assert setting.patterns.margin != papers.margin and setting.patterns.lowest != papers.lowest
    assert setting.q_std == 10 * setting.p_std and setting.patterns.p_only < papers.p_only
    assert setting.weight_decay == 0 and isinstance(setting.anneal, AtStep) and setting.grouped > 1
    assert len(two_layer.RELAXATIONS) == 9
