"""HTML that is escaped by construction: `tag` escapes everything that is no markup yet."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence

# Elements that have no end tag.
_VOID = frozenset({"input", "meta"})
# Of what a model said; the run directory has it in full.
_CHARACTERS = 1500


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as HTML text; markup passes unchanged."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other, escaped where they are no markup."""
    return Markup("".join(text(part) for part in parts))


def tag(name: str, *children: object, **attributes: str | bool) -> Markup:
    """An element. `class_` is `class`, `data_chart` is `data-chart`; True is bare, False leaves it out."""
    head = name
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            head += f" {key}"
        elif value is not False:
            head += f' {key}="{text(value)}"'
    return Markup(f"<{head}>" if name in _VOID else f"<{head}>{join(children)}</{name}>")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, label: str, class_: str = "") -> Markup:
    """A table in a box of its own that scrolls; the first cell of a row is its header."""
    body = [
        tag("tr", *(tag("td", cell) if i else tag("th", cell, scope="row") for i, cell in enumerate(row)))
        for row in rows
    ]
    content = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))) if head else "",
        tag("tbody", *body),
        class_=class_ or False,
    )
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")


def short(said: str) -> str:
    """What a model said, cut where it is too long for a page."""
    if len(said) <= _CHARACTERS:
        return said
    return f"{said[:_CHARACTERS]} … (cut here, {len(said):,} characters in all)"


def script_json(value: object) -> str:
    """JSON that can stand inside `<script>`: nothing in it can end the element or the line."""
    plain = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    return plain
