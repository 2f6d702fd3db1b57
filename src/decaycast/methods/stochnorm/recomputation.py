"""Activation checkpointing: a forward run again during backward must use the mask and the statistics of the first one.

`torch.utils.checkpoint` throws activations away and calls the layers again while the gradient is taken. By then the running
statistics have moved, so a layer that reads them would differentiate another function than the one whose output was used.
Here a layer remembers a few vectors of each call, and finds its call again by the batch's mean.
"""

from __future__ import annotations

from collections import deque

import torch

from decaycast.methods.stochnorm.kernels import Statistics

KEPT = 8  # calls a layer remembers: those between a forward and its backward, as with shared layers or pipelines
_SAME = 1e-4  # in deviations; on the same activations the means of two calls differ by rounding alone


def recomputing() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Calls:
    """The last calls of one layer in training mode."""

    def __init__(self) -> None:
        self._kept: deque[Statistics] = deque(maxlen=KEPT)

    def remember(self, seen: Statistics) -> None:
        """Keep what a call has seen, and forget the oldest."""
        self._kept.append(seen)

    def find(self, mean: torch.Tensor, variance: torch.Tensor) -> Statistics:
        """What the call has seen whose batch had this mean; among equal ones the one not asked for the longest.

        Raises:
            RuntimeError: no such call is remembered.
        """
        width = _SAME * (variance.sqrt() + mean.abs()) + torch.finfo(mean.dtype).tiny
        for place, seen in enumerate(self._kept):
            if seen.mean.shape == mean.shape and seen.mean.dtype == mean.dtype and _within(seen.mean, mean, width):
                del self._kept[place]
                self._kept.append(seen)
                return seen
        raise RuntimeError(
            f"this StochNorm runs during a backward pass, on a batch that is none of its last {len(self._kept)} in training "
            "mode. Activation checkpointing must see the activations it saw before (keep preserve_rng_state=True), and "
            f"at most {KEPT} calls may lie between a forward and its backward; call eval() for any other use"
        )


def _within(a: torch.Tensor, b: torch.Tensor, width: torch.Tensor) -> bool:
    return bool((((a - b).abs() <= width) | (a.isnan() & b.isnan()) | (a == b)).all())
