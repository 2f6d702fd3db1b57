"""Evidence for the label-noise room: what the theory says of small models, and what happens to a network."""

from __future__ import annotations

from decaycast.methods.label_noise.figures.covariance import StationaryCovariance
from decaycast.methods.label_noise.figures.equal_strength import EqualStrength
from decaycast.methods.label_noise.figures.escape import Escape
from decaycast.methods.label_noise.figures.random_start import RandomStart
from decaycast.methods.label_noise.figures.sparse import SparseRecovery
from decaycast.methods.label_noise.figures.trajectory import Trajectory

FIGURES = (SparseRecovery(), Trajectory(), StationaryCovariance(), Escape(), EqualStrength(), RandomStart())
