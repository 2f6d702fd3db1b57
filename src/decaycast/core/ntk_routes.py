"""The ways to the empirical kernel: what is kept of a block of samples ("features"), and how two blocks make kernel entries.

Used by `decaycast.core.ntk`, whose head says what the routes are. Each route has `numbers` (size of one sample's features),
`features(x, outputs)` and `contract(one, other, mode, out)`, which adds the kernel of two blocks to `out`, of shape
(b1, c, b2, c) for mode "full", (c, b1, b2) for "per_output" and (b1, b2) otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from decaycast.core.names import choose


@dataclass(frozen=True, kw_only=True)
class Route:
    """How the kernel of a model is computed: `name` (one of `ROUTES` but "auto") and the `reason`."""

    name: str
    reason: str


# the model as a function


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A checked model with its inputs. `chosen` are detached: differentiating leaves the model's own gradients alone."""

    model: nn.Module
    chosen: dict[str, Tensor]
    rest: dict[str, Tensor]
    x1: Tensor
    x2: Tensor | None
    output_shape: tuple[int, ...]  # per sample: (c,) or ()

    @property
    def outputs(self) -> int:
        """The number c of outputs per sample."""
        return math.prod(self.output_shape)

    def call(self, theta: dict[str, Tensor], x: Tensor) -> Tensor:
        """The model's outputs with `theta` in place of the chosen parameters."""
        return functional_call(self.model, {**self.rest, **theta}, (x,))

    @classmethod
    def checked(cls, model: nn.Module, names: Iterable[str] | None, x1: Tensor, x2: Tensor | None) -> Problem:
        """The problem, if there is a kernel to compute; ValueError says what is in the way."""
        _check_frozen_mode(model)
        chosen = _chosen(model, names)
        others = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        rest = {name: value.detach() for name, value in others.items() if name not in chosen}
        for name, x in (("x1", x1), ("x2", x2)):
            if x is not None:
                _check_input(x, name)
        problem = cls(model=model, chosen=chosen, rest=rest, x1=x1, x2=x2, output_shape=())
        return replace(problem, output_shape=_output_shape(problem))


def plain_attention() -> AbstractContextManager[Any]:
    """Attention by its definition: the fused kernels have no batching rule and no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, Tensor]:
    if isinstance(names, str):
        raise ValueError(f"parameters has to be a list of names, got the text {names!r}; write [{names!r}]")
    known = dict(model.named_parameters())
    if names is None:
        names = [name for name, value in known.items() if value.requires_grad]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameter, so its kernel is empty; set requires_grad, or name "
                "parameters"
            )
    names = [choose(name, known, "parameter") for name in names]
    if not names:
        raise ValueError("parameters is an empty list; name at least one, or leave it out for all trainable ones")
    return {name: known[name].detach() for name in names}


def _check_frozen_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"{kind} ({name})" if name else kind
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{where} is in training mode and ties the samples of a batch together; call model.eval()")
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"{where} is in training mode and draws random numbers; call model.eval()")


def _check_input(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == 0:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} has to be a tensor with at least one sample along its first dimension, got {got}")
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise ValueError(f"{name} has to be finite, but holds NaN or infinity; look for it in the data")


def _output_shape(problem: Problem) -> tuple[int, ...]:
    """Shape of one sample's output; refuses models whose samples depend on each other, tried on the first two."""
    with torch.enable_grad():
        theta = {name: value.detach().requires_grad_() for name, value in problem.chosen.items()}
        pair, alone = problem.call(theta, problem.x1[:2]), problem.call(theta, problem.x1[:1])
    if not isinstance(pair, Tensor) or pair.ndim not in (1, 2) or len(pair) != len(problem.x1[:2]) or not pair.numel():
        got = tuple(pair.shape) if isinstance(pair, Tensor) else type(pair).__name__
        raise ValueError(
            f"the model has to return a tensor of shape (n, outputs) or (n,), got {got} for n = {len(problem.x1[:2])}; "
            "wrap it in a module that flattens or selects"
        )
    if not pair.requires_grad:
        raise ValueError(
            "the outputs do not depend on the chosen parameters; is there a detach or no_grad in the model?"
        )
    pair, alone = pair.detach(), alone.detach()
    if not torch.isfinite(pair).all():
        raise ValueError("the model's outputs are not finite; look at its weights")
    if not torch.allclose(pair[:1], alone, rtol=_rounding(pair), atol=_rounding(pair) * float(alone.abs().max())):
        raise ValueError(
            "the output of a sample depends on the other samples of the batch, or on chance, so there is no kernel between "
            "samples; model.eval() may help"
        )
    return tuple(pair.shape[1:])


