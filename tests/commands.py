"""The command line called as its user does, in this process: what the tests of every verb share."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from decaycast import cli


class Ended(NamedTuple):
    """How a call ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def words(self) -> str:
        """All of stdout without borders, in one line."""
        return " ".join(re.sub(r"[^\x00-\x7f]", " ", self.out).split())


Command = Callable[..., Ended]


def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path, *verb: str, columns: int = 150
) -> Command:
    """What runs `decaycast VERB ...` in `folder`, through the entry point, without data of this machine."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("DECAYCAST_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["decaycast", *verb, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), *capfd.readouterr())

    return run


def error_line(ended: Ended) -> str:
    """The one line on stderr of a call refused with exit code 2."""
    assert ended.code == 2 and ended.out == ""
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.err
    return lines[0]
