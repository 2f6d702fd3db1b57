"""A text as windows of characters, for small language models: the inputs, and the same characters one place later."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CONTEXT = 64
"""Characters a model sees at once."""
FILES = {"shakespeare": ("text/tinyshakespeare.txt", "tinyshakespeare.txt")}
PARTS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
"""Which share of the text each part is cut from: held-out text comes later, so that no sentence is in two parts."""


def find(name: str, roots: list[Path]) -> Path | None:
    """The text's file under the first of `roots` that has it."""
    for root in roots:
        for file in FILES[name]:
            if (root / file).is_file():
                return root / file
    return None


def encode(text: str) -> tuple[np.ndarray, str]:
    """Character numbers (int64) of `text`, and its alphabet in sorted order."""
    alphabet = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(alphabet)}
    return np.array([number[character] for character in text], dtype=np.int64), alphabet


def windows(codes: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Non-overlapping windows of one of `PARTS`: inputs and next characters, both int64 of shape (n, CONTEXT)."""
    begin, end = (round(share * len(codes)) for share in PARTS[part])
    count = (end - begin - 1) // CONTEXT
    inputs = codes[begin : begin + count * CONTEXT].reshape(-1, CONTEXT)
    return inputs, codes[begin + 1 : begin + 1 + count * CONTEXT].reshape(-1, CONTEXT)
