"""K networks of one architecture as one batched program: what takes K small matrix products takes one batched product.

A small network leaves its processor waiting for Python, which costs as much per operation for one network as for K. Here the
K copies of each parameter are one tensor of shape (K, ...), inputs have shape (K, batch, ...), and replica k sees slice k
alone: nothing that happens in one replica, NaN included, reaches another.

How a module is run. ``nn.Sequential`` is gone through child by child. Linear layers are batched products with a backward of
their own; activations and ``nn.Flatten`` need no change; everything else goes through ``torch.func.vmap``, but for networks and
layers in which there is dropout, a layer that torch does not define (it may draw random numbers), or settings that differ:
those are called replica by replica, each replica's own module with its own settings and generator, which is right and slow. A
layer that draws belongs into an ``nn.Sequential``, where it is called so alone. The training loop is
`decaycast.core.replica_training`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Layer = Callable[[Tensor], Tensor]
_ELEMENTWISE = (nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Softplus)


class Replicas:
    """K networks that differ in the values of their parameters and buffers, not in their structure.

    Args:
        models: K >= 1 networks of one structure; they are read here and written by `write_back` alone.
        device: where the stacked tensors lie; None for where the first network is.

    Raises:
        ValueError: no network; networks of different structure, shapes or types; lazy parameters.

    Example (two networks on inputs of their own):

    >>> models = [torch.nn.Linear(3, 2) for _ in range(2)]
    >>> batch = Replicas(models)
    >>> inputs = torch.randn(2, 5, 3)
    >>> torch.allclose(batch(inputs)[1], models[1](inputs[1]), atol=1e-6)
    True
    """

    def __init__(self, models: Sequence[nn.Module], *, device: str | torch.device | None = None) -> None:
        self.models = list(models)
        _check_alike(self.models)
        self._tensors = [_tensors(model) for model in self.models]
        trained = {name for name, value in self.models[0].named_parameters() if value.requires_grad}
        self.parameters: dict[str, Tensor] = {}
        """Trained tensors by name, each a leaf of shape (K, ...)."""
        self.state: dict[str, Tensor] = {}
        """All stacked tensors by name: `parameters`, frozen parameters and buffers."""
        for name in self._tensors[0]:
            self.state[name] = torch.stack([one[name].detach() for one in self._tensors]).to(device)
            if name in trained:
                self.parameters[name] = self.state[name].requires_grad_()
        self._run = _lift(self, self.models)

    def __len__(self) -> int:
        """K, the replicas that are left."""
        return len(self.models)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Outputs of shape (K, batch, ...) for inputs of shape (K, batch, ...); in the mode of the first network.

        Raises:
            RuntimeError: a module draws random numbers by a function, where no layer shows it.
        """
        # the fused kernels of attention have no batching rule: they would be called once per replica
        with sdpa_kernel(SDPBackend.MATH):
            return self._run(inputs)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the replicas at `places` (0-based, in this order) only; the tensors are new ones."""
        self.models = [self.models[place] for place in places]
        self._tensors = [self._tensors[place] for place in places]
        self.state = {name: pick(value.detach(), places) for name, value in self.state.items()}
        self.parameters = {name: self.state[name].requires_grad_() for name in self.parameters}
        self._run = _lift(self, self.models)

    @torch.no_grad()
    def write_back(self, places: Sequence[int] | None = None) -> None:
        """Copy the tensors of the replicas at `places` (default: all) into their networks."""
        for place in range(len(self)) if places is None else places:
            for name, tensor in self._tensors[place].items():
                tensor.copy_(self.state[name][place])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; each module's own mode is put back."""
        modes = [(module, module.training) for model in self.models for module in model.modules()]
        for model in self.models:
            model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training


def pick(stacked: Tensor, places: Sequence[int]) -> Tensor:
    """Slices of the first dimension, copied."""
    return stacked.index_select(0, torch.tensor(places, device=stacked.device, dtype=torch.long))