def _rounding(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps ** 0.75


# the structured route: per layer, its input u and the gradients delta of all outputs


@dataclass(frozen=True, kw_only=True)
class _Layer:
    module: nn.Linear
    weight: str | None  # name if chosen
    bias: str | None


def _linear_layers(problem: Problem) -> list[_Layer] | str:
    """The Linear layers that own every chosen parameter, or why there is no such list."""
    owner: dict[str, nn.Module] = {}
    kept = {id(value): name for name, value in problem.model.named_parameters()}
    layers: dict[nn.Linear, dict[str, str]] = {}
    for path, module in problem.model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            name = kept[id(value)]
            if name not in problem.chosen:
                continue
            if not isinstance(module, nn.Linear) or key not in ("weight", "bias"):
                return f"{name} belongs to {type(module).__name__}, not to a Linear layer"
            if name in owner:
                return f"{name} is shared with {path}"
            owner[name] = module
            layers.setdefault(module, {})[key] = name
    return [_Layer(module=m, weight=keys.get("weight"), bias=keys.get("bias")) for m, keys in layers.items()]


class Structured:
    """Features of a block of samples: per layer (u, delta), shapes (b, in) and (b, c, out)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        layers = _linear_layers(problem)
        assert not isinstance(layers, str), layers
        self.layers = layers

    def numbers(self, outputs: int) -> int:
        """Numbers that the features of one sample take."""
        return sum(m.in_features + outputs * m.out_features for m in (layer.module for layer in self.layers))

    def features(self, x: Tensor, outputs: slice) -> list[tuple[Tensor, Tensor]]:
        """Per layer, inputs u of shape (b, in) and signals delta of shape (b, c, out)."""
        with torch.enable_grad(), _Tap(self.layers) as tap:
            theta = {name: value.detach().requires_grad_() for name, value in self.problem.chosen.items()}
            out = self.problem.call(theta, x).reshape(len(x), -1)
            tap.check(len(x))
            picked = range(out.shape[1])[outputs]
            signals = [z.new_empty(len(x), len(picked), z.shape[1]) for z in tap.after]
            for position, output in enumerate(picked):
                # samples do not mix, so the gradient of the sum over samples holds every sample's own
                rows = torch.autograd.grad(
                    out[:, output].sum(), tap.after, retain_graph=position < len(picked) - 1, materialize_grads=True
                )
                for signal, row in zip(signals, rows, strict=True):
                    signal[:, position] = row
        return list(zip(tap.before, signals, strict=True))

    def contract(self, one: Any, other: Any, mode: str, out: Tensor) -> None:
        """Add the kernel of two blocks to `out`."""
        for layer, (u, delta), (v, epsilon) in zip(self.layers, one, other, strict=True):
            gram = u @ v.T if layer.weight else u.new_zeros(len(u), len(v))
            if layer.bias:
                gram += 1.0
            if mode == "full":
                block = delta.flatten(0, 1) @ epsilon.flatten(0, 1).T
                out.addcmul_(block.view(out.shape), gram[:, None, :, None])
            elif mode == "per_output":
                out.addcmul_(delta.transpose(0, 1) @ epsilon.permute(1, 2, 0), gram)
            else:
                out.addcmul_(delta.flatten(1) @ epsilon.flatten(1).T, gram)


class _NotStructuredError(Exception):
    """The model's layers are not used as the structured route needs; the message is the reason."""


class _Tap:
    """While entered, keeps what goes into and comes out of each layer."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.layers = layers
        self._inputs: list[list[Tensor]] = [[] for _ in layers]
        self._outputs: list[list[Tensor]] = [[] for _ in layers]
        self._handles: list[Any] = []

    def __enter__(self) -> _Tap:
        for i, layer in enumerate(self.layers):
            self._handles.append(layer.module.register_forward_hook(self._keep(i)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, i: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            del module
            self._inputs[i].append(args[0].detach())
            self._outputs[i].append(out)
            return out.clone()  # an activation that works in place must not change what is kept

        return hook

    def check(self, samples: int) -> None:
        for layer, inputs in zip(self.layers, self._inputs, strict=True):
            name = (layer.weight or layer.bias or "").rpartition(".")[0] or "the Linear layer"
            if len(inputs) != 1:
                raise _NotStructuredError(f"{name} is called {len(inputs)} times as a layer, not once")
            if inputs[0].ndim != 2 or len(inputs[0]) != samples:
                raise _NotStructuredError(
                    f"{name} gets inputs of shape {tuple(inputs[0].shape)}, not one vector per sample"
                )

    @property
    def before(self) -> list[Tensor]:
        return [inputs[0] for inputs in self._inputs]

    @property
    def after(self) -> list[Tensor]:
        return [outputs[0] for outputs in self._outputs]


def find_route(problem: Problem) -> Route:
    """The fastest route the problem has."""
    layers = _linear_layers(problem)
    if isinstance(layers, str):
        return _unstructured(problem, layers)
    try:
        wrong = _disagreement(Structured(problem))
    except _NotStructuredError as reason:
        return _unstructured(problem, str(reason))
    if wrong:
        return _unstructured(problem, f"{wrong} is used beside its Linear layer")
    return Route(name="structured", reason=f"{len(layers)} Linear layers, each called once, own all chosen parameters")


def _unstructured(problem: Problem, reason: str) -> Route:
    try:
        Generic(problem).features(problem.x1[:1], slice(0, 1))
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        return Route(name="loop", reason=f"{reason}; torch.func cannot batch its gradients ({first})")
    return Route(name="generic", reason=reason)


def _disagreement(structured: Structured) -> str | None:
    """Name of a parameter whose gradient is not delta u^T, on a few samples: it is used elsewhere, too."""
    problem = structured.problem
    x = torch.cat([problem.x1[:2], problem.x1[2:][-2:]])
    features = structured.features(x, slice(None))
    with torch.enable_grad():
        theta = {name: value.detach().requires_grad_() for name, value in problem.chosen.items()}
        out = problem.call(theta, x).reshape(len(x), -1)
        # no two outputs with the same weight, or errors could cancel
        weights = torch.linspace(1.0, 2.0, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
        exact = torch.autograd.grad(out, list(theta.values()), weights, materialize_grads=True)
    found = dict(zip(theta, exact, strict=True))
    for layer, (u, delta) in zip(structured.layers, features, strict=True):
        signal = torch.einsum("bco,bc->bo", delta, weights)
        for name, ours in ((layer.weight, signal.T @ u), (layer.bias, signal.sum(0))):
            if name and (ours - found[name]).norm() > _rounding(ours) * (ours.norm() + found[name].norm()):
                return name
    return None


# the generic route: Jacobians


class Generic:
    """Features of a block of samples: its Jacobian, one matrix (b, c, parameters) per tensor."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def numbers(self, outputs: int) -> int:
        """Numbers that the features of one sample take."""
        return outputs * sum(value.numel() for value in self.problem.chosen.values())

    def features(self, x: Tensor, outputs: slice) -> list[Tensor]:
        """Per chosen tensor, its Jacobian of shape (b, c, numbers)."""

        def one(theta: dict[str, Tensor], sample: Tensor) -> Tensor:
            return self.problem.call(theta, sample[None]).reshape(-1)[outputs]

        with plain_attention():
            jacobian = vmap(jacrev(one), (None, 0))(self.problem.chosen, x)
        return [value.detach().flatten(2) for value in jacobian.values()]

    def contract(self, one: Any, other: Any, mode: str, out: Tensor) -> None:
        """Add the kernel of two blocks to `out`."""
        for left, right in zip(one, other, strict=True):
            if mode == "full":
                flat = out.view(len(left) * left.shape[1], -1)
                flat.addmm_(left.flatten(0, 1), right.flatten(0, 1).T)
            elif mode == "per_output":
                out.baddbmm_(left.transpose(0, 1), right.permute(1, 2, 0))
            else:
                out.addmm_(left.flatten(1), right.flatten(1).T)


class Loop(Generic):
    """The same Jacobians, by one backward pass per sample and output."""

    def features(self, x: Tensor, outputs: slice) -> list[Tensor]:
        """As in `Generic`."""
        picked = range(self.problem.outputs)[outputs]
        with torch.enable_grad():
            theta = {name: value.detach().requires_grad_() for name, value in self.problem.chosen.items()}
            leaves = list(theta.values())
            jacobian = [leaf.new_empty(len(x), len(picked), leaf.numel()) for leaf in leaves]
            for i in range(len(x)):
                out = self.problem.call(theta, x[i : i + 1]).reshape(-1)
                for a, output in enumerate(picked):
                    rows = torch.autograd.grad(out[output], leaves, retain_graph=True, materialize_grads=True)
                    for value, row in zip(jacobian, rows, strict=True):
                        value[i, a] = row.flatten()
        return jacobian


METHODS: dict[str, type[Structured] | type[Generic]] = {
    "structured": Structured,
    "generic": Generic,
    "loop": Loop,
}
