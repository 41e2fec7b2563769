"""What the command line shows: names and words of others are text, never markup."""

from __future__ import annotations

import io

from rich.console import Console

from castune.console import table_of


def test_cells_and_heads_are_plain_text() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(table_of(["arm", "[/path]"], [["[bold]x", None], ["[red]", "[/z]"]]))
    shown = out.getvalue()
    for text in ("[/path]", "[bold]x", "[red]", "[/z]", "–"):
        assert text in shown
