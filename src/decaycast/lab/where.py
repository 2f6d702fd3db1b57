"""Executors by the names of the command line: here, processes, replicas, ray."""

from __future__ import annotations

import os
from collections.abc import Callable

from decaycast.core.names import choose
from decaycast.lab.execute import Execute, in_process, processes

PLACES = ("here", "processes", "replicas", "ray")


def cores() -> int:
    """Processor cores that this process may use, at least 1."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def executor(
    place: str,
    *,
    workers: int | None = None,
    address: str | None = None,
    note: Callable[[str], None] | None = None,
) -> Execute:
    """The executor called `place`.

    Args:
        place: "here" (this process, one after the other), "processes" (of this machine), "replicas" (many runs as one
            batched program where that is faster, else processes), or "ray" (a cluster).
        workers: trainings at a time; None for one per core, or for all that a Ray cluster has. Not for "here".
        address: HOST:PORT of a running Ray cluster; None starts one on this machine and ends it afterwards.
        note: called with sentences about decisions that were measured.

    Raises:
        ValueError: an unknown place; `workers` below 1, or with "here"; `address` without "ray".
        ImportError: "ray" without Ray.
    """
    choose(place, PLACES, "place to train")
    if address is not None and place != "ray":
        raise ValueError(
            f"an address is that of a Ray cluster, got {address!r} with {place!r}; train on ray, or leave it out"
        )
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if place == "here":
        if workers not in (None, 1):
            raise ValueError(f"'here' trains one run at a time, got {workers} workers; train on processes instead")
        return in_process
    if place == "ray":
        from decaycast.lab.ray_cluster import on_ray

        return on_ray(address, workers=workers)
    if place == "replicas":
        from decaycast.lab.replicas import replicas

        return replicas(workers=workers or cores(), note=note)
    return processes(workers or cores())
