"""What a store's file holds, as SQL: its tables, what it refuses, and how a file of an older decaycast becomes a new one.

Schema 2 keeps the numbers of a row as float64s (`decaycast.lab.codec`), schema 1 as JSON. A file of schema 1 is read as it
is. The first call that adds rows to it raises its schema in the same transaction, because an older decaycast could not read
them: that one then says so and asks for an update. The rows that are there stay as they are, byte for byte, and both kinds
are read side by side. Writing JSON into older files for ever would need both ways of writing, and their appends would stay slow.

Each key stands in one index, that of the finished or that of the failed rows. Keys are random, so in a large file each index
costs the reading and writing of a page per row. Queries name the status, or SQLite would find no index for them; the
indexes hold it too, so that a search for keys reads nothing else. A file that was made with schema 1 has a third index,
over all rows; it is kept.
"""

from __future__ import annotations

SCHEMA_VERSION = 2
APPLICATION_ID = 0x44434153  # "DCAS": tells our file from any other SQLite database

_ROWS = (
    """CREATE TABLE rows (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
        seed TEXT NOT NULL, config TEXT NOT NULL, reason TEXT NOT NULL, seconds TEXT NOT NULL,
        final BLOB NOT NULL, provenance TEXT NOT NULL, curve BLOB NOT NULL)""",
    "CREATE UNIQUE INDEX one_done_row ON rows (key, status) WHERE status = 'done'",
    "CREATE TRIGGER no_update BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'rows are append-only'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'rows are append-only'); END",
    """CREATE VIEW decisive AS SELECT * FROM rows AS r WHERE r.status = 'done' OR NOT (
        EXISTS (SELECT 1 FROM rows AS o WHERE o.key = r.key AND o.status = 'done')
        OR EXISTS (SELECT 1 FROM rows AS o WHERE o.key = r.key AND o.status = 'failed' AND o.id > r.id))""",
    f"PRAGMA application_id = {APPLICATION_ID}",
)
# What a file of schema 1 lacks, or has if its decaycast already packed rows.
UPGRADE = (
    "CREATE TABLE IF NOT EXISTS shapes (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    "CREATE TABLE IF NOT EXISTS packed (id INTEGER PRIMARY KEY, shape INTEGER NOT NULL, numbers BLOB NOT NULL)",
    "CREATE INDEX IF NOT EXISTS failed_rows ON rows (key, status) WHERE status = 'failed'",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
CREATE = (*_ROWS, *UPGRADE)
