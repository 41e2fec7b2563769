"""The page of the command line, generated from the commands themselves when the site is built."""

from __future__ import annotations

from typing import Any

_MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put every command's help where a page asks for it."""
    return markdown.replace(_MARK, commands()) if _MARK in markdown else markdown


def commands() -> str:
    """Usage, arguments and options of every command, as Markdown."""
    import typer.main

    from castune.cli import app

    group: Any = typer.main.get_command(app)
    sections = []
    for name, command in sorted(group.commands.items()):
        context = command.make_context(name, [], resilient_parsing=True)
        words = [piece for piece in command.collect_usage_pieces(context) if piece]
        rows = [
            (
                " ".join(parameter.opts) or parameter.name,
                _default(parameter),
                (getattr(parameter, "help", None) or "").strip(),
            )
            for parameter in command.params
            if parameter.name != "help"
        ]
        table = "".join(
            f"| `{option}` | {default} | {text.replace('|', chr(92) + '|')} |\n" for option, default, text in rows
        )
        sections.append(
            f"## castune {name}\n\n`castune {name} {' '.join(words)}`\n\n{(command.help or '').strip()}\n\n"
            f"| option | default | |\n|---|---|---|\n{table}"
        )
    return "\n".join(sections)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if isinstance(value, list):
        value = " ".join(value)
    return "" if value is None or callable(value) or value is False else f"`{value}`"
