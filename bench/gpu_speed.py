"""Speeds that `bench/gpu.py` measures: many networks at once, StochNorm beside batch norm, WRN-28-10's training step."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from decaycast.core.replica_batches import ShuffledBatches
from decaycast.core.replica_training import ReplicaTraining
from decaycast.core.train import train
from decaycast.methods.l2.autol2 import AutoL2Hook
from decaycast.methods.stochnorm.method import StochNorm, StochNorm2d
from gpu_networks import convolutional, fully_connected, wide_resnet

OUT_OF_MEMORY = "out of memory"
DECAYS = (1e-4, 3e-4, 1e-3, 3e-3)
"""Weight decays of the experiment, in torch's unit; AutoL2 on e-folds is the arm beside them."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is; the smoke sizes only show that it runs."""

    device: str = "cuda"
    rounds: int = 9
    replicas: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    fc: int = 2048
    cnn: int = 300
    batch: int = 128
    samples: int = 8192
    norm_shapes: tuple[tuple[int, int], ...] = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
    norm_batch: int = 64
    wrn: tuple[int, int] = (28, 10)
    steps: int = 20
    compiled: bool = True
    product: int = 8192
    epochs: int = 12
    decays: tuple[float, ...] = DECAYS


SMOKE = Sizes(
    device="cpu",
    rounds=2,
    replicas=(1, 3),
    fc=8,
    cnn=2,
    batch=4,
    samples=16,
    norm_shapes=((4, 4),),
    norm_batch=2,
    wrn=(10, 1),
    steps=1,
    compiled=False,
    product=32,
    epochs=2,
    decays=(1e-3,),
)
Work = Callable[[], object]
Result = dict[str, Any]


class Clock:
    """Wall clock of work on a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def seconds(self, work: Work) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def by_turns(self, sides: dict[str, Work], rounds: int) -> dict[str, list[float]]:
        """Seconds of each side in each round; a first round is not counted, and after a minute three are enough."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        began = time.monotonic()
        for made in range(rounds + 1):
            for name, work in sides.items():
                times[name].append(self.seconds(work))
            if made >= 3 and time.monotonic() - began > 60:
                break
        return {name: found[1:] for name, found in times.items()}

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def spread(above: list[float], below: list[float], factor: float = 1.0) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios."""
    ratios = [factor * a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"value": middle, "low": low, "high": high}


# many networks at once


def sgd(model: nn.Module, **settings: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, **settings})  # type: ignore[arg-type]


def replicas(kind: str, count: int, sizes: Sizes, deadline: float) -> Result:
    """Steps per second of `count` networks in one program, over those of one network trained by the loop."""
    shape = (1, 28, 28) if kind == "FC" else (3, 32, 32)
    build = partial(fully_connected, sizes.fc) if kind == "FC" else partial(convolutional, sizes.cnn)
    torch.manual_seed(0)
    inputs = torch.randn(sizes.samples, *shape, device=sizes.device)
    target = torch.randint(10, (sizes.samples,), device=sizes.device)
    try:
        models = [build().to(sizes.device) for _ in range(count)]
        together = ReplicaTraining(
            models,
            ShuffledBatches(inputs, target, sizes.batch, list(range(count))),
            functional.cross_entropy,
            [sgd(model) for model in models],
            stop=[10**9] * count,
        )
        sides = {
            "together": lambda: together.advance(together.step + sizes.steps),
            "one": one(build, inputs, target, sizes),
        }
        times = Clock(sizes.device).by_turns(sides, sizes.rounds)
    except torch.OutOfMemoryError:
        return {"what": f"{count} replicas of the {kind}", "failure": OUT_OF_MEMORY}
    aim = ">= 20" if (kind, count) == ("FC", 64) else ""
    what = f"{count} separate {kind} (width {sizes.fc if kind == 'FC' else sizes.cnn}) / the same in one program, time"
    return {"what": what, **spread(times["one"], times["together"], count), "aim": aim, "times": times}


def one(build: Callable[[], nn.Module], inputs: torch.Tensor, target: torch.Tensor, sizes: Sizes) -> Work:
    """The loop on one network, going on at each call; batches as the replicas have them."""
    model = build().to(sizes.device)
    optimizer, batches, made = sgd(model), shuffled(inputs, target, sizes.batch, seed=0), itertools.count()

    def work() -> None:
        start = next(made) * sizes.steps
        train(model, batches, functional.cross_entropy, optimizer, start=start, stop=start + sizes.steps)

    return work


def shuffled(inputs: torch.Tensor, target: torch.Tensor, size: int, seed: int, skip: int = 0) -> Iterator[Any]:
    """Endless mini-batches, each epoch in a fresh order drawn from `seed`, without the first `skip`."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = max(1, len(inputs) // size)
    epochs, skip = divmod(skip, per_epoch)
    for _ in range(epochs):
        torch.randperm(len(inputs), generator=generator)
    while True:
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        for place in range(skip, per_epoch):
            index = order[place * size : (place + 1) * size]
            yield inputs[index], target[index]
        skip = 0


# stochastic normalisation


