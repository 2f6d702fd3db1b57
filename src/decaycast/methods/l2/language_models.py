"""Power laws of language-model pre-training: the time scale of AdamW, its weight decay, and the batch size.

Conventions of this file. N parameters, D tokens of the whole run (one pass), B what one optimiser step sees; B and D are in one
unit. tau = B/(lr*weight_decay*D) with the *peak* lr of a linear decay to zero. Source of all: Bergsma et al. 2025, Power Lines
(arXiv 2505.13738): about 400 runs of 111M to 3.3B parameters on SlimPajama, muP-adjusted lr.
"""

from __future__ import annotations

import warnings

import numpy as np

from decaycast.core.names import choose
from decaycast.methods.l2.checked import Values, plain, positive

TPP_RANGE = (1.0, 1000.0)  # over which the law's values are quoted
SEQUENCE = 2048  # tokens in a sequence of the runs behind the batch-size laws
UNITS = ("tokens", "sequences")


class OutsideFittedRange(UserWarning):
    """A power law is used where it was not fitted; `value` and the range `low` to `high` come along."""

    def __init__(self, what: str, value: float, low: float, high: float) -> None:
        super().__init__(what, value, low, high)  # as arguments, so that it can travel between processes
        self.what, self.value, self.low, self.high = what, value, low, high

    def __str__(self) -> str:
        span = f"{self.low:g} to {self.high:g}"
        return f"{self.what} = {self.value:g} is outside the fitted range, {span}: this is an extrapolation"


def power_lines(tokens_per_parameter: Values) -> Values:
    """The best AdamW time scale of language-model pre-training: tau = 1.084*TPP**-0.527.

    Args:
        tokens_per_parameter: TPP = D/N > 0, tokens of the whole run over parameters.

    Returns:
        tau = 1/(lr*weight_decay*steps) with the *peak* lr, as a fraction of the run.

    Raises:
        ValueError: not a positive finite number.

    Warns:
        OutsideFittedRange: TPP is not in 1 to 1000.

    Source: Bergsma et al. 2025, Power Lines (arXiv 2505.13738); R^2 0.975 over runs of 111M to 3.3B parameters on one text
    corpus, one pass over the data, muP-adjusted lr with linear decay to zero.

    Example:
        >>> round(power_lines(20), 3)
        0.224
    """
    tpp = positive("tokens_per_parameter", tokens_per_parameter)
    outside = np.atleast_1d(tpp)[(np.atleast_1d(tpp) < TPP_RANGE[0]) | (np.atleast_1d(tpp) > TPP_RANGE[1])]
    if outside.size:
        warnings.warn(OutsideFittedRange("tokens_per_parameter", float(outside[0]), *TPP_RANGE), stacklevel=2)
    return plain(1.084 * tpp**-0.527)


def power_lines_weight_decay(
    *,
    tokens_per_parameter: Values,
    lr: Values,
    batch: Values,
    data: Values,
    batch_unit: str,
    data_unit: str,
    sequence_length: Values | None = None,
) -> Values:
    """The best AdamW weight decay of language-model pre-training: lambda = B*TPP**0.527/(1.084*lr*D).

    Args:
        tokens_per_parameter: TPP > 0.
        lr: peak learning rate (muP-adjusted) > 0.
        batch: B > 0, what one optimiser step sees, in `batch_unit`.
        data: D >= B, what the run sees, in `data_unit`.
        batch_unit: "tokens" or "sequences".
        data_unit: "tokens" or "sequences".
        sequence_length: tokens per sequence; needed when the two units differ.

    Returns:
        lambda, of the broadcast shape.

    Raises:
        ValueError: different units without `sequence_length`, a batch larger than the data, a number that is not positive.

    Warns:
        OutsideFittedRange: as `power_lines`.

    Source: as `power_lines`. B in sequences over D in tokens is wrong by the sequence length, a mistake found in public code.

    Example:
        >>> round(power_lines_weight_decay(tokens_per_parameter=20, lr=6e-4, batch=256, data=20_480_000_000,
        ...       batch_unit="sequences", data_unit="tokens", sequence_length=2048), 4)
        0.1909
    """
    for unit in (batch_unit, data_unit):
        choose(unit, UNITS, "unit")
    if batch_unit != data_unit and sequence_length is None:
        raise ValueError(
            f"batch is in {batch_unit} and data in {data_unit}: lambda would be wrong by the sequence length; give both in one "
            "unit, or sequence_length="
        )
    b, d = positive("batch", batch), positive("data", data)
    if batch_unit != data_unit:
        b, d = in_tokens(b, batch_unit, sequence_length), in_tokens(d, data_unit, sequence_length)
    if np.any(b > d):
        raise ValueError(
            f"one batch ({batch} {batch_unit}) is more than the whole run ({data} {data_unit}); check units"
        )
    return plain(b / (positive("lr", lr) * d * power_lines(tokens_per_parameter)))


def in_tokens(amount: Values, unit: str, sequence_length: Values | None) -> Values:
    """`amount` tokens or sequences as tokens.

    Args:
        amount: > 0, in `unit`.
        unit: "tokens" or "sequences".
        sequence_length: tokens per sequence > 0; may be None where `amount` is in tokens.

    Returns:
        Tokens, of the broadcast shape.

    Raises:
        ValueError: unknown unit, sequences without a length, a number that is not positive.

    Source: arithmetic.

    Example:
        >>> in_tokens(512, "sequences", 2048)
        1048576.0
    """
    if choose(unit, UNITS, "unit") == "tokens":
        return plain(positive("amount", amount))
    if sequence_length is None:
        raise ValueError("sequences become tokens with sequence_length=, which was not given")
    return plain(positive("amount", amount) * positive("sequence_length", sequence_length))


def optimal_batch(data_tokens: Values) -> Values:
    """The batch with the lowest loss for a given amount of data, in tokens: 2048 * 0.0306*D**0.383.

    Args:
        data_tokens: D > 0, tokens of the whole run.

    Returns:
        Tokens per optimiser step.

    Raises:
        ValueError: not a positive finite number.

    Source: Bergsma et al. 2025 (arXiv 2505.13738): the law counts 2048-token sequences; independent of model size there.

    Example:
        >>> round(optimal_batch(40e9) / 1e6, 2)
        0.72
    """
    return plain(SEQUENCE * 0.0306 * positive("data_tokens", data_tokens) ** 0.383)


def critical_batch(minimal_tokens: Values) -> Values:
    """The batch beyond which more data parallelism hardly shortens training, in tokens: 2048 * 0.0471*D_min**0.462.

    Args:
        minimal_tokens: D_min > 0, tokens that reach the wanted loss with a small batch.

    Returns:
        Tokens per optimiser step.

    Raises:
        ValueError: not a positive finite number.

    Source: Bergsma et al. 2025 (arXiv 2505.13738). The factor 0.0471 was not checked against the paper: take it as a scale.

    Example:
        >>> round(critical_batch(40e9) / 1e6, 1)
        7.6
    """
    return plain(SEQUENCE * 0.0471 * positive("minimal_tokens", minimal_tokens) ** 0.462)
