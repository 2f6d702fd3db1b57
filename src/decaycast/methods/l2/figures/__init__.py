"""Evidence for the L2 room: the paper's figures and its failures, each with a claim and a judge."""

from __future__ import annotations

from decaycast.methods.l2.figures.budget import FixedBudget
from decaycast.methods.l2.figures.constants import CONSTANT, COSINE
from decaycast.methods.l2.figures.controller import AgainstConstant
from decaycast.methods.l2.figures.fc_runs import LADDERS as FC
from decaycast.methods.l2.figures.ladders import CNN, CNN_BN, WRN, WRN_SCHEDULE
from decaycast.methods.l2.figures.narrow import Narrow
from decaycast.methods.l2.figures.plateau import FcPlateau, FcZeroDecay, Plateau, ZeroDecay
from decaycast.methods.l2.figures.prediction import Prediction
from decaycast.methods.l2.figures.time_to_best import TimeToBest
from decaycast.methods.l2.figures.wide import WideNetwork

FIGURES = (
    TimeToBest(),
    FcPlateau(name="l2/plateau-fc", title="Plateau: fully connected, MNIST", ladders=FC, figure="fig. 2b"),
    FcZeroDecay(name="l2/zero-decay-fc", title="No weight decay against little: MNIST", ladders=FC, figure="fig. 2b"),
    FixedBudget(),
    Plateau(name="l2/plateau-cnn-bn", title="Plateau: CNN with batch norm", ladders=CNN_BN, figure="fig. 3"),
    Plateau(name="l2/plateau-cnn", title="Plateau: CNN without batch norm", ladders=CNN, figure="fig. 3"),
    Plateau(name="l2/plateau-wrn", title="Plateau: wide residual network", ladders=WRN, figure="fig. 2e"),
    ZeroDecay(name="l2/zero-decay-wrn", title="No weight decay against little: WRN", ladders=WRN, figure="fig. 2e"),
    Plateau(
        name="l2/plateau-wrn-schedule",
        title="Plateau: wide residual network, momentum and stepped learning rate",
        ladders=WRN_SCHEDULE,
        figure="fig. 1a",
    ),
    Narrow(),
    Prediction(),
    AgainstConstant(
        name="l2/autol2",
        title="AutoL2 against the tuned constant",
        claim="At a constant learning rate AutoL2 reaches a higher best accuracy than the tuned constant weight decay.",
        better=True,
        grids=CONSTANT,
    ),
    AgainstConstant(
        name="l2/autol2-cosine",
        title="AutoL2 under a learning-rate schedule",
        claim="Under a cosine learning-rate schedule the paper's AutoL2 stays below the tuned constant weight decay.",
        better=False,
        grids=COSINE,
        source="Lewkowycz & Gur-Ari 2020, sec. 5, left to future work there",
    ),
    WideNetwork(),
)
