"""Rows on disk: one SQLite file to which rows are only ever added.

The path of a row: `Store.missing` names the runs without one, an executor trains them, `Store.append` writes each as it
arrives in a transaction of its own, and `Store.read` hands back one decisive row per run. When `append` has returned,
the row survives a kill, a full disk and a power cut. When two processes write to one file, each waits for the other.
`Store.extend` adds many rows in one transaction, all or none: the disk is waited for once. `Store.table` reads settings and
last numbers only, from what `decaycast.lab.table` packs beside each row: a million rows in a second or two.

Decisive means: the first finished row of a run, else its newest failed row. The file itself enforces this (a unique
index over finished rows; triggers that refuse to change or delete), so no caller can break it.

Why a rollback journal and not a write-ahead log: one row per training is rare, and a store stays a single file that
can be copied while nobody writes. Nothing read from a store or an export can execute code: it is JSON and float64s. What the
file holds, and what becomes of one by an older decaycast, tells `decaycast.lab.schema`.
"""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from decaycast.core.experiment import Row, Run, Scalar
from decaycast.lab import schema
from decaycast.lab.codec import COLUMNS, from_columns, from_line, to_columns, to_line
from decaycast.lab.schema import SCHEMA_VERSION
from decaycast.lab.table import Table, numbered, pack, unpack

EXPORT_VERSION = 1
_CACHE_KIB = 64 * 1024  # most memory for pages of the file: the index of a million keys fits
_FEW = 1000  # runs that are looked up one by one, rather than by reading all keys
_NAMES = ", ".join(COLUMNS)
_SELECT = f"SELECT {_NAMES} FROM decisive"
_OF_KEY = f"SELECT {_NAMES} FROM rows WHERE key = ?"
_FAILURES = """SELECT id, reason,
    EXISTS (SELECT 1 FROM rows AS o WHERE o.key = r.key AND o.status = 'done')
    OR EXISTS (SELECT 1 FROM rows AS o WHERE o.key = r.key AND o.status = 'failed' AND o.id > r.id)
    FROM rows AS r WHERE status = 'failed'"""
