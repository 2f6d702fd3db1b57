"""Real regression sets: six that scikit-learn ships, and two that are read from the data folder.

The lab's data sets are images and text, so this figure reads its own: `california` and `adult` from the folder ``tabular`` below
``DECAYCAST_DATA`` (california_housing.npz with arrays X and y; adult_train_32561.csv.xz in the layout of the UCI file), all
others from scikit-learn, without a network. Which column is predicted was fixed before anything was run.

==============  ==========================================================================  ==================
name            predicted                                                                   from
==============  ==========================================================================  ==================
diabetes        progression after a year                                                    10 measurements
california      median house value of a district                                            8 figures
adult           age                                                                         numbers and sex
linnerud        weight, waist and pulse (20 people)                                         3 exercises
wine            alcohol                                                                     12 measurements
breast-cancer   mean smoothness of cell nuclei                                              the 9 other means
iris            petal width                                                                 3 other lengths
digits          lower half of an image (32 pixels)                                          upper half
==============  ==========================================================================  ==================

Source: scikit-learn's `sklearn.datasets`; California: Pace & Barry 1997; Adult: UCI, Kohavi 1996.
"""

from __future__ import annotations

import csv
import io
import lzma
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from decaycast.core.names import choose

ENVIRONMENT = "DECAYCAST_DATA"
Arrays = tuple[np.ndarray, np.ndarray]
_ADULT_NUMBERS = (2, 4, 10, 11, 12)  # weight of the record, years of education, capital gain and loss, hours per week
_ADULT_SEX = 9


@lru_cache(maxsize=8)
def load(name: str) -> Arrays:
    """Inputs (n, features) and targets (n,) or (n, outputs) of a set, float64, as they are. Read them, do not write into them.

    Raises:
        ValueError: an unknown name, or a file that is missing or not what it should be.
        ImportError: scikit-learn is not installed.
    """
    choose(name, SETS, "regression set")
    inputs, targets = SETS[name]()
    return np.asarray(inputs, dtype=np.float64), np.asarray(targets, dtype=np.float64)


def _shipped(name: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("this figure needs scikit-learn for its data: pip install 'decaycast[lab]'") from error
    return getattr(datasets, f"load_{name}")()


def _diabetes() -> Arrays:
    found = _shipped("diabetes")
    return found.data, found.target


def _linnerud() -> Arrays:
    found = _shipped("linnerud")
    return found.data, found.target


def _wine() -> Arrays:
    table = _shipped("wine").data
    return table[:, 1:], table[:, 0]


def _breast_cancer() -> Arrays:
    means = _shipped("breast_cancer").data[:, :10]
    return np.delete(means, 4, axis=1), means[:, 4]


def _iris() -> Arrays:
    table = _shipped("iris").data
    return table[:, :3], table[:, 3]


def _digits() -> Arrays:
    images = _shipped("digits").data
    return images[:, :32], images[:, 32:]


def _california() -> Arrays:
    with _file("california_housing.npz").open("rb") as opened, np.load(opened, allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    shapes = {name: each.shape for name, each in arrays.items()}
    if shapes.get("X") != (20640, 8) or shapes.get("y") != (20640,):
        raise ValueError(
            f"california_housing.npz must hold X of shape (20640, 8) and y of shape (20640,), got {shapes}"
        )
    return arrays["X"], arrays["y"]


def _adult() -> Arrays:
    text = lzma.decompress(_file("adult_train_32561.csv.xz").read_bytes()).decode("utf-8")
    rows = [row for row in csv.reader(io.StringIO(text), skipinitialspace=True) if len(row) == 15 and row[0].isdigit()]
    if len(rows) != 32561:
        raise ValueError(f"adult_train_32561.csv.xz must hold 32,561 people of 15 columns, got {len(rows)}")
    numbers = [[float(row[column]) for column in _ADULT_NUMBERS] + [float(row[_ADULT_SEX] == "Male")] for row in rows]
    return np.array(numbers), np.array([float(row[0]) for row in rows])


def _file(name: str) -> Path:
    root = os.environ.get(ENVIRONMENT)
    path = Path(root or ".") / "tabular" / name
    if not root or not path.is_file():
        where = path if root else f"no folder given ({ENVIRONMENT})"
        raise ValueError(f"{name} was not found: looked in {where}; put it into <data folder>/tabular/")
    return path


SETS: dict[str, Callable[[], Arrays]] = {
    "diabetes": _diabetes,
    "california": _california,
    "adult": _adult,
    "linnerud": _linnerud,
    "wine": _wine,
    "breast-cancer": _breast_cancer,
    "iris": _iris,
    "digits": _digits,
}
