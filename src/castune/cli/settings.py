"""Settings as options: their name, kind of value, default and help come from the fields of the configs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from castune.cli.values import names, numbers, shares
from castune.config import DataConfig, Recipe

Values = dict[str, Any]
"""What a command is given of its settings, by their keys, for a config to check."""

_NONE = "none"
_CONTEXT = "context"


class Typed(Values):
    """Only the settings that were typed; a command fills in the others itself, for example from a run."""


def _or_none(kind: Callable[[str], object]) -> Callable[[str], object]:
    """A value of a kind, or `none` where a run's own is to be taken back."""

    def parsed(text: str) -> object:
        try:
            return None if text == _NONE else kind(text)
        except ValueError:
            name = "integer" if kind is int else "number"
            raise typer.BadParameter(f"{text!r} is not a valid {name}.") from None

    return parsed


@dataclass(frozen=True)
class Setting:
    """A field of a config as an option of a command.

    A field that is a data source stands for its text, one that may have several domains for a list of such texts, and
    one of several values for these with commas between them.
    """

    config: type[BaseModel]
    field: str
    name: str
    """Of the command's parameter."""
    key: str
    """Where its value stands in what the command is given."""
    word: str = ""
    """What stands for its value in the help, where that is not the last word of the field's name."""
    panel: str = ""
    """The group of options it is shown in."""

    @property
    def option(self) -> str:
        """As it is typed."""
        return "--" + self.name.replace("_", "-")

    @property
    def default(self) -> object:
        """The field's, as it would be typed; one or several texts, a number, or None."""
        value = self._info.default
        if isinstance(value, DataConfig):
            return [value.source] if self._is_repeatable else value.source
        return ",".join(map(str, value)) if isinstance(value, tuple) else value

    def help(self, group: Settings = ()) -> str:
        """The field's docstring as plain text, other options of the group by their names; how several are given."""
        words = " ".join((self._info.description or "").split())
        for one in group:
            if one.field != self.field and one.field not in self.choices:
                words = words.replace(f"`{one.field}`", one.option)
        text = words.replace("`", "")
        if self._is_repeatable:
            return (
                f"{text} Repeat for several domains, named after their sources or files; limit, balance and shares "
                "apply to each."
            )
        if self._is_table:
            return f"{text} Format: VALUE=SHARE,VALUE=SHARE."
        return f"{text} Comma-separated." if self._item else text

    @property
    def metavar(self) -> str | None:
        """What stands for a value in the help: N for a whole number, X for another one; None of a switch."""
        if self._kinds == (bool,):
            return None
        if int in self._kinds:
            return "|".join(["N", *self.choices])
        if float in self._kinds:
            return "X"
        return self.word or self.field.rpartition("_")[2].upper()

    @property
    def choices(self) -> list[str]:
        """The words that are accepted, where there are only these."""
        kinds = (self._item,) if self._item else self._kinds
        return [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]

    def parameter(self, group: Settings, *, can_be_taken_back: bool = False) -> inspect.Parameter:
        """The parameter that typer makes an option of, beside those of its group.

        Args:
            group: all settings of its group.
            can_be_taken_back: what is no default can become one again: of a switch by `--no-`, of a setting that has no
                value by default by `none`.
        """
        kind = next((one for one in (int, float, str) if self._typed == one | None), None)
        takes_none = can_be_taken_back and kind is not None
        is_switch = self._kinds == (bool,)
        has_opposite = is_switch and (can_be_taken_back or self.default is True)
        declared = f"{self.option}/--no-{self.option[2:]}" if has_opposite else self.option
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Option(
                self.default,
                declared,
                help=self.help(group),
                metavar=f"{self.metavar}|{_NONE}" if takes_none else self.metavar,
                parser=_or_none(kind) if takes_none and kind is not None else None,
                rich_help_panel=self.panel,
                autocompletion=lambda: self.choices,
            ),
            annotation=self._typed,
        )

    def value(self, given: object) -> object:
        """What was typed, as the config takes it.

        Raises:
            CastuneError: numbers or shares with commas between them were expected.
        """
        if not isinstance(given, str):
            return given
        if self._item is int:
            return numbers(given, self.option, int, "0,15,29")
        if self._item:
            return names(given)
        if self._is_table:
            return shares(given, self.option)
        return int(given) if int in self._kinds and given.isdecimal() else given

    @property
    def _info(self) -> FieldInfo:
        return self.config.model_fields[self.field]

    @property
    def _kinds(self) -> tuple[object, ...]:
        return _kinds(self._info.annotation)

    @property
    def _item(self) -> object:
        """The kind of the values of a field that takes several; None of one that takes one."""
        return next((_kinds(get_args(kind)[0])[0] for kind in self._kinds if get_origin(kind) is tuple), None)

    @property
    def _is_table(self) -> bool:
        return any(get_origin(kind) is dict for kind in self._kinds)

    @property
    def _is_repeatable(self) -> bool:
        return DataConfig in self._kinds and len(self._kinds) > 1

    @property
    def _typed(self) -> Any:
        """What typer reads: plain values, for the config knows what is accepted."""
        if self._is_repeatable:
            return list[str]
        kind = self._kinds[0] if len(self._kinds) == 1 and self._kinds[0] in (bool, int, float) else str
        return kind | None if self.default is None else kind


