"""One run on two ranks: the row of one process, checkpoints for any number of ranks, and ranks that are killed.

Tolerance stated here: on the same whole batch two ranks and one process differ by rounding alone (float32), which training
carries on. Curves agree to 1e-3 relative after 60 to 120 steps (without batch norm to 1e-4), and the forecast of `find` to 1 %.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import RANKS, end, on_ranks, read, start, text
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from decaycast.core import checkpoint, ranks
from decaycast.core.checkpoint import CheckpointError
from decaycast.core.experiment import Row, Run
from decaycast.core.measure import COLUMNS
from decaycast.lab import data
from decaycast.lab.resume import Keeper
from decaycast.lab.store import Store
from decaycast.lab.trial import Trial, train_run
from decaycast.methods.l2.find import find
from decaycast.methods.l2.forecast import Forecast

STEPS = 120
TINY: dict[str, Any] = {
    "data": "digits",
    "train_size": 300,
    "validation_size": 101,  # which two ranks cannot share equally
    "test_size": 99,
    "model": "mlp-16x1",
    "lr": 0.1,
    "momentum": 0.9,
    "schedule": "cosine",
    "batch_size": 32,
    "steps": STEPS,
    "weight_decay": 0.01,
    "points": 12,
}
RUNS = {
    "schedule": {"rule": "cosine"},
    "autol2": {"rule": "autol2", "weight_decay": 0.1, "schedule": "constant", "lr": 0.02},
    "autol2-efolds": {"rule": "autol2-efolds", "budget_efolds": 3.0},
    "adamw, full batch": {"optimizer": "adamw", "momentum": 0.0, "lr": 0.01, "batch_size": 300},
    "batch norm": {"model": "wrn-10-1", "steps": 60},
}
TOLERANCE = {"batch norm": 1e-3}


def tiny(**changes: Any) -> Run:
    return Run(config={**TINY, **changes})


def curve_of(row: Row) -> torch.Tensor:
    return torch.tensor([row.curve[name] for name in COLUMNS], dtype=torch.float64)


def killed_at(step: int) -> None:
    """From now on this process kills itself where the batch of this step is asked for."""
    original = data.batches

    def batches(*args: Any, skip: int = 0, **named: Any) -> Iterator[Any]:
        for place, batch in enumerate(original(*args, skip=skip, **named), start=skip):
            if place == step:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    data.batches = batches  # type: ignore[assignment]


def run_rank(rank: int, folder: Path) -> None:
    """What the plan in the folder says."""
    torch.set_num_threads(1)
    plan = json.loads((folder / "plan.json").read_text())
    store = f"file://{folder}/{plan['store']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    group = ranks.world()
    if plan["do"] == "all":
        found = {name: curve_of(train_run(tiny(**RUNS[name]), group=group)) for name in RUNS}
        model = network()
        forecast = searched(DistributedDataParallel(model), rank)
        found["forecast"] = numbers_of(forecast)
        found["untouched"] = torch.tensor(
            [torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters())]
        )
        torch.save({**found, **refusals(rank, folder, group)}, folder / f"{rank}.pt")
    if plan["do"] == "train":
        if plan.get("kill") and plan["kill"]["rank"] == rank:
            killed_at(plan["kill"]["step"])
        keeper = Keeper(plan["checkpoint"], every_seconds=0, group=group)
        row = train_run(tiny(**plan["run"]), group=group, keeper=keeper)
        torch.save({"curve": curve_of(row)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def refusals(rank: int, folder: Path, group: Any) -> dict[str, torch.Tensor]:
    """What each rank is told when the ranks cannot train together."""

    def told(run: Run, **given: Any) -> torch.Tensor:
        try:
            train_run(run, group=group, **given)
        except Exception as error:
            return text(f"{type(error).__name__}: {error}")
        return text("nothing was raised")

    damaged = folder / "damaged.pt"
    damaged.write_bytes(b"PK")
    changes = {"lr": 0.2, "weight_decay": 0.5} if rank else {}
    return {
        "other settings": told(tiny(**changes)),
        "no data": told(tiny(data="flowers89" if rank else "digits"), data_dir=str(folder)),
        "odd batch": told(tiny(batch_size=33)),
        "damaged": told(tiny(), keeper=Keeper(damaged, group=group)),
        "no file": told(tiny(), keeper=Keeper(folder if rank == 0 else damaged, group=group)),
    }


# searching and training


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def searched(model: nn.Module, rank: int | None) -> Forecast:
    """`find` on digits; on a rank with half of each batch and of the validation data (unequal halves)."""
    split = data.load("digits", train_size=320, validation_size=101)
    pairs = list(zip(split.train[0].split(32), split.train[1].split(32), strict=True))
    held = split.validation
    if rank is not None:
        pairs = [(x[rank::RANKS], y[rank::RANKS]) for x, y in pairs]
        held = (held[0][rank::RANKS], held[1][rank::RANKS])
    return find(
        model,
        lambda net, decay: torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=decay),
        nn.functional.cross_entropy,
        pairs,
        [held],
        budget_steps=300,
        max_cost=0.5,
    )


def numbers_of(forecast: Forecast) -> torch.Tensor:
    return torch.tensor(
        [forecast.weight_decay, *forecast.interval, forecast.cost, forecast.efolds], dtype=torch.float64
    )


Found = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "plan.json").write_text(json.dumps({"do": "all", "store": "store"}))
    return on_ranks(__file__, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_what_one_process_trains(found: Found, name: str):
    row = train_run(tiny(**RUNS[name]))
    assert row.status == "done" and torch.equal(found[0][name], found[1][name])
    expected, tolerance = curve_of(row), TOLERANCE.get(name, 1e-4)
    for place, column in enumerate(COLUMNS):
        slack = 0.02 if "accuracy" in column else 1e-6  # one sample more or less in a hundred
        torch.testing.assert_close(found[0][name][place], expected[place], rtol=tolerance, atol=slack, msg=column)
    decided = found[0][name][COLUMNS.index("weight_decay")]
    assert torch.equal(decided, expected[COLUMNS.index("weight_decay")])
    assert len(set(decided.tolist())) > 1 or name in ("adamw, full batch", "batch norm")


@pytest.mark.slow
def test_find_on_two_ranks_is_find_on_the_whole_batch(found: Found):
    assert torch.equal(found[0]["forecast"], found[1]["forecast"])
    torch.testing.assert_close(found[0]["forecast"], numbers_of(searched(network(), None)), rtol=0.01, atol=0)
    assert found[0]["untouched"].all() and found[1]["untouched"].all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        (
            "other settings",
            *["the ranks disagree on lr (rank 0: 0.1, rank 1: 0.2); weight_decay (rank 0: 0.01, rank 1: 0.5)"] * 2,
        ),
        ("no data", "rank 1 cannot go on: DataError: flowers89 was not found", "DataError: flowers89 was not found"),
        ("odd batch", *["2 ranks cannot share a batch of 33 samples equally; choose a batch size that 2 divides"] * 2),
        ("damaged", *["damaged.pt is no checkpoint, or a damaged one"] * 2),
        ("no file", "IsADirectoryError", "rank 0 cannot go on: IsADirectoryError"),
    ],
)
def test_ranks_that_cannot_train_together_all_say_why(found: Found, what: str, first: str, second: str):
    assert first in read(found[0][what]) and second in read(found[1][what])


# checkpoints and kills


def on_two(folder: Path, **plan: Any) -> list[subprocess.Popen[str]]:
    """Two ranks at work on the run of the folder's checkpoint."""
    plan = {
        "do": "train",
        "store": f"store{len(list(folder.iterdir()))}",
        "checkpoint": str(folder / "state.pt"),
        **plan,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return start(__file__, folder)


def results(folder: Path, started: list[subprocess.Popen[str]]) -> Found:
    said = end(started)
    assert not any(process.returncode for process in started), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


CHAIN = RUNS["autol2"]


@pytest.mark.slow
def test_killed_ranks_go_on_to_the_uninterrupted_result(tmp_path: Path, found: Found):
    chosen, last = random.Random(8), 0
    for victim in (1, 0):
        step = chosen.randrange(last + 15, last + 55)
        started = on_two(tmp_path, run=CHAIN, kill={"rank": victim, "step": step})
        said = end(started)  # the other ends by itself: no hang
        assert started[victim].returncode == -signal.SIGKILL, said[victim]
        assert started[1 - victim].returncode not in (0, -signal.SIGKILL)
        state = checkpoint.read(tmp_path / "state.pt")["trial"]
        assert last < state["step"] <= step
        last = state["step"]
    chain = results(tmp_path, on_two(tmp_path, run=CHAIN))
    for rank in range(RANKS):
        assert torch.equal(chain[rank]["curve"], found[rank]["autol2"])


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_on_another_number_of_ranks(tmp_path: Path, first: int):
    run, path = tiny(**CHAIN), tmp_path / "state.pt"
    alone = curve_of(train_run(run))
    if first == 1:
        half = Trial(run)
        half.advance(63)
        Keeper(path).write(half)
        both = [each["curve"] for each in results(tmp_path, on_two(tmp_path, run=CHAIN))]
    else:
        end(on_two(tmp_path, run=CHAIN, kill={"rank": 0, "step": 63}))
        assert 0 < checkpoint.read(path)["trial"]["step"] <= 63
        both = [curve_of(train_run(run, keeper=Keeper(path)))]
    decay = COLUMNS.index("weight_decay")
    assert len(set(alone[decay].tolist())) > 1
    for curve in both:
        assert torch.equal(curve[decay], alone[decay]) and torch.equal(curve[0], alone[0])
        loss = COLUMNS.index("validation_loss")
        torch.testing.assert_close(curve[loss], alone[loss], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", RUNS)
def test_one_process_goes_on_to_the_bit(tmp_path: Path, name: str):
    run, path = tiny(**{**RUNS[name], "steps": 40}), tmp_path / "state.pt"
    whole = train_run(run)
    half = Trial(run)
    half.advance(17)
    Keeper(path).write(half)
    again = train_run(run, keeper=Keeper(path))
    assert again.curve == whole.curve and again.final == whole.final
    once_more = train_run(run, keeper=Keeper(path, every_seconds=0))
    assert once_more.curve == whole.curve
    finished = train_run(run, keeper=Keeper(path))  # nothing is left to train
    assert finished.curve == whole.curve and finished.final == whole.final


def test_the_time_of_earlier_processes_counts(tmp_path: Path):
    run, path = tiny(steps=12), tmp_path / "new" / "folder" / "state.pt"
    train_run(run, keeper=Keeper(path, every_seconds=0))
    state = checkpoint.read(path)
    checkpoint.write(path, {**state, "seconds": 1000.0})
    assert 1000 < train_run(run, keeper=Keeper(path)).seconds < 1100


def test_checkpoints_are_written_when_it_is_time(tmp_path: Path):
    run, path = tiny(steps=12), tmp_path / "state.pt"
    train_run(run, keeper=Keeper(path, every_seconds=1000))
    assert not path.exists()
    reported: list[bool] = []
    train_run(run, keeper=Keeper(path, every_seconds=0), on_row=lambda row: reported.append(path.exists()))
    assert reported and all(reported)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    path = tmp_path / "state.pt"
    half = Trial(tiny())
    half.advance(3)
    Keeper(path).write(half)
    with pytest.raises(
        CheckpointError, match="checkpoint of another run .lr 0.1 there, 0.2 here, seed 0 there, 1 here"
    ):
        train_run(dataclasses.replace(tiny(lr=0.2), seed=1), keeper=Keeper(path))
    checkpoint.write(path, {"step": 3})
    with pytest.raises(CheckpointError, match="is no checkpoint of a run; choose another file"):
        train_run(tiny(), keeper=Keeper(path))
    state = half.state_dict()
    del state["efolds"]
    with pytest.raises(ValueError, match="this is no state of Trial: missing .'efolds'."):
        Trial(tiny()).load_state_dict(state)
    with pytest.raises(ValueError, match="the time between checkpoints must be at least 0 seconds, got -1"):
        Keeper(path, every_seconds=-1)


def test_batches_are_shared_and_skipped():
    inputs, target = torch.arange(20.0), torch.arange(20)
    whole = data.batches(inputs, target, 6, seed=1)
    parts = [data.batches(inputs, target, 6, seed=1, share=(rank, 3)) for rank in range(3)]
    later = data.batches(inputs, target, 6, seed=1, skip=4)
    for place in range(12):
        batch = next(whole)[1]
        assert torch.equal(batch, torch.cat([next(part)[1] for part in parts]))
        assert place < 4 or torch.equal(batch, next(later)[1])
    full = [next(data.batches(inputs, target, 50, seed=1, share=(rank, 2), skip=3))[1] for rank in range(2)]
    assert torch.equal(torch.cat(full), target)
    with pytest.raises(data.DataError, match="4 ranks cannot share a batch of 6 samples equally"):
        next(data.batches(inputs, target, 6, seed=1, share=(0, 4)))


# the command line


def command(*options: str) -> list[str]:
    settings = {**TINY, "budget": 60}
    names = ("data", "train_size", "model", "lr", "momentum", "schedule", "batch_size", "weight_decay", "budget")
    given = [part for name in names for part in (f"--{name.replace('_', '-')}", str(settings[name]))]
    return ["-m", "decaycast", "train", *given, "--json", *options]


@pytest.mark.slow
def test_under_torchrun_one_rank_reports_and_one_row_is_stored(tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    options = (
        "--store",
        str(tmp_path / "rows.sqlite"),
        "--checkpoint",
        str(tmp_path / "state.pt"),
        "--checkpoint-every",
        "0",
    )
    ended = subprocess.run(
        [*torchrun, *command(*options)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    printed = json.loads(ended.stdout)  # of one rank: two objects would be no JSON
    with Store(tmp_path / "rows.sqlite") as store:
        (row,) = store.read()
    assert row.provenance["ranks"] == "2" and row.status == "done"
    alone = train_run(row.run)
    assert printed["test_loss"] == row.final["test_loss"] == pytest.approx(alone.final["test_loss"], rel=1e-4)
    assert checkpoint.read(tmp_path / "state.pt")["trial"]["step"] == 60


def test_torchrun_without_a_meeting_place_is_an_error():
    incomplete = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    incomplete.pop("MASTER_ADDR", None), incomplete.pop("MASTER_PORT", None)
    ended = subprocess.run([sys.executable, *command()], env=incomplete, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert "WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT is not set; start the ranks with torchrun" in ended.stderr
