"""The help of commands: options and commands in named groups, examples at the end, nothing cut off at 80 columns.

Plain text on purpose: the same on every terminal and in a pipe, and nothing that must be imported first.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeAlias

from typer.core import TyperCommand, TyperGroup

# Groups of options, in the order in which they are shown.
READS, MEASURES, ATTRIBUTION, UNITS = "Input", "Measurement", "Attribution", "Units"
ADAPTER, TRAINS, USES_UTILITY = "Adapter", "Training", "Use of utility data"
COMBINES, PLANS, RUNS, WRITES = "Combination", "Estimate", "Execution", "Output"
# Of what belongs to no group, such as help itself.
OTHERS = "Other options"
_ORDER = (
    READS, MEASURES, ATTRIBUTION, UNITS, ADAPTER, TRAINS, USES_UTILITY, COMBINES, PLANS, RUNS, WRITES, OTHERS,
)  # fmt: skip
# So many options are read at a glance, and need no groups.
_FEW = 10
# Longer names have a line of their own, above their text.
_LONGEST_NAME = 26
_EXAMPLES = "Examples:\n"
_HARD_SPACE = "\N{NO-BREAK SPACE}"

# These are of the library below typer: older versions import it, newer ones contain it.
Context: TypeAlias = Any
Formatter: TypeAlias = Any
Parameter: TypeAlias = Any
Row = tuple[str, str]


def text_and_examples(command: Callable[..., None]) -> tuple[str, str]:
    """The docstring of a command: what it says, and the lines of its examples."""
    text, _, examples = (inspect.getdoc(command) or "").partition(_EXAMPLES)
    return text.strip(), inspect.cleandoc(examples)


def summary(command: Any) -> str:
    """The first paragraph of a command's help, one sentence."""
    return " ".join((command.help or "").partition("\n\n")[0].split())


def option_groups(command: Any, ctx: Context) -> dict[str, list[Parameter]]:
    """The options of a command by their groups; few options are one group."""
    options = [one for one in command.get_params(ctx) if one.param_type_name == "option"]
    if len(options) <= _FEW:
        return {"Options": options}
    groups: dict[str, list[Parameter]] = {}
    for one in options:
        # Help itself is an option of the library below.
        groups.setdefault(getattr(one, "rich_help_panel", None) or OTHERS, []).append(one)
    return dict(sorted(groups.items(), key=lambda group: _ORDER.index(group[0])))


class HelpfulCommand(TyperCommand):
    """A command whose help shows options in their groups and its examples."""

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        """Arguments, required options, the rest: what has to be typed comes first."""
        required = [_row(one, ctx)[0] for one in self.get_params(ctx) if one.required]
        optional = [f"[{one.metavar}]" for one in _arguments(self, ctx) if not one.required]
        return [*required, *optional, "[OPTIONS]"]

    def format_options(self, ctx: Context, formatter: Formatter) -> None:
        """Arguments, then options group by group."""
        groups = {"Arguments": _arguments(self, ctx), **option_groups(self, ctx)}
        _write_sections(formatter, {name: [_row(one, ctx) for one in members] for name, members in groups.items()})

    def format_epilog(self, ctx: Context, formatter: Formatter) -> None:
        """The examples, as they are typed."""
        _write_examples(formatter, self.epilog)


class HelpfulGroup(TyperGroup):
    """Commands whose help shows them in their groups, a line each."""

    def format_options(self, ctx: Context, formatter: Formatter) -> None:
        """Commands group by group, then the options of castune itself."""
        groups: dict[str, list[Row]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            groups.setdefault(command.rich_help_panel, []).append((name, summary(command)))
        _write_sections(formatter, groups)
        options = option_groups(self, ctx)
        _write_sections(formatter, {name: [_row(one, ctx) for one in members] for name, members in options.items()})

    def format_epilog(self, ctx: Context, formatter: Formatter) -> None:
        """Where to begin."""
        _write_examples(formatter, self.epilog)


def _arguments(command: Any, ctx: Context) -> list[Parameter]:
    return [one for one in command.get_params(ctx) if one.param_type_name == "argument"]


def _row(parameter: Parameter, ctx: Context) -> Row:
    """A parameter as it is typed, and its text; of arguments versions of typer differ in what they put around them."""
    if parameter.param_type_name == "argument":
        return parameter.metavar, parameter.help or ""
    name, record = parameter.get_help_record(ctx)
    text, bracket, remark = record.rpartition("  [")
    if not bracket:
        return name, record
    # A default stays in one line, unless it is a list.
    return name, f"{text} [{remark.replace(' ', _HARD_SPACE).replace(',', ', ')}"


def _write_sections(formatter: Formatter, sections: dict[str, list[Row]]) -> None:
    """Rows below their headings, all texts in one column; names of suites and options are not broken at hyphens."""
    names = (len(name) for rows in sections.values() for name, _ in rows)
    column = max(length for length in names if length <= _LONGEST_NAME) + 2
    for heading, rows in sections.items():
        if not rows:
            continue
        with formatter.section(heading):
            indent = " " * formatter.current_indent
            for name, text in rows:
                room = formatter.width - len(indent) - column
                lines = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False) or [""]
                first, rest = ("", lines) if len(name) > column - 2 else (lines[0], lines[1:])
                for start, end in ((name, first), *(("", line) for line in rest)):
                    formatter.write(f"{indent}{start:{column}}{end}".replace(_HARD_SPACE, " ").rstrip() + "\n")


def _write_examples(formatter: Formatter, examples: str | None) -> None:
    if examples:
        with formatter.section("Examples"):
            for line in examples.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")
