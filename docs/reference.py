"""The API reference, from the docstrings, by pdoc: python docs/reference.py [FOLDER]."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pdoc
import pdoc.render

import decaycast

ROOMS = ("core", "methods", "adapters", "lab")


def specifications(rooms: Sequence[str] = ROOMS) -> Iterator[str]:
    """The rooms, each with all it holds but the adapters of packages that are not installed.

    The command line documents itself.
    """
    _ = decaycast.KernelSelfDistillation  # what is loaded when it is named has to be named
    yield "decaycast"
    yield from (f"decaycast.{room}" for room in rooms)
    for found in pkgutil.walk_packages(decaycast.__path__, "decaycast."):
        if found.name.split(".")[1] in rooms:
            try:
                importlib.import_module(found.name)
            except ImportError as error:
                print(f"{found.name} is left out: {error}")
                yield f"!{found.name}"


def build(folder: Path, rooms: Sequence[str] = ROOMS) -> None:
    """Write the pages of the package and its `rooms` into `folder`."""
    pdoc.render.configure(docformat="google", math=True, footer_text=f"decaycast {decaycast.__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Couldn't import")  # said above, in one line each
        pdoc.pdoc(*specifications(rooms), output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/reference"))
