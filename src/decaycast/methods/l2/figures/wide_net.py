"""A wide, bias-free ReLU network under full-batch gradient descent with L2, its kernel, and theorem 2 beside it.

Conventions of this file. Weights W_l start as N(0, 1) and layer l computes z_l = W_l u_l, with u_1 = sqrt(2/d)*x and
u_{l+1} = sqrt(2/width)*relu(z_l) (the NTK parametrisation, V_w = 2 of `decaycast.core.kernel`): two hidden layers and one
output f = z_3, so that f is homogeneous of degree 3. Samples are scaled to |u_1| = 1; labels are -1 and +1. Loss: mean over
the n samples of (f - y)**2/2, plus (lambda/2)*||W||^2, hence W <- (1 - lr*lambda)*W - lr*gradient; flow time t = lr*steps.

With b_l = df/dz_l both are sums over layers of what one pass forth and back leaves behind:

    gradient of W_l = sum_i (f_i - y_i)/n * b_l(x_i) u_l(x_i)^T        Theta(x, x') = sum_l (u_l . u_l')*(b_l . b_l')

so that a kernel costs no Jacobian, and training and kernel share their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decaycast.core.train import DivergedError
from decaycast.methods.l2 import theory

DEGREE = 3
MODES = 3  # single modes kept in a curve: those with the largest share of the labels


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Outputs of a batch, shape (n,), and per layer what enters it and df/dz: shapes (n, fan_in) and (n, fan_out)."""

    outputs: Tensor
    entering: Sequence[Tensor]
    backward: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two classes: unit samples u_1 of shape (n, d), and labels -1 and +1 of shape (n,)."""

    inputs: Tensor
    labels: Tensor


def two_classes(part: tuple[Tensor, Tensor], minus: int, plus: int, samples: int | None = None) -> Pair:
    """The first `samples` of two classes of a data set (all if None), as this file's network takes them.

    Raises:
        ValueError: a class is missing, or there are fewer samples.
    """
    images, classes = part
    flat = images.flatten(1)[(classes == minus) | (classes == plus)]
    labels = torch.where(classes[(classes == minus) | (classes == plus)] == plus, 1.0, -1.0)
    count = len(flat) if samples is None else samples
    if count > len(flat) or labels[:count].unique().numel() < 2:
        raise ValueError(
            f"wanted {count} samples of the classes {minus} and {plus}, but the data have {int((labels < 0).sum())} and "
            f"{int((labels > 0).sum())}; raise train_size, or lower samples"
        )
    return Pair(inputs=torch.nn.functional.normalize(flat[:count]), labels=labels[:count].to(flat))


def initial_weights(inputs: int, width: int, seed: int, like: Tensor) -> list[Tensor]:
    """N(0, 1) weights of the three layers from `seed` alone, with the dtype and device of `like`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(width, inputs), (width, width), (1, width)]
    return [torch.randn(shape, generator=generator).to(like) for shape in shapes]


def passes(weights: Sequence[Tensor], inputs: Tensor) -> Pass:
    """One pass forth and back; `inputs` are u_1."""
    entering, backward = _forth(weights, inputs), [inputs.new_ones(len(inputs), 1)]
    for weight, hidden in zip(reversed(weights[1:]), reversed(entering[1:]), strict=True):
        backward.insert(0, (backward[0] @ weight).mul_(hidden > 0).mul_(math.sqrt(2.0 / weight.shape[1])))
    return Pass(outputs=entering[-1] @ weights[-1][0], entering=entering, backward=backward)


def kernel(left: Pass, right: Pass) -> Tensor:
    """Theta between two batches, shape (n_left, n_right), not divided by n."""
    layers = zip(left.entering, right.entering, left.backward, right.backward, strict=True)
    return torch.stack([(u @ v.T) * (a @ b.T) for u, v, a, b in layers]).sum(0)


def descend(
    weights: Sequence[Tensor], data: Pair, *, lr: float, weight_decay: float, at: Sequence[int]
) -> Iterator[tuple[int, Pass]]:
    """Gradient descent in place; at each step number of `at` (rising) the pass over the training data, before that step.

    Raises:
        DivergedError: outputs are not finite any more.
    """
    looks = set(at)
    for step in range(at[-1] + 1):
        now = passes(weights, data.inputs)
        if step in looks:
            if not now.outputs.isfinite().all():
                raise DivergedError(step, math.nan, [])
            yield step, now
        residual = (now.outputs - data.labels)[:, None] / len(data.labels)
        for weight, entering, backward in zip(weights, now.entering, now.backward, strict=True):
            weight.addmm_((residual * backward).T, entering, beta=1.0 - lr * weight_decay, alpha=-lr)


