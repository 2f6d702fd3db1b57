"""Why a large initial learning rate generalises better: the two patterns, and how fast each is learnt (Li, Wei & Ma 2019).

Conventions of this file. An example is (x1, x2) with a label y = -1 or +1, both equally likely. P lives in x1: noisy, linearly
separable, learnt from many examples. Q lives in x2: without noise, not linearly separable, memorised from few. Both blocks
have d coordinates, but Q spans two of them alone, so x2 is given in the basis (z/|z|, zeta/|zeta|).

    P     x1 = y*gamma0*w + g,  |w| = 1,  g ~ N(0, I/d) given that y*<w, g> >= 0;  w is the first coordinate here
    Q     x2 = a*z for y = +1,  a*(z + zeta) or a*(z - zeta) for y = -1;  a ~ U[low, 1],  |zeta| = r*|z|,  <z, zeta> = 0

The network is f(x) = u.relu(U x) with fixed u = +-1/sqrt(neurons), one set of neurons per block; the loss is the mean of
log(1 + exp(-y*f)), plus (lambda/2)*||U||^2. Each step is U <- (1 - lr*lambda)*U - lr*(gradient + xi), xi ~ N(0, noise_std^2) per
coordinate: the noise sits inside the learning rate. *Gradient time* T is the sum of the learning rates.

The speeds are for the start, where f = 0 and every example pulls with 1/2, and for many neurons; they are derived, not printed
in the paper. A block's speed is per unit of T on data that all hold its pattern: multiply it with the fraction that does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decaycast.core.schedule import one_number, whole

KINDS = ("p_only", "q_only", "both")
_HARMONICS = 400  # times 1/arctan(r): where the series of `q_gap` ends


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """How the examples are made. The defaults separate the two algorithms at sizes a computer can train.

    Args:
        dimension: d >= 2, coordinates of each block.
        p_only: probability in [0, 1] of an example with P alone (x2 = 0).
        q_only: probability in [0, 1] of an example with Q alone (x1 = 0); the rest holds both.
        margin: gamma0*sqrt(d) >= 0; 1 in the paper.
        lowest: smallest amplitude a of Q, in [0, 1]; 0 in the paper.
        scale: |z| > 0; 1 in the paper.
        separation: r = |zeta|/|z| > 0; d**(-3/4) in the paper.

    Raises:
        ValueError: an argument outside its range, or fractions that add up to more than 1.

    Source: Li, Wei & Ma 2019 (arXiv 1907.04595), section 3.
    """

    dimension: int = 64
    p_only: float = 0.02
    q_only: float = 0.2
    margin: float = 0.25
    lowest: float = 0.5
    scale: float = 6.0
    separation: float = 0.2

    def __post_init__(self) -> None:
        whole("dimension", self.dimension, least=2)
        for name in ("p_only", "q_only", "lowest"):
            within(name, getattr(self, name), 0.0, 1.0)
        if self.p_only + self.q_only > 1:
            raise ValueError(
                f"p_only and q_only are parts of one whole and may add up to 1 at most, got {self.p_only} + {self.q_only}"
            )
        within("margin", self.margin, 0.0)
        positive("scale", self.scale)
        positive("separation", self.separation)

    @property
    def drift(self) -> float:
        """Mean of y*<w, x1> in units of 1/sqrt(d): c = margin + sqrt(2/pi)."""
        return self.margin + math.sqrt(2.0 / math.pi)

    @property
    def directions(self) -> np.ndarray:
        """z, z + zeta and z - zeta as rows, shape (3, 2)."""
        return self.scale * np.array([[1.0, 0.0], [1.0, self.separation], [1.0, -self.separation]])


def paper_patterns(dimension: int, kappa: float, q_only: float = 0.2) -> Patterns:
    """The values of the paper's assumption 3.3; they separate only at a `dimension` far beyond what can be trained.

    Args:
        dimension: d >= 2.
        kappa: sqrt(d/N) in (0, 1), small: P alone is in d/2 of the N examples.
        q_only: fraction of Q alone, a constant in the paper.

    Raises:
        ValueError: an argument outside its range.

    Source: Li, Wei & Ma 2019, assumption 3.3.

    >>> paper_patterns(256, 0.2).separation  # 256**(-3/4)
    0.015625
    """
    if not 0 < one_number(kappa) < 1:
        raise ValueError(f"kappa = sqrt(d/N) must lie in (0, 1), got {kappa!r}")
    size = whole("dimension", dimension, least=2)
    return Patterns(
        dimension=size, p_only=kappa**2 / 2, q_only=q_only, margin=1.0, lowest=0.0, scale=1.0, separation=size**-0.75
    )


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Drawn examples, float64: x1 of shape (n, d), x2 of shape (n, 2), labels (n,) of -1 and +1.

    `kind` (n,) holds indices of `KINDS`. `corner` (n,) says which of z, z + zeta, z - zeta it is, and `amplitude` (n,) how much
    of it: x2 = amplitude*directions[corner]. Where there is no Q the amplitude is 0.
    """

    x1: Tensor
    x2: Tensor
    labels: Tensor
    kind: Tensor
    corner: Tensor
    amplitude: Tensor


