"""What `decaycast.lab.compare` compares: arms, their settings, and which of them fit a model.

Each arm is one regulariser alone: weight decay is 0 where it is not the arm's own. Settings are the published defaults or those
of the method's card in the docs; none was tuned here. Two arms are yardsticks from outside, label smoothing and SAM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from decaycast.core.experiment import Scalar
from decaycast.core.names import choose
from decaycast.lab.forecasting import USUAL_DEFAULTS
from decaycast.methods.large_lr.insert import insert_activation_noise
from decaycast.methods.stochnorm.method import StochNorm

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One regulariser, and what it is called."""

    name: str
    words: str
    """For tables; may name settings in braces."""
    source: str
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    """Defaults; None is chosen by optimiser or schedule (`settings_of`)."""
    yardstick: bool = False
    usual: bool = True
    """Whether it belongs to a comparison that names no arms."""

    def title(self, settings: Mapping[str, Scalar]) -> str:
        """How a table names it with these settings.

        >>> ARMS["sam"].title({"rho": 0.05})
        'SAM, radius 0.05 (yardstick)'
        """
        shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
        return self.words.format(**shown) + (" (yardstick)" if self.yardstick else "")


_ALL = (
    Arm(name=NONE, words="no regulariser", source="the baseline"),
    Arm(
        name="weight-decay",
        words="weight decay {weight_decay}",
        source="constant; the usual default of the optimiser",
        settings={"weight_decay": None},
    ),
    Arm(
        name="autol2",
        words="AutoL2 by {clock}",
        source="Lewkowycz & Gur-Ari 2020; the clock of e-folds is ours (docs/autol2-schedules.md)",
        settings={"clock": None},
    ),
    Arm(
        name="label-noise",
        words="label noise, flip {flip}",
        source="Damian, Ma & Lee 2021",
        settings={"flip": 0.2},
    ),
    Arm(
        name="activation-noise",
        words="activation noise {std}, off at {until} of the run",
        source="Li, Wei & Ma 2019",
        settings={"std": 0.4, "until": 0.5},
    ),
    Arm(
        name="stochnorm",
        words="StochNorm, p = {p}",
        source="Kou et al. 2020",
        settings={"p": 0.5},
    ),
    Arm(
        name="self-distillation",
        words="self-distillation, T = {temperature}, mix {mix}",
        source="Mobahi, Farajtabar & Bartlett 2020; settings of docs/self-distill.md",
        settings={"temperature": 2.0, "mix": 0.1},
    ),
    Arm(
        name="label-smoothing",
        words="label smoothing {smoothing}",
        source="Szegedy et al. 2016",
        settings={"smoothing": 0.1},
        yardstick=True,
    ),
    Arm(
        name="sam",
        words="SAM, radius {rho}",
        source="Foret et al. 2021",
        settings={"rho": 0.05},
        yardstick=True,
    ),
    Arm(
        name="forecast",
        words="weight decay by forecast",
        source="decaycast.forecast, within the budget: probes first, then the run with what they leave",
        settings={"max_cost": 0.3},
        usual=False,
    ),
)
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _ALL}
_RANGES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "weight_decay": ("> 0", lambda value: value > 0),
    "flip": ("in (0, 1)", lambda value: 0 < value < 1),
    "std": ("> 0", lambda value: value > 0),
    "until": ("in (0, 1]", lambda value: 0 < value <= 1),
    "p": ("in [0, 1)", lambda value: 0 <= value < 1),
    "temperature": ("> 0", lambda value: value > 0),
    "mix": ("in [0, 1)", lambda value: 0 <= value < 1),
    "smoothing": ("in (0, 1)", lambda value: 0 < value < 1),
    "rho": ("> 0", lambda value: value > 0),
    "max_cost": ("in (0, 1]", lambda value: 0 < value <= 1),
}


def chosen(
    arms: Iterable[str] | Mapping[str, Mapping[str, Scalar]] | None, baseline: str
) -> dict[str, dict[str, Scalar]]:
    """The arms that were asked for, the baseline among them and first, with the settings given for each.

    Raises:
        ValueError: an unknown arm or setting (the message offers the nearest name), or no arm but the baseline.
    """
    choose(baseline, ARMS, "arm")
    if isinstance(arms, str):
        arms = [arms]  # one name, not its letters
    asked = [arm.name for arm in _ALL if arm.usual] if arms is None else list(arms)
    given = arms if isinstance(arms, Mapping) else {}
    found: dict[str, dict[str, Scalar]] = {}
    for name in dict.fromkeys([baseline, *asked]):
        arm = ARMS[choose(name, ARMS, "arm")]
        own = dict(given.get(name) or {})
        for setting in own:
            choose(setting, arm.settings, f"setting of arm {name!r}")
        found[name] = own
    if len(found) < 2:
        raise ValueError(
            f"there is nothing to compare {baseline!r} with; name at least one other arm of {', '.join(ARMS)}"
        )
    return found


def settings_of(name: str, given: Mapping[str, Scalar], *, optimizer: str, schedule: str) -> dict[str, Scalar]:
    """The settings of an arm as a run's config holds them: the given ones over the defaults.

    Raises:
        ValueError: a setting out of range.

    >>> settings_of("weight-decay", {}, optimizer="adamw", schedule="cosine")
    {'weight_decay': 0.01}
    >>> settings_of("autol2", {}, optimizer="sgd", schedule="constant")  # the paper's own rule is made for a constant rate
    {'clock': 'steps'}
    """
    usual: dict[str, Scalar] = dict(ARMS[name].settings)
    if name == "weight-decay":
        usual["weight_decay"] = USUAL_DEFAULTS[optimizer]
    if name == "autol2":
        usual["clock"] = "steps" if schedule == "constant" else "efolds"
    return {setting: _checked(name, setting, value) for setting, value in {**usual, **given}.items()}


def _checked(arm: str, setting: str, value: Scalar) -> Scalar:
    if setting == "clock":
        return choose(str(value), ("steps", "efolds"), "clock of AutoL2")
    words, fits = _RANGES[setting]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise ValueError(f"{setting} of arm {arm!r} must be a number {words}, got {value!r}")
    return float(value)


def misfit(name: str, settings: Mapping[str, Scalar], model: nn.Module, target: torch.Tensor, classes: int) -> str:
    """Why an arm cannot be trained with this model and these labels; "" where it can. The model is left as it is."""
    if name == "stochnorm":
        converted = StochNorm.convert(copy.deepcopy(model), p=float(settings["p"]), report=None)  # type: ignore[arg-type]
        if not any(isinstance(module, StochNorm) for module in converted.modules()):
            return "the model has no batch norm that StochNorm could replace"
    if name == "activation-noise":
        try:
            insert_activation_noise(copy.deepcopy(model), std=1.0, report=None)
        except ValueError:
            return "the model has no activation (ReLU, GELU and their kin) that noise could be put in front of"
    if name == "self-distillation" and target.ndim > 1:
        return "every sample has several labels, and self-distillation is for one per sample"
    if name == "label-noise" and float(settings["flip"]) >= 1 - 1 / classes:  # type: ignore[arg-type]
        return f"with {classes} classes flips have to be rarer than {1 - 1 / classes:.3g}, where labels say nothing any more"
    return ""
