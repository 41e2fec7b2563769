"""Tables on the command line that fit the terminal: cells wrap at spaces; where that is too narrow, rows become lists.

Names of suites and words of errors are text, never markup, and nothing is cut off.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

# Cells of more lines are easier to read in a list.
_MOST_LINES = 5
# What a table needs beside the text of its columns: a border, and a border and two spaces a column.
_BORDER, _BORDER_OF_COLUMN = 1, 3
_HARD_SPACE = "\N{NO-BREAK SPACE}"


def stdout_console(width: int) -> Console:
    """Standard output: as wide as the terminal or COLUMNS, else, into a file or a pipe, of this width."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else width)


class TextTable:
    """Rows of cells under heads, for a rich console of any width.

    Args:
        heads: of the columns.
        rows: cells, one a head; what is missing (None) is a dash.
        title: above it.
        caption: below it.
    """

    def __init__(
        self, heads: Iterable[str], rows: Iterable[Iterable[object]], *, title: str = "", caption: str = ""
    ) -> None:
        self.heads = list(heads)
        self.rows = [["–" if cell is None else str(cell) for cell in row] for row in rows]
        self.title = title
        self.caption = caption

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table where it fits, else a list."""
        from rich.padding import Padding
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="italic")
        if (widths := self._widths(options.max_width)) is not None:
            yield self._table(widths)
        else:
            for row in self.rows:
                yield Text(f"{self.heads[0]}: {row[0]}", overflow="fold")
                yield Padding(self._list(row), (0, 0, 0, 2))
        if self.caption:
            yield Text(self.caption, style="dim italic")

    def _widths(self, room: int) -> list[int] | None:
        """Widths of the columns, the widest narrowed first; None where a word or too many lines would not fit."""
        columns = [[head, *cells] for head, *cells in zip(self.heads, *self.rows, strict=True)]
        widths = [max(map(len, column)) for column in columns]
        least = [max(len(word) for text in column for word in _whole(text).split(" ")) for column in columns]
        room -= _BORDER + _BORDER_OF_COLUMN * len(columns)
        if sum(least) > room:
            return None
        while sum(widths) > room:
            widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
            widths[widest] -= 1
        fits = all(
            len(_wrapped(text, width)) <= _MOST_LINES
            for column, width in zip(columns, widths, strict=True)
            for text in column
        )
        return widths if fits else None

    def _table(self, widths: Sequence[int]) -> Table:
        from rich.table import Column, Table
        from rich.text import Text

        sized = zip(self.heads, widths, strict=True)
        table = Table(*(Column(Text(head), width=width, overflow="fold") for head, width in sized))
        for row in self.rows:
            lines = ("\n".join(_wrapped(cell, width)) for cell, width in zip(row, widths, strict=True))
            table.add_row(*map(Text, lines))
        return table

    def _list(self, row: Sequence[str]) -> Table:
        """The further cells of a row, one a line behind their heads."""
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 0, 0, 2))
        grid.add_column(overflow="fold")
        grid.add_column(overflow="fold")
        for head, cell in zip(self.heads[1:], row[1:], strict=True):
            if cell:
                grid.add_row(Text(head), Text(cell))
        return grid


def _whole(text: str) -> str:
    """Values stay in one line with their errors."""
    return text.replace(" ± ", f"{_HARD_SPACE}±{_HARD_SPACE}")


def _wrapped(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(_whole(text), width, break_on_hyphens=False)
    return [line.replace(_HARD_SPACE, " ") for line in lines] or [""]