def sample(patterns: Patterns, count: int, generator: torch.Generator, kind: str | None = None) -> Examples:
    """Draw `count` examples, all of one `kind` of `KINDS` if it is given.

    Args:
        patterns: how they are made.
        count: >= 1.
        generator: torch's, on the CPU.
        kind: None draws from the mixture.

    Raises:
        ValueError: an unknown kind, no whole number of examples.

    >>> drawn = sample(Patterns(dimension=3), 5, torch.Generator().manual_seed(0), kind="q_only")
    >>> drawn.x1.abs().sum().item(), drawn.x2.shape
    (0.0, torch.Size([5, 2]))
    """
    count, d = whole("count", count, least=1), patterns.dimension
    options = {"generator": generator, "dtype": torch.float64}
    # every kind draws the same numbers, so that the examples of a seed do not depend on what is done with them
    first, second, amount = torch.rand((3, count), **options)
    g = torch.randn((count, d), **options) / math.sqrt(d)
    labels = torch.where(first < 0.5, 1.0, -1.0).to(torch.float64)
    kinds = _kinds(patterns, torch.rand(count, **options), kind)
    x1 = g.clone()
    x1[:, 0] = labels * (g[:, 0].abs() + patterns.margin / math.sqrt(d))
    x1[kinds == 1] = 0.0
    corner = torch.where(labels > 0, 0, torch.where(second < 0.5, 1, 2))
    amplitude = (patterns.lowest + (1.0 - patterns.lowest) * amount) * (kinds != 0)
    x2 = amplitude[:, None] * torch.from_numpy(patterns.directions)[corner]
    return Examples(x1=x1, x2=x2, labels=labels, kind=kinds, corner=corner, amplitude=amplitude)


def _kinds(patterns: Patterns, drawn: Tensor, kind: str | None) -> Tensor:
    if kind is None:
        q_only = drawn < patterns.p_only + patterns.q_only
        return torch.where(drawn < patterns.p_only, 0, torch.where(q_only, 1, 2))
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return torch.full(drawn.shape, KINDS.index(kind))


# the noise in the weights


def stationary_noise(*, weight_std: float, lr: float, weight_decay: float) -> float:
    """Noise that keeps the spread of the weights where it is: noise_std = tau*sqrt(1 - (1 - lr*lambda)^2)/lr.

    Args:
        weight_std: tau >= 0, per coordinate.
        lr: learning rate > 0.
        weight_decay: lambda >= 0 with lr*lambda <= 2.

    Returns:
        Standard deviation of xi per coordinate, inside the learning rate.

    Raises:
        ValueError: an argument outside its range.

    Source: Li, Wei & Ma 2019, assumption 3.1: (1 - lr*lambda)^2*tau^2 + lr^2*noise_std^2 = tau^2.

    >>> round(stationary_noise(weight_std=5.0, lr=1.0, weight_decay=0.2), 9)  # 0.8**2 + 0.6**2 = 1
    3.0
    """
    tau, shrink = within("weight_std", weight_std, 0.0), _shrink(lr, weight_decay)
    # shrink*(2 - shrink) is 1 - (1 - shrink)^2 without the cancellation
    return tau * math.sqrt(shrink * (2.0 - shrink)) / lr


