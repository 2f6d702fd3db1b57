"""Rows as a table: what a sweep of a million trainings is read, sorted and exported as.

A row's settings and last numbers are packed when it is stored: its number in the store, its key in 10 bytes, then one
float64 for each number. The names of the numbers and everything that is text form its *shape*, of which a sweep has a
handful; so a million rows are read as a few numpy arrays. Curves, reasons and provenance stay in the rows alone.

Columns of a `Table`, in this order: key, status, reason, seed, seconds; the settings of the run under their own names;
the numbers of `Row.final`; and the last measured value of each column of the curve, as ``last_validation_loss`` and so on.
A number of `Row.final` that has the name of another column is called ``final_...``. What a row does not have is NaN
in a column of numbers and None in one of texts.
"""

from __future__ import annotations

import csv
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from decaycast.core.experiment import Row, Scalar

KEY_BYTES = 10
_ID = struct.Struct("<q")
FORMATS = (".csv", ".parquet")
_HEAD = ("key", "status", "reason", "seed", "seconds")
_EXACT = 2**53  # whole numbers up to here are float64s; larger ones (seeds) are kept as text


class TableError(RuntimeError):
    """A table cannot be written; the message names the file and what to do next."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows as columns of one length: float64 arrays of numbers; arrays of text or objects for the rest."""

    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["key"])

    def __getitem__(self, name: str) -> np.ndarray:
        """One column.

        Raises:
            KeyError: there is none of this name; the message lists all.
        """
        if name not in self.columns:
            raise KeyError(f"the table has no column {name!r}; it has {', '.join(self.columns)}")
        return self.columns[name]

    def take(self, chosen: np.ndarray | Sequence[int]) -> Table:
        """The rows that a mask or a sequence of positions names."""
        return Table(columns={name: column[chosen] for name, column in self.columns.items()})

    def write(self, path: str | os.PathLike[str]) -> int:
        """Write the table as CSV or parquet, by the name's ending, and return its number of rows.

        In CSV a missing value is an empty field. The file appears whole or not.

        Raises:
            ValueError: another ending.
            ImportError: parquet without pyarrow.
            TableError: the file cannot be written.
        """
        target = Path(path)
        write = {".csv": _write_csv, ".parquet": _write_parquet}.get(target.suffix)
        if write is None:
            raise ValueError(f"a table is written as {' or '.join(FORMATS)}, got {target.name!r}; choose such a name")
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write(self, part)
            os.replace(part, target)
        except OSError as error:
            raise TableError(
                f"cannot write {target}: {error.strerror or error}; the store is unchanged, choose another path"
            ) from error
        finally:
            with suppress(OSError):
                part.unlink()
        return len(self)


# packing


def pack(row: Row) -> tuple[str, bytes]:
    """The shape of `row` as JSON text, and its key and numbers as bytes."""
    values = [row.status == "done", row.run.seed, row.seconds, *row.run.config.values()]
    kinds = [float, *map(type, values[1:])]
    for place, kind in enumerate(kinds):
        if kind is int and not -_EXACT <= values[place] <= _EXACT:
            values[place], kinds[place] = str(values[place]), str
    last = [column[-1] for column in row.curve.values() if len(column)]
    names, are_numbers, are_texts = _layout(
        tuple(row.run.config), tuple(kinds), tuple(row.final), tuple(row.curve) if last else ()
    )
    numbers = [*compress(values, are_numbers), *row.final.values(), *last]
    shape = _shape(names, tuple(compress(values, are_texts)))
    return shape, struct.pack(f"<{KEY_BYTES}s{len(numbers)}d", bytes.fromhex(row.run.key), *numbers)


@lru_cache(maxsize=1024)
def _layout(
    config: tuple[str, ...], kinds: tuple[type, ...], final: tuple[str, ...], curve: tuple[str, ...]
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], list[bool], list[bool]]:
    """The names of the numbers and of the texts of a row, and which of its values are which; `kinds` are their types."""
    are_numbers = [issubclass(kind, (int, float)) and kind is not bool for kind in kinds]
    are_texts = [not number for number in are_numbers]
    first = ["done", "seed", "seconds", *(f"config {name}" for name in config)]
    numbers = [*compress(first, are_numbers), *(f"final {name}" for name in final), *(f"last {name}" for name in curve)]
    return (tuple(numbers), tuple(compress(first, are_texts))), are_numbers, are_texts


_encode = json.JSONEncoder(separators=(",", ":")).encode


@lru_cache(maxsize=1024)
def _shape(names: tuple[tuple[str, ...], tuple[str, ...]], texts: tuple[Scalar, ...]) -> str:
    numbers, named = names
    return _encode({"numbers": numbers, "texts": dict(zip(named, texts, strict=True))})


def numbered(row: int, packed: bytes) -> bytes:
    """Packed numbers behind the id of their row, which tells the order in which rows of several shapes were stored."""
    return _ID.pack(row) + packed


def unpack(packed: Mapping[str, bytes], reasons: Mapping[int, str], drop: Sequence[int]) -> Table:
    """The table of packed rows.

    Args:
        packed: by shape, its rows one after the other, each `numbered`.
        reasons: by id, why a row failed.
        drop: ids that are left out.
    """
    shapes = [json.loads(shape) for shape in packed]
    rows = [np.frombuffer(part, dtype=_record(shape)) for shape, part in zip(shapes, packed.values(), strict=True)]
    ids = np.concatenate([part["id"] for part in rows]) if rows else np.empty(0, dtype=np.int64)
    columns: dict[str, np.ndarray] = {}
    start = 0
    for shape, part in zip(shapes, rows, strict=True):
        _fill(columns, slice(start, start + len(part)), len(ids), shape, part["numbers"])
        start += len(part)
    keys = b"".join(part["key"].tobytes() for part in rows)
    table = Table(columns=_named(columns, keys, ids, reasons))
    order = np.argsort(ids, kind="stable")
    if len(drop):
        order = order[~np.isin(ids[order], drop)]
    return table if len(order) == len(ids) and (np.diff(ids) > 0).all() else table.take(order)


def _record(shape: Mapping[str, Any]) -> np.dtype:
    return np.dtype([("id", "<i8"), ("key", np.uint8, KEY_BYTES), ("numbers", "<f8", len(shape["numbers"]))])


def _fill(
    columns: dict[str, np.ndarray], part: slice, count: int, shape: Mapping[str, Any], numbers: np.ndarray
) -> None:
    """Write the rows of one shape into their places `part` of the columns."""
    by_name = np.ascontiguousarray(numbers.reshape(len(numbers), len(shape["numbers"])).T)
    for name, column in zip(shape["numbers"], by_name, strict=True):
        if len(column) == count:
            columns[name] = column
        else:
            into = columns.setdefault(name, np.full(count, math.nan))
            into[part] = column  # a column of texts (a setting that is a number here and a text there) takes both
    for name, value in shape["texts"].items():
        into = columns.get(name)
        if into is None or into.dtype != object:
            mixed = np.full(count, None, dtype=object)
            if into is not None:
                here = ~np.isnan(into)
                mixed[here] = into[here]
            columns[name] = into = mixed
        into[part] = value


def _named(
    packed: Mapping[str, np.ndarray], keys: bytes, ids: np.ndarray, reasons: Mapping[int, str]
) -> dict[str, np.ndarray]:
    """The columns under the names that people read, in order."""
    done = packed.get("done", np.empty(0)) == 1
    reason = np.full(len(ids), "", dtype=object)
    for place in np.flatnonzero(~done) if reasons else ():
        reason[place] = reasons.get(int(ids[place]), "")
    columns: dict[str, np.ndarray] = {
        "key": np.frombuffer(keys.hex().encode(), dtype=f"S{2 * KEY_BYTES}").astype(str),
        "status": np.where(done, "done", "failed"),
        "reason": reason,
        "seed": packed.get("seed", np.empty(0)),
        "seconds": packed.get("seconds", np.empty(0)),
    }
    for section, prefix in (("config ", ""), ("final ", ""), ("last ", "last_")):
        for name in [name for name in packed if name.startswith(section)]:
            plain = prefix + name.removeprefix(section)
            while plain in columns:
                plain = f"{section.strip()}_{plain}"
            columns[plain] = packed[name]
    return columns


# files


def _write_csv(table: Table, path: Path) -> None:
    columns = [_fields(column) for column in table.columns.values()]
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(zip(*columns, strict=True))


def _fields(column: np.ndarray) -> list[Any]:
    """Values as CSV has them: nothing for a missing one, whole numbers without a point."""
    values = column.tolist()
    if column.dtype.kind == "U":
        return values
    return [_field(value) if isinstance(value, float) else value for value in values]  # nothing is written for None


def _field(value: float) -> Any:
    if math.isnan(value):
        return ""
    return int(value) if value.is_integer() and abs(value) <= _EXACT else value


def _write_parquet(table: Table, path: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("parquet files are written with pyarrow: pip install 'decaycast[parquet]'") from error
    arrays = {name: pyarrow.array(_typed(column), from_pandas=True) for name, column in table.columns.items()}
    parquet.write_table(pyarrow.table(arrays), path)


def _typed(column: np.ndarray) -> np.ndarray | list[Any]:
    """A column of one type: texts where a setting has several."""
    if column.dtype != object:
        return column
    values = column.tolist()
    if len({type(value) for value in values if value is not None} - {str}) == 0:
        return [_utf8(value) for value in values]
    one = len({type(value) for value in values if value is not None}) == 1
    return values if one else [None if value is None else _utf8(str(value)) for value in values]


def _utf8(text: str | None) -> str | None:
    # reasons may quote file names that are no text; parquet holds UTF-8 alone
    return text and text.encode("utf-8", "backslashreplace").decode()
