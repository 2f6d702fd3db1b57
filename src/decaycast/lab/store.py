"""Rows on disk: one SQLite file to which rows are only ever added.

The path of a row: `Store.missing` names the runs without one, an executor trains them, `Store.append` writes each as it
arrives in a transaction of its own, and `Store.read` hands back one decisive row per run. When `append` has returned,
the row survives a kill, a full disk and a power cut. When two processes write to one file, each waits for the other.
`Store.extend` adds many rows in one transaction, all or none: the disk is waited for once. `Store.table` reads settings and
last numbers only, from what `decaycast.lab.table` packs beside each row: a million rows in a second or two.

Decisive means: the first finished row of a run, else its newest failed row. The file itself enforces this (a unique
index over finished rows; triggers that refuse to change or delete), so no caller can break it.

Why a rollback journal and not a write-ahead log: one row per training is rare, and a store stays a single file that
can be copied while nobody writes. Nothing read from a store or an export can execute code: it is JSON throughout.
"""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from decaycast.core.experiment import Row, Run, Scalar
from decaycast.lab.codec import COLUMNS, from_columns, from_line, to_columns, to_line
from decaycast.lab.table import Table, numbered, pack, unpack

SCHEMA_VERSION = 1
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
# Beside the rows, so that a decaycast without it reads and writes the same file; rows that such a one has added are packed
# when the table is read.
_PACKED_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS shapes (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    "CREATE TABLE IF NOT EXISTS packed (id INTEGER PRIMARY KEY, shape INTEGER NOT NULL, numbers BLOB NOT NULL)",
    "CREATE INDEX IF NOT EXISTS failed_rows ON rows (key) WHERE status = 'failed'",
)
_FEW = 1000  # runs that are looked up one by one, rather than by reading all keys
_SELECT = f"SELECT {', '.join(COLUMNS)} FROM decisive"
_INSERT = (
    f"INSERT INTO rows ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "
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
        return self.extend([row]) == 1

    def extend(self, rows: Iterable[Row]) -> int:
        """Write `rows` in one transaction, all of them or none, and return how many were new; errors as `append`."""
        values = [(to_columns(row), *pack(row)) for row in rows]
        with self._errors(), self._transaction():
            if not self._has_packed():
                self._create(_PACKED_SCHEMA)
            shapes: dict[str, int] = {}
            return sum(self._insert(*value, shapes) for value in values)

    def read(self, where: Mapping[str, Scalar] | None = None, *, newest: int | None = None) -> list[Row]:
        """Decisive rows in the order they were stored; only those whose config has every entry of `where`.

        An entry None in `where` also matches a config without that entry. With `newest`, only that many rows at the end
        of the store are looked at.
        """
        wanted = dict(where or {})
        rows = []
        select = f"{_SELECT} ORDER BY id"
        if newest is not None:
            select = (
                f"SELECT * FROM (SELECT id, {', '.join(COLUMNS)} FROM decisive ORDER BY id DESC LIMIT ?) ORDER BY id"
            )
        with self._errors():
            for columns in self._db.execute(select, () if newest is None else (newest,)):
                columns = columns if newest is None else columns[1:]
                config = json.loads(columns[COLUMNS.index("config")])
                if all(config.get(name) == value for name, value in wanted.items()):
                    rows.append(from_columns(columns))
        return rows

    def rows_of(self, runs: Iterable[Run]) -> list[Row]:
        """Decisive rows of `runs` in their order, one for each; runs without a row are left out."""
        with self._errors():
            found = [self._db.execute(f"{_SELECT} WHERE key = ?", (run.key,)).fetchone() for run in runs]
        return [from_columns(columns) for columns in found if columns is not None]

    def table(self) -> Table:
        """Settings and last numbers of the decisive rows, in the order they were stored; without curves, so it is fast."""
        with self._errors(), self._transaction("BEGIN"):
            return unpack(self._packed(), *self._failures())

    def missing(self, runs: Iterable[Run], *, retry_failed: bool = False) -> list[Run]:
        """The runs that still have to be trained, in order and each once; failed ones too with `retry_failed`."""
        asked = {run.key: run for run in runs}
        with self._errors():
            if len(asked) <= _FEW:
                found = [
                    row
                    for key in asked
                    for row in self._db.execute("SELECT key, status FROM rows WHERE key = ?", (key,))
                ]
            else:
                found = self._db.execute("SELECT key, status FROM rows").fetchall()
        present = {key for key, status in found if status == "done" or not retry_failed}
        return [run for key, run in asked.items() if key not in present]

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write the decisive rows as gzipped JSON lines and return their number; equal rows give equal bytes.

        Rows are sorted by key, fractions in curves are rounded to 6 significant digits. The file appears whole or not.
        """
        with self._errors():
            lines = [to_line(from_columns(columns)) for columns in self._db.execute(f"{_SELECT} ORDER BY key")]
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
        return self.extend(new)

    def _insert(self, columns: tuple[str, ...], shape: str, numbers: bytes, known: dict[str, int]) -> bool:
        cursor = self._db.execute(_INSERT, columns)
        if cursor.rowcount != 1:
            return False
        row = cursor.lastrowid
        if shape not in known:
            self._db.execute("INSERT OR IGNORE INTO shapes (text) VALUES (?)", (shape,))
            (known[shape],) = self._db.execute("SELECT id FROM shapes WHERE text = ?", (shape,)).fetchone()
        self._db.execute("INSERT INTO packed VALUES (?, ?, ?)", (row, known[shape], numbered(row or 0, numbers)))
        return True

    def _has_packed(self) -> bool:
        return self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'packed'").fetchone() is not None

    def _packed(self) -> dict[str, bytes]:
        """By shape, all rows packed; what another version of decaycast has stored is packed here."""
        parts: dict[str, list[bytes]] = {}
        others = f"SELECT id, {', '.join(COLUMNS)} FROM rows"
        if self._has_packed():
            texts = dict(self._db.execute("SELECT id, text FROM shapes"))
            if len(texts) == 1:  # a sweep: its rows need no sorting one by one
                parts = {
                    text: list(chain.from_iterable(self._db.execute("SELECT numbers FROM packed")))
                    for text in texts.values()
                }
            else:
                by_shape: dict[int, list[bytes]] = {number: [] for number in texts}
                for shape, numbers in self._db.execute("SELECT shape, numbers FROM packed"):
                    by_shape[shape].append(numbers)
                parts = {texts[number]: part for number, part in by_shape.items() if part}
            others += " WHERE id NOT IN (SELECT id FROM packed)"
        if sum(map(len, parts.values())) < self._db.execute("SELECT count(*) FROM rows").fetchone()[0]:
            for row, *columns in self._db.execute(others):
                shape, numbers = pack(from_columns(columns))
                parts.setdefault(shape, []).append(numbered(row, numbers))
        return {shape: b"".join(part) for shape, part in parts.items()}

    def _failures(self) -> tuple[dict[int, str], list[int]]:
        """By id, the reasons of failed rows that decide; and the ids of those that do not."""
        reasons, superseded = {}, []
        for row, reason, decides in self._db.execute(
            "SELECT id, reason, NOT EXISTS (SELECT 1 FROM rows AS o WHERE o.key = r.key AND (o.status = 'done' OR "
            "o.id > r.id)) FROM rows AS r WHERE status = 'failed'"
        ):
            if decides:
                reasons[row] = json.loads(reason)
            else:
                superseded.append(row)
        return reasons, superseded

    def _open(self) -> None:
        self._db.execute("PRAGMA synchronous = FULL")
        if self._version() == 0:
            with self._transaction():
                if self._version() == 0:  # another process may have created the store in between
                    self._create((*_SCHEMA, *_PACKED_SCHEMA))

    def _create(self, schema: Iterable[str]) -> None:
        for statement in schema:
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
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        self._db.execute(begin)
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
            case sqlite3.SQLITE_IOERR:
                return (
                    f"store {self.path} cannot be written or read ({error}): the disk fails, is gone, or a quota or size limit "
                    "is reached; finished rows are safe, remedy it and run again"
                )
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
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(from_line(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"damaged row in {path}, line {number}: {error}; fetch or export the file again"
            ) from error
    return rows


def _refuse_newer(path: str | os.PathLike[str], version: int) -> None:
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema {version} and this decaycast reads up to {SCHEMA_VERSION}; update decaycast"
        )
