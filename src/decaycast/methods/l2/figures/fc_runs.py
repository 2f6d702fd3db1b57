"""The runs behind fig. 2a-c: a fully connected network on 512 images, one ladder of decays at two learning rates.

Small size, chosen on one seed before the others were run: 128 would do as well as a width of 64, at twice the price. Rates
above 0.02 e-folds per step leave no time to learn, below 2e-5 runs get long: three decades lie between them.
"""

from __future__ import annotations

from typing import Any

from decaycast.core.experiment import Row, Run, Size
from decaycast.methods.l2.figures.fc import train_fc
from decaycast.methods.l2.figures.shared import Ladder, rates

LADDERS: dict[Size, Ladder] = {
    "smoke": Ladder(
        config={
            "data": "digits",
            "train_size": 256,
            "validation_size": 400,
            "test_size": 200,
            "model": "mlp-32x3",
            "init_gain": 2.0,
            "batch_size": 64,
            "points": 40,
        },
        lrs=(0.1, 0.05),
        rates=rates(0.02, 0.00632456, 3),
        efolds=2.0,
        seeds=1,
    ),
    "small": Ladder(
        config={
            "data": "mnist",
            "train_size": 512,
            "validation_size": 4000,
            "test_size": 4000,
            "pool": 2,
            "model": "mlp-64x3",
            "init_gain": 2.0,
            "batch_size": 64,
            "points": 100,
        },
        lrs=(0.1, 0.05),
        rates=rates(0.02, 2e-5, 7),
        efolds=2.0,
        seeds=5,
    ),
    # t*lr*lambda = 2 in the paper's unit, whose penalty has no 1/2, is 4 e-folds; its learning rates are 10 times torch's
    "paper": Ladder(
        config={
            "data": "mnist",
            "train_size": 512,
            "validation_size": 5000,
            "test_size": 10_000,
            "model": "mlp-2048x3",
            "init_gain": 1.0,
            "batch_size": 512,
            "points": 150,
        },
        lrs=(0.05, 0.015, 0.005),
        rates=rates(0.01, 1e-5, 10),
        efolds=4.0,
        seeds=5,
    ),
}


def train_fc_figure(self: Any, run: Run, data: Any) -> Row:
    """What the figures on these runs have as their `train`: one function, so that they can share rows."""
    return train_fc(run, data)
