"""Noise into whole models: which places get it, that evaluation does not notice, and that removal leaves no trace."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from decaycast.methods.large_lr import insert, traced
from decaycast.methods.large_lr.insert import insert_activation_noise, remove_activation_noise
from decaycast.methods.large_lr.noise import ActivationNoise, activation_noises

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Residual, with functions, a method, dropout that depends on the mode, a parameter and a buffer."""

    def __init__(self, channels: int, inplace: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.inplace = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            inplace,
        )
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = functional.relu(self.norm(self.conv(x)), inplace=self.inplace)
        h = functional.dropout(h, 0.5, training=self.training)
        return torch.nn.functional.gelu(self.gain * h + self.shift) + x.relu()


class Net(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace)
        self.stem, self.block, self.prelu = nn.Conv2d(3, 6, 3), Block(6, inplace), nn.PReLU(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.prelu(self.block(self.act(self.stem(x)))))
        return self.head(h.mean((2, 3)))


def net(**kwargs: Any) -> Net:
    torch.manual_seed(1)
    return Net(**kwargs)


def run(model: nn.Module, x: torch.Tensor = X, seed: int = 5) -> list[torch.Tensor]:
    """Output and gradients of one training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(x.clone())
    output.square().sum().backward()
    return [output.detach(), *[each.grad.clone() for each in model.parameters() if each.grad is not None]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything insertion could change: objects, their attributes, hooks and modes."""
    found: list[tuple[Any, ...]] = []
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
        hooks = [list(value.items()) for key, value in vars(module).items() if "hooks" in key]
        inside = {
            key: [(k, id(v)) for k, v in vars(module)[key].items()] for key in ("_parameters", "_buffers", "_modules")
        }
        found.append((name, id(module), type(module), {k: id(v) for k, v in plain.items()}, hooks, inside))
    return found


def test_every_place_and_the_table():
    lines: list[str] = []
    model = net()
    assert insert_activation_noise(model, 0.4, report=lines.append) is model
    assert lines[0].splitlines() == [
        "Activation noise, std = 0.4: 5 of 5 places",
        "     1  ReLU  [act]",
        "     3  relu, gelu called in Block  [block]",
        "     1  PReLU  [prelu]",
    ]
    noises = activation_noises(model)
    assert list(noises) == [
        "act.activation_noise",
        *[f"block.activation_noise_{index}" for index in range(3)],
        "prelu.activation_noise",
    ]
    assert all(noise.std == 0.4 and not noise.per_element for noise in noises.values())


@pytest.mark.parametrize("inplace", [False, True])
def test_evaluation_is_that_of_the_model_without(inplace: bool):
    plain, noisy = net(inplace=inplace), insert_activation_noise(net(inplace=inplace), 0.4, report=None)
    assert plain.state_dict().keys() == noisy.state_dict().keys()
    assert not same(run(plain), run(noisy))
    noisy.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(X), noisy.eval()(X))