class _BatchedLinear(torch.autograd.Function):
    """x W^T + b for every replica. The gradient of W comes out in W's own layout, which the optimiser walks through faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if needs_x else None,
            torch.bmm(grad.mT, x) if needs_weight else None,
            grad.sum(1) if needs_bias else None,
        )


def _lift(owner: Replicas, modules: Sequence[nn.Module]) -> Layer:
    """A function of (K, batch, ...) that does what each of the K modules does to (batch, ...)."""
    first = modules[0]
    if type(first) is nn.Sequential and not _hooked(first):
        return _chain([_lift(owner, children) for children in zip(*modules, strict=True)])
    if type(first) in _ELEMENTWISE and not _hooked(first) and _same_settings(modules):
        return first
    if type(first) is nn.Flatten and not _hooked(first):
        start, end = (dim + 1 if dim >= 0 else dim for dim in (first.start_dim, first.end_dim))
        return lambda x: x.flatten(start, end)
    if type(first) is nn.Linear and not _hooked(first):
        return _linear(owner, first)
    if any(_may_draw(module) for module in first.modules()) or not _same_settings(modules):
        return _each(owner, modules)
    return _vmapped(owner, first)


def _chain(layers: Sequence[Layer]) -> Layer:
    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run


def _linear(owner: Replicas, module: nn.Linear) -> Layer:
    names = _names(owner, module)
    weight, bias = names["weight"], names.get("bias")

    def run(x: Tensor) -> Tensor:
        rows = x.flatten(1, -2) if x.ndim > 3 else x.unsqueeze(1) if x.ndim == 2 else x
        out = _BatchedLinear.apply(rows, owner.state[weight], None if bias is None else owner.state[bias])
        return out.view(*x.shape[:-1], out.shape[-1])  # type: ignore[union-attr]

    return run


def _vmapped(owner: Replicas, module: nn.Module) -> Layer:
    names = _names(owner, module)

    def one(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, state, (x,))

    def run(x: Tensor) -> Tensor:
        """All replicas of `module` on their own inputs."""
        state = {local: owner.state[name] for local, name in names.items()}
        try:
            return vmap(one, in_dims=(0, 0), randomness="error")(state, x) if state else vmap(module)(x)
        except RuntimeError as error:
            if "random" not in str(error):
                raise
            raise RuntimeError(
                f"{type(module).__name__} draws random numbers by a function, and in a batch every replica needs its own; "
                "draw them in a layer (nn.Dropout, or a module of its own), or train these networks one by one"
            ) from error

    return run


def _each(owner: Replicas, modules: Sequence[nn.Module]) -> Layer:
    """Each replica's own module on its slice: settings and random numbers of its own, at the price of K calls."""
    names = _names(owner, modules[0])

    def run(x: Tensor) -> Tensor:
        """All replicas of `module` on their own inputs."""
        state = {local: owner.state[name].unbind() for local, name in names.items()}
        calls = enumerate(zip(modules, x.unbind(), strict=True))
        return torch.stack(
            [functional_call(module, {n: s[k] for n, s in state.items()}, (part,)) for k, (module, part) in calls]
            if state
            else [module(part) for _, (module, part) in calls]
        )

    return run


def _names(owner: Replicas, module: nn.Module) -> dict[str, str]:
    """Name inside `module` (of the first network) -> name in the stacked state; tied parameters have one there."""
    found = {id(tensor): name for name, tensor in owner._tensors[0].items()}
    return {local: found[id(tensor)] for local, tensor in _tensors(module).items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _may_draw(module: nn.Module) -> bool:
    """Whether a layer draws random numbers, as far as one can see from outside."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return not type(module).__module__.startswith("torch.") and next(module.children(), None) is None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _same_settings(modules: Sequence[nn.Module]) -> bool:
    return len({repr(module) for module in modules}) == 1


def _check_alike(models: Sequence[nn.Module]) -> None:
    if not models:
        raise ValueError("there is no network to replicate; give at least one")
    first, *others = (_structure(model) for model in models)
    for place, other in enumerate(others, start=1):
        if other != first:
            wrong = [f"{a} and {b}" for a, b in zip(first, other, strict=False) if a != b] or ["different lengths"]
            raise ValueError(
                f"network {place} is built differently from network 0 ({wrong[0]}); batch networks of one structure"
            )


def _structure(model: nn.Module) -> list[tuple[Any, ...]]:
    modules = [(name, type(module).__name__, module.training) for name, module in model.named_modules()]
    tensors = [
        (name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad) for name, tensor in _tensors(model).items()
    ]
    return [*modules, *tensors]
