"""Evidence for the self-distillation room: the paper's toy, real regression sets, and networks on flipped labels."""

from __future__ import annotations

from decaycast.methods.self_distill.figures.forecast import Forecast
from decaycast.methods.self_distill.figures.noisy_labels import NoisyLabels
from decaycast.methods.self_distill.figures.regression import Regression
from decaycast.methods.self_distill.figures.toy import Toy

FIGURES = (Toy(), Regression(), NoisyLabels(), Forecast())
