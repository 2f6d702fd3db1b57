"""Kernels of infinitely wide, fully connected networks in closed form: NNGP (their outputs) and NTK (their training).

Conventions of this file. A network has `depth` hidden layers and a linear read-out:

    h_1 = s(d)*W_1 x + b_1,    h_{l+1} = s(n_l)*W_{l+1} phi(h_l) + b_{l+1},    f = h_{depth+1}

phi is ReLU or erf, n_l the width of hidden layer l, d the input dimension. Outputs are independent, so a kernel is one
number per pair of inputs: K = E[f f'] (NNGP) and Theta = E[sum over parameters of df df'] (NTK), each *per output* (not
summed over outputs), over all weights of all layers, first and last included, and over the biases if they are trained.

====================  ==================================  ==========================================  ================
parametrisation       weights and biases at the start     Theta                                       contribution of
====================  ==================================  ==========================================  ================
``"ntk"``             W ~ N(0, 1), s(n) = sqrt(V_w/n);    finite in the limit; `widths` do not        one layer: A = V_w
                      b = sqrt(V_b)*beta, beta ~ N(0, 1)  matter (Jacot et al. 2018)                  B = V_b
``"standard"``        W ~ N(0, V_w/n), s = 1;             of a torch network of these `widths`, to    A = n (fan-in)
                      b ~ N(0, V_b)                       leading order; grows like the width         B = 1
====================  ==================================  ==========================================  ================

V_w is `weight_variance`, V_b `bias_variance`; B = 0 for biases that are fixed. K is the same in both. The recursion, with
q = K(x, x), starting from K_1 = V_w*x.x'/d + V_b and Theta_1 = A*x.x'/d + B:

    K_{l+1} = V_w*E[phi phi'] + V_b        Theta_{l+1} = A*E[phi phi'] + B + V_w*E[phidot phidot']*Theta_l

    ReLU  c = K/sqrt(q q'):                E[phi phi'] = sqrt(q q')/2*e(c),  e = (sqrt(1-c^2) + c*(pi - acos c))/pi
    erf   c = 2K/sqrt((1+2q)(1+2q')):      E[phi phi'] = 2/pi*e(c),          e = asin c

and in both E[phidot phidot'] = d E[phi phi'] / dK, so only e and its derivative are needed. Nothing here is normalised
by width or outputs: `decaycast.core.ntk.empirical_ntk(net, x, mode="mean")` of a wide torch network is what to compare with.

Source: Cho & Saul 2009 (arc-cosine), Williams 1997 (erf), Jacot et al. 2018 (arXiv 1806.07572), Lee et al. 2019
(arXiv 1902.06720); width factors of the standard parametrisation: Sohl-Dickstein et al. 2020 (arXiv 2001.07301).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decaycast.core.dual import DUALS, Dual
from decaycast.core.names import choose

ACTIVATIONS = tuple(DUALS)
PARAMETRISATIONS = ("ntk", "standard")


def nngp(
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    depth: int,
    activation: str = "relu",
    weight_variance: float = 2.0,
    bias_variance: float = 0.0,
) -> Tensor:
    """Covariance of one output of a random, infinitely wide network, K(x, x') = E[f(x) f(x')].

    Args:
        x1: inputs of shape (n1, features), float64 (recommended) or float32, finite; no gradient flows through.
        x2: inputs of shape (n2, features) of the same dtype and device; None for `x1` with itself (half the work).
        depth: number of hidden layers, >= 0 (0 is the linear model).
        activation: ``"relu"`` or ``"erf"``.
        weight_variance: V_w > 0; weights have variance V_w/fan_in. 2 keeps the variance of ReLU layers.
        bias_variance: V_b >= 0; 0 is a network without biases, or with biases that start at zero.

    Returns:
        Shape (n1, n2), dtype and device of `x1`. Symmetric to the last bit when `x2` is None.

    Raises:
        ValueError: an argument is of the wrong shape or outside its range.

    Source: Lee et al. 2018 (arXiv 1711.00165), eq. 5; Cho & Saul 2009, eq. 6 for ReLU; Williams 1997, eq. 11 for erf.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> nngp(x, depth=1).mul(math.pi).round(decimals=6)  # variance 2*|x|^2/d = 1; orthogonal inputs: 1/pi
        tensor([[3.1416, 1.0000],
                [1.0000, 3.1416]], dtype=torch.float64)
    """
    net = _Network.checked(depth, activation, weight_variance, bias_variance)
    return _kernel(net, *_checked_inputs(x1, x2), with_ntk=False)


def ntk(
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    depth: int,
    activation: str = "relu",
    weight_variance: float = 2.0,
    bias_variance: float = 0.0,
    parametrisation: str = "ntk",
    widths: int | Sequence[int] | None = None,
    train_bias: bool | None = None,
) -> Tensor:
    """Neural tangent kernel of one output of an infinitely wide network (head of this file).

    Args:
        x1: as in `nngp`.
        x2: as in `nngp`.
        depth: as in `nngp`.
        activation: as in `nngp`.
        weight_variance: as in `nngp`.
        bias_variance: as in `nngp`.
        parametrisation: ``"ntk"``, or ``"standard"`` for what `torch.nn.Linear` computes with weights drawn from
            N(0, V_w/fan_in) and biases from N(0, V_b) (torch's own default is V_w = 1/3, uniform).
        widths: of the hidden layers, one number or one per layer; needed by ``"standard"`` and refused by ``"ntk"``.
        train_bias: whether biases are trained; None means that they are if `bias_variance` > 0. Say True for a standard
            network whose biases start at zero.

    Returns:
        Shape (n1, n2), dtype and device of `x1`. In the standard parametrisation: the kernel of the network with these
        widths up to a relative O(1/width) in its mean (and O(1/sqrt(width)) in one draw); not divided by the width.

    Raises:
        ValueError: an argument is of the wrong shape or outside its range.

    Notes:
        Cosines within rounding of 1, (8 + sqrt(features)/2)*eps, count as 1: such inputs point the same way as far as the
        dtype can tell, and acos would turn rounding eps into sqrt(eps). Pairs near c = -1 keep that error, absolute
        sqrt(eps). In erf networks, pairs off the diagonal lose digits once variances come near 1/eps. An input of
        zeros in a ReLU network without bias has kernel 0, and relu'(0) = 0 as in torch.

    Source: Jacot et al. 2018, theorem 1; Lee et al. 2019, appendix E for both activations.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> ntk(x, depth=1).round(decimals=4)  # K_2 + K_1*(pi - acos c)/pi: 1 + 1 and 1/pi + 0
        tensor([[2.0000, 0.3183],
                [0.3183, 2.0000]], dtype=torch.float64)
    """
    net = _Network.checked(depth, activation, weight_variance, bias_variance)
    choose(parametrisation, PARAMETRISATIONS, "parametrisation")
    biased = bias_variance > 0 if train_bias is None else train_bias
    x1, x2 = _checked_inputs(x1, x2)
    if parametrisation == "ntk":
        if widths is not None:
            raise ValueError(f"widths do not matter in the ntk parametrisation, got {widths}; leave them out")
        return _kernel(net, x1, x2, with_ntk=True, bias_share=bias_variance if biased else 0.0)
    fan_in = (x1.shape[1], *_checked_widths(widths, depth))
    return _kernel(net, x1, x2, with_ntk=True, fan_in=fan_in, bias_share=1.0 if biased else 0.0)


# the network


@dataclass(frozen=True, kw_only=True)
class _Network:
    depth: int
    activation: str
    weight_variance: float
    bias_variance: float

    @property
    def dual(self) -> Dual:
        return DUALS[self.activation]

    @classmethod
    def checked(cls, depth: int, activation: str, weight_variance: float, bias_variance: float) -> _Network:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise ValueError(f"depth is the number of hidden layers, a whole number >= 0, got {depth!r}")
        choose(activation, ACTIVATIONS, "activation")
        if not (math.isfinite(weight_variance) and weight_variance > 0):
            raise ValueError(f"weight_variance must be finite and > 0, got {weight_variance}; 2.0 is usual for ReLU")
        if not (math.isfinite(bias_variance) and bias_variance >= 0):
            raise ValueError(f"bias_variance must be finite and >= 0, got {bias_variance}; 0.0 means no bias")
        return cls(depth=depth, activation=activation, weight_variance=weight_variance, bias_variance=bias_variance)


# per input: everything that is not a pair, in float64


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One set of inputs. `rows`: what is multiplied to the first cosine; `gains`, `normalisers`: one vector per layer."""

    rows: Tensor
    variances: list[Tensor]
    gains: list[Tensor | None]
    normalisers: list[Tensor]


def _side(net: _Network, x: Tensor) -> _Side:
    # squares in float64 whatever the dtype of x: these vectors cost nothing and everything else leans on them
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    variances = [net.weight_variance * norm.square() / x.shape[1] + net.bias_variance]
    for _ in range(net.depth):
        variances.append(net.weight_variance * net.dual.moments(variances[-1])[0] + net.bias_variance)
    normalisers = [net.dual.normaliser(q) for q in variances[:-1]] + [torch.ones_like(norm)]
    gains: list[Tensor | None] = []
    for q, normaliser in zip(variances[:-1], normalisers[1:], strict=True):
        gains.append((math.sqrt(net.weight_variance) * net.dual.amplitude(q) * normaliser).to(x.dtype))
    if net.activation == "relu" and net.bias_variance == 0:
        gains[:-1] = [None] * len(gains[:-1])  # exactly 1: ReLU layers without bias keep their scale
    scale = (math.sqrt(net.weight_variance / x.shape[1]) * normalisers[0]).to(x.dtype)
    rows = x * scale[:, None]
    if net.bias_variance:
        bias = math.sqrt(net.bias_variance) * normalisers[0]
        rows = torch.cat([rows, bias.to(x.dtype)[:, None]], dim=1)
    return _Side(rows=rows, variances=variances, gains=gains, normalisers=[v.to(x.dtype) for v in normalisers])


def _shares(net: _Network, fan_in: Sequence[int] | None) -> list[float]:
    """A/V_w of every layer: what weights contribute to Theta, in units of what they contribute to K."""
    return [1.0] * (net.depth + 1) if fan_in is None else [width / net.weight_variance for width in fan_in]


def _diagonal(net: _Network, side: _Side, shares: Sequence[float], bias_share: float, with_ntk: bool) -> Tensor:
    """The kernel of every input with itself, by the recursion on variances: no cosine, no rounding to sqrt(eps)."""
    if not with_ntk:
        return side.variances[-1]
    theta = shares[0] * (side.variances[0] - net.bias_variance) + bias_share
    for q, share in zip(side.variances[:-1], shares[1:], strict=True):
        second, slope = net.dual.moments(q)
        theta = net.weight_variance * (share * second + slope * theta) + bias_share
    return theta


# per pair of inputs: blocks that stay in cache, everything in place


@torch.no_grad()
def _kernel(
    net: _Network,
    x1: Tensor,
    x2: Tensor | None,
    *,
    with_ntk: bool,
    fan_in: Sequence[int] | None = None,
    bias_share: float = 0.0,
) -> Tensor:
    left = _side(net, x1)
    right = left if x2 is None else _side(net, x2)
    out = x1.new_empty(len(left.rows), len(right.rows))
    shares = _shares(net, fan_in)
    panel_rows, block_elements = _block_sizes(out)
    # K itself may grow inside the result; beside Theta it needs a panel of its own
    spare = out.new_empty(min(panel_rows, len(out)) * out.shape[1] if with_ntk else 0)
    for start in range(0, len(out), panel_rows):
        stop = min(start + panel_rows, len(out))
        first = start if x2 is None else 0  # symmetric: from the diagonal to the right
        panel = out[start:stop, first:]
        minus_c = spare[: panel.numel()].view(panel.shape) if with_ntk else panel
        torch.addmm(minus_c, left.rows[start:stop], right.rows[first:].T, beta=0.0, alpha=-1.0, out=minus_c)
        step = max(1, block_elements // panel.shape[1])
        for row in range(0, stop - start, step):
            block = slice(row, min(row + step, stop - start)), slice(row if x2 is None else 0, None)
            pair = _Pair(
                left=left,
                right=right,
                rows=slice(start + block[0].start, start + block[0].stop),
                columns=slice(first + block[1].start, None),
            )
            _recursion(net, pair, minus_c[block], panel[block] if with_ntk else None, shares, bias_share)
        if x2 is None:
            _mirror(out, start, stop)
    if x2 is None:
        out.diagonal().copy_(_diagonal(net, left, shares, bias_share, with_ntk))
    _fill_zero_inputs(net, out, left, right, bias_share if with_ntk else 0.0)
    return out


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The block of pairs (rows of `left`) x (columns: rows of `right`)."""

    left: _Side
    right: _Side
    rows: slice
    columns: slice

    def gains(self, layer: int) -> tuple[Tensor, Tensor] | None:
        one, other = self.left.gains[layer], self.right.gains[layer]
        return None if one is None or other is None else (one[self.rows], other[self.columns])

    def normalisers(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.left.normalisers[layer][self.rows], self.right.normalisers[layer][self.columns]


def _recursion(
    net: _Network,
    pair: _Pair,
    minus_c: Tensor,
    theta: Tensor | None,
    shares: Sequence[float],
    bias_share: float,
) -> None:
    """All layers for one block. Carried, both negative: c = nu*nu'*K and theta = nu*nu'*Theta/share.

    With m = sqrt(V_w)*alpha*nu_next, S = m*m' and N = nu_next*nu_next':
        c <- S*e(c) + V_b*N        theta <- S*(e(c) + ratio*e'(c)*theta) + B/share*N
    """
    tolerance = (8.0 + 0.5 * math.sqrt(pair.left.rows.shape[1])) * torch.finfo(minus_c.dtype).eps
    carried = [minus_c] if theta is None else [minus_c, theta]
    constants = [net.bias_variance] if theta is None else [net.bias_variance, 0.0]
    if theta is not None:
        theta.copy_(minus_c)
        _add_outer(theta, pair.normalisers(0), net.bias_variance - bias_share / shares[0])
    if net.depth:
        minus_c.clamp_(max=1.0)
    scratch, slope = torch.empty_like(minus_c), torch.empty_like(minus_c)
    for layer in range(net.depth):
        net.dual.step(minus_c, scratch, slope, tolerance)
        if theta is not None:
            ratio = net.dual.unit * shares[layer] / shares[layer + 1]
            torch.addcmul(minus_c, theta, slope, value=ratio, out=theta)
            constants[1] = bias_share / shares[layer + 1]
        last = layer == net.depth - 1
        _scale_outer(carried[-1:] if last else carried, pair.gains(layer), scratch)
        for value, constant in zip(carried, constants, strict=True):
            _add_outer(value, pair.normalisers(layer + 1), -constant)
    carried[-1].mul_(-shares[-1] if theta is not None else -1.0)


def _scale_outer(values: Sequence[Tensor], vectors: tuple[Tensor, Tensor] | None, scratch: Tensor) -> None:
    if vectors is not None:
        torch.mul(vectors[0][:, None], vectors[1][None, :], out=scratch)
        for value in values:
            value.mul_(scratch)


def _add_outer(value: Tensor, vectors: tuple[Tensor, Tensor], factor: float) -> None:
    if factor:
        value.addr_(*vectors, alpha=factor)


def _block_sizes(out: Tensor) -> tuple[int, int]:
    """Rows of a panel (one matrix product) and elements of a block (elementwise work).

    CPU: four blocks of 65,536 numbers stay in a third-level cache, and numbers per call outweigh the cost of the call.
    Elsewhere a launch costs more than a pass over memory, so blocks are large.
    """
    panel_bytes, block_elements = (1 << 23, 1 << 16) if out.device.type == "cpu" else (1 << 28, 1 << 24)
    return max(16, panel_bytes // (out.element_size() * max(1, out.shape[1]))), block_elements


def _mirror(out: Tensor, start: int, stop: int) -> None:
    """Copy the panel of rows start to stop, right of the diagonal, to below it."""
    square = out[start:stop, start:stop]
    square.copy_(square.triu() + square.triu(1).T)
    out[stop:, start:stop] = out[start:stop, stop:].T


def _fill_zero_inputs(net: _Network, out: Tensor, left: _Side, right: _Side, value: float) -> None:
    """ReLU without bias sends an input of zeros to zeros: no gradient but that of the last bias."""
    if net.activation == "relu" and net.bias_variance == 0:
        out[(left.variances[0] == 0).nonzero()[:, 0]] = value
        out[:, (right.variances[0] == 0).nonzero()[:, 0]] = value


# arguments


def _checked_inputs(x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor | None]:
    _check_input(x1, "x1")
    if x2 is None:
        return x1, None
    _check_input(x2, "x2")
    if x1.shape[1] != x2.shape[1]:
        raise ValueError(f"x1 has {x1.shape[1]} features and x2 has {x2.shape[1]}; both have to be of the same kind")
    if x1.dtype != x2.dtype or x1.device != x2.device:
        raise ValueError(
            f"x1 is {x1.dtype} on {x1.device} and x2 is {x2.dtype} on {x2.device}; move one with x2.to(x1)"
        )
    return x1, x2


def _check_input(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or x.ndim != 2 or 0 in x.shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} has to be a tensor of shape (samples, features), got {got}; flatten images first")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} has to be float32 or float64, got {x.dtype}; use {name}.double()")
    if x.requires_grad:
        raise ValueError(f"{name} requires a gradient, and none flows through this kernel; pass {name}.detach()")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} has to be finite, but holds NaN or infinity; look for it in the data")


def _checked_widths(widths: int | Sequence[int] | None, depth: int) -> tuple[int, ...]:
    if widths is None and depth:
        raise ValueError(
            "the standard parametrisation has a kernel that grows with the width: give widths, one number or one per "
            "hidden layer"
        )
    sizes = (widths,) * depth if isinstance(widths, int) else tuple(widths or ())
    if len(sizes) != depth:
        raise ValueError(f"widths has {len(sizes)} entries for {depth} hidden layers; give one number or one per layer")
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"widths have to be whole numbers >= 1, got {widths}")
    return sizes
