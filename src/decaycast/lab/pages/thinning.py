"""Which points to draw when there are more than a page can hold or a screen can show. Pure functions of numbers.

A line keeps the lowest and the highest value of every stretch and its gaps, so that no spike is lost; loose points keep one
of each small cell of the picture, so that no outlier is lost. Both keep points, they never average them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from decaycast.core.experiment import Trace

LINE_POINTS = 20_000  # of lines, over all traces of a plot
MARKED_POINTS = 4000  # of markers, each of which is an element of the page


def thin(count: int, limit: int) -> list[int]:
    """At most `limit` (>= 2) evenly spaced indices below `count`, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def thin_line(y: Sequence[float], limit: int) -> list[int]:
    """At most `limit` (>= 8) indices of a line: of every stretch its lowest and highest value, and one of its gaps.

    Args:
        y: values in the order in which they are joined; NaN is a gap.
        limit: most indices to keep.

    Returns:
        Rising indices, the first and the last among them.

    Example:
        >>> thin_line([0.0] * 50 + [9.0] + [0.0] * 49, 8)
        [0, 50, 51, 99]
    """
    values = np.asarray(y, dtype=float)
    if len(values) <= limit:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    edges = np.linspace(0, len(values), (limit - 2) // 3 + 1).astype(int)
    for start, end in pairwise(edges.tolist()):
        stretch = values[start:end]
        finite = np.isfinite(stretch)
        if finite.any():
            kept |= {start + int(np.argmin(np.where(finite, stretch, np.inf)))}
            kept |= {start + int(np.argmax(np.where(finite, stretch, -np.inf)))}
        if not finite.all():
            kept.add(start + int(np.argmin(finite)))
    return sorted(kept)


def thin_points(x: Sequence[float], y: Sequence[float], limit: int, *, logs: tuple[bool, bool]) -> list[int]:
    """At most `limit` (>= 4) indices of loose points: the first one in each cell of a grid over the picture.

    Args:
        x: positions.
        y: as many values; points that cannot be drawn (NaN, infinite, not positive on a log axis) are left out.
        limit: most indices to keep.
        logs: whether the axes of x and of y are logarithmic.

    Returns:
        Rising indices.
    """
    if len(x) <= limit:
        return list(range(len(x)))
    both = [np.asarray(values, dtype=float) for values in (x, y)]
    with np.errstate(divide="ignore", invalid="ignore"):
        both = [np.log(values) if log else values for values, log in zip(both, logs, strict=True)]
    seen = np.flatnonzero(np.isfinite(both[0]) & np.isfinite(both[1]))
    if not len(seen):
        return []
    side = int(np.sqrt(limit))
    cells = np.zeros(len(seen), dtype=int)
    for values in both:
        low, span = values[seen].min(), np.ptp(values[seen])
        place = np.minimum((values[seen] - low) / span * side, side - 1).astype(int) if span else 0
        cells = cells * side + place
    _, first = np.unique(cells, return_index=True)
    return sorted(seen[first].tolist())


def thin_trace(trace: Trace, traces: int, *, logs: tuple[bool, bool]) -> Trace:
    """`trace`, one of so many `traces` of a plot, with no more points than a browser draws at once; `logs` as `thin_points`."""
    share = max(8, (LINE_POINTS if trace.mode == "lines" else MARKED_POINTS) // traces)
    joined = "lines" in trace.mode
    kept = thin_line(trace.y, share) if joined else thin_points(trace.x, trace.y, share, logs=logs)
    if len(kept) == len(trace.x):
        return trace
    parts = {name: getattr(trace, name) for name in ("x", "y", "low", "high")}
    return replace(trace, **{name: values and [values[i] for i in kept] for name, values in parts.items()})
