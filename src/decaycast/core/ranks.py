"""Several ranks that train one model: who they are, means that all of them hold alike, and a check that they agree.

A *rank* is a process of torch.distributed (torchrun starts one per device); a *group* is the ranks that train a model together.
In all functions here a group of None stands for this process alone: nothing is exchanged then. With a group every rank of it
has to make the same call, which waits for the others.

A rule compares numbers with >=, so that all ranks have to hold the same number to the last bit. Values are therefore
gathered, and every rank adds them up in the order of the ranks.

What is the same on all ranks in a training: weights, optimiser, schedules, what rules decide, measured rows. What differs: the
batch, and label noise on it. DistributedDataParallel averages gradients of the ranks' own mean losses, each rank counting
alike; so do the means here, and with unequal batches both are the mean over ranks, not over samples. Sums (`total`) of
validation losses count samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, SupportsFloat

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

Group = Any
"""A torch.distributed process group of two ranks or more, or None."""
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world() -> Group:
    """The default process group, or None without one or with a single rank.

    Raises:
        RuntimeError: torchrun started several ranks, but there is no process group: each would decide by itself.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD if dist.get_world_size() > 1 else None
    if "RANK" in os.environ and (started := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise RuntimeError(
            f"WORLD_SIZE is {started} but there is no process group, so that each rank would decide by itself; call "
            "torch.distributed.init_process_group first"
        )
    return None


def group_of(model: torch.nn.Module) -> Group:
    """The group that averages the gradients of `model`: that of its DistributedDataParallel, else None."""
    inner = getattr(model, "_orig_mod", model)  # under torch.compile
    if isinstance(inner, DistributedDataParallel) and dist.get_world_size(inner.process_group) > 1:
        return inner.process_group
    return None


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The network inside DistributedDataParallel, or `model` itself: its forward pass does not wait for other ranks."""
    inner = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, DistributedDataParallel) else model


def rank_in(group: Group) -> int:
    """This process's number in `group`, from 0; 0 alone."""
    return 0 if group is None else dist.get_rank(group)


def size_of(group: Group) -> int:
    """How many ranks `group` has; 1 alone."""
    return 1 if group is None else dist.get_world_size(group)


def gather(values: Sequence[float], group: Group) -> list[list[float]]:
    """The numbers of every rank, as float64, in the order of the ranks; all bring equally many."""
    if group is None:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64, device=_device(group))
    everyone = [torch.empty_like(mine) for _ in range(size_of(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).tolist()


def total(values: Sequence[float], group: Group) -> list[float]:
    """Sums over the ranks, the same to the last bit on each."""
    return [sum(column) for column in zip(*gather(values, group), strict=True)]


def mean(values: Sequence[SupportsFloat | None], group: Group, *, same: Mapping[str, Any] | None = None) -> list[float]:
    """Means over the ranks, each rank counting alike; the same to the last bit on each.

    Args:
        values: numbers or tensors of one element. NaN anywhere makes the mean NaN on every rank, and so does what is no number.
        group: the ranks, or None.
        same: what the ranks have to agree on, as in `agree`; checked in the same exchange.

    Raises:
        ValueError: the ranks disagree on `same` (on every rank); a value that is no number (on the rank that brought it).

    >>> mean([2, torch.tensor(0.5)], None)
    [2.0, 0.5]
    """
    numbers = [_number(value) for value in values]
    rows = gather([*numbers, 0.0 if group is None else _digest(same)], group)
    if len({row[-1] for row in rows}) > 1:
        agree(same or {}, group)
    for value, number in zip(values, numbers, strict=True):
        if math.isnan(number) and not _is_number(value):
            raise ValueError(f"a mean over ranks needs numbers, but rank {rank_in(group)} brought {value!r:.60}")
    columns = list(zip(*rows, strict=True))[:-1]
    return [column[0] if len(set(column)) == 1 else sum(column) / len(column) for column in columns]


def agree(facts: Mapping[str, Any], group: Group, *, error: Exception | None = None) -> None:
    """Raise on every rank unless all have the same `facts` and none has an `error`.

    Args:
        facts: plain values by name, as JSON can hold them.
        group: the ranks, or None.
        error: what went wrong on this rank, if anything did: it is raised here, and the other ranks hear of it.

    Raises:
        ValueError: facts that differ, named with each rank's value.
        RuntimeError: another rank brought an error.
    """
    told: list[dict[str, Any]] = []
    if group is not None:
        message = json.dumps({"facts": dict(facts), "error": None if error is None else _describe(error)})
        told = [json.loads(text) for text in _texts(message, group)]
    if error is not None:
        raise error
    for rank, other in enumerate(told):
        if other["error"] is not None:
            raise RuntimeError(f"rank {rank} cannot go on: {other['error']}")
    _refuse_differences([other["facts"] for other in told])


def settings_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What ranks have to agree on in an optimiser: its kind and each group's size, learning rate and weight decay."""
    groups = optimizer.param_groups
    facts: dict[str, Any] = {
        "optimizer": type(optimizer).__name__,
        "parameters": [len(each["params"]) for each in groups],
    }
    for name, key in (("lr", "lr"), ("weight decay", "weight_decay")):
        facts[name] = [float(each.get(key, 0.0)) for each in groups]
    return facts


def from_first(data: bytes, group: Group) -> bytes:
    """The first rank's bytes, on every rank."""
    if group is None:
        return data
    length = int(gather([len(data)], group)[0][0])
    buffer = torch.empty(length, dtype=torch.uint8)
    if rank_in(group) == 0:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else buffer
    buffer = buffer.to(_device(group))
    dist.broadcast(buffer, src=dist.get_global_rank(group, 0), group=group)
    return buffer.cpu().numpy().tobytes()


@contextlib.contextmanager
def joined(device: str = "cpu", *, timeout_seconds: float = 600.0) -> Iterator[Group]:
    """The group of the ranks that torchrun started, for the time of the block; None where it started none, or just one.

    A process group that is there already is used, and left alone at the end.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl).
        timeout_seconds: how long a rank waits for the others, at the start and in each exchange, before it gives up.

    Raises:
        ValueError: the environment says WORLD_SIZE but not all of RANK, MASTER_ADDR and MASTER_PORT, or no whole numbers.
    """
    if dist.is_available() and dist.is_initialized():
        yield world()
        return
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        yield None
        return
    _check_environment()
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def _check_environment() -> None:
    found = {name: os.environ.get(name, "") for name in _NEEDED}
    missing = [name for name, value in found.items() if not value]
    advice = "start the ranks with torchrun --nproc-per-node N -m decaycast ..."
    if missing:
        raise ValueError(f"WORLD_SIZE is {found['WORLD_SIZE']} but {', '.join(missing)} is not set; {advice}")
    rank, count = found["RANK"], found["WORLD_SIZE"]
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ValueError(f"RANK must be a whole number below WORLD_SIZE, got {rank!r} and {count!r}; {advice}")


def _refuse_differences(everyone: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for facts in everyone for name in facts))
    words = [[json.dumps(facts.get(name)) for facts in everyone] for name in names]
    differing = [(name, said) for name, said in zip(names, words, strict=True) if len(set(said)) > 1]
    if differing:
        listed = "; ".join(
            f"{name} ({', '.join(f'rank {rank}: {word}' for rank, word in enumerate(said))})"
            for name, said in differing
        )
        raise ValueError(f"the ranks disagree on {listed}. Give every rank the same, or their models drift apart")


def _texts(text: str, group: Group) -> list[str]:
    """What every rank says, in the order of the ranks."""
    mine = text.encode()
    lengths = [int(row[0]) for row in gather([len(mine)], group)]
    padded = torch.frombuffer(bytearray(mine.ljust(max(lengths))), dtype=torch.uint8).to(_device(group))
    everyone = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everyone, padded, group=group)
    return [each.cpu().numpy().tobytes()[:length].decode() for each, length in zip(everyone, lengths, strict=True)]


def _device(group: Group) -> torch.device:
    """Where the group's backend takes tensors from: the CPU if it can ("cpu:gloo,cuda:nccl"), else its first device."""
    kinds = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def _digest(facts: Mapping[str, Any] | None) -> float:
    """48 bits that tell facts apart, as a number that float64 holds exactly."""
    text = json.dumps(dict(facts or {}), sort_keys=True)
    return float(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