_INSERT = f"INSERT INTO rows ({_NAMES}) VALUES ({', '.join('?' * len(COLUMNS))}) ON CONFLICT DO NOTHING"
_Value = tuple[tuple[str | bytes, ...], str, bytes]  # a row: its columns, its shape, its packed numbers


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
            if self._version() < SCHEMA_VERSION:
                self._run(schema.UPGRADE)
            last = self._last()
            new = self._insert(values, last)
            shapes = {shape: self._shape(shape) for shape in dict.fromkeys(shape for _, shape, _ in new)}
            packed = ((row, shapes[shape], numbered(row, part)) for row, (_, shape, part) in enumerate(new, last + 1))
            self._db.executemany("INSERT INTO packed VALUES (?, ?, ?)", packed)
        return len(new)

    def read(self, where: Mapping[str, Scalar] | None = None, *, newest: int | None = None) -> list[Row]:
        """Decisive rows in the order they were stored; only those whose config has every entry of `where`.

        An entry None in `where` also matches a config without that entry. With `newest`, only that many rows at the end
        of the store are looked at.
        """
        wanted = dict(where or {})
        rows = []
        select = f"{_SELECT} ORDER BY id"
        if newest is not None:
            select = f"SELECT * FROM (SELECT id, {_NAMES} FROM decisive ORDER BY id DESC LIMIT ?) ORDER BY id"
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
            found = [self._decisive(run.key) for run in runs]
        return [from_columns(columns) for columns in found if columns is not None]

    def table(self) -> Table:
        """Settings and last numbers of the decisive rows, in the order they were stored; without curves, so it is fast."""
        with self._errors(), self._transaction("BEGIN"):
            return unpack(self._packed(), *self._failures())

    def missing(self, runs: Iterable[Run], *, retry_failed: bool = False) -> list[Run]:
        """The runs that still have to be trained, in order and each once; failed ones too with `retry_failed`."""
        asked = {run.key: run for run in runs}
        present: set[str] = set()
        with self._errors():
            for status in ("done",) if retry_failed else ("done", "failed"):
                keys = f"SELECT key FROM rows WHERE status = '{status}'"
                if len(asked) <= _FEW:
                    present |= {key for key in asked if self._db.execute(f"{keys} AND key = ?", (key,)).fetchone()}
                else:
                    present.update(key for (key,) in self._db.execute(keys))
        return [run for key, run in asked.items() if key not in present]

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write the decisive rows as gzipped JSON lines and return their number; equal rows give equal bytes.

        Rows are sorted by key, fractions in curves are rounded to 6 significant digits. The file appears whole or not.
        """
        with self._errors():
            rows = {columns[0]: to_line(from_columns(columns)) for columns in self._db.execute(_SELECT)}
        header, lines = (
            json.dumps({"decaycast": "rows", "version": EXPORT_VERSION}),
            [rows[key] for key in sorted(rows)],
        )
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

    def _insert(self, values: Sequence[_Value], last: int) -> Sequence[_Value]:
        """Add rows behind the `last`, and return those that are new rather than another finished row of their run."""
        before = self._db.total_changes
        self._db.executemany(_INSERT, (columns for columns, _, _ in values))
        if self._db.total_changes - before == len(values):
            return values
        added = deque(self._db.execute("SELECT key, status FROM rows WHERE id > ? ORDER BY id", (last,)))
        # A value that was refused has a finished row before it, so none of its run can come behind: the next match is it.
        return [value for value in values if added and value[0][:2] == added[0] and added.popleft()]

    def _last(self) -> int:
        """The id of the newest row, which is also how many there are: ids are given in turn and no row is deleted."""
        return self._db.execute("SELECT coalesce(max(id), 0) FROM rows").fetchone()[0]

    def _decisive(self, key: str) -> tuple[Any, ...] | None:
        finished = self._db.execute(f"{_OF_KEY} AND status = 'done'", (key,)).fetchone()
        return finished or self._db.execute(f"{_OF_KEY} AND status = 'failed' ORDER BY id DESC", (key,)).fetchone()

    def _shape(self, text: str) -> int | None:
        """The number of a shape in this file, which learns of new ones."""
        found = self._db.execute("SELECT id FROM shapes WHERE text = ?", (text,)).fetchone()
        return found[0] if found else self._db.execute("INSERT INTO shapes (text) VALUES (?)", (text,)).lastrowid

    def _has_packed(self) -> bool:
        return self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'packed'").fetchone() is not None

    def _packed(self) -> dict[str, bytes]:
        """By shape, all rows packed; what a decaycast without packing has stored is packed here."""
        parts: dict[str, list[bytes]] = {}
        others = f"SELECT id, {_NAMES} FROM rows"
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
        if sum(map(len, parts.values())) < self._last():
            for row, *columns in self._db.execute(others):
                shape, numbers = pack(from_columns(columns))
                parts.setdefault(shape, []).append(numbered(row, numbers))
        return {shape: b"".join(part) for shape, part in parts.items()}

    def _failures(self) -> tuple[dict[int, str], list[int]]:
        """By id, the reasons of failed rows that decide; and the ids of those that do not."""
        reasons, superseded = {}, []
        for row, reason, replaced in self._db.execute(_FAILURES):
            if replaced:
                superseded.append(row)
            else:
                reasons[row] = json.loads(reason)
        return reasons, superseded

    def _open(self) -> None:
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        if self._version() == 0:
            with self._transaction():
                if self._version() == 0:  # another process may have created the store in between
                    self._run(schema.CREATE)

    def _run(self, statements: Iterable[str]) -> None:
        for statement in statements:
            self._db.execute(statement)

    def _version(self) -> int:
        # One statement sees one state of the file, also while another process creates the store.
        version, application, tables = self._db.execute(
            "SELECT user_version, application_id, (SELECT count(*) FROM sqlite_master) "
            "FROM pragma_user_version, pragma_application_id"
        ).fetchone()
        if application != schema.APPLICATION_ID and (version or application or tables):
            raise StoreError(f"{self.path} is the database of another program, not a store; choose another path")
        _refuse_newer(self.path, version, SCHEMA_VERSION)
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
    _refuse_newer(path, version, EXPORT_VERSION)
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(from_line(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"damaged row in {path}, line {number}: {error}; fetch or export the file again"
            ) from error
    return rows


def _refuse_newer(path: str | os.PathLike[str], version: int, known: int) -> None:
    if version > known:
        raise StoreError(f"{path} has schema {version} and this decaycast reads up to {known}; update decaycast")
