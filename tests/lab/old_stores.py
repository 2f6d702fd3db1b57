"""Stores as a decaycast of schema 1 wrote them, made by hand: numbers are JSON, and a third index stands over all rows."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from decaycast.core.experiment import Row
from decaycast.lab.table import numbered, pack

SCHEMA = """
CREATE TABLE rows (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
    seed TEXT NOT NULL, config TEXT NOT NULL, reason TEXT NOT NULL, seconds TEXT NOT NULL,
    final TEXT NOT NULL, provenance TEXT NOT NULL, curve TEXT NOT NULL);
CREATE INDEX rows_by_key ON rows (key, status);
CREATE UNIQUE INDEX one_done_row ON rows (key) WHERE status = 'done';
CREATE TRIGGER no_update BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'rows are append-only'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'rows are append-only'); END;
CREATE VIEW decisive AS SELECT * FROM rows AS r WHERE r.status = 'done' OR NOT EXISTS (
    SELECT 1 FROM rows AS o WHERE o.key = r.key AND (o.status = 'done' OR o.id > r.id));
PRAGMA application_id = 1145258323;
PRAGMA user_version = 1;
"""
PACKED = """
CREATE TABLE shapes (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE packed (id INTEGER PRIMARY KEY, shape INTEGER NOT NULL, numbers BLOB NOT NULL);
CREATE INDEX failed_rows ON rows (key) WHERE status = 'failed';
"""


def make_old_store(path: Path, rows: Sequence[Row], *, packed: bool) -> None:
    """A file of schema 1 with `rows`; `packed` as the later ones of that schema packed them for the table."""
    db = sqlite3.connect(path)
    db.executescript(SCHEMA + (PACKED if packed else ""))
    add_old_rows(db, rows)
    for number, row in enumerate(rows if packed else (), start=1):
        shape, numbers = pack(row)
        db.execute("INSERT OR IGNORE INTO shapes (text) VALUES (?)", (shape,))
        (place,) = db.execute("SELECT id FROM shapes WHERE text = ?", (shape,)).fetchone()
        db.execute("INSERT INTO packed VALUES (?, ?, ?)", (number, place, numbered(number, numbers)))
    db.commit()
    db.close()


def add_old_rows(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    for row in rows:
        texts = [row.run.seed, dict(row.run.config), row.reason, plain(row.seconds)]
        texts.append({name: plain(value) for name, value in row.final.items()})
        texts.append(dict(row.provenance))
        texts.append({name: [plain(value) for value in column] for name, column in row.curve.items()})
        values = [row.run.key, row.status, *(json.dumps(text, separators=(",", ":")) for text in texts)]
        db.execute(
            "INSERT INTO rows (key, status, seed, config, reason, seconds, final, provenance, curve) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            values,
        )


def plain(value: float) -> float | str | None:
    """A number as schema 1 had it in JSON."""
    if math.isnan(value):
        return None
    return str(float(value)) if math.isinf(value) else value
