"""Evidence for the StochNorm room: fine-tuning from few data to many, and the choice of p, each with a claim and a judge."""

from __future__ import annotations

from decaycast.methods.stochnorm.figures.best_p import BestProbability
from decaycast.methods.stochnorm.figures.fine_tuning import FineTuning

FIGURES = (FineTuning(), BestProbability())
