"""Two gloo ranks, seeded alike: their noise differs, accumulates, and goes on from the state that rank 0 saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.ranks import RANKS, on_ranks, read, text
from torch import nn

from decaycast.methods.label_noise.method import LabelNoise, TargetNoise

COUNT = 2000
LABELS = torch.arange(COUNT) % 5


def run_rank(rank: int, folder: Path) -> None:
    """What each rank does; its numbers go to a file."""
    torch.manual_seed(0)
    early = LabelNoise(0.4, 5)  # built before the group exists, as in many scripts
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    targets, given = TargetNoise(1.0), LabelNoise(0.4, 5, torch.Generator().manual_seed(3))
    found = {"first": early(LABELS), "second": early(LABELS), "targets": targets(torch.zeros(COUNT))}
    if rank == 0:
        torch.save({"early": early.state_dict(), "given": given.state_dict()}, folder / "checkpoint.pt")
    dist.barrier()
    found["third"] = early(LABELS)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.manual_seed(100 + rank)
    resumed = LabelNoise(0.4, 5)
    resumed.load_state_dict(state["early"])
    found["resumed"] = resumed(LABELS)
    try:
        given.load_state_dict(state["given"])
        words = ""
    except ValueError as error:
        words = str(error)
    found["words"] = text(words)
    found["gradient"] = gradient_of_two_micro_batches(resumed)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def gradient_of_two_micro_batches(noise: LabelNoise) -> torch.Tensor:
    """Of a model whose logits are its weights: after the exchange it holds how often each class was drawn, by all ranks."""
    layer = nn.Linear(1, 5, bias=False).double()
    nn.init.zeros_(layer.weight)
    model = nn.parallel.DistributedDataParallel(layer)
    inputs, labels = torch.ones(COUNT, 1, dtype=torch.float64), torch.zeros(COUNT, dtype=torch.long)
    drawn = []
    with model.no_sync():
        drawn.append(noise.on_batch(0, (inputs, labels))[1])
        (nn.functional.cross_entropy(model(inputs), drawn[-1]) / 2).backward()
    drawn.append(noise.on_batch(0, (inputs, labels))[1])
    (nn.functional.cross_entropy(model(inputs), drawn[-1]) / 2).backward()
    return torch.stack([layer.weight.grad[:, 0], torch.bincount(torch.cat(drawn), minlength=5).double()])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    return on_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "second", "targets"])
def test_ranks_draw_independent_noise(ranks: list[dict[str, torch.Tensor]], name: str):
    clean = torch.zeros(COUNT) if name == "targets" else LABELS
    moved = [(rank[name] > clean if name == "targets" else rank[name] != clean).double() for rank in ranks]
    rate = 0.5 if name == "targets" else 0.4
    assert all(abs(each.mean() - rate) < 4 * (rate * (1 - rate) / COUNT) ** 0.5 for each in moved)
    product = ((moved[0] - rate) * (moved[1] - rate)).mean() / (rate * (1 - rate))
    assert abs(product) < 4 / COUNT**0.5


@pytest.mark.slow
def test_both_go_on_exactly_from_rank_0s_checkpoint(ranks: list[dict[str, torch.Tensor]]):
    assert all(torch.equal(rank["resumed"], rank["third"]) for rank in ranks)
    assert not torch.equal(ranks[0]["resumed"], ranks[1]["resumed"])


@pytest.mark.slow
def test_the_state_of_another_ranks_generator_is_refused(ranks: list[dict[str, torch.Tensor]]):
    words = [read(rank["words"]) for rank in ranks]
    assert words[0] == "" and "the saved state is that of rank 0's generator and this is rank 1" in words[1]


@pytest.mark.slow
def test_micro_batches_of_all_ranks_have_noise_of_their_own(ranks: list[dict[str, torch.Tensor]]):
    counts = sum(rank["gradient"][1] for rank in ranks)
    # the mean gradient of the logits is the softmax (1/5) less the share of each class among all labels drawn
    for rank in ranks:
        torch.testing.assert_close(rank["gradient"][0], 0.2 - counts / counts.sum(), rtol=0, atol=1e-12)
    assert not torch.equal(ranks[0]["gradient"][1], ranks[1]["gradient"][1])


def test_one_process_counts_as_rank_0():
    torch.manual_seed(0)
    alone = LabelNoise(0.4, 5)
    assert alone.state_dict()["calls"] == 0 and LabelNoise(0.4, 5, torch.Generator()).state_dict()["rank"] == 0
