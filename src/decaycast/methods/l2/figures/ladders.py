"""The ladders of the convolutional networks: few and coarse CIFAR-10 images at the small size.

Units: the paper's code has no 1/2 in the penalty and averages cross-entropy over the 10 classes too, so its learning rate is
10 times torch's and its lr*lambda half the e-folds per step. Its WRN of fig. 2 runs for 0.1/(lr*lambda) epochs of 48 steps,
9.6 e-folds; that of fig. 1a, with momentum and a schedule, for 0.1/lambda epochs at lr 0.2, 19 e-folds at the first rate.
"""

from __future__ import annotations

from collections.abc import Mapping

from decaycast.core.experiment import Scalar, Size
from decaycast.methods.l2.figures.shared import Ladder, mean_multiplier, rates

SMOKE: dict[str, Scalar] = {
    "data": "digits",
    "train_size": 128,
    "validation_size": 200,
    "test_size": 100,
    "batch_size": 32,
    "points": 10,
}
SMALL: dict[str, Scalar] = {
    "data": "cifar10",
    "train_size": 1000,
    "validation_size": 1000,
    "test_size": 1000,
    "pool": 2,
    "batch_size": 32,
    "points": 60,
}
PAPER_SIZE: dict[str, Scalar] = {"data": "cifar10", "validation_size": 5000, "points": 150}
PAPER_EFOLDS, PAPER_EFOLDS_SCHEDULE = 9.6, 19.2 * mean_multiplier("step_decay")


def _ladders(name: str, small: Ladder, paper: Ladder) -> Mapping[Size, Ladder]:
    keep = {key: small.config[key] for key in ("momentum", "schedule") if key in small.config}
    smoke = Ladder(
        config={**SMOKE, **keep, "model": name}, lrs=small.lrs, rates=rates(0.05, 0.0125, 3), efolds=1.0, seeds=2
    )
    return {"smoke": smoke, "small": small, "paper": paper}


# The digits have 8x8 pixels, too few for the CNN: at the smoke size the WRN stands in for it.
CNN = _ladders(
    "wrn-10-1",
    Ladder(config={**SMALL, "model": "cnn-8"}, lrs=(0.05,), rates=rates(0.004, 4e-4, 5), efolds=2.0, seeds=5),
    Ladder(
        config={**PAPER_SIZE, "model": "cnn-300", "batch_size": 128},
        lrs=(0.001,),
        rates=rates(1e-3, 1e-5, 7),
        efolds=PAPER_EFOLDS,
        seeds=5,
    ),
)
CNN_BN = _ladders(
    "wrn-10-1",
    Ladder(config={**SMALL, "model": "cnn-bn-8"}, lrs=(0.1,), rates=rates(0.008, 5e-4, 5), efolds=2.0, seeds=5),
    Ladder(
        config={**PAPER_SIZE, "model": "cnn-bn-300", "batch_size": 128},
        lrs=(0.001,),
        rates=rates(1e-3, 1e-5, 7),
        efolds=PAPER_EFOLDS,
        seeds=5,
    ),
)
WRN = _ladders(
    "wrn-10-1",
    Ladder(
        config={**SMALL, "pool": 4, "model": "wrn-10-1"},
        lrs=(0.1,),
        rates=rates(0.008, 5e-4, 5),
        efolds=1.5,
        seeds=5,
    ),
    Ladder(
        config={**PAPER_SIZE, "model": "wrn-28-10", "batch_size": 1024},
        lrs=(0.02, 0.005),
        rates=rates(0.016, 3.125e-5, 10),
        efolds=PAPER_EFOLDS,
        seeds=5,
    ),
)
WRN_SCHEDULE = _ladders(
    "wrn-10-1",
    Ladder(
        config={**SMALL, "pool": 4, "model": "wrn-10-1", "momentum": 0.9, "schedule": "step_decay"},
        lrs=(0.02,),
        rates=rates(0.016, 1e-3, 5),
        efolds=1.0,
        seeds=5,
    ),
    Ladder(
        config={**PAPER_SIZE, "model": "wrn-28-10", "batch_size": 1024, "momentum": 0.9, "schedule": "step_decay"},
        lrs=(0.02,),
        rates=rates(0.02, 2e-4, 7),
        efolds=PAPER_EFOLDS_SCHEDULE,
        seeds=5,
    ),
)