def weight_std(steps: int, *, initial_std: float, noise_std: float, lr: float, weight_decay: float = 0.0) -> float:
    """Spread of the noise part of the weights after `steps` steps; without weight decay a random walk.

    tau_t^2 = (1 - lr*lambda)^(2t)*tau0^2 + lr^2*noise_std^2*(1 + (1 - lr*lambda)^2 + ... ), t terms.

    Args:
        steps: t >= 0.
        initial_std: tau0 >= 0, per coordinate.
        noise_std: of xi per coordinate, >= 0.
        lr: learning rate > 0.
        weight_decay: lambda >= 0 with lr*lambda <= 2.

    Returns:
        Standard deviation per coordinate.

    Raises:
        ValueError: an argument outside its range.

    Source: the update of Li, Wei & Ma 2019, section 3, summed up.

    >>> weight_std(16, initial_std=3.0, noise_std=2.0, lr=0.5)  # sqrt(3**2 + 16*(0.5*2)**2)
    5.0
    """
    t, tau = whole("steps", steps, least=0), within("initial_std", initial_std, 0.0)
    push, shrink = lr * within("noise_std", noise_std, 0.0), _shrink(lr, weight_decay)
    # log of (1 - shrink)^2, where a shrink of 1 forgets everything in one step
    kept = 2.0 * math.log1p(-shrink) if shrink < 1 else 2.0 * math.log(shrink - 1.0) if shrink > 1 else -math.inf
    lost = shrink * (2.0 - shrink)
    terms = -math.expm1(kept * t) / lost if lost > 0 and t else float(t)
    memory = math.exp(kept * t) if t else 1.0
    return math.sqrt(memory * tau**2 + terms * push**2)


# how fast each pattern is learnt


def p_speed(patterns: Patterns) -> float:
    """Growth of the mean margin y*f of P per unit of gradient time, at the start: c^2/(8 d), c = margin + sqrt(2/pi).

    It does not depend on the noise in the weights: P needs the linear part of the network alone.

    Returns:
        dE[y*f]/dT.

    Source: derived from the model of Li, Wei & Ma 2019; about 0.40/d with their margin.

    >>> round(8 * p_speed(Patterns(dimension=8, margin=0.0)), 4)  # 2/pi over 8
    0.0796
    """
    return patterns.drift**2 / (8.0 * patterns.dimension)


def q_speed(patterns: Patterns) -> float:
    """Growth per unit of gradient time of Q's gap at the start and without noise: s^2*E[a]*arctan(r)/(8 pi).

    The *gap* is what no linear function has: r(z) - (r(z + zeta) + r(z - zeta))/2, r being f on Q. Only neurons whose kink
    lies between z - zeta and z + zeta make it, an arctan(r)*2/pi of all.

    Returns:
        d(gap)/dT, to leading order in r.

    Source: derived from the model of Li, Wei & Ma 2019; s^2*r/50 for their amplitudes.

    >>> round(1 / q_speed(Patterns(scale=1.0, lowest=0.0, separation=1e-3)) * 1e-3, 1)  # 16 pi
    50.3
    """
    return patterns.scale**2 * _mean_amplitude(patterns) * math.atan(patterns.separation) / (8.0 * math.pi)


def q_ceiling(patterns: Patterns, angular_noise: float) -> float:
    """The gap of Q that noise lets through, however long it lasts: s^2*E[a]*arctan(r)^3/(12 pi*c).

    A neuron that noise carries out of the kink comes back on either side, and what it has learnt counts for and against.

    Args:
        patterns: how the examples are made.
        angular_noise: c >= 0, variance per unit of gradient time of the angle of a neuron in Q's plane; for a plane at spread
            tau about lr*noise_std^2/(2 tau^2).

    Returns:
        The gap at which `q_gap` ends, to leading order in r; infinity without noise.

    Raises:
        ValueError: `angular_noise` outside its range.

    Source: derived; the paper bounds the same by O(r^2/lambda) (Li, Wei & Ma 2019, section 4).

    >>> patterns = Patterns(scale=1.0, lowest=0.0, separation=0.1)
    >>> round(q_ceiling(patterns, 0.01) / q_speed(patterns), 3)  # reached at c*T = (2/3)*r^2
    0.662
    """
    noise, width = within("angular_noise", angular_noise, 0.0), math.atan(patterns.separation)
    scale = patterns.scale**2 * _mean_amplitude(patterns)
    return scale * width**3 / (12.0 * math.pi * noise) if noise else math.inf


