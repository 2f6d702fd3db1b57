"""Label noise for a training loop: labels that are drawn anew for every batch.

Conventions. Both classes here are hooks (`decaycast.core.hook`) and plain functions of the targets. What goes in is never
changed; what comes out is new, of the same dtype on the same device. Every call draws afresh, so with gradient accumulation
each micro-batch has noise of its own. Evaluation uses the labels as they are: call it on training batches only.

Where the numbers come from. Without a `generator` the noise follows from a seed that is drawn once, at construction, from
torch's global generator (so `torch.manual_seed` makes a run reproducible), the rank in torch.distributed, and the number of
the call. Hence ranks draw different noise even if all of them were seeded alike, and the state is two numbers that are right
on every rank: a run goes on exactly from a checkpoint that only rank 0 wrote. Ranks that share a batch (tensor or pipeline
parallelism) must not differ: give those generators of one seed, and others of another.
With a `generator` the numbers are its own, it is yours to seed per rank, and every rank has to keep its own state.

Source: Damian, Ma & Lee 2021, "Label noise SGD provably prefers flat global minimizers", algorithms 1 and 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import get_worker_info

from decaycast.core.decay import check_keys
from decaycast.core.hook import Hook
from decaycast.core.names import choose
from decaycast.core.schedule import check_multiplier, whole
from decaycast.methods.label_noise.flips import checked_flip

_Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
KINDS = ("rademacher", "gaussian")
_AT_ONCE = 2**12  # numbers drawn at a time: for a small batch each torch call costs more than what it computes


class _Noise(Hook, ABC):
    """What both kinds share: the stream of random numbers with its state, and the way into a batch."""

    def __init__(self, generator: torch.Generator | None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator has to be a torch.Generator, got {type(generator).__name__}; seed one by hand")
        self.generator = generator
        # as torch's DataLoader does: one number from the global generator, then independent of it
        self._seed = 0 if generator is not None else int(torch.randint(2**62, ()))
        self._calls = 0
        self._drawn: tuple[Any, tuple[Tensor, ...]] = (None, ())

    @abstractmethod
    def __call__(self, targets: Tensor) -> Tensor:
        """The targets with fresh noise."""

    def on_batch(self, step: int, batch: Any) -> Any:
        """A new batch with noisy targets: a pair (inputs, targets), or a mapping with the targets under "labels".

        Raises:
            TypeError: a batch of another kind.
            ValueError: as the call.
        """
        if isinstance(batch, Mapping):
            if "labels" in batch:
                return {**batch, "labels": self(batch["labels"])}
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            return (batch[0], self(batch[1]))
        raise TypeError(
            f"a batch has to be a pair (inputs, targets) or a mapping with 'labels', got {_kind(batch)}; call the noise on "
            "the targets yourself"
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: two numbers, or with a generator its state and the rank that it belongs to."""
        if self.generator is None:
            return {"seed": self._seed, "calls": self._calls}
        return {"generator": self.generator.get_state(), "rank": _rank()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the saved stream was; the settings stay those of this object.

        Raises:
            ValueError: a state of noise with (without) a generator, of another kind of generator, or of another rank.
        """
        check_keys(state, self.state_dict(), f"{type(self).__name__} with{'' if self.generator else 'out'} a generator")
        if self.generator is None:
            seed, calls = (whole(name, state[name], least=0) for name in ("seed", "calls"))
            self._seed, self._calls, self._drawn = seed, calls, (None, ())
            return
        saved = state["generator"].cpu()
        if saved.shape != self.generator.get_state().shape:
            raise ValueError(
                f"the saved state is that of a generator on another device than this one's {self.generator.device}; resume "
                "on the device that the state was saved on"
            )
        if state["rank"] != _rank():
            raise ValueError(
                f"the saved state is that of rank {state['rank']}'s generator and this is rank {_rank()}, which would draw the "
                "same noise; save one state per rank, or let the noise be built without a generator"
            )
        self.generator.set_state(saved)

    def __getstate__(self) -> dict[str, Any]:
        # what was drawn ahead is made again when needed; each of its views would take the whole block along
        return {**self.__dict__, "_drawn": (None, ())}

    def _fresh(self, targets: Tensor, shape: torch.Size, draw: _Draw, setting: Any) -> Tensor:
        """This call's share of what `draw` makes, of the given shape.

        Without a generator the numbers of several calls are drawn together. What a call gets is a function of seed, rank,
        number of the call, shape, dtype, device and `setting`, whatever was asked for before.
        """
        if get_worker_info() is not None:
            raise RuntimeError(
                "label noise is called in a DataLoader worker, where copies of it would repeat the same noise in every worker "
                "and epoch; call it in the training process, on the batch that the loader returns"
            )
        if self.generator is not None:
            _check_device(self.generator.device, targets.device)
            return draw((1, *shape), self.generator)[0]
        count = shape.numel()
        at_once = max(1, _AT_ONCE // count)
        block, place = divmod(self._calls, at_once)
        key = (_rank(), block, shape, targets.device, targets.dtype, setting)
        if self._drawn[0] != key:
            # `count` is part of the seed: batches of two sizes would else be cut, shifted, from the same numbers
            seed = np.random.SeedSequence((self._seed, _rank(), block, count)).generate_state(1, np.uint64)
            stream = torch.Generator(targets.device).manual_seed(int(seed[0]))
            self._drawn = (key, draw((at_once, *shape), stream).unbind(0))
        self._calls += 1
        return self._drawn[1][place]


class LabelNoise(_Noise):
    """Replace each label, with probability `flip`, by another class: a hook, and a function of the targets.

    Whole classes: y -> (y + k) mod C with k = 0 with probability 1-p, and else uniform on 1, ..., C-1. Class probabilities
    (mixup, distillation): the entries of each row move round by k, which is the same for a one-hot row, and in expectation
    (1-p) q + p (1-q)/(C-1), the smoothed target. Entries equal to `ignore_index` stay.

    Args:
        flip: p, the probability of *another* class, in [0, (C-1)/C); the paper's 0.2. From torch's ``label_smoothing``:
            `flips.flip_from_smoothing`. May be set at any time.
        num_classes: C >= 2.
        generator: where the flips are drawn from, on the targets' device; None for a stream of its own (head of this file).
        ignore_index: label that is left alone; keyword only.

    Raises:
        TypeError: a generator of another kind.
        ValueError: p outside [0, (C-1)/C), fewer than two classes.

    Source: Damian et al. 2021, algorithm 2; flips over C classes as in the authors' code.

    >>> noise = LabelNoise(flip=0.2, num_classes=10, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.full((1000,), 3)
    >>> noisy = noise(labels)
    >>> round(float((noisy != labels).float().mean()), 2)
    0.2
    """

    def __init__(
        self, flip: float, num_classes: int, generator: torch.Generator | None = None, *, ignore_index: int = -100
    ) -> None:
        self.num_classes = whole("num_classes", num_classes, least=2)
        self.flip = flip
        self.ignore_index = ignore_index
        self._seen = False
        super().__init__(generator)

    @property
    def flip(self) -> float:
        """Probability p of another class, in [0, (C-1)/C)."""
        return self._flip

    @flip.setter
    def flip(self, value: float) -> None:
        self._flip = checked_flip(value, self.num_classes)

    def __call__(self, targets: Tensor) -> Tensor:
        """New targets with fresh flips.

        Args:
            targets: whole numbers in [0, C) of any shape, or class probabilities of shape (n, C, ...). Both are looked at in
                full on the CPU; elsewhere, where that would wait for the device, at the first call only, and a label out of
                range then comes back as it is, for the loss to refuse.

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            ValueError: an empty batch, labels out of range, floats that are no class probabilities, a generator on another
                device.
            RuntimeError: called in a worker process of a DataLoader.
        """
        if self._is_soft(targets):
            return self._moved_rows(targets)
        clean = self._check_classes(targets) if targets.is_cpu or not self._seen else False
        self._seen = True
        moved = (targets + self._fresh(targets, targets.shape, self._shifts, self._flip)).remainder_(self.num_classes)
        if moved.dtype != targets.dtype:
            moved = moved.to(targets.dtype)
        return moved if clean else torch.where(self._classes(targets), moved, targets)

    def _moved_rows(self, targets: Tensor) -> Tensor:
        """Class probabilities, anywhere."""
        if targets.is_cpu or not self._seen:
            self._check_probabilities(targets)
            self._seen = True
        shift = self._fresh(targets, targets.shape[:1] + targets.shape[2:], self._shifts, self._flip)
        places = torch.arange(self.num_classes, device=targets.device).view(-1, *[1] * (targets.ndim - 2))
        return targets.gather(1, (places - shift.unsqueeze(1)) % self.num_classes)

    def _shifts(self, shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
        """By how many classes each label moves: C (which is 0), or uniform on 1, ..., C-1.

        One number u in [0, 1) says both: below p the label moves, and floor(u (C-1)/p) is uniform on 0, ..., C-2.
        """
        if not self._flip:
            return torch.zeros(shape, dtype=torch.int64, device=stream.device)
        # in float64 whatever the default dtype: in bfloat16 p would be one of a few hundred numbers
        exact = torch.float32 if stream.device.type == "mps" else torch.float64
        places = torch.rand(shape, generator=stream, device=stream.device, dtype=exact)
        others = self.num_classes - 1
        return places.mul_(others / self._flip).clamp_(max=others).long().add_(1)

    def _classes(self, targets: Tensor) -> Tensor:
        """Which labels are classes, not to be ignored."""
        return (targets >= 0) & (targets < self.num_classes) & (targets != self.ignore_index)

    def _is_soft(self, targets: Tensor) -> bool:
        if not isinstance(targets, Tensor) or not targets.numel():
            got = f"shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets have to be a tensor with at least one label, got {got}; is the batch empty?")
        if targets.dtype == torch.bool or targets.is_complex():
            raise ValueError(f"labels have to be whole numbers, got {targets.dtype}; convert them with .long()")
        if not targets.is_floating_point():
            return False
        if targets.ndim < 2 or targets.shape[1] != self.num_classes:
            raise ValueError(
                f"flips need whole-number labels, or class probabilities of shape (n, {self.num_classes}, ...), got "
                f"{targets.dtype} of shape {tuple(targets.shape)}; convert labels with .long(), for regression use TargetNoise"
            )
        return True

    def _check_classes(self, targets: Tensor) -> bool:
        """Refuse labels out of range; whether all are classes, none to be ignored."""
        least, most = targets.aminmax()
        low, high = int(least), int(most)
        if low >= 0 and high < self.num_classes and not low <= self.ignore_index <= high:
            return True
        wrong = targets[~self._classes(targets) & (targets != self.ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"labels have to be in [0, {self.num_classes}), or {self.ignore_index} to be ignored, got {int(wrong[0])}; count "
                "the classes, or map the labels to 0, 1, ..."
            )
        return False

    def _check_probabilities(self, targets: Tensor) -> None:
        shares = targets.detach()
        off = (shares.sum(1) - 1.0).abs().max()
        if not (float(shares.min()) >= 0 and float(off) <= torch.finfo(targets.dtype).eps ** 0.5):
            raise ValueError(
                "float targets have to be class probabilities: no entry below 0 and a sum of 1 over the classes; convert labels "
                "with .long(), and for regression use TargetNoise"
            )


class TargetNoise(_Noise):
    """Add fresh noise of standard deviation `sigma` to every target of a regression: a hook, and a function of the targets.

    Args:
        sigma: standard deviation >= 0, in the targets' unit; its square is the `noise_variance` of the loss (f - y)^2/2.
            (Torch's ``MSELoss`` of one output is twice that loss: count lr twice.) May be set at any time.
        kind: "rademacher" (+sigma or -sigma, the paper's) or "gaussian"; to second order they do the same.
        generator: as in `LabelNoise`.

    Raises:
        TypeError: a generator of another kind.
        ValueError: sigma below 0 or not finite, an unknown kind.

    Source: Damian et al. 2021, algorithm 1.

    >>> noise = TargetNoise(sigma=0.5, generator=torch.Generator().manual_seed(0))
    >>> sorted(set(noise(torch.full((20,), 2.0)).tolist()))
    [1.5, 2.5]
    """

    def __init__(self, sigma: float, kind: str = "rademacher", generator: torch.Generator | None = None) -> None:
        self.sigma = sigma
        self.kind = choose(kind, KINDS, "kind of noise")
        super().__init__(generator)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise, >= 0."""
        return self._sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._sigma = check_multiplier("sigma", value)

    def __call__(self, targets: Tensor) -> Tensor:
        """New targets with fresh noise.

        Args:
            targets: floating, of any shape.

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            ValueError: an empty batch, targets that are not floating, a generator on another device.
            RuntimeError: called in a worker process of a DataLoader.
        """
        if not isinstance(targets, Tensor) or not targets.is_floating_point() or not targets.numel():
            got = f"{targets.dtype} of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else _kind(targets)
            raise ValueError(
                f"targets have to be a floating tensor with at least one number, got {got}; for classes use LabelNoise"
            )

        def draw(shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
            noise = torch.empty(shape, dtype=targets.dtype, device=targets.device)
            if self.kind == "gaussian":
                return noise.normal_(generator=stream).mul_(self._sigma)
            return noise.bernoulli_(0.5, generator=stream).mul_(2.0).sub_(1.0).mul_(self._sigma)

        return targets + self._fresh(targets, targets.shape, draw, (self.kind, self._sigma))


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _check_device(generator: torch.device, targets: torch.device) -> None:
    # one without a number is on the device that is current
    numbers = {generator.index, targets.index} - {None}
    if generator.type != targets.type or len(numbers) > 1:
        raise ValueError(f"the generator is on {generator} and the targets on {targets}; give one on the same device")


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with {sorted(map(str, batch))}"
    return f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
