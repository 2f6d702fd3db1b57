"""Activations that a module calls as functions: found, and given noise, in a trace of its own forward (`torch.fx`).

A trace runs the forward once with stand-ins for the tensors, so all that Python decides is decided then and for good. It is taken
in training mode, of one module's own code alone, and thrown away where the code shows that it would not repeat the original.
"""

from __future__ import annotations

import copy
import inspect
import operator
import random
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import nn
from torch.nn import functional

_NAMES = (
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "rrelu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "hardswish",
    "softplus",
)
_FUNCTIONS = {
    getattr(owner, name)
    for owner in (functional, torch)
    for base in _NAMES
    for name in (base, f"{base}_")
    if hasattr(owner, name)
}
_METHODS = {name for base in _NAMES for name in (base, f"{base}_")}
# what a trace does not keep: it sees no tensor, no context, and runs once
_UNSEEN = {"isinstance", "is_tensor", "is_grad_enabled", "is_autocast_enabled", "checkpoint"}
_UNSEEN |= {"no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "autocast"}


class CannotTraceError(Exception):
    """A forward that a trace would miss or get wrong; the text says why."""


class _OwnForward(torch.fx.Tracer):
    """Traces a module's own code; children, parameters and buffers stay what they are."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is one."""
        return True


def is_activation_function(value: Any) -> bool:
    """Whether it is one of torch's functions for ReLU, GELU and their kin."""
    try:
        return value in _FUNCTIONS
    except TypeError:  # not hashable
        return False


def trace(module: nn.Module) -> torch.fx.Graph:
    """The graph of a module's own forward in training mode; the module and all random generators are left as they were.

    Raises:
        CannotTraceError: it cannot be traced, or a trace would not repeat it.
    """
    _check_arguments(type(module))
    if unseen := sorted(_UNSEEN & _mentioned(type(module))):
        raise CannotTraceError(f"forward uses {unseen[0]}")
    before, randomness, training = dict(vars(module)), _random_states(), module.training
    # entries of dictionaries and lists, the registered parameters, buffers and children among them
    inside = {name: copy.copy(value) for name, value in before.items() if type(value) in (dict, list, set)}
    module.training = True
    try:
        with torch.enable_grad():
            graph = _OwnForward().trace(module)
        module.training = training
        _check_untouched(module, before, inside, randomness)
    except CannotTraceError:
        raise
    except Exception as error:
        raise CannotTraceError(
            f"cannot be traced: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    finally:
        vars(module).clear()
        vars(module).update(before)
        for name, entries in inside.items():
            before[name].clear()
            (before[name].extend if isinstance(entries, list) else before[name].update)(entries)
        _restore(randomness)
    return graph


def sites(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The nodes that call an activation as a function or method, in order."""
    return [node for node in graph.nodes if _is_site(node)]


def works_in_place(node: torch.fx.Node) -> bool:
    """Whether a site overwrites its input."""
    if name_of(node).endswith("_"):
        return True
    try:
        called = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # torch's built-in functions and methods have no such argument
        return False
    return bool(called.arguments.get("inplace", False))


def name_of(node: torch.fx.Node) -> str:
    """The name of the function that a node calls."""
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))


class NoisyForward:
    """What stands in for a module's forward: its own in evaluation, the traced one with noise in training.

    Copies and pickles of it trace again when they are first called.
    """

    def __init__(self, module: nn.Module, noises: list[str], graph: torch.fx.Graph | None = None) -> None:
        self.module, self.noises, self.settings = module, noises, _settings(module)
        self.function: Callable[..., Any] | None = None if graph is None else _noisy_function(module, noises, graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module.

        Raises:
            RuntimeError: an attribute that the trace took for a constant has changed.
        """
        module = self.module
        if not module.training:
            return type(module).forward(module, *args, **kwargs)
        for name, value in self.settings.items():
            now = module.__dict__.get(name)
            if now != value:
                raise RuntimeError(
                    f"{type(module).__name__}.{name} was {value!r} when noise was inserted and is {now!r} now; call "
                    "remove_activation_noise and insert_activation_noise again"
                )
        if self.function is None:
            self.function = _noisy_function(module, self.noises, trace(module))
        return self.function(module, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "function": None}


def _noisy_function(module: nn.Module, noises: list[str], graph: torch.fx.Graph) -> Callable[..., Any]:
    """The graph's code with a call of each noise in front of its site, as a function of the module."""
    for node, name in zip(sites(graph), noises, strict=True):
        first = node.args[0] if node.args else node.kwargs["input"]
        with graph.inserting_before(node):
            noisy = graph.call_module(name, (first,))
        if node.args:
            node.args = (noisy, *node.args[1:])
        else:
            node.kwargs = {**node.kwargs, "input": noisy}
    graph.lint()
    return type(torch.fx.GraphModule(module, graph)).forward


def _is_site(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and is_activation_function(node.target)


def _check_arguments(kind: type[nn.Module]) -> None:
    for parameter in list(inspect.signature(kind.forward).parameters.values())[1:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise CannotTraceError("forward takes *args, **kwargs or keywords")
        if parameter.default is not parameter.empty:
            raise CannotTraceError(f"forward has the optional argument {parameter.name}")


def _mentioned(kind: type[nn.Module]) -> set[str]:
    """Names in the code of forward, of the methods of its class that it mentions, and of Python functions it mentions."""
    seen: set[str] = set()
    todo: list[Any] = [kind.forward]
    while todo:
        function: Any = inspect.unwrap(todo.pop())
        if not isinstance(function, FunctionType) or function.__module__.startswith("torch."):
            continue
        new = {name for code in _codes(function.__code__) for name in code.co_names} - seen
        seen |= new
        for name in new:
            method = inspect.getattr_static(kind, name, None)
            method = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            todo += [found for found in (method, function.__globals__.get(name)) if isinstance(found, FunctionType)]
    return seen


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _check_untouched(
    module: nn.Module, before: dict[str, Any], inside: dict[str, Any], randomness: tuple[Any, ...]
) -> None:
    """Whether tracing had no side effect, which running the graph would not have."""
    if any(not _same(a, b) for a, b in zip(randomness, _random_states(), strict=True)):
        raise CannotTraceError("forward draws random numbers")
    after = vars(module)
    changed = [name for name in {**before, **after} if after.get(name) is not before.get(name)]
    changed += [name for name, entries in inside.items() if name not in changed and not _alike(entries, after[name])]
    if constants := [name for name in changed if name.startswith("_tensor_constant")]:
        raise CannotTraceError(f"forward makes a tensor of its own ({constants[0]})")
    if changed:
        raise CannotTraceError(f"forward changes {changed[0]}")


def _alike(a: Any, b: Any) -> bool:
    """Whether two dictionaries, lists or sets hold the same objects."""
    if len(a) != len(b) or isinstance(a, set):
        return bool(len(a) == len(b) and a == b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return all(map(operator.is_, a, b))


def _settings(module: nn.Module) -> dict[str, Any]:
    """The attributes that a trace takes for constants, where they are plain values."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(module).items() if name != "training" and isinstance(value, plain)}


def _random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(np.array_equal(a, b))
