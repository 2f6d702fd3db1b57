"""Rows as JSON: what a store and its exports are made of. Nothing read from them can execute code.

Numbers: a missing value (NaN) is stored as null and an infinite one as the text "inf" or "-inf", because plain JSON has
neither; all come back as the floats they were, only the sign of a negative zero is lost. Integers come back as floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
    lengths = {name: len(column) for name, column in row.curve.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of a curve must have one length, got {lengths}; pad missing values with NaN")
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
        curve={name: tuple(map(_decode, column)) for name, column in record["curve"].items()},
        final={name: _decode(value) for name, value in record["final"].items()},
        seconds=_decode(record["seconds"]),
        provenance=record["provenance"],
    )


# Columns stored as they are. All others are JSON text, which also holds what SQLite cannot: seeds of more than 64 bits,
# and reasons with undecodable file names in them.
_PLAIN = ("key", "status")


_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def to_columns(row: Row) -> tuple[str, ...]:
    """What the database holds of `row`, one text for each of `COLUMNS`.

    Raises:
        ValueError: the columns of the curve differ in length.
    """
    return tuple(value if name in _PLAIN else _text(value) for name, value in _to_record(row).items())


def _text(value: Any) -> str:
    """JSON of `value`; short ways for what most rows have, since starting the encoder takes longer than its work."""
    if type(value) is int or type(value) is float:
        return repr(value)  # the record holds no float that is not finite
    return '""' if value == "" else "{}" if value == {} else _dumps(value)


def from_columns(columns: Sequence[Any]) -> Row:
    """The row that `to_columns` was given."""
    pairs = zip(COLUMNS, columns, strict=True)
    return _from_record({name: value if name in _PLAIN else json.loads(value) for name, value in pairs})


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
