"""Two gloo ranks with half a batch each against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.ranks import RANKS, on_ranks, read, text
from torch import nn

from decaycast.methods.stochnorm.method import StochNorm
from decaycast.methods.stochnorm.variants import SyncStochNorm

CHANNELS = 6
MASK = torch.tensor([True, False, True, True, False, False])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    model.double()
    for layer in (model[1], model[4]):
        nn.init.uniform_(layer.weight, 0.5, 2), nn.init.normal_(layer.bias)
        nn.init.normal_(layer.running_mean), nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, 8, generator=generator).double(), torch.randn(8, 6, 4, 4, generator=generator).double()


def loss_of(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (model(x) - target).square().mean()


def one_step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    loss = loss_of(model, x, target)
    loss.backward()
    plain = getattr(model, "module", model)
    grads = {name: each.grad for name, each in plain.named_parameters()}
    return {"loss": loss.detach(), "x": x.grad, **grads, **dict(plain.named_buffers())}  # type: ignore[dict-item]


def run_rank(rank: int, folder: Path) -> None:
    """What each rank does; its numbers go to a file."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    StochNorm.convert(model, p=0.5, generator=torch.Generator().manual_seed(10 + rank), report=None)
    model = nn.parallel.DistributedDataParallel(model)
    # even and odd samples; rank 1 brings masks of its own, which must not count
    found = one_step(model, *(part[rank::RANKS] for part in batch()))
    uneven = SyncStochNorm(CHANNELS, generator=torch.Generator().manual_seed(rank)).double()
    piece = batch()[1][:3] if rank == 0 else batch()[1][3:]
    found["uneven"] = uneven(piece, MASK if rank == 0 else ~MASK).detach()
    found["uneven_mean"] = uneven.running_mean.clone()
    alone = SyncStochNorm(2, p=0.5)(torch.tensor([[float(rank), 1.0]]), torch.tensor([True, True]))
    found["one_value_a_rank"] = alone.detach()
    try:
        SyncStochNorm(2)(torch.ones(1 - rank, 2))
    except ValueError as error:
        found["too_few"] = text(str(error))
    part = (piece[:0] if rank else piece).clone().requires_grad_()
    uneven.zero_grad()
    output = uneven(part, MASK)
    output.square().sum().backward()
    found |= {"empty": output.detach(), "empty_x": part.grad, "empty_weight": uneven.weight.grad}
    try:
        torch.autograd.grad(uneven(piece.clone().requires_grad_(), MASK).sum(), uneven.weight, create_graph=True)
        words = ""
    except RuntimeError as error:
        words = str(error)
    found["refusal"] = text(words)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    return on_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_the_whole_batch(ranks: list[dict[str, torch.Tensor]]):
    model = StochNorm.convert(network(), p=0.5, generator=torch.Generator().manual_seed(10), report=None)
    expected = one_step(model, *batch())
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, expected["loss"], rtol=1e-12, atol=0)
    for name, value in expected.items():
        if name not in ("loss", "x"):
            for found in ranks:  # DistributedDataParallel averages the gradients of the ranks' mean losses
                torch.testing.assert_close(found[name].to(value), value, rtol=1e-11, atol=1e-13, msg=name)
    x = torch.empty_like(expected["x"])
    for rank, found in enumerate(ranks):
        x[rank::RANKS] = found["x"] / RANKS  # of the mean over the rank's half
    torch.testing.assert_close(x, expected["x"], rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_batches_of_unequal_size_and_the_first_ranks_mask(ranks: list[dict[str, torch.Tensor]]):
    layer = StochNorm.convert(nn.BatchNorm2d(CHANNELS), report=None).double()
    expected = layer(batch()[1], MASK)
    torch.testing.assert_close(
        torch.cat([found["uneven"] for found in ranks]), expected.detach(), rtol=1e-11, atol=1e-12
    )
    for found in ranks:
        torch.testing.assert_close(found["uneven_mean"], layer.running_mean, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_one_value_a_rank_and_an_empty_rank(ranks: list[dict[str, torch.Tensor]]):
    both = torch.cat([found["one_value_a_rank"] for found in ranks])
    torch.testing.assert_close(both, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), rtol=1e-4, atol=1e-6)
    assert ranks[1]["empty"].numel() == ranks[1]["empty_x"].numel() == 0 and not ranks[1]["empty_weight"].any()
    layer, x = StochNorm.convert(nn.BatchNorm2d(CHANNELS), report=None).double(), batch()[1][:3].requires_grad_()
    layer(batch()[1], MASK)  # the step before
    layer.zero_grad()
    output = layer(x, MASK)
    output.square().sum().backward()
    torch.testing.assert_close(ranks[0]["empty"], output.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ranks[0]["empty_x"], x.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_one_value_in_all(ranks: list[dict[str, torch.Tensor]]):
    for found in ranks:
        words = read(found["too_few"])
        assert "training needs more than one value per channel, and 2 ranks have 1 together" in words


@pytest.mark.slow
def test_double_backward_is_refused(ranks: list[dict[str, torch.Tensor]]):
    words = read(ranks[0]["refusal"])
    assert "the synchronised StochNorm has no double backward" in words


def test_alone_it_is_the_ordinary_layer():
    x = batch()[1]
    ordinary = StochNorm.convert(nn.BatchNorm2d(CHANNELS), report=None).double()
    alone = SyncStochNorm(CHANNELS).double()
    assert torch.equal(alone(x, MASK), ordinary(x, MASK)) and torch.equal(alone.running_var, ordinary.running_var)
    assert torch.equal(alone.eval()(x), ordinary.eval()(x))


def test_too_few_dimensions():
    with pytest.raises(ValueError, match="expected an input of at least 2 dimensions, got 1"):
        SyncStochNorm(CHANNELS)(torch.zeros(6))
