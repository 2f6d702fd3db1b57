"""Noise in front of the activations: what lets a small learning rate learn in the order of a large one (Li, Wei & Ma 2019).

Conventions. h -> h + std*e with e ~ N(0, 1), drawn anew by every layer at every call in training mode; evaluation passes the
input on as it is. As in the paper one map e is shared by the batch and by all channels: e has the input's shape with 1 in
place of the first two dimensions, (1, 1, height, width) for images. An input of two dimensions (n, features) has no map; it
gets one number per feature, shared by the batch, and (n, tokens, features) one per feature, shared by batch and tokens. `std` is
in units of the input, about 1 after a normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from decaycast.core.decay import check_keys
from decaycast.core.hook import Hook
from decaycast.core.schedule import Schedule, check_multiplier, whole


class ActivationNoise(nn.Module):
    """Adds Gaussian noise to its input in training; to stand in front of an activation.

    As in the paper, batch and channels share one map by default: an input (n, channels, height, width) gets one of (1, 1,
    height, width), (n, channels, length) one of (1, 1, length), (n, features) one number per feature. Every layer and every call
    draws anew. In evaluation, and at level 0, the input itself comes out, to the bit, and nothing is drawn.

    It has neither parameters nor buffers, so a model's state_dict is the same with and without it: the level is a setting that
    a resumed run gives anew, or that `NoiseSchedule`, which moves all levels of a model, restores. In data-parallel training
    each rank draws noise of its own, unless the ranks' generators are seeded alike.

    Args:
        std: standard deviation, finite and >= 0, in units of the input; may be set at any time. The paper's 0.4 goes in front
            of the ReLUs of a WRN-16-10, behind batch norm.
        per_element: noise of its own for every element, instead of one map shared by batch and channels.
        generator: where noise is drawn from, on the input's device; its state is yours to save. None for torch's own
            (`torch.manual_seed`), the only one that activation checkpointing can repeat.
        inplace: write into the input, as the activation behind it does if it works in place.

    Raises:
        ValueError: `std` is no finite number >= 0.

    Source: Li, Wei & Ma 2019, section 5 (mitigation).

    >>> noise = ActivationNoise(0.5, generator=torch.Generator().manual_seed(0))
    >>> noisy = noise(torch.zeros(8, 3, 2, 2))
    >>> torch.equal(noisy[0, 0], noisy[7, 2]), noisy[0, 0].unique().numel()  # one map of 2 x 2
    (True, 4)
    """

    def __init__(
        self, std: float, per_element: bool = False, generator: torch.Generator | None = None, inplace: bool = False
    ) -> None:
        super().__init__()
        self.std, self.per_element, self.generator, self.inplace = std, per_element, generator, inplace

    @property
    def std(self) -> float:
        """Standard deviation of the noise, in units of the input."""
        return self._std

    @std.setter
    def std(self, value: float) -> None:
        self._std = check_multiplier("std", value)

    def forward(self, input: Tensor) -> Tensor:
        """The input with noise in training mode, itself in evaluation or at std 0.

        Args:
            input: floating, of any shape; dtype and memory format are kept.

        Raises:
            TypeError: an input that is not floating.
            ValueError: a generator on another device.
            RuntimeError: symbolic tracing in training mode; activation checkpointing with a generator of one's own.
        """
        if not self.training or self._std == 0:
            return input
        if isinstance(input, torch.fx.Proxy):
            raise RuntimeError(
                "ActivationNoise cannot be traced symbolically in training mode; call eval() on the model first"
            )
        if not input.is_floating_point():
            raise TypeError(f"expected a floating input, got {input.dtype}; convert it first")
        if self.generator is not None:
            self._check_generator(self.generator, input)
        shape = input.shape if self.per_element else _shared_shape(input.shape)
        noise = torch.randn(shape, generator=self.generator, dtype=input.dtype, device=input.device)
        return input.add_(noise, alpha=self._std) if self.inplace else torch.add(input, noise, alpha=self._std)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"std={self._std:g}" + "".join(
            f", {name}=True" for name in ("per_element", "inplace") if getattr(self, name)
        )

    @staticmethod
    def _check_generator(generator: torch.Generator, input: Tensor) -> None:
        if generator.device.type != input.device.type:
            raise ValueError(
                f"the generator is on {generator.device} and the input on {input.device}; give one on the same device"
            )
        # a checkpoint repeats the forward in the backward pass, and restores torch's own generators alone
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "activation checkpointing would draw other noise than the first time from a generator of one's own; "
                "use generator=None"
            )


def _shared_shape(shape: torch.Size) -> tuple[int, ...]:
    shared = 2 if len(shape) > 2 else len(shape) - 1
    return (1,) * shared + tuple(shape[shared:])


def activation_noises(model: nn.Module) -> dict[str, ActivationNoise]:
    """Every `ActivationNoise` of a model by its name, each once.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationNoise)}


