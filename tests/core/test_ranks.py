"""Two gloo ranks: means that are the same to the bit, errors that all hear of, and training that equals one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import RANKS, on_ranks, read, text
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from decaycast.core import ranks
from decaycast.core.measure import evaluate
from decaycast.core.schedule import cosine
from decaycast.core.train import DivergedError, endless, train
from decaycast.methods.l2.autol2 import AutoL2, AutoL2Hook

VALUES = ((0.1, 3.0), (0.2, 4.0))
LOSSES = [
    [2.0 + ((7 * step + 3 * rank) % (11 + rank)) / 5 - step / 100 for rank in range(RANKS)] for step in range(120)
]
STEPS = 40
CLOCKS: dict[str, dict[str, Any]] = {
    "steps": {},
    "efolds": {"clock": "efolds", "budget_efolds": 3.0, "steps": 120, "refractory": 0.1, "measure_every": 1},
}


def refusal(work: Callable[[], Any]) -> torch.Tensor:
    """What `work` raises, as a tensor."""
    try:
        work()
    except Exception as error:
        return text(f"{type(error).__name__}: {error}")
    return text("nothing was raised")


def falling(step: int) -> float:
    """An error that always improves, so that the losses decide."""
    return 0.9 - step / 1000


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def optimizer_of(model: nn.Module, **changes: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.2, "momentum": 0.9, "weight_decay": 0.05, **changes})  # type: ignore[arg-type]


def data(count: int = 16, batches: int = 7, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(count, 5, generator=generator).double(), torch.randint(0, 3, (count,), generator=generator))
        for _ in range(batches)
    ]


def part(batches: list[tuple[torch.Tensor, torch.Tensor]], rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(inputs[rank::RANKS], target[rank::RANKS]) for inputs, target in batches]


def autol2(numbers: Callable[[int], tuple[float, float]], calls: int = 120, **settings: Any) -> torch.Tensor:
    """The weight decays that AutoL2 chooses on these losses and errors."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=1.0)
    scheduler, chosen = AutoL2(optimizer, **{"measure_every": 5, **settings}), []
    for step in range(calls):
        scheduler.step(*numbers(step))
        chosen.append(scheduler.get_last_wd()[0])
    return torch.tensor(chosen, dtype=torch.float64)


