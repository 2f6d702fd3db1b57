"""From plain values to one HTML file that needs nothing else: the part that all pages share.

plotly.js is written into a page that has plots, and a content security policy in its head forbids every request, so that a
page opened years later, offline or from a mail shows the same and tells nobody. All text is escaped by the template engine;
the only markup passed through is plotly.js and JSON in which "<" is an escape.
"""

from __future__ import annotations

import base64
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from decaycast.core.experiment import Row, Scalar

try:
    import jinja2
    from markupsafe import Markup
except ImportError as error:
    raise ImportError("the page is written with jinja2: pip install 'decaycast[lab]'") from error
from plotly.offline import get_plotlyjs

TEMPLATES = "templates"
KINDS = ("forecast", "probe", "figure", "index", "sweep")
"""What a page can be; each has a template of its name."""
OUTCOMES = {"held": "good", "not held": "bad", "not enough data": "middling"}
MARKS = {"held": "✓ held", "not held": "✕ not held", "not enough data": "~ not enough data"}
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#21918c"/>'
    '<path d="M6 6C8 20 14 25 27 26" fill="none" stroke="#fff" stroke-width="3.5" stroke-linecap="round"/></svg>'
)


class ReportError(RuntimeError):
    """A page could not be written."""


def write_page(path: str | os.PathLike[str], page: Mapping[str, Any]) -> Path:
    """Render `page` with the template that its "kind" names, and write it whole or not at all.

    Raises:
        ReportError: the file cannot be written.
    """
    text = render(page)
    path = Path(path)
    # In the same folder, so that the replacement is one step and a killed process leaves no half page.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    return path


def render(page: Mapping[str, Any]) -> str:
    """The text of a page. `page` holds what the template of its "kind" asks for; "plots" decide on plotly.js."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(payload=lambda item: Markup(item.payload), tones=OUTCOMES, marks=MARKS)
    drawn = bool(page.get("plots") or page.get("check"))
    icon = "data:image/svg+xml;base64," + base64.b64encode(ICON.encode()).decode()
    template = environment.get_template(f"{page['kind']}.html")
    return template.render(**page, icon=icon, plotly_js=Markup(get_plotlyjs()) if drawn else "")


def setting(value: Scalar) -> str:
    """A setting as people read it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def merged_provenance(rows: Sequence[Row]) -> dict[str, str]:
    """Each key with its distinct values; a few are named, more are counted."""
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        for name, value in row.provenance.items():
            values[name][value] = None
    merged = {}
    for name, distinct in values.items():
        several = sorted(distinct)
        text = f"{several[0]} to {several[-1]}" if name == "time" and len(several) > 1 else ", ".join(several[:4])
        merged[name] = text + (f" and {len(several) - 4} more" if len(several) > 4 and name != "time" else "")
    return merged


def _source(name: str) -> str:
    return resources.files("decaycast.lab.pages").joinpath(TEMPLATES, name).read_text(encoding="utf-8")