def norms(dtype: torch.dtype, sizes: Sizes, deadline: float) -> Result:
    """Forward and backward of StochNorm2d over BatchNorm2d, summed over ResNet-50's stage shapes, channels last."""

    def layers(kind: type[nn.Module]) -> Work:
        torch.manual_seed(0)
        built = []
        for channels, side in sizes.norm_shapes:
            x = torch.randn(sizes.norm_batch, channels, side, side, device=sizes.device, dtype=dtype)
            x = x.to(memory_format=torch.channels_last)
            built.append((kind(channels).to(sizes.device), x.requires_grad_(), torch.randn_like(x)))

        def work() -> None:
            for norm, x, grad in built:
                x.grad = None
                norm(x).backward(grad)

        return work

    times = Clock(sizes.device).by_turns(
        {"ours": layers(StochNorm2d), "batch norm": layers(nn.BatchNorm2d)}, 3 * sizes.rounds
    )
    name = str(dtype).removeprefix("torch.")
    what = f"StochNorm2d / BatchNorm2d, {name} channels-last"
    return {"what": what, **spread(times["ours"], times["batch norm"]), "aim": "<= 1", "times": times}


# WRN-28-10's step


def wrn_parts(sizes: Sizes, convert: bool = False) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """The network, what is called (compiled), and its optimiser."""
    torch.manual_seed(0)
    model = wide_resnet(*sizes.wrn).to(sizes.device).to(memory_format=torch.channels_last)
    if convert:
        StochNorm.convert(model, report=None)
    called = torch.compile(model) if sizes.compiled else model
    return model, called, sgd(model)  # type: ignore[return-value]


def lower_precision(sizes: Sizes) -> Any:
    return torch.autocast(sizes.device, dtype=torch.bfloat16)


def wrn_step(sizes: Sizes, deadline: float) -> Result:
    """Our loop with AutoL2 over a plain torch loop, and the plain step over the matrix products it is made of."""
    x = torch.randn(sizes.batch, 3, 32, 32, device=sizes.device).to(memory_format=torch.channels_last)
    target = torch.randint(10, (sizes.batch,), device=sizes.device)
    sides: dict[str, Work] = {}
    for name, hooks in {"core.train": (), "core.train + AutoL2": (AutoL2Hook(start=5e-4),)}.items():
        sides[name] = partial(ours, *wrn_parts(sizes)[1:], itertools.count(), (x, target), hooks, sizes)
    sides["plain loop"] = partial(plain, *wrn_parts(sizes)[1:], (x, target), sizes)
    sides["StochNorm"] = partial(plain, *wrn_parts(sizes, convert=True)[1:], (x, target), sizes)
    times = Clock(sizes.device).by_turns(sides, sizes.rounds)
    step = [each / sizes.steps for each in times["plain loop"]]
    operations, rate = operations_of(sizes), products_per_second(sizes)
    name = f"WRN-{sizes.wrn[0]}-{sizes.wrn[1]}, bf16, channels-last{', compiled' if sizes.compiled else ''}"
    found = {
        f"core.train / plain loop, {name}": {**spread(times["core.train"], times["plain loop"]), "aim": "<= 1.05"},
        f"core.train + AutoL2 / plain loop, {name}": {
            **spread(times["core.train + AutoL2"], times["plain loop"]),
            "aim": "<= 1.05",
        },
        f"step with StochNorm / with batch norm, {name}": spread(times["StochNorm"], times["plain loop"]),
        f"plain step / its matrix products alone, {name}": spread(step, [operations / rate] * len(step)),
    }
    headlines = [{"what": what, **numbers} for what, numbers in found.items()]
    return {"headlines": headlines, "operations": operations, "operations_per_second": rate, "times": times}


def ours(called: nn.Module, optimizer: Any, made: Iterator[int], batch: Any, hooks: Any, sizes: Sizes) -> None:
    start = next(made) * sizes.steps
    train(
        called,
        itertools.repeat(batch),
        functional.cross_entropy,
        optimizer,
        start=start,
        stop=start + sizes.steps,
        hooks=hooks,
        autocast=lambda: lower_precision(sizes),
    )


def plain(called: nn.Module, optimizer: Any, batch: Any, sizes: Sizes) -> None:
    """The loop everybody writes; it looks at the loss as often as ours."""
    called.train()
    for step in range(sizes.steps):
        with lower_precision(sizes):
            loss = functional.cross_entropy(called(batch[0]), batch[1])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            loss.item()


def operations_of(sizes: Sizes) -> float:
    """Floating-point operations of a step's products: convolutions and the last layer, there and back."""
    model = wide_resnet(*sizes.wrn)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() * sizes.batch / 2


def products_per_second(sizes: Sizes) -> float:
    """Operations per second of one large product in bfloat16: the best of the rounds."""
    n = sizes.product
    a, b = (torch.randn(n, n, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    clock = Clock(sizes.device)
    best = min(clock.seconds(lambda: [a @ b for _ in range(10)]) for _ in range(sizes.rounds + 1))
    return 10 * 2 * n**3 / best