def q_gap(time: float, patterns: Patterns, angular_noise: float) -> float:
    """Gap of Q after a gradient time while every example still pulls with 1/2, and noise turns the neurons.

    gap = (s^2*E[a]/4)*int_0^T C(t) dt, C the correlation over time of +-1/2 on the two sides of the kink. From `q_speed`*T it
    bends to `q_ceiling` around c*T = (2/3)*arctan(r)^2.

    Args:
        time: T >= 0.
        patterns: how the examples are made.
        angular_noise: c >= 0, as in `q_ceiling`.

    Returns:
        The gap, to leading order in r.

    Raises:
        ValueError: an argument outside its range.

    Source: derived: Brownian motion on a circle, as a series of sines.

    >>> patterns = Patterns()
    >>> round(q_gap(10.0, patterns, 1e-9) / (10.0 * q_speed(patterns)), 4)
    1.0
    >>> round(q_gap(1e7, patterns, 1e-3) / q_ceiling(patterns, 1e-3), 4)
    1.0
    """
    t, noise, width = (
        within("time", time, 0.0),
        within("angular_noise", angular_noise, 0.0),
        math.atan(patterns.separation),
    )
    n = np.arange(1.0, _HARMONICS / width, 2.0)
    weights = (2.0 / (math.pi * n) * (1.0 - np.cos(n * width))) ** 2 / 2.0
    rates = n**2 * noise / 2.0
    lasting = np.divide(-np.expm1(-rates * t), rates, out=np.full(n.shape, t), where=rates * t > 1e-12)
    # the rest of the series: its weight is known, C(0) = arctan(r)/(2 pi), and all of it is forgotten sooner than this
    rest = (width / (2.0 * math.pi) - weights.sum()) * lasting[-1]
    return patterns.scale**2 * _mean_amplitude(patterns) / 4.0 * float(weights @ lasting + rest)


def largest_lr(patterns: Patterns) -> float:
    """Learning rate beyond which gradient descent on Q's common part is unstable at the start: 16/(s^2*E[a^2]).

    Returns:
        2 over the curvature: 1/4 of the logistic loss, times half of the neurons, times |x2|^2.

    Source: derived from the model of Li, Wei & Ma 2019.

    >>> largest_lr(Patterns(scale=2.0, lowest=1.0))
    4.0
    """
    low = patterns.lowest
    return 16.0 / (patterns.scale**2 * (1.0 + low + low**2) / 3.0)


def anneal_loss(slack: float, q_only: float, classes: int = 2) -> float:
    """Training loss at which to anneal: everything learnt but Q alone, which is still at chance: eps1 + q*log(classes).

    Args:
        slack: eps1 >= 0, how well the rest is to be fitted.
        q_only: fraction of the examples, in [0, 1], that hold only what is not to be learnt yet.
        classes: >= 2.

    Returns:
        The threshold, in nats.

    Raises:
        ValueError: an argument outside its range.

    Source: Li, Wei & Ma 2019, algorithm L-S; more than two classes derived.

    >>> round(anneal_loss(0.05, 0.2), 4)  # 0.05 + 0.2*log(2)
    0.1886
    """
    chance = math.log(whole("classes", classes, least=2))
    return within("slack", slack, 0.0) + within("q_only", q_only, 0.0, 1.0) * chance


def _mean_amplitude(patterns: Patterns) -> float:
    return (1.0 + patterns.lowest) / 2.0


def _shrink(lr: float, weight_decay: float) -> float:
    """lr*lambda of one step."""
    shrink = positive("lr", lr) * within("weight_decay", weight_decay, 0.0)
    if shrink > 2:
        raise ValueError(f"lr*weight_decay must be at most 2, beyond which weights grow, got {shrink:g}")
    return shrink


def positive(name: str, value: float) -> float:
    """`value` as a float if it is a finite number > 0, else a ValueError naming it."""
    if not (within(name, value, 0.0) > 0):
        raise ValueError(f"{name} must be > 0, got {value!r}")
    return float(value)


def within(name: str, value: float, low: float, high: float = math.inf) -> float:
    """`value` as a float if it is a finite number from `low` to `high`, else a ValueError naming it."""
    number = one_number(value)
    if not (low <= number <= high and math.isfinite(number)):
        wanted = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"a finite number >= {low:g}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number
