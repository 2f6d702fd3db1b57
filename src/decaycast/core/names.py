"""Names typed by people: accept a known one, otherwise offer the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def choose(name: str, options: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `options`.

    Args:
        name: what the user typed.
        options: the known names, in the order to list them.
        what: the kind of thing, for the message ("schedule", "data set").

    Raises:
        ValueError: the name is not known; the message offers the nearest one and lists all.

    >>> choose("cosine", ["constant", "cosine"], "schedule")
    'cosine'
    >>> choose("cosin", ["constant", "cosine"], "schedule")
    Traceback (most recent call last):
        ...
    ValueError: unknown schedule 'cosin'; did you mean 'cosine'? known: constant, cosine
    """
    known = list(options)
    if name in known:
        return name
    by_folded = {option.casefold(): option for option in known}
    nearest = difflib.get_close_matches(str(name).casefold(), by_folded, n=1)
    hint = f"did you mean {by_folded[nearest[0]]!r}? " if nearest else ""
    raise ValueError(f"unknown {what} {name!r}; {hint}known: {', '.join(known)}")