def trained(model: nn.Module, rank: int | None, hook: AutoL2Hook, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Rows of 40 steps; on a rank with its half of each batch and an unequal part of the validation data."""
    batches, validation = data(), data(30, 1, seed=5)[0]
    if rank is not None:
        batches = part(batches, rank)
        validation = tuple(each[:7] if rank else each[7:] for each in validation)
    group = ranks.group_of(model)
    rows = train(
        model,
        endless(batches),
        functional.cross_entropy,
        optimizer,
        stop=STEPS,
        lr_schedule=cosine(STEPS),
        hooks=[hook],
        evaluate=lambda net: evaluate(net, [validation], functional.cross_entropy, group),
        measure_at=range(1, STEPS + 1, 3),
    )
    return torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)


def exchanges(rank: int) -> dict[str, Any]:
    group = ranks.world()
    found = {
        "mean": torch.tensor(ranks.mean(VALUES[rank], group)),
        "total": torch.tensor(ranks.total(VALUES[rank], group)),
        "nan": torch.tensor(ranks.mean([1.0 if rank else math.nan, torch.tensor(2.0)], group)),
        "bytes": text(ranks.from_first(b"first \x00" if rank == 0 else b"", group).decode()),
        "no_bytes": text(ranks.from_first(b"", group).decode() + "."),
        "who": torch.tensor([ranks.rank_in(group), ranks.size_of(group)]),
        "none": refusal(lambda: ranks.mean([None if rank else 1.0], group)),
        "same": refusal(lambda: ranks.agree({"lr": 0.1, "name": "é"}, group)),
        "differ": refusal(
            lambda: ranks.agree({"lr": [0.1, 0.2][rank], "name": "é", **({"more": 1} if rank else {})}, group)
        ),
        "error": refusal(lambda: ranks.agree({}, group, error=OSError("no such disk") if rank else None)),
    }
    small = dist.new_group([0, 1])
    found["other group"] = torch.tensor(ranks.mean([float(rank)], small))
    return found


def decisions(rank: int) -> dict[str, Any]:
    def mine(step: int) -> tuple[float, float]:
        return LOSSES[step][rank], falling(step)

    def other_rate() -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=[0.1, 0.3][rank], weight_decay=1.0)
        AutoL2(optimizer).step(1.0, 0.5)

    def broken(loss: float | None) -> Callable[[], None]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=1.0)
        return lambda: AutoL2(optimizer).step(loss if rank else 1.0, 0.5)

    return {
        "steps": autol2(mine),
        "efolds": autol2(mine, **CLOCKS["efolds"]),
        "steps alone": autol2(mine, reduce=False),
        "efolds alone": autol2(mine, reduce=False, **CLOCKS["efolds"]),
        "other start": refusal(lambda: autol2(mine, start=[0.1, 0.2][rank])),
        "other rate": refusal(other_rate),
        "nan loss": refusal(broken(math.nan)),
        "no loss": refusal(broken(None)),
    }


def trainings(rank: int) -> dict[str, Any]:
    def wrapped() -> DistributedDataParallel:
        return DistributedDataParallel(network())

    def run(optimizer: Callable[[nn.Module], torch.optim.Optimizer], batches: Any, stop: int = 30) -> None:
        model = wrapped()
        train(model, endless(batches), functional.cross_entropy, optimizer(model), stop=stop)

    mine, model = part(data(), rank), wrapped()
    hook, wrong = AutoL2Hook(start=0.05, measure_every=2, refractory=0.2), [(x, y + 5 * rank) for x, y in mine]
    infinite = [(x * (math.inf if rank and i == 3 else 1.0), y) for i, (x, y) in enumerate(mine * 20)]
    rows = trained(model, rank, hook, optimizer_of(model))
    alone = network()
    return {
        "rows": rows,
        "weights": torch.cat([each.detach().flatten() for each in model.parameters()]),
        "unwrapped": torch.tensor([ranks.unwrapped(model) is model.module, ranks.group_of(alone) is None]),
        "other lr": refusal(lambda: run(lambda net: optimizer_of(net, lr=0.1 * (1 + rank)), mine)),
        "other decay": refusal(lambda: run(lambda net: optimizer_of(net, weight_decay=0.1 * rank), mine)),
        "other stop": refusal(lambda: run(optimizer_of, mine, stop=30 + rank)),
        "labels": refusal(lambda: run(optimizer_of, wrong)),
        "diverged": refusal(lambda: run(optimizer_of, infinite)),
        "nothing to measure": refusal(lambda: evaluate(alone, [], functional.cross_entropy, ranks.world())),
        "regression": torch.tensor(
            evaluate(alone, [(x, alone(x).detach() + 1) for x, _ in mine], functional.mse_loss, ranks.world())
        ),
    }


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    settings = {"rank": rank, "world_size": RANKS, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **settings)
    torch.save({**exchanges(rank), **decisions(rank), **trainings(rank)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    return on_ranks(__file__, tmp_path_factory.mktemp("ranks"))


Found = list[dict[str, torch.Tensor]]


@pytest.mark.slow
def test_means_and_sums_are_the_same_on_every_rank(found: Found):
    for rank, each in enumerate(found):
        assert each["mean"].tolist() == torch.tensor([(0.1 + 0.2) / 2, 3.5]).tolist()
        assert each["total"].tolist() == torch.tensor([0.1 + 0.2, 7.0]).tolist()
        assert math.isnan(each["nan"][0]) and each["nan"][1] == 2
        assert each["who"].tolist() == [rank, 2] and each["other group"] == 0.5
        assert read(each["bytes"]) == "first \x00" and read(each["no_bytes"]) == "."


@pytest.mark.slow
def test_a_difference_is_an_error_on_every_rank(found: Found):
    for each in found:
        assert read(each["same"]) == "nothing was raised"
        words = read(each["differ"])
        assert (
            "ValueError: the ranks disagree on lr (rank 0: 0.1, rank 1: 0.2); more (rank 0: null, rank 1: 1)" in words
        )
        assert "name" not in words


@pytest.mark.slow
def test_an_error_of_one_rank_is_an_error_on_every_rank(found: Found):
    assert read(found[1]["error"]) == "OSError: no such disk"
    assert read(found[0]["error"]) == "RuntimeError: rank 1 cannot go on: OSError: no such disk"
    assert read(found[0]["none"]) == "nothing was raised"
    assert read(found[1]["none"]) == "ValueError: a mean over ranks needs numbers, but rank 1 brought None"


@pytest.mark.slow
@pytest.mark.parametrize("clock", ["steps", "efolds"])
def test_autol2_decides_alike_on_ranks_with_different_losses(found: Found, clock: str):
    expected = autol2(lambda step: (sum(LOSSES[step]) / 2, falling(step)), **CLOCKS[clock])
    assert torch.equal(found[0][clock], found[1][clock]) and torch.equal(found[0][clock], expected)
    # each by itself would decide otherwise than the other
    for rank, each in enumerate(found):
        by_itself = autol2(lambda step, rank=rank: (LOSSES[step][rank], falling(step)), **CLOCKS[clock])
        assert torch.equal(each[f"{clock} alone"], by_itself)
    assert not torch.equal(found[0][f"{clock} alone"], found[1][f"{clock} alone"])


@pytest.mark.slow
def test_autol2_refuses_ranks_that_differ(found: Found):
    for each in found:
        words = read(each["other start"])
        assert "the ranks disagree on AutoL2's rule" in words and '"start": 0.1' in words and '"start": 0.2' in words
        assert "the ranks disagree on lr (rank 0: [0.1], rank 1: [0.3])" in read(each["other rate"])
        assert "loss must be finite, got nan at step 0" in read(each["nan loss"])
    assert "loss must be finite, got nan at step 0" in read(found[0]["no loss"])
    assert "rank 1 brought None" in read(found[1]["no loss"])


@pytest.mark.slow
def test_training_equals_one_process_with_the_whole_batch(found: Found):
    model = network()
    rows = trained(model, None, AutoL2Hook(start=0.05, measure_every=2, refractory=0.2), optimizer_of(model))
    assert len(set(rows[:, 3].tolist())) > 1  # the rule has decided something
    for each in found:
        torch.testing.assert_close(each["rows"], rows, rtol=1e-11, atol=1e-13)
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        torch.testing.assert_close(each["weights"], weights, rtol=1e-10, atol=1e-12)
        assert each["unwrapped"].all()
    assert torch.equal(found[0]["rows"], found[1]["rows"]) and torch.equal(found[0]["weights"], found[1]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other lr", "the ranks disagree on lr (rank 0: [0.1], rank 1: [0.2])"),
        ("other decay", "the ranks disagree on weight decay (rank 0: [0.0], rank 1: [0.1])"),
        ("other stop", "the ranks disagree on stop (rank 0: 30, rank 1: 31)"),
        ("diverged", "DivergedError: the training loss is nan at step 25"),
        ("nothing to measure", "there is nothing to evaluate on"),
    ],
)
def test_what_is_wrong_ends_every_rank(found: Found, what: str, message: str):
    for each in found:
        assert message in read(each[what])


@pytest.mark.slow
def test_labels_of_one_rank_end_every_rank(found: Found):
    assert "ValueError: labels run from" in read(found[1]["labels"])
    assert "RuntimeError: rank 1 cannot go on: ValueError: labels run from" in read(found[0]["labels"])


@pytest.mark.slow
def test_evaluation_of_a_regression(found: Found):
    for each in found:
        assert each["regression"][0] == pytest.approx(1) and math.isnan(each["regression"][1])


def test_alone_nothing_is_exchanged():
    assert ranks.world() is None and ranks.rank_in(None) == 0 and ranks.size_of(None) == 1
    assert ranks.mean([1, torch.tensor(2.5)], None) == [1.0, 2.5] and ranks.total([1.0], None) == [1.0]
    assert ranks.from_first(b"x", None) == b"x"
    ranks.agree({"lr": 1}, None)
    with pytest.raises(KeyError, match="mine"):
        ranks.agree({}, None, error=KeyError("mine"))
    with pytest.raises(ValueError, match="a mean over ranks needs numbers, but rank 0 brought 'x'"):
        ranks.mean(["x"], None)  # type: ignore[list-item]
    model = network()
    assert ranks.group_of(model) is None and ranks.unwrapped(model) is model


def test_the_settings_that_ranks_have_to_share():
    model = network()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=0.2
    )
    expected = {"optimizer": "AdamW", "parameters": [2, 2], "lr": [0.1, 0.2], "weight decay": [0.01, 0.01]}
    assert ranks.settings_of(optimizer) == expected


def test_a_missing_process_group_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2 but there is no process group"):
        autol2(lambda step: (1.0, 0.5), calls=1)
    assert autol2(lambda step: (1.0, 0.5), calls=1, reduce=False) == 0.1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks.world() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "WORLD_SIZE is 2 but MASTER_PORT is not set; start the ranks with torchrun"),
        ({"RANK": "", "MASTER_ADDR": ""}, "WORLD_SIZE is 2 but RANK, MASTER_ADDR is not set"),
        ({"RANK": "2"}, "RANK must be a whole number below WORLD_SIZE, got '2' and '2'"),
        ({"RANK": "-1"}, "RANK must be a whole number below WORLD_SIZE, got '-1' and '2'"),
        ({"WORLD_SIZE": "two"}, "RANK must be a whole number below WORLD_SIZE, got '0' and 'two'"),
    ],
    ids=str,
)
def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str):
    complete = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**complete, **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), ranks.joined():
        raise AssertionError("nothing to join")


@pytest.mark.parametrize("count", [None, "", "1"])
def test_outside_torchrun_there_is_nothing_to_join(monkeypatch: pytest.MonkeyPatch, count: str | None):
    monkeypatch.delenv("WORLD_SIZE", raising=False) if count is None else monkeypatch.setenv("WORLD_SIZE", count)
    with ranks.joined() as group:
        assert group is None and not dist.is_initialized()


def test_a_group_of_one_rank_is_used_and_left_alone(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with ranks.joined() as group:
            assert group is None
        assert dist.is_initialized()
        assert ranks.group_of(DistributedDataParallel(network())) is None
    finally:
        dist.destroy_process_group()


def test_a_compiled_wrapper_is_seen_through():
    class Compiled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    inner = network()
    assert ranks.group_of(Compiled(inner)) is None


def test_divergence_alone_still_says_where():
    model = network()
    batches = [(x * math.inf, y) for x, y in data()]
    with pytest.raises(DivergedError, match="the training loss is nan at step 0"):
        train(model, endless(batches), functional.cross_entropy, optimizer_of(model), stop=3)
