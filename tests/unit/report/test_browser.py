"""The page in a real browser: does it draw, in silence, and does it keep to itself?"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from fake_run import Run, make_run
from processes import run_command

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=8000",
]
DRAWN = "document.querySelectorAll('[data-chart]:not([data-drawn])').length === 0"


def browse(page: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what it said on the console."""
    command = [
        str(CHROMIUM),
        *OPTIONS,
        "--dump-dom",
        f"--user-data-dir={page.parent / 'profile'}",
        page.as_uri(),
    ]
    done = run_command(command)
    done.check_returncode()
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # The browser's own pages (new tab, toolbar) speak too, of slow networks for example.
    return done.stdout, [line for line in said if not re.search(r"source: chrome(-untrusted)?://", line)]


def test_what_a_page_says_is_heard(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<script>console.warn('a word'); missing()</script>", encoding="utf-8")
    _, console = browse(tmp_path / "page.html")
    assert len(console) == 2
    assert "a word" in console[0]


def test_all_charts_are_drawn_and_the_console_is_silent(tmp_path: Path, run: Run) -> None:
    run.write(tmp_path / "report.html")
    document, console = browse(tmp_path / "report.html")
    assert console == []
    assert document.count('data-drawn="true"') == document.count('data-chart="') == 5
    assert document.count("<svg xmlns=") == 5
    assert document.count('role="gridcell" tabindex') == len(run.cmap)
    assert _cells(document, "zones") == 3 * len(run.cmap)


def test_a_large_map_is_drawn(tmp_path: Path) -> None:
    make_run((32,) * 32).write(tmp_path / "report.html")
    document, console = browse(tmp_path / "report.html")
    assert console == []
    assert document.count('role="gridcell" tabindex') == 1024
    assert _cells(document, "zones") == 3 * 1024


def test_nothing_off_the_page_may_load_or_run(tmp_path: Path, run: Run) -> None:
    # Were escaping to fail, the policy would still hold: put in what an attack would.
    page = run.write(tmp_path / "report.html")
    attack = '<img src="https://example.org/x.png"><script>document.title = "owned"</script>'
    (tmp_path / "attacked.html").write_text(page.replace("<main>", f"<main>{attack}", 1), encoding="utf-8")
    document, console = browse(tmp_path / "attacked.html")
    assert any("example.org" in line and "Content Security Policy" in line for line in console)
    assert "<title>owned" not in document
    assert document.count('data-drawn="true"') == 5


@pytest.mark.parametrize("dark", [True, False])
def test_the_page_follows_the_colour_scheme(browser: Browser, tmp_path: Path, run: Run, dark: bool) -> None:
    run.write(tmp_path / "report.html")
    browser.open(tmp_path / "report.html", DRAWN, dark=dark)
    browser.picture(tmp_path / "report.png", "body")
    assert _first_pixel(tmp_path / "report.png") == ((0x15, 0x18, 0x1B) if dark else (0xFD, 0xFD, 0xFC))


def _drawing(document: str, chart: str) -> str:
    return document.split(f'data-chart="{chart}"')[1].split("</figure>")[0]


def _cells(document: str, chart: str) -> int:
    groups = _drawing(document, chart).split('class="mark-rect role-mark')[1:]
    return sum(group.split("</g>")[0].count("<path") for group in groups)


def _first_pixel(picture: Path) -> tuple[int, ...]:
    content, data, at = picture.read_bytes(), b"", 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        if content[at + 4 : at + 8] == b"IDAT":
            data += content[at + 8 : at + 8 + length]
        at += 12 + length
    # Byte 0 is the first row's filter; its first pixel has no neighbour, so that every filter keeps it.
    return tuple(zlib.decompress(data)[1:4])