class NoiseSchedule(Hook):
    """Multiplies the noise of a whole model with a schedule: std_t = initial std * fn(t).

    In one's own loop call `step()` once after each `optimizer.step()`; in the loop of `decaycast.core.train` pass it as a hook.
    Each noise's level at construction is its initial one. To end a training without noise, let `fn` reach 0.

    Args:
        model: with at least one `ActivationNoise`; others that are added later are not followed.
        fn: 0-based step -> multiplier, finite and >= 0, e.g. of `decaycast.core.schedule`.

    Raises:
        TypeError: `model` is no module, or `fn` cannot be called.
        ValueError: a model without noise; a multiplier that is negative or not finite.

    Source: Li, Wei & Ma 2019 take the noise away in one step half-way (`step_decay(total, milestones=(0.5,), factor=0)`).

    >>> from decaycast.core.schedule import linear
    >>> model = nn.Sequential(ActivationNoise(0.4), nn.ReLU())
    >>> schedule = NoiseSchedule(model, linear(4))
    >>> for _ in range(3):
    ...     schedule.step()
    >>> model[0].std
    0.1
    """

    def __init__(self, model: nn.Module, fn: Schedule) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be a function step -> multiplier, got {type(fn).__name__}")
        noises = activation_noises(model)
        if not noises:
            raise ValueError(
                "the model has no ActivationNoise to schedule; call insert_activation_noise(model, std) first"
            )
        self.fn, self.last_step = fn, 0
        self._initial = {name: noise.std for name, noise in noises.items()}
        self._noises = noises
        self._move_to(0)

    def step(self) -> None:
        """Go on to the next step's level."""
        self._move_to(self.last_step + 1)

    def on_batch(self, step: int, batch: Any) -> Any:
        """As a hook: the level of this step; the batch is passed on."""
        if step != self.last_step:
            self._move_to(step)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, without `fn`, which the resumed run gives anew."""
        return {"last_step": self.last_step, "initial": dict(self._initial)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` and set the restored step's level.

        Raises:
            ValueError: the state does not belong to this model (keys, names, numbers); nothing is changed then.
        """
        check_keys(state, self.state_dict(), type(self).__name__)
        check_keys(state["initial"], self._initial, f"{type(self).__name__} for this model")
        initial = {name: check_multiplier(f"saved std of {name}", std) for name, std in state["initial"].items()}
        last_step = whole("last_step", state["last_step"], least=0)
        multiplier = self._multiplier_at(last_step)
        self._initial, self.last_step = initial, last_step
        self._write(multiplier)

    def _move_to(self, step: int) -> None:
        multiplier = self._multiplier_at(step)
        self.last_step = step
        self._write(multiplier)

    def _multiplier_at(self, step: int) -> float:
        return check_multiplier(f"fn({step})", self.fn(step))

    def _write(self, multiplier: float) -> None:
        for name, noise in self._noises.items():
            noise.std = self._initial[name] * multiplier
