"""The L2 paper's WRN experiment as `bench/gpu.py` runs it: arms that pause at a deadline and go on from a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from decaycast.core import checkpoint
from decaycast.core.measure import evaluate
from decaycast.core.schedule import cosine
from decaycast.core.train import train
from decaycast.methods.l2.autol2 import AutoL2Hook
from gpu_speed import Result, Sizes, lower_precision, sgd, shuffled, wrn_parts


def experiment(decay: float | None, sizes: Sizes, work: Path, data: Any, deadline: float) -> Result | None:
    """One arm: SGD with momentum, cosine, one constant weight decay (None: AutoL2 on e-folds); pauses at the deadline.

    Test accuracy is that of the last step. Images are flipped and shifted by up to 4 pixels.
    """
    (inputs, target), validation, test = (tuple(part.to(sizes.device) for part in parts) for parts in data)
    steps = sizes.epochs * max(1, len(inputs) // sizes.batch)
    shape, lr = cosine(steps), 0.1
    model, called, _ = wrn_parts(sizes)
    optimizer = sgd(model, lr=lr, weight_decay=decay or 1.0)
    rates = [lr * shape(step) for step in range(steps)]
    hooks = [AutoL2Hook(clock="efolds", budget_efolds=1.3, steps=steps, lr=rates)] if decay is None else []
    file, made, spent, rows = work / f"wrn-{'autol2' if decay is None else decay}.pt", 0, 0.0, []
    if file.exists():
        made, spent, rows = resume(checkpoint.read(file), model, optimizer, hooks)

    def scores(part: Any) -> tuple[float, float]:
        with lower_precision(sizes):
            return evaluate(model, zip(part[0].split(500), part[1].split(500), strict=True), functional.cross_entropy)

    batches = augmented(shuffled(inputs, target, sizes.batch, seed=0, skip=made), made)
    while made < steps and time.monotonic() < deadline:
        stop = made + steps // sizes.epochs
        rows += train(
            called,
            batches,
            functional.cross_entropy,
            optimizer,
            start=made,
            stop=stop,
            lr_schedule=shape,
            hooks=hooks,
            evaluate=lambda net: scores(validation),
            measure_at=(stop,),
            efolds_spent=spent,
            autocast=lambda: lower_precision(sizes),
        )
        made, spent = stop, rows[-1]["efolds"]
    if made < steps:
        state = {
            "made": made,
            "spent": spent,
            "rows": rows,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        checkpoint.write(file, {**state, "hooks": [hook.state_dict() for hook in hooks]})
        return None
    loss, accuracy = scores(test)
    who = "AutoL2, 1.3 e-folds" if decay is None else f"weight decay {decay:g}"
    what = f"WRN-{sizes.wrn[0]}-{sizes.wrn[1]}, {sizes.epochs} epochs, {who}: test accuracy"
    return {"what": what, "value": accuracy, "test_loss": loss, "efolds": spent, "rows": rows}


def resume(state: dict[str, Any], model: nn.Module, optimizer: Any, hooks: list[Any]) -> tuple[int, float, list[Any]]:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for hook, part in zip(hooks, state["hooks"], strict=True):
        hook.load_state_dict(part)
    return state["made"], state["spent"], state["rows"]


def augmented(batches: Iterator[Any], made: int) -> Iterator[Any]:
    """Each batch flipped or not, image by image, and shifted as a whole; a function of the step's number alone."""
    for step, (x, target) in enumerate(batches, start=made):
        chance = np.random.default_rng(step)
        flip = torch.from_numpy(chance.random(len(x)) < 0.5).to(x.device)
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
        down, right = chance.integers(0, 9, 2).tolist()
        x = functional.pad(x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
        yield x.contiguous(memory_format=torch.channels_last), target