@pytest.mark.parametrize("inplace", [False, True])
def test_training_at_level_0_is_that_of_the_model_without(inplace: bool):
    plain, noisy = net(inplace=inplace), insert_activation_noise(net(inplace=inplace), 0.0, report=None)
    assert same(run(plain), run(noisy)), "dropout and batch norm in training mode, and every gradient, to the bit"
    torch.testing.assert_close(dict(plain.named_buffers()), dict(noisy.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_removal_leaves_nothing(training: bool):
    model = net().train(training)
    before, keys = fingerprint(model), list(model.state_dict())
    insert_activation_noise(model, 0.4, report=None)
    assert all(noise.training == training for noise in activation_noises(model).values())
    assert fingerprint(model) != before and list(model.state_dict()) == keys
    lines: list[str] = []
    assert remove_activation_noise(model, report=lines.append) is model
    assert lines[0].splitlines()[0] == "Activation noise removed: 5 of 5 places"
    assert fingerprint(model) == before
    remove_activation_noise(model, report=lines.append)
    assert lines[1] == "no inserted activation noise in this model: nothing was removed"


def test_the_noise_stands_in_front_of_each_activation():
    """Against a model with the noise written by hand."""

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.noise, self.first, self.act, self.second = (
                ActivationNoise(0.4),
                nn.Linear(3, 5),
                nn.ReLU(),
                nn.Linear(5, 2),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.act(self.noise(self.first(x)))
            h = functional.silu(self.noise(self.second(self.act(self.noise(h)))))
            return torch.relu_(self.noise(h)).tanh()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.act(input=self.act(self.first(x)))  # one module, used twice, once by keyword
            return torch.relu_(functional.silu(input=self.second(h))).tanh()

    plain, by_hand = Plain(), ByHand()
    by_hand.load_state_dict(plain.state_dict())
    insert_activation_noise(plain, 0.4, report=None)
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    assert same(run(plain, x), run(by_hand, x))


def test_an_activation_that_works_in_place_still_does():
    class Shortcut(nn.Module):
        """The shortcut sees the activated values, because relu overwrote them."""

        def __init__(self, module: bool) -> None:
            super().__init__()
            self.norm, self.act = nn.BatchNorm1d(3), nn.ReLU(inplace=True) if module else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            if self.act is None:
                functional.relu(h, inplace=True)
            else:
                self.act(h)
            return h

    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    for module in (False, True):
        found = run(insert_activation_noise(Shortcut(module), 1.0, report=None), x)[0]
        torch.manual_seed(5)
        assert torch.equal(found, (nn.BatchNorm1d(3)(x) + torch.randn(1, 3)).relu())


def test_again_sets_the_level_and_skip_leaves_alone():
    model, lines = insert_activation_noise(net(), 0.4, report=None), []
    insert_activation_noise(model, 0.2, per_element=True, skip="pre*", report=lines.append)
    assert lines[0].splitlines()[1:] == [
        "     1  ReLU: set anew  [act]",
        "     3  Block: set anew  [block]",
        "     1  PReLU: set anew: left alone, in skip  [prelu]",
    ]
    assert [(noise.std, noise.per_element) for noise in activation_noises(model).values()] == [(0.2, True)] * 4 + [
        (0.4, False)
    ]
    remove_activation_noise(model, report=None)
    assert activation_noises(model) == {}


def test_a_model_that_is_an_activation_and_kin_of_other_libraries():
    class QuickGELU(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(1.702 * x)

    lines: list[str] = []
    for model in (nn.ReLU(), nn.Sequential(QuickGELU(), nn.Sigmoid())):
        insert_activation_noise(model, 0.4, report=lines.append)
    assert lines[0].splitlines()[1] == "     1  ReLU  [(the model)]"
    assert lines[1].splitlines() == ["Activation noise, std = 0.4: 1 of 1 places", "     1  QuickGELU  [0]"]


def module_of(forward: Callable[..., Any]) -> nn.Module:
    """A module with this forward and a few attributes."""
    module: Any = type("Odd", (nn.Module,), {"forward": forward})()
    module.count, module.kept, module.linear = 0, [], nn.Linear(3, 3)
    return module


def branch(self: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x) if x.sum() > 0 else x


def optional(self: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return functional.relu(x) if mask is None else x


def keywords(self: Any, *args: torch.Tensor) -> torch.Tensor:
    return functional.relu(args[0])


def torch_random(self: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x) if torch.rand(1) < 2 else x


def numpy_random(self: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x) * float(np.random.rand() < 2)


def python_random(self: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x) if random.random() < 2 else x


def counting(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.count += 1
    return functional.relu(x)


def keeping(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.kept.append(x)
    return functional.relu(x)


def registering(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.linear = nn.Identity()
    return functional.relu(x)


def constant(self: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x + torch.ones(3))


def types(self: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x) if helper(x) else x


def helper(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def context(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return functional.relu(x)


UNTRACEABLE = [
    (branch, "cannot be traced: symbolically traced variables cannot be used as inputs to control flow"),
    (optional, "forward has the optional argument mask"),
    (keywords, r"forward takes \*args, \*\*kwargs or keywords"),
    (torch_random, "forward draws random numbers"),
    (numpy_random, "forward draws random numbers"),
    (python_random, "forward draws random numbers"),
    (counting, "forward changes count"),
    (keeping, "forward changes kept"),
    (registering, "forward changes _modules"),
    (constant, r"forward makes a tensor of its own \(_tensor_constant0\)"),
    (types, "forward uses isinstance"),
    (context, "forward uses no_grad"),
]


@pytest.mark.parametrize(("forward", "reason"), UNTRACEABLE, ids=lambda each: getattr(each, "__name__", ""))
def test_forwards_that_a_trace_would_get_wrong_are_left_alone(forward: Callable[..., Any], reason: str):
    odd, lines = module_of(forward), []
    model = nn.Sequential(odd, nn.ReLU())
    before, state = fingerprint(odd), (random.getstate(), torch.get_rng_state())
    insert_activation_noise(model, 0.4, report=lines.append)
    assert fingerprint(odd) == before and odd.kept == []
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert lines[0].startswith("Activation noise, std = 0.4: 1 of 2 places\n")
    assert "activations called in it as functions, if any, get no noise" in lines[0]
    with pytest.raises(traced.CannotTraceError, match=reason):
        traced.trace(odd)


def test_other_layers_that_cannot_are_said():
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    replaced = net().block
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    lines: list[str] = []
    insert_activation_noise(nn.Sequential(encoder, replaced, nn.ReLU()), 0.4, report=lines.append)
    assert "TransformerEncoderLayer: left alone, relu as a function inside a layer of torch" in lines[0]
    assert "its forward was replaced on the object" in lines[0]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_left_alone():
    lines: list[str] = []
    insert_activation_noise(nn.Sequential(torch.jit.script(nn.ReLU()), nn.ReLU()), 0.4, report=lines.append)
    assert "ReLU: left alone, TorchScript: insert before scripting  [0]" in lines[0].replace(
        "RecursiveScriptModule", "ReLU"
    )


def test_bad_input_changes_nothing():
    model = net()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="std must be a finite number >= 0, got -0.4"):
        insert_activation_noise(model, -0.4)
    with pytest.raises(
        ValueError, match="'blok' in skip matches no module with an activation; there are: act, block, prelu"
    ):
        insert_activation_noise(model, 0.4, skip=["act", "blok"])
    with pytest.raises(ValueError, match=r"can get noise(.*\n)+.*called in Block: left alone, in skip"):
        insert_activation_noise(model, 0.4, skip="*")
    with pytest.raises(ValueError, match="no activation in this model can get noise, so nothing was changed"):
        insert_activation_noise(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), 0.4)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        insert_activation_noise("model", 0.4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got NoneType"):
        remove_activation_noise(None)  # type: ignore[arg-type]
    assert fingerprint(model) == before


def test_an_attribute_that_changes_after_the_trace_is_noticed():
    model = insert_activation_noise(net(), 0.4, report=None)
    model.block.inplace = True
    with pytest.raises(RuntimeError, match="Block.inplace was False when noise was inserted and is True now"):
        model(X)
    model.eval()(X)
    insert_activation_noise(remove_activation_noise(model, report=None), 0.4, report=None).train()(X)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_alike_and_apart(copied: Callable[[nn.Module], nn.Module]):
    model = insert_activation_noise(net(), 0.4, report=None)
    other: Any = copied(model)
    assert same(run(model), run(other))
    with torch.no_grad():
        other.block.gain.fill_(0.0)
    assert not same(run(model), run(other)) and model.block.gain.item() == 1.5
    assert "forward" not in vars(remove_activation_noise(other, report=None).block)


@pytest.mark.slow
def test_compiled_with_noise_of_its_own_at_every_call():
    model = insert_activation_noise(net(), 0.4, report=None)
    compiled = torch.compile(model, backend="aot_eager")
    assert not torch.equal(compiled(X), compiled(X))
    for noise in activation_noises(model).values():
        noise.std = 0.0
    plain = net()
    plain.load_state_dict(model.state_dict())
    assert same(run(compiled), run(plain))
    assert torch.equal(compiled.eval()(X), plain.eval()(X))


def test_every_function_and_method_is_known():
    for name in (
        "relu",
        "relu6",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "softplus",
        "leaky_relu",
        "rrelu",
    ):
        assert traced.is_activation_function(getattr(functional, name)), name
    assert not traced.is_activation_function(functional.sigmoid) and not traced.is_activation_function([])
    assert insert._is_activation(nn.Hardswish()) and not insert._is_activation(nn.Tanh())
