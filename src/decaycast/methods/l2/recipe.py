"""A training recipe as far as weight decay goes, and the same e-folds in another optimiser."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from decaycast.core.names import choose
from decaycast.core.timescale import CONVENTIONS, LearningRate, efolds, weight_decay_for


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the e-folds of a run. `lr` and `convention` as in `dc.efolds`; momentum counts for "sgd" only.

    Raises:
        ValueError: "adam" as convention (coupled L2 has no fixed shrink there), or an unknown one.
    """

    lr: LearningRate
    weight_decay: float
    steps: int
    momentum: float = 0.0
    convention: str = "sgd"

    def __post_init__(self) -> None:
        if str(self.convention).casefold() in ("adam", "nadam", "radam", "adamax", "adagrad", "rmsprop"):
            raise ValueError(
                f"{self.convention} couples weight decay into an adaptive step: the decay of each weight depends on its "
                "gradients, so there are no e-folds to keep; convert from or to the optimiser with "
                'decoupled_weight_decay=True (convention "decoupled")'
            )
        choose(self.convention, CONVENTIONS, "convention")

    @property
    def efolds(self) -> float:
        """E-folds over the run."""
        return efolds(
            lr=self.lr,
            weight_decay=self.weight_decay,
            steps=self.steps,
            momentum=self.momentum,
            convention=self.convention,
        )


def convert(
    recipe: Recipe,
    *,
    lr: LearningRate | None = None,
    steps: int | None = None,
    momentum: float | None = None,
    convention: str | None = None,
) -> Recipe:
    """The same e-folds with another learning rate, length, momentum, or in another optimiser.

    Args:
        recipe: the run whose decay is to be kept.
        lr: of the new run. Needed when the optimiser changes kind, or a schedule its length.
        steps: of the new run.
        momentum: of the new run, for ``convention="sgd"``.
        convention: of the new run: "sgd", "decoupled" (AdamW, Muon, Adam with decoupled_weight_decay=True), "relative" or
            "corrected".

    Returns:
        A recipe with the weight decay that makes its `efolds` equal; what is not given stays.

    Raises:
        ValueError: a needed lr is missing; "adam"; more e-folds than heavy ball can spend in so few steps.

    Source: time scale of L2, Lewkowycz & Gur-Ari 2020, with the shrink per step of `core.timescale`. Equal shrink is not equal
    regularisation: Adam's and SGD's updates differ in more than their decay.

    Example:
        >>> sgd = Recipe(lr=0.1, weight_decay=5e-4, steps=10_000, momentum=0.9)
        >>> round(convert(sgd, convention="decoupled", lr=1e-3).weight_decay, 6)
        0.5
    """
    kind = recipe.convention if convention is None else convention
    if lr is None and (kind == "sgd") != (recipe.convention == "sgd"):
        raise ValueError(
            f"learning rates of {recipe.convention!r} and {kind!r} optimisers are different quantities; give the new one, lr="
        )
    if lr is None and steps not in (None, recipe.steps) and (callable(recipe.lr) or np.ndim(recipe.lr) > 0):
        raise ValueError(
            f"the recipe's lr is a schedule over {recipe.steps} steps; give the one over {steps} steps, lr="
        )
    shrink = recipe.momentum if momentum is None else momentum
    target = replace(
        recipe,
        lr=recipe.lr if lr is None else lr,
        steps=recipe.steps if steps is None else steps,
        momentum=shrink if kind == "sgd" else 0.0,
        convention=kind,
    )
    new = weight_decay_for(
        efolds=recipe.efolds, lr=target.lr, steps=target.steps, momentum=target.momentum, convention=target.convention
    )
    return replace(target, weight_decay=new)