@torch.no_grad()
def compare(
    train: Pair, validation: Pair, *, width: int, seed: int, lr: float, weight_decay: float, at: Sequence[int]
) -> dict[str, list[float]]:
    """Train one network and lay theorem 2 with its own start, Theta_0 and f_0, beside it.

    Args:
        train: n training samples.
        validation: other samples, for the accuracy.
        width: of both hidden layers.
        seed: of the weights at the start.
        lr: learning rate; the theory is that of gradient flow, so lr*(largest eigenvalue of Theta_0/n) << 1.
        weight_decay: lambda > 0.
        at: steps at which to look, rising, the first one 0.

    Returns:
        Columns of length len(at): step, efolds (lr*lambda*step), ||Theta_t||/||Theta_0|| (Frobenius) and ||f - f_theory||/
        ||f_theory|| over the training samples; and, each with its ``_theory``, the loss (mean of (f - y)**2/2), accuracies,
        and the components f_a of the modes with the largest |y_a|, with their sign turned so that y_a > 0.

    Raises:
        DivergedError: `lr` is too large for these data.
    """
    weights = initial_weights(train.inputs.shape[1], width, seed, train.inputs)
    start, elsewhere = passes(weights, train.inputs), passes(weights, validation.inputs)
    theta, cross = kernel(start, start), kernel(elsewhere, start)
    steps, norms, outputs, others = [], [], [], []
    for step, now in descend(weights, train, lr=lr, weight_decay=weight_decay, at=at):
        steps.append(step)
        norms.append(float(kernel(now, now).norm() / theta.norm()))
        outputs.append(_numpy(now.outputs))
        others.append(_numpy(_forth(weights, validation.inputs)[-1] @ weights[-1][0]))
    times, y, y_other = lr * np.array(steps, float), _numpy(train.labels), _numpy(validation.labels)
    law = {"weight_decay": weight_decay, "homogeneity": DEGREE}
    case = (times, theta.cpu(), y)
    f_theory = theory.function_evolution(*case, initial=_numpy(start.outputs), **law)
    begin = {"initial": _numpy(start.outputs), "cross_initial": _numpy(elsewhere.outputs)}
    other_theory = theory.prediction_evolution(*case, cross.cpu(), **begin, **law)
    f, other = np.array(outputs), np.array(others)
    columns = {
        "step": steps,
        "efolds": times * weight_decay,
        "kernel_norm": norms,
        "kernel_norm_theory": theory.kernel_scale(times, weight_decay, DEGREE),
        "output_error": np.linalg.norm(f - f_theory, axis=1) / np.linalg.norm(f_theory, axis=1),
    }
    for name, values, other_values in (("", f, other), ("_theory", f_theory, other_theory)):
        columns |= _summary(name, values, y, other_values, y_other, largest_modes(_numpy(theta), y))
    return {name: [float(value) for value in values] for name, values in columns.items()}


def _forth(weights: Sequence[Tensor], inputs: Tensor) -> list[Tensor]:
    """What enters each layer; the outputs are the last of these times the last weights."""
    entering = [inputs]
    for weight in weights[:-1]:
        entering.append(torch.relu(entering[-1] @ weight.T).mul_(math.sqrt(2.0 / len(weight))))
    return entering


def largest_modes(theta: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Eigenvectors, as columns, along which the labels have the largest components, all of them positive."""
    vectors = np.linalg.eigh((theta + theta.T) / 2)[1]
    share = y @ vectors
    chosen = np.argsort(-np.abs(share))[:MODES]
    return vectors[:, chosen] * np.sign(share[chosen])


def _summary(
    suffix: str, f: np.ndarray, y: np.ndarray, other: np.ndarray, y_other: np.ndarray, vectors: np.ndarray
) -> dict[str, np.ndarray]:
    columns = {
        f"train_loss{suffix}": ((f - y) ** 2).mean(1) / 2,
        f"train_accuracy{suffix}": (f * y > 0).mean(1),
        f"validation_accuracy{suffix}": (other * y_other > 0).mean(1),
    }
    return columns | {f"mode_{i + 1}{suffix}": f @ vector for i, vector in enumerate(vectors.T)}


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
