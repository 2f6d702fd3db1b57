"""Regularisation that tunes itself, for PyTorch: forecast the weight decay of a long training from a short one.

    import decaycast as dc

    dc.efolds(lr=0.1, weight_decay=5e-4, steps=10_000, momentum=0.9)  # 5.0: how often weights shrink by e
    dc.effective_rate(optimizer)                                      # the same per step, for your optimiser
    dc.AutoL2(optimizer)                                              # weight decay that lowers itself
    dc.StochNorm.convert(model, p=0.5)                                # fine-tuning on few data
    dc.LabelNoise(flip=0.2, num_classes=10)                           # label noise, towards flat minima
    dc.hessian_trace(model, loss_fn, batches)                         # how flat, with a standard error
    dc.distill(fit, inputs, targets, rounds=3, mix=0.1)               # a network taught by itself

Importing this loads torch and numpy, nothing else; `KernelSelfDistillation`, a scikit-learn estimator, when it is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from decaycast.core.decay import WeightDecayScheduler
from decaycast.core.estimate import Estimate
from decaycast.core.param_groups import assert_no_decay, decay_groups, explain_param_groups
from decaycast.core.timescale import effective_rate, efolds, weight_decay_for
from decaycast.core.trace import hessian_trace
from decaycast.methods.l2 import theory as infinite_width
from decaycast.methods.l2 import transfer
from decaycast.methods.l2.autol2 import AutoL2
from decaycast.methods.l2.find import find
from decaycast.methods.l2.forecast import Forecast, forecast
from decaycast.methods.l2.rule import AutoL2Rule
from decaycast.methods.label_noise.method import LabelNoise
from decaycast.methods.label_noise.regularizer import implicit_regularizer
from decaycast.methods.large_lr.insert import insert_activation_noise
from decaycast.methods.large_lr.noise import ActivationNoise
from decaycast.methods.self_distill.distill import distill
from decaycast.methods.stochnorm.freeze import freeze_batch_norm
from decaycast.methods.stochnorm.l2sp import L2SP
from decaycast.methods.stochnorm.method import StochNorm, StochNorm1d, StochNorm2d, StochNorm3d

if TYPE_CHECKING:
    from decaycast.methods.self_distill.estimator import KernelSelfDistillation

__version__ = "0.1.0"

__all__ = [
    "L2SP", "ActivationNoise", "AutoL2", "AutoL2Rule", "Estimate", "Forecast", "KernelSelfDistillation", "LabelNoise",
    "StochNorm", "StochNorm1d", "StochNorm2d", "StochNorm3d", "WeightDecayScheduler", "assert_no_decay",
    "decay_groups", "distill", "effective_rate", "efolds", "explain_param_groups", "find", "forecast",
    "freeze_batch_norm", "hessian_trace", "implicit_regularizer", "infinite_width", "insert_activation_noise",
    "transfer", "weight_decay_for",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "KernelSelfDistillation":
        from decaycast.methods.self_distill.estimator import KernelSelfDistillation

        return globals().setdefault(name, KernelSelfDistillation)  # found without this function from now on
    raise AttributeError(f"module 'decaycast' has no attribute {name!r}")
