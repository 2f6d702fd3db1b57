"""Batches for K networks at once, each with an order, or data, of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from decaycast.core.train import Batch


class Batches(Protocol):
    """Batches of all replicas."""

    def next(self) -> Batch:
        """Inputs (K, batch, ...) and targets (K, batch, ...) of one step."""
        ...

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the replicas at `places` only."""
        ...


class ShuffledBatches:
    """Batches of one data set in K orders: replica k sees each epoch in a fresh order drawn from `seeds[k]`.

    An incomplete last batch of an epoch is skipped; a batch size of at least the number of samples gives full-batch training.

    Args:
        inputs: (samples, ...), on the device to train on.
        target: (samples, ...).
        batch_size: samples per replica and step, >= 1.
        seeds: one per replica.

    Raises:
        ValueError: no samples, a batch size below 1.

    >>> batches = ShuffledBatches(torch.arange(6.0), torch.arange(6), batch_size=2, seeds=[0, 1])
    >>> batches.next()[0].shape
    torch.Size([2, 2])
    """

    def __init__(self, inputs: Tensor, target: Tensor, batch_size: int, seeds: Sequence[int]) -> None:
        if len(inputs) == 0 or batch_size < 1:
            raise ValueError(f"need samples and a batch size >= 1, got {len(inputs)} samples and {batch_size}")
        self.inputs, self.target, self.batch_size = inputs, target, batch_size
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._order, self._start = torch.empty(0), len(inputs)

    def next(self) -> Batch:
        """The batches of the next step."""
        count, size = len(self.inputs), self.batch_size
        if size >= count:
            return shared(self.inputs, len(self._generators)), shared(self.target, len(self._generators))
        if self._start + size > count:
            orders = [torch.randperm(count, generator=generator) for generator in self._generators]
            self._order, self._start = torch.stack(orders).to(self.inputs.device), 0
        index = self._order[:, self._start : self._start + size]
        self._start += size
        flat, shape = index.reshape(-1), index.shape
        inputs, target = (part.index_select(0, flat).unflatten(0, shape) for part in (self.inputs, self.target))
        return inputs, target

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the replicas at `places` only."""
        self._generators = [self._generators[place] for place in places]
        if self._order.numel():
            self._order = self._order[list(places)]


class SeparateBatches:
    """Batches of K iterators of (inputs, target), for replicas that differ in their data; all of one shape at each step."""

    def __init__(self, iterators: Sequence[Iterator[Batch]]) -> None:
        self._iterators = list(iterators)

    def next(self) -> Batch:
        """The batches of the next step.

        Raises:
            ValueError: an iterator has run dry.
        """
        pairs = [next(iterator, None) for iterator in self._iterators]
        found = [pair for pair in pairs if pair is not None]
        if len(found) < len(pairs):
            raise ValueError("the training data of a replica ran dry; give iterators that repeat (endless(loader))")
        return torch.stack([inputs for inputs, _ in found]), torch.stack([target for _, target in found])

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the replicas at `places` only."""
        self._iterators = [self._iterators[place] for place in places]


def shared(part: Tensor, count: int) -> Tensor:
    """The same tensor for every replica: (count, ...) without copies."""
    return part.expand(count, *part.shape)
