"""Adapters: the methods in the places that other frameworks have for them. Importing one needs its framework."""

from __future__ import annotations

import math
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def require(extra: str, **ranges: str) -> str:
    """Find one of the given packages in a version that the adapter was made for, before anything of it is imported.

    Args:
        extra: name of the extra that installs it, for the message.
        ranges: distribution (``_`` for ``-``) = versions, such as ``">=2.5,!=2.6.2"``; with ``>=``, ``<`` and ``!=`` alone.

    Returns:
        The first of the distributions that is installed.

    Raises:
        ImportError: none is installed, or the one that is has a version outside the range.

    >>> require("lab", numpy=">=1.26")
    'numpy'
    """
    for name, wanted in ranges.items():
        distribution = name.replace("_", "-")
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if not _admits(wanted, found):
            raise ImportError(
                f"{distribution} {found} is installed, and this adapter works with {distribution}{wanted}: "
                f"pip install --upgrade 'decaycast[{extra}]'"
            )
        return distribution
    missing = " or ".join(name.replace("_", "-") for name in ranges)
    raise ImportError(f"this adapter needs {missing}, which is not installed: pip install 'decaycast[{extra}]'")


def loss_as_error(loss: Any) -> Any:
    """A loss (a tensor) squeezed into (0, 1): it rises and falls with it, where AutoL2 wants an error and there is none."""
    return 0.5 + loss.double().atan() / math.pi


def _admits(wanted: str, found: str) -> bool:
    compare = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, "!=": lambda a, b: a != b}
    terms = re.findall(r"(>=|<|!=)([\d.]+)", wanted)
    return all(compare[sign](_release(found), _release(bound)) for sign, bound in terms)


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a release, so that 2.10 follows 2.9; what comes after them (rc1, +cpu, .dev0) is left out."""
    parts = [int(part) for part in re.match(r"[\d.]+", text)[0].strip(".").split(".")]  # type: ignore[index]
    return tuple(parts + [0] * (4 - len(parts)))
