"""One HTML page that needs nothing else, and charts as files.

The page carries Vega itself, once for all charts. Its security policy allows the scripts it was written with (by hash)
and inline styles, and nothing else: no request leaves it, and text of a model could not run even if it were not
escaped. Vega's expressions are therefore interpreted (`ast`), never compiled.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import vl_convert

from castune.artifacts.files import replacing
from castune.report.markup import Markup, join, script_json, tag
from castune.report.theme import Chart, Charts, theme

_HERE = Path(__file__).parent
# Figure files are drawn without a page around them.
_INK, _PAPER = "#222222", "#ffffff"
_PAGE_FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
_FILE_FONT = "Arial, 'Liberation Sans', sans-serif"


def write_charts(directory: str | Path, drawn: Charts, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write every chart as files, atomically; needs no browser.

    Args:
        directory: where they go.
        drawn: charts by the names of their files.
        formats: `svg`, `png`, `pdf`.

    Returns:
        The files.
    """
    directory = Path(directory)
    config = {**theme(_INK, _FILE_FONT), "background": _PAPER, "padding": 12}
    written = []
    for name, chart in drawn.items():
        spec = chart.to_dict()
        # The theme decides colours and fonts here, not Altair's default configuration.
        spec.pop("config", None)
        svg = vl_convert.vegalite_to_svg(spec, config=config)
        for suffix in formats:
            path = directory / f"{name}.{suffix}"
            with replacing(path) as temporary:
                temporary.write_bytes(_drawn(svg, suffix))
            written.append(path)
    return written


def _drawn(svg: str, suffix: str) -> bytes:
    if suffix == "svg":
        return svg.encode()
    return bytes(vl_convert.svg_to_png(svg, scale=2) if suffix == "png" else vl_convert.svg_to_pdf(svg))


def document(title: str, body: Markup, drawn: Charts) -> str:
    """A whole page.

    Args:
        title: of the page.
        body: what is on it; `sections.figure` says where the charts go.
        drawn: the charts by name.
    """
    specs = {name: _bare(chart) for name, chart in drawn.items()}
    # The stub of vl_convert calls the snippet required; it is not, and only the default one is cached.
    runtime = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    scripts = [runtime, *(_read(name) for name in ("page.js", "explorer.js", "samples.js"))]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = join(
        [
            Markup('<meta charset="utf-8">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup('<meta name="color-scheme" content="light dark">'),
            tag("title", title),
            tag("style", Markup("".join(map(_read, ("style.css", "explorer.css", "samples.css"))))),
        ]
    )
    data = tag(
        "script",
        Markup(script_json({"specs": specs, "config": theme("currentColor", _PAGE_FONT)})),
        id="charts",
        type="application/json",
    )
    code = [tag("script", Markup(script)) for script in scripts]
    page = tag("html", tag("head", head), tag("body", body, data, *code), lang="en")
    return f"<!doctype html>\n{page}\n"


def _bare(chart: Chart) -> dict[str, object]:
    """The chart's specification without what the page decides itself."""
    spec = chart.to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
