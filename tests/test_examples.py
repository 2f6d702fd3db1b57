"""Every example in a docstring runs as printed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import decaycast

MODULES = [
    info.name
    for info in pkgutil.walk_packages(decaycast.__path__, "decaycast.")
    if not info.name.endswith("__main__") and ".cli" not in info.name
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "pip install 'decaycast[" not in str(error):
            raise
        pytest.skip(str(error))
    assert doctest.testmod(module).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES if ".adapters." not in name]
    assert sum(bool(found.examples) for module in modules for found in finder.find(module)) > 50
