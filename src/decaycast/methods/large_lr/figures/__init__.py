"""Evidence for the large-learning-rate room: the two-layer model of the theory, and a patch planted in images."""

from __future__ import annotations

from decaycast.methods.large_lr.figures.controls import ActivationNoiseControl, NoNoiseControl
from decaycast.methods.large_lr.figures.order import Order
from decaycast.methods.large_lr.figures.patch import PatchCost, PatchNoise, PatchOrder
from decaycast.methods.large_lr.figures.two_layer import TwoLayer

FIGURES = (TwoLayer(), Order(), NoNoiseControl(), ActivationNoiseControl(), PatchOrder(), PatchCost(), PatchNoise())
