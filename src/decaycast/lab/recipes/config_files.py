"""Configuration files as names and values, read without running code, and checked access to the values.

JSON is read by the standard library. Of YAML only what timm writes is read: `key: value` lines and lists of plain values.
Pickles (training_args.bin, checkpoints) are refused unread: unpickling runs whatever the file says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_BYTES = 1_000_000
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar")


def load(path: Path) -> dict[str, Any]:
    """The names and values in a JSON or flat YAML file; a ValueError says what is wrong with it.

    Raises:
        ValueError: a pickle, a binary or oversized file, broken or nested syntax, a name twice.
        OSError: it cannot be read.
    """
    if path.suffix.lower() in PICKLES:
        raise _pickle(path.name)
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if raw[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise _pickle(path.name)
    if len(raw) > MOST_BYTES:
        raise ValueError(f"{path.name} has more than {MOST_BYTES:,} bytes: no training configuration is that large")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path.name} is not a text file; a JSON or YAML configuration is expected")
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        return _json(path.name, text)
    return flat_yaml(path.name, text)


def _pickle(name: str) -> ValueError:
    return ValueError(
        f"{name} is a pickle (torch.save); it is not read, because unpickling can run code. In the environment that wrote it, "
        "save the arguments as text: open('args.json', 'w').write(args.to_json_string())"
    )


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be a configuration") from None
    except ValueError as error:  # JSONDecodeError is one; so are the two refusals below
        raise ValueError(f"{name} is not a JSON configuration: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} holds a {type(values).__name__}, not an object with the recipe's names and values")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{twice[0]!r} stands in it twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_LINE = re.compile(r"([A-Za-z_][\w.-]*):(?:\s+(.*))?$")
NUMBER = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$")


def flat_yaml(name: str, text: str) -> dict[str, Any]:
    """`key: value` lines, each key once, and lists of plain values under a key; anything else of YAML is refused.

    Raises:
        ValueError: a line of another form, with its number.
    """
    values: dict[str, Any] = {}
    last = None  # the key whose value may follow as a list
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{name}, line {number}"
        stripped = _uncommented(line).rstrip()
        if not stripped or stripped == "---":
            continue
        item = re.match(r" *- +(\S.*)$", stripped)
        if item and last is not None:
            values[last] = [*(values[last] or []), _scalar(item[1], where)]
            continue
        found = _LINE.match(stripped)
        if not found:
            raise ValueError(
                f"{where}: {line.strip()[:40]!r} is no 'key: value'; nested values and other YAML are not read. Remove the line, "
                "or give the recipe as options"
            )
        if found[1] in values:
            raise ValueError(f"{where}: {found[1]!r} stands in the file twice")
        values[found[1]] = _scalar(found[2] or "", where)
        last = None if found[2] else found[1]
    return values


def _uncommented(line: str) -> str:
    return (
        line
        if line.lstrip().startswith(("'", '"')) or re.search(r":\s+['\"]", line)
        else re.sub(r"(^|\s)#.*", "", line)
    )


def _scalar(text: str, where: str) -> Any:
    quoted = re.fullmatch(r"'((?:[^']|'')*)'|\"([^\"\\]*)\"", text)
    if quoted:
        return quoted[1].replace("''", "'") if quoted[1] is not None else quoted[2]
    if text in ("[]", "{}"):
        return [] if text == "[]" else {}
    if re.fullmatch(r"\[[^\[\]{}'\"]*\]", text):
        return [_scalar(part.strip(), where) for part in text[1:-1].split(",")]
    if text[:1] in tuple("!&*|>%@`{}[],'\"?") or re.search(r":\s", text):
        raise ValueError(
            f"{where}: {text[:40]!r} is YAML beyond plain values, which is not read; give the recipe as options"
        )
    plain = {"": None, "null": None, "~": None, "true": True, "false": False}
    if text.lower() in plain:
        return plain[text.lower()]
    if NUMBER.match(text):
        return float(text) if re.search(r"[.eE]", text) else int(text)
    return math.nan if text.lower() == ".nan" else math.inf if text.lower().lstrip("+-") == ".inf" else text


@dataclass(frozen=True)
class Config:
    """Checked access to the values of a file."""

    name: str
    values: Mapping[str, Any]

    def number(self, key: str, default: float | None = None, *, least: float = 0.0, zero: bool = True) -> float | None:
        """A finite number >= `least` (without `zero`: and not 0); `default` where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, str):
            raise ValueError(f"{self.name}: {key} must be a number, got the text {value[:40]!r}; remove the quotes")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{self.name}: {key} must be a number, got {type(value).__name__}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number >= least and (zero or number)):
            bound = f">= {least:g}" if zero else f"> {least:g}"
            raise ValueError(f"{self.name}: {key} must be a finite number {bound}, got {number:g}")
        return number

    def whole(self, key: str, default: int | None = None, *, least: int = 0) -> int | None:
        """A whole number >= `least`; `default` where the key is absent or null."""
        number = self.number(key, default, least=least)
        if number is not None and number != int(number):
            raise ValueError(f"{self.name}: {key} must be a whole number, got {number:g}")
        return None if number is None else int(number)

    def text(self, key: str, default: str) -> str:
        """A text; `default` where the key is absent, null or empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.name}: {key} must be a name, got {type(value).__name__}")
        return value or default

    def flag(self, key: str) -> bool:
        """True or false; false where the key is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{self.name}: {key} must be true or false, got {type(value).__name__}")
        return bool(value)

    def devices(self, given: int | None) -> tuple[int, list[str]]:
        """World size, and a note where it is assumed."""
        said = self.whole("world_size", least=1)
        if given is not None or said is not None:
            return given or said or 1, []
        return 1, ["one device is assumed; give --world-size if there were more"]