def _kinds(annotation: object) -> tuple[object, ...]:
    """The kinds of value that an annotation allows, without None and without their limits."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for one in get_args(annotation) for kind in _kinds(one))
    return () if annotation is NoneType else (annotation,)


Settings = tuple[Setting, ...]


def all_of(config: type[BaseModel], *, but: Mapping[str, str]) -> Settings:
    """Every field of a config, but those for which there is a reason."""
    return only(config, *(field for field in config.model_fields if field not in but))


def only(config: type[BaseModel], *fields: str) -> Settings:
    """Some fields of a config."""
    return tuple(Setting(config, field, name=field, key=field) for field in fields)


def data_of(field: str, name: str) -> Settings:
    """A recipe's data: the source by this name, and how much of it is drawn."""
    return (Setting(Recipe, field, name=name, key="source", word="DATA"), *drawn_of(f"{name}_"))


def drawn_of(prefix: str) -> Settings:
    """How much of a source is drawn."""
    return (
        Setting(DataConfig, "limit", name=f"{prefix}limit", key="limit"),
        Setting(DataConfig, "balance", name=f"{prefix}balance", key="balance", word="COLUMN"),
        Setting(DataConfig, "shares", name=f"{prefix}shares", key="shares"),
    )


def in_panel(panel: str, settings: Settings, others: Mapping[str, str] | None = None) -> Settings:
    """The settings in a group of options; `others` names the groups of those fields that belong elsewhere."""
    groups = others or {}
    return tuple(replace(setting, panel=groups.get(setting.field, panel)) for setting in settings)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes as options what stands for one parameter here: `Annotated[Values, all_of(...)]`, or
    `Annotated[Typed, ...]` if it receives only options that were typed."""
    groups: dict[str, Settings] = {}
    only_typed: set[str] = set()
    parameters = []
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        metadata = getattr(hints[parameter.name], "__metadata__", ())
        if metadata and isinstance(metadata[0], tuple):
            groups[parameter.name] = metadata[0]
            if is_of_typed := get_args(hints[parameter.name])[0] is Typed:
                only_typed.add(parameter.name)
            parameters += [one.parameter(metadata[0], can_be_taken_back=is_of_typed) for one in metadata[0]]
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))

    of_settings = {setting.name for settings in groups.values() for setting in settings}
    if only_typed:
        parameters.append(
            inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        )

    @functools.wraps(command)
    def expanded(**given: object) -> None:
        context: Any = given.pop(_CONTEXT, None)

        def is_told(group: str, setting: Setting) -> bool:
            return group not in only_typed or context.get_parameter_source(setting.name).name != "DEFAULT"

        values = {
            group: {setting.key: setting.value(given[setting.name]) for setting in settings if is_told(group, setting)}
            for group, settings in groups.items()
        }
        given = {name: value for name, value in given.items() if name not in of_settings}
        command(**given, **values)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded
