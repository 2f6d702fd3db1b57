"""Headless Chromium for the tests of pages, driven by its command line.

Its window cannot be narrower than 500 px, so pages are looked at through frames of the width of a phone; copies of the pages
carry a script that looks and tells the outer document, whose DOM is dumped.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("DECAYCAST_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install one or set DECAYCAST_CHROMIUM"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
LISTEN = """<script>
const faults = [];
addEventListener("error", event => faults.push(String(event.message)));
addEventListener("securitypolicyviolation", event => faults.push(event.violatedDirective + " " + event.blockedURI));
const frame = new URLSearchParams(location.search).get("page");
const tell = said => parent.postMessage(JSON.stringify({page: frame, faults, ...said}), "*");
</script>"""
DRAWN_MS = 500
OUTER = """<!doctype html><meta charset="utf-8"><body><script>
addEventListener("message", event => {
  const note = document.createElement("pre");
  note.textContent = event.data;
  document.body.append(note);
});
</script>"""


def chromium(folder: Path, page: Path, *flags: str, patience_ms: int | None = 5000) -> str:
    """The DOM of `page` after its scripts have run; `patience_ms` of a clock that jumps over waiting, None for the real one."""
    assert CHROMIUM is not None
    clock = [] if patience_ms is None else [f"--virtual-time-budget={patience_ms}"]
    command = [CHROMIUM, *FLAGS, *clock, f"--user-data-dir={folder / 'profile'}", *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def with_script(path: Path, script: str) -> None:
    """Change the page at `path`: faults are listened for from its start, and `script` runs once its plots are drawn."""
    text = path.read_text(encoding="utf-8").replace("<head>", "<head>" + LISTEN, 1)
    start, _, end = text.rpartition("</body>")
    path.write_text(
        f"{start}<script>setTimeout(() => {{{script}}}, {DRAWN_MS});</script></body>{end}", encoding="utf-8"
    )


def look(folder: Path, pages: Mapping[str, Path], script: str, widths: Sequence[int] = (1280,)) -> dict[str, Any]:
    """What `script` tells (`tell({...})`) of each page at each width, by "page-width"."""
    outer = OUTER
    for name, path in pages.items():
        with_script(path, script)
        for width in widths:
            address = f"{path.relative_to(folder).as_posix()}?page={name}-{width}"
            outer += f'<iframe src="{address}" width="{width}" height="900"></iframe>'
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    dom = chromium(folder, folder / "outer.html", patience_ms=20_000)
    notes = (json.loads(html.unescape(note)) for note in re.findall(r"<pre>(.*?)</pre>", dom, re.DOTALL))
    return {note["page"]: note for note in notes}
