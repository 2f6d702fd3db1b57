"""Rows on disk: one SQLite file to which rows are only ever added.

The path of a row: `Store.missing` names the runs without one, an executor trains them, `Store.append` writes each as it
arrives in a transaction of its own, and `Store.read` hands back one decisive row per run. When `append` has returned,
the row survives a kill, a full disk and a power cut. When two processes write to one file, each waits for the other.

Decisive means: the first finished row of a run, else its newest failed row. The file itself enforces this (a unique
index over finished rows; triggers that refuse to change or delete), so no caller can break it.

Numbers: a missing value (NaN) is stored as null and an infinite one as the text "inf" or "-inf", because plain JSON has
neither; all come back as the floats they were, only the sign of a negative zero is lost. Integers come back as floats.

Why a rollback journal and not a write-ahead log: one row per training is rare, and a store stays a single file that
can be copied while nobody writes. Nothing read from a store or an export can execute code: it is JSON throughout.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from decaycast.core.experiment import Row, Run, Scalar

SCHEMA_VERSION = 1
EXPORT_DIGITS = 6
_APPLICATION_ID = 0x44434153  # "DCAS": tells our file from any other SQLite database
_SCHEMA = (
    """CREATE TABLE rows (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
        seed TEXT NOT NULL, config TEXT NOT NULL, reason TEXT NOT NULL, seconds TEXT NOT NULL,
        final TEXT NOT NULL, provenance TEXT NOT NULL, curve TEXT NOT NULL)""",
    "CREATE INDEX rows_by_key ON rows (key, status)",
    "CREATE UNIQUE INDEX one_done_row ON rows (key) WHERE status = 'done'",
    "CREATE TRIGGER no_update BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'rows are append-only'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'rows are append-only'); END",
    """CREATE VIEW decisive AS SELECT * FROM rows AS r WHERE r.status = 'done' OR NOT EXISTS (
        SELECT 1 FROM rows AS o WHERE o.key = r.key AND (o.status = 'done' OR o.id > r.id))""",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_COLUMNS = ("key", "status", "seed", "config", "reason", "seconds", "final", "provenance", "curve")
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM decisive"
_INSERT = (
    f"INSERT INTO rows ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "
    "ON CONFLICT (key) WHERE status = 'done' DO NOTHING"
)


class StoreError(RuntimeError):
    """A store or an export cannot be opened, read or written; the message names the file and what to do next."""


class Store:
    """An append-only store of rows in one SQLite file, created with its folder when it does not exist.

    Use it as a context manager, and from the thread that opened it. Other threads and processes open the same path
    themselves; each of their calls waits up to `wait_seconds` for the file to become free.

    Raises:
        StoreError: the path is no store, was written by a newer decaycast, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, wait_seconds: float = 60.0) -> None:
        self.path = Path(path)
        self.wait_seconds = wait_seconds
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot create the folder of store {self.path}: {error.strerror}; choose a folder you can write to"
            ) from error
        with self._errors():
            self._db = sqlite3.connect(str(self.path.absolute()), timeout=wait_seconds, isolation_level=None)
        try:
            with self._errors():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Rows need no closing to be safe."""
        self._db.close()

    def append(self, row: Row) -> bool:
        """Write `row` and return True, or return False where its run has a finished row and `row` is another one.

        Raises:
            StoreError: the disk is full, the file is locked or read-only; rows stored before stay as they are.
            ValueError: the columns of the curve differ in length.
        """
        values = _to_columns(row)
        with self._errors():
            return self._db.execute(_INSERT, values).rowcount == 1

    def read(self, where: Mapping[str, Scalar] | None = None) -> list[Row]:
        """Decisive rows in the order they were stored; only those whose config has every entry of `where`.

        An entry None in `where` also matches a config without that entry.
        """
        wanted = dict(where or {})
        rows = []
        with self._errors():
            for columns in self._db.execute(f"{_SELECT} ORDER BY id"):
                config = json.loads(columns[_COLUMNS.index("config")])
                if all(config.get(name) == value for name, value in wanted.items()):
                    rows.append(_from_columns(columns))
        return rows

    def rows_of(self, runs: Iterable[Run]) -> list[Row]:
        """Decisive rows of `runs` in their order, one for each; runs without a row are left out."""
        with self._errors():
            found = [self._db.execute(f"{_SELECT} WHERE key = ?", (run.key,)).fetchone() for run in runs]
        return [_from_columns(columns) for columns in found if columns is not None]

    def missing(self, runs: Iterable[Run], *, retry_failed: bool = False) -> list[Run]:
        """The runs that still have to be trained, in order and each once; failed ones too with `retry_failed`."""
        with self._errors():
            have = dict(self._db.execute("SELECT key, max(status = 'done') FROM rows GROUP BY key"))
        present = {key for key, done in have.items() if done or not retry_failed}
        return list({run.key: run for run in runs if run.key not in present}.values())

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write the decisive rows as gzipped JSON lines and return their number; equal rows give equal bytes.

        Rows are sorted by key, fractions in curves are rounded to 6 significant digits. The file appears whole or not.
        """
        with self._errors():
            lines = [_to_line(_from_columns(columns)) for columns in self._db.execute(f"{_SELECT} ORDER BY key")]
        header = json.dumps({"decaycast": "rows", "version": SCHEMA_VERSION})
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(gzip.compress("\n".join([header, *lines, ""]).encode(), mtime=0))
            os.replace(part, target)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise StoreError(
                f"cannot write export {target}: {error.strerror}; the store is unchanged, choose another path"
            ) from error
        return len(lines)

    def import_(self, path: str | os.PathLike[str]) -> int:
        """Add the rows of an export and return how many were new: all of them are added, or none.

        A failed row is new only where its run has no row yet, so importing twice adds nothing.
        """
        rows = load_export(path)
        absent = {run.key for run in self.missing(row.run for row in rows)}
        new = [row for row in rows if row.status == "done" or row.run.key in absent]
        with self._errors(), self._transaction():
            return sum(self._db.execute(_INSERT, _to_columns(row)).rowcount for row in new)

    def _open(self) -> None:
        self._db.execute("PRAGMA synchronous = FULL")
        if self._version() == 0:
            with self._transaction():
                if self._version() == 0:  # another process may have created the store in between
                    for statement in _SCHEMA:
                        self._db.execute(statement)

    def _version(self) -> int:
        # One statement sees one state of the file, also while another process creates the store.
        version, application, tables = self._db.execute(
            "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_master) "
            "FROM pragma_user_version, pragma_application_id"
        ).fetchone()
        if application != _APPLICATION_ID and (version or application or tables):
            raise StoreError(f"{self.path} is the database of another program, not a store; choose another path")
        _refuse_newer(self.path, version)
        return version

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(self._explain(error)) from error

    def _explain(self, error: sqlite3.Error) -> str:
        # Extended codes keep the primary code in their low byte.
        match (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF:
            case sqlite3.SQLITE_FULL:
                return f"the disk of store {self.path} is full; finished rows are safe, free some space and run again"
            case sqlite3.SQLITE_NOTADB:
                return f"{self.path} is not a decaycast store (not a SQLite database); choose another path"
            case sqlite3.SQLITE_BUSY:
                return f"store {self.path} was locked by another process for {self.wait_seconds:g} s; try again later"
            case sqlite3.SQLITE_READONLY:
                return f"store {self.path} is read-only; make it and its folder writable or copy it elsewhere"
            case sqlite3.SQLITE_CANTOPEN:
                return f"cannot open store {self.path}; choose a file in a folder you can write to"
            case sqlite3.SQLITE_CORRUPT:
                return f"store {self.path} is damaged ({error}); restore it from a copy or import an export"
        return f"store {self.path} failed: {error}; rows stored before this are safe"


def load_export(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file written by `Store.export`.

    Raises:
        StoreError: the file is missing, truncated, damaged, of another format or of a newer schema.
    """
    try:
        lines = gzip.decompress(Path(path).read_bytes()).decode().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise StoreError(f"cannot read export {path}: {error}; fetch or export it again") from error
    try:
        header = json.loads(lines[0])
        version = header["version"] if header["decaycast"] == "rows" else None
    except (IndexError, ValueError, KeyError, TypeError):
        version = None
    if not isinstance(version, int):
        raise StoreError(f"{path} is not an export of decaycast rows; write one with Store.export")
    _refuse_newer(path, version)
    return [_from_line(line, f"{path}, line {number}") for number, line in enumerate(lines[1:], start=2)]


def _refuse_newer(path: str | os.PathLike[str], version: int) -> None:
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema {version} and this decaycast reads up to {SCHEMA_VERSION}; update decaycast"
        )


def _encode(value: float) -> float | str | None:
    value = float(value)
    if math.isnan(value):
        return None
    if math.isinf(value):
        return str(value)
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


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _to_columns(row: Row) -> tuple[str, ...]:
    return tuple(value if name in _PLAIN else _dumps(value) for name, value in _to_record(row).items())


def _from_columns(columns: Sequence[Any]) -> Row:
    pairs = zip(_COLUMNS, columns, strict=True)
    return _from_record({name: value if name in _PLAIN else json.loads(value) for name, value in pairs})


def _to_line(row: Row) -> str:
    record = _to_record(row)
    record["curve"] = {name: [_round(value) for value in column] for name, column in record["curve"].items()}
    return json.dumps(record, separators=(",", ":"), allow_nan=False, sort_keys=True)


def _from_line(line: str, place: str) -> Row:
    try:
        record = cast(dict[str, Any], json.loads(line))
        row = _from_record(record)
        if row.status not in ("done", "failed") or row.run.key != record["key"]:
            raise ValueError("its key or status does not fit its contents")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"damaged row in {place}: {error}; fetch or export the file again") from error
    return row
