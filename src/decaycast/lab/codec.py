"""Rows as a database and its exports hold them. Nothing read from either can execute code: it is JSON and float64s.

An export is JSON lines: a missing value (NaN) is null and an infinite one the text "inf" or "-inf", because plain JSON has
neither; all come back as the floats they were, only the sign of a negative zero is lost.

The database holds one text or blob for each of `COLUMNS`. Texts are JSON (key and status as they are), which also holds what
SQLite cannot: seeds of more than 64 bits, and reasons with undecodable file names in them. `final` and `curve` are blobs:
a line of JSON with the names, then the float64s of each column, lowest byte first; every float comes back bit for bit.
Writing 480 numbers so takes a twentieth of the time of JSON. In both, integers come back as floats.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, cast

from decaycast.core.experiment import Row, Run

EXPORT_DIGITS = 6
COLUMNS = ("key", "status", "seed", "config", "reason", "seconds", "final", "provenance", "curve")


def _encode(value: float) -> float | str | None:
    value = float(value)
    if value - value != 0:
        return None if math.isnan(value) else str(value)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _decode(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _round(value: float | str | None) -> float | str | None:
    # Step numbers are whole and may have more digits than we keep of a loss.
    return float(f"{value:.{EXPORT_DIGITS}g}") if isinstance(value, float) else value


def _to_record(row: Row) -> dict[str, Any]:
    return {
        "key": row.run.key,
        "status": row.status,
        "seed": row.run.seed,
        "config": dict(row.run.config),
        "reason": row.reason,
        "seconds": _encode(row.seconds),
        "final": {name: _encode(value) for name, value in row.final.items()},
        "provenance": dict(row.provenance),
        "curve": {name: [_encode(value) for value in column] for name, column in row.curve.items()},
    }


def _from_record(record: Mapping[str, Any]) -> Row:
    return Row(
        run=Run(config=record["config"], seed=record["seed"]),
        status=record["status"],
        reason=record["reason"],
        curve=_decode_curve(record["curve"]),
        final=_decode_final(record["final"]),
        seconds=_decode(record["seconds"]),
        provenance=record["provenance"],
    )


def _decode_curve(columns: Mapping[str, Sequence[Any]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(map(_decode, column)) for name, column in columns.items()}


def _decode_final(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {name: _decode(value) for name, value in numbers.items()}


_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def to_columns(row: Row) -> tuple[str | bytes, ...]:
    """What the database holds of `row`: one text or blob for each of `COLUMNS`.

    Raises:
        ValueError: the columns of the curve differ in length.
    """
    if len(set(map(len, row.curve.values()))) > 1:
        lengths = {name: len(column) for name, column in row.curve.items()}
        raise ValueError(f"columns of a curve must have one length, got {lengths}; pad missing values with NaN")
    return (
        row.run.key,
        row.status,
        _text(row.run.seed),
        _dumps(dict(row.run.config)),
        _text(row.reason),
        _text(_encode(row.seconds)),
        _blob(row.final, row.final.values()),
        _words(row.provenance),
        _blob(row.curve, chain.from_iterable(row.curve.values())),
    )


def from_columns(columns: Sequence[Any]) -> Row:
    """The row that `to_columns` was given, or that a decaycast of schema 1 has stored, where numbers are JSON."""
    _, status, seed, config, reason, seconds, final, provenance, curve = columns
    return Row(
        run=Run(config=json.loads(config), seed=json.loads(seed)),
        status=status,
        reason=json.loads(reason),
        curve=_unblob(curve) if isinstance(curve, bytes) else _decode_curve(json.loads(curve)),
        final={name: value for name, (value,) in _unblob(final).items()}
        if isinstance(final, bytes)
        else _decode_final(json.loads(final)),
        seconds=_decode(json.loads(seconds)),
        provenance=json.loads(provenance),
    )


def _text(value: Any) -> str:
    """JSON of `value`; short ways for what most rows have, since starting the encoder takes longer than its work."""
    if type(value) is int or type(value) is float:
        return repr(value)  # `_encode` leaves no float that is not finite
    return '""' if value == "" else _dumps(value)


def _words(texts: Mapping[str, str]) -> str:
    """JSON of a provenance, remembered: the rows of a sweep share it."""
    values = tuple(texts.values())
    if set(map(type, values)) <= {str}:  # other values can be equal without being the same: 1 and True
        return _shared_words(tuple(texts), values)
    return _dumps(dict(texts))


@lru_cache(maxsize=64)
def _shared_words(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    return _dumps(dict(zip(names, values, strict=True)))


def _blob(names: Iterable[str], numbers: Iterable[float]) -> bytes:
    """The `numbers` of columns of equal length, one column after the other, behind their names."""
    values = [*numbers]
    return _head(tuple(names)) + struct.pack(f"<{len(values)}d", *values)


@lru_cache(maxsize=256)
def _head(names: tuple[str, ...]) -> bytes:
    return _dumps(names).encode() + b"\n"  # JSON has no other line break


def _unblob(blob: bytes) -> dict[str, tuple[float, ...]]:
    """The columns that `_blob` was given."""
    head, _, body = blob.partition(b"\n")
    names, values = _names(head), struct.unpack(f"<{len(body) // 8}d", body)
    length = len(values) // max(len(names), 1)
    return {name: values[place * length : (place + 1) * length] for place, name in enumerate(names)}


@lru_cache(maxsize=256)
def _names(head: bytes) -> tuple[str, ...]:
    return tuple(json.loads(head))


def to_line(row: Row) -> str:
    """A line of an export: JSON with sorted names, fractions in curves rounded to `EXPORT_DIGITS` significant digits."""
    record = _to_record(row)
    record["curve"] = {name: [_round(value) for value in column] for name, column in record["curve"].items()}
    return json.dumps(record, separators=(",", ":"), allow_nan=False, sort_keys=True)


def from_line(line: str) -> Row:
    """The row of a line that `to_line` has made.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    record = cast(dict[str, Any], json.loads(line))
    row = _from_record(record)
    if row.status not in ("done", "failed") or row.run.key != record["key"]:
        raise ValueError("its key or status does not fit its contents")
    return row
