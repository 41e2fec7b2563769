"""The page of the command line, generated from the commands themselves when the site is built."""

from __future__ import annotations

from typing import Any

_MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put every command's help where a page asks for it."""
    return markdown.replace(_MARK, commands()) if _MARK in markdown else markdown


def commands() -> str:
    """Usage, examples, arguments and options of every command as Markdown, in the order and the groups of the help."""
    import typer.main

    from castune.cli import app
    from castune.cli.help import option_groups

    group: Any = typer.main.get_command(app)
    sections = []
    for name, command in group.commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        words = " ".join(command.collect_usage_pieces(context))
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        table = ""
        for heading, members in {"Arguments": arguments, **option_groups(command, context)}.items():
            rows = [_row(one) for one in members if one.name != "help"]
            table += f"| **{heading}** | | |\n" + "".join(rows) if rows else ""
        sections.append(
            f"## castune {name}\n\n`castune {name} {words}`\n\n{(command.help or '').strip()}\n\n"
            f"```shell\n{command.epilog}\n```\n\n"
            f"| option | default | |\n|---|---|---|\n{table}"
        )
    return "\n".join(sections)


def _row(parameter: Any) -> str:
    option = parameter.metavar if parameter.param_type_name == "argument" else " ".join(parameter.opts)
    text = (getattr(parameter, "help", None) or "").strip().replace("|", "\\|")
    return f"| `{option}` | {_default(parameter)} | {text} |\n"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if isinstance(value, list):
        value = " ".join(value)
    return "" if value is None or callable(value) or value is False else f"`{value}`"
