"""Options that are settings: they say what the fields of the configs say, and none is forgotten."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
import typer
import typer.main
from pydantic import BaseModel
from typer.testing import CliRunner

from castune.cli import app, options
from castune.cli.settings import Settings, Values, all_of, with_settings
from castune.config import (
    AttackConfig,
    DataConfig,
    DiagnoseConfig,
    EvaluateConfig,
    Recipe,
    RepairConfig,
    SelectConfig,
    TuneConfig,
)
from castune.config.base import Config, Count
from castune.errors import CastuneError

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# The configs of which a command takes every field, but those it leaves out for a reason.
WHOLE: dict[str, list[tuple[type[BaseModel], Mapping[str, str]]]] = {
    "plan": [(Recipe, options.NOT_OF_A_PLANNED_MODEL), (DiagnoseConfig, options.NOT_PLANNED)],
    "diagnose": [(Recipe, options.NOT_OF_A_MODEL), (DiagnoseConfig, {})],
    "select": [(SelectConfig, options.NOT_SELECTED)],
    "tune": [(TuneConfig, {})],
    "evaluate": [(EvaluateConfig, options.NOT_EVALUATED)],
    "repair": [(RepairConfig, {})],
    "attack": [(AttackConfig, options.NOT_ATTACKED)],
}
CALIBRATION = {
    "safety": (Recipe, "safety"), "safety_limit": (DataConfig, "limit"), "safety_balance": (DataConfig, "balance"),
    "safety_shares": (DataConfig, "shares"),
    "utility": (Recipe, "utility"), "utility_limit": (DataConfig, "limit"), "utility_balance": (DataConfig, "balance"),
    "utility_shares": (DataConfig, "shares"),
}  # fmt: skip
# Further settings by the names of their options.
FURTHER: dict[str, dict[str, tuple[type[BaseModel], str]]] = {
    "plan": CALIBRATION,
    "diagnose": CALIBRATION,
    "tune": {
        "data": (Recipe, "align"), "limit": (DataConfig, "limit"), "balance": (DataConfig, "balance"),
        "shares": (DataConfig, "shares"),
        "utility_limit": (DataConfig, "limit"), "utility_balance": (DataConfig, "balance"),
        "utility_shares": (DataConfig, "shares"),
    },
    "inspect": {"dtype": (Recipe, "dtype"), "device": (Recipe, "device")},
    "repair": {"dtype": (Recipe, "dtype"), "device": (Recipe, "device")},
    "mask": {"dtype": (Recipe, "dtype"), "device": (Recipe, "device")},
    "judge": {"judge": (EvaluateConfig, "judge")},
}  # fmt: skip
# What a run or a machine is asked for at the moment, and no recipe holds.
NO_SETTINGS = {
    "plan": {"model", "accelerator", "decoded_share", "overrides"},
    "diagnose": {"model", "out", "shard"},
    "select": {"run_directory", "random", "beside"},
    # Its utility data are its own: nothing is taken unless surgery, replay or a null space asks for it.
    "tune": {"run_directory", "held_out", "arm", "utility", "overwrite"},
    # Sources of an inspection are the run's unless others are given, and one limit is for all of them.
    "inspect": {
        "adapter",
        "base",
        "run",
        "arm",
        "safety",
        "utility",
        "over_refusal",
        "limit",
        "out",
        "as_json",
    },
    "repair": {
        "source",
        "arm",
        "base",
        "suites",
        "confirm",
        "safety",
        "utility",
        "over_refusal",
        "limit",
        "beside",
        "out",
        "as_json",
    },
    "mask": {"adapters", "out", "run", "arm", "beside", "base", "combination", "weights", "density", "overwrite"},
    "evaluate": {"run_directory", "allow_overlap"},
    "judge": {"run_directory"},
    "attack": {"run_directory", "arms", "kinds", "rows", "prompts"},
}
ADDED = {
    "",
    " Comma-separated.",
    " Format: VALUE=SHARE,VALUE=SHARE.",
    " Repeat for several domains, named after their sources or files; limit, balance and shares apply to each.",
}


def settings_of(command: str) -> dict[str, tuple[type[BaseModel], str]]:
    """The fields that options of a command must be, by the names of its parameters."""
    whole = {
        field: (config, field)
        for config, left_out in WHOLE.get(command, [])
        for field in config.model_fields
        if field not in left_out
    }
    return {**whole, **FURTHER.get(command, {})}


def parameters_of(command: str) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in COMMANDS[command].params if parameter.name != "help"}


@pytest.mark.parametrize("command", NO_SETTINGS)
def test_every_setting_is_an_option_and_every_option_a_setting_or_known_not_to_be(command: str) -> None:
    assert not settings_of(command).keys() & NO_SETTINGS[command]
    assert parameters_of(command).keys() == settings_of(command).keys() | NO_SETTINGS[command]


def test_what_is_left_out_is_a_field_and_has_a_reason() -> None:
    for configs in WHOLE.values():
        for config, left_out in configs:
            assert left_out.keys() <= config.model_fields.keys()
            assert all(len(reason) > 5 for reason in left_out.values())


@pytest.mark.parametrize(
    ("command", "name", "config", "field"),
    [(command, name, *setting) for command in NO_SETTINGS for name, setting in settings_of(command).items()],
)
def test_default_and_help_are_those_of_the_field(command: str, name: str, config: type[BaseModel], field: str) -> None:
    info, parameter = config.model_fields[field], parameters_of(command)[name]
    expected: Any = info.default
    if isinstance(expected, DataConfig):
        expected = [expected.source] if parameter.multiple else expected.source
    elif isinstance(expected, tuple):
        expected = ",".join(map(str, expected))
    shown = str(expected) if isinstance(parameter.default, str) else expected
    assert parameter.default == shown
    assert f"--{name.replace('_', '-')}" in parameter.opts
    text = " ".join((info.description or "").replace("`", "").split())
    assert text
    # Other settings of the command are named as options, and as keys in the docstring.
    keys = {f"--{other.replace('_', '-')}": key for other, (_, key) in settings_of(command).items()}
    said = re.sub(r"--[a-z-]+", lambda option: keys[option[0]], parameter.help)
    assert said.startswith(text)
    assert said.removeprefix(text) in ADDED


@pytest.mark.parametrize("config", [Recipe, DataConfig, DiagnoseConfig, SelectConfig, TuneConfig, EvaluateConfig])
def test_every_setting_has_a_docstring(config: type[BaseModel]) -> None:
    assert [name for name, info in config.model_fields.items() if not info.description] == []


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (options.DIAGNOSIS, DiagnoseConfig),
        (options.PLANNED_DIAGNOSIS, DiagnoseConfig),
        (options.SELECTION, SelectConfig),
        (options.TUNING, TuneConfig),
        (options.EVALUATION, EvaluateConfig),
    ],
)
def test_a_command_without_options_has_the_configs_defaults(settings: Settings, config: type[BaseModel]) -> None:
    assert config(**{setting.key: setting.value(setting.default) for setting in settings}) == config()


# As they were when defaults and texts were written out, a command a line.
OPTIONS = {
    "run": "--set --out",
    "study": "--set --out --dry-run --accelerator --executor --workers --threads --gpus --memory --address --shards "
    "--shard --launch",
    "watch": "--interval --once",
    "budget": "--max-loss --anchor --cost",
    "plan": "--safety --utility --safety-limit --utility-limit --max-new-tokens --margin-tokens --problems "
    "--solution-tokens --batch-tokens --units --mlp-groups --accelerator --decoded-share --seed --revision --dtype "
    "--device",
    "diagnose": "--out --safety --utility --safety-limit --utility-limit --domains --measure --ablation "
    "--max-new-tokens --margin-tokens --problems --solution-tokens --sensitivity-rank --batch-tokens --shard --layers "
    "--units --mlp-groups --seed --dtype --device --revision --trust-remote-code",
    "select": "--zone --fraction --buckets --bucket --random --score --seed --beside",
    "group": "--buckets",
    "tune": "--data --limit --balance --held-out --arm --method --beta --learning-rate --epochs --max-steps "
    "--batch-size --accumulation --max-length --rank --alpha --weight-decay --freeze-a --surgery --replay --utility "
    "--utility-limit --surgery-granularity --surgery-batch-size --null-space --gradient-checkpointing --quantization "
    "--checkpoint-steps --snapshot-steps --reselect-steps --seed --overwrite",
    "drift": "--arm --shard",
    "mask": "--out --run --arm --as --base --combination --weights --density --overwrite --dtype --device",
    "export": "--out --merged --arm --base --dtype",
    "evaluate": "--suites --limit --judge --backend --served-model --max-new-tokens --reasoning-tokens --letters "
    "--batch-tokens --seed --allow-overlap",
    "judge": "--judge",
    "lm-eval": "--tasks --limit --num-fewshot --batch-size --apply-chat-template --include-path --seed --overwrite",
    "report": "",
    "reproduce": "--out --check",
    "doctor": "",
}


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, names in OPTIONS.items() for option in names.split()]
)
def test_options_keep_their_names(command: str, option: str) -> None:
    [parameter] = [one for one in COMMANDS[command].params if option in one.opts]
    required = [
        word
        for one in COMMANDS[command].params
        if one.required and one is not parameter
        for word in (["x"] if one.param_type_name == "argument" else [one.opts[0], "x"])
    ]
    given = [option] if parameter.is_flag else [option, "1"]
    value = COMMANDS[command].make_context(command, [*required, *given]).params[parameter.name]
    assert value is True if parameter.is_flag else str(value[0] if parameter.multiple else value) in ("1", "1.0")


class Toy(Config):
    """Fields of every kind."""

    number: Count = 3
    """How `many`
    there are."""
    size: float | None = None
    """A size."""
    word: Literal["a", "b"] = "a"
    """A word."""
    words: tuple[Literal["a", "b"], ...] = ("a", "b")
    """Words."""
    numbers: tuple[Count, ...] | None = None
    """Numbers."""
    parts: dict[str, float] | None = None
    """Parts."""
    either: Count | Literal["auto"] = 8
    """A number or a word."""
    off: bool = False
    """A switch."""
    on: bool = True
    """Another."""


def toy(*arguments: str) -> tuple[Values, str]:
    """What a command is given, and what its help says."""
    seen: list[Values] = []

    def command(name: str, settings: Annotated[Values, all_of(Toy, but={"size": "not of interest"})]) -> None:
        assert name == "x"
        seen.append(settings)

    of_toy = typer.Typer(rich_markup_mode=None)
    of_toy.command()(with_settings(command))
    done = CliRunner().invoke(of_toy, ["x", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return (seen or [{}])[0], " ".join(done.output.split())


def test_fields_of_every_kind_become_options() -> None:
    values, _ = toy()
    assert Toy(**values) == Toy()
    assert "size" not in values
    values, _ = toy(
        "--number", "5", "--word", "b", "--words", " b ,", "--numbers", "1,2", "--parts", "a=2, b c=0.5,d=e=1e-3,",
        "--either", "auto", "--off", "--no-on",
    )  # fmt: skip
    assert values == {
        "number": 5, "word": "b", "words": ("b",), "numbers": (1, 2), "parts": {"a": 2, "b c": 0.5, "d=e": 0.001},
        "either": "auto", "off": True, "on": False,
    }  # fmt: skip
    assert toy("--either", "16")[0]["either"] == 16
    # The lowest version of typer writes a backslash before it.
    text = toy("--help")[1].replace("\\[", "[")
    assert "How many there are. [default: 3]" in text
    assert "Words. Comma-separated. [default: a,b]" in text
    assert "Parts. Format: VALUE=SHARE,VALUE=SHARE." in text
    assert "--size" not in text


def test_what_is_no_number_is_told_with_its_option() -> None:
    with pytest.raises(CastuneError, match="--numbers 1;2: expected numbers separated by commas, for example 0,15,29"):
        toy("--numbers", "1;2")


@pytest.mark.parametrize("typed", ["a", "a=", "=1", "a=x", "a=1,a=2", "a=1,a =1", "a:1", "1"])
def test_what_is_no_share_of_something_is_told_with_its_option(typed: str) -> None:
    with pytest.raises(CastuneError, match=rf"--parts {typed}: expected a share .* for example harmful=0.5,benign=0.5"):
        toy("--parts", typed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--template-date", "tomorrow"], r"template_date.*accepted: a day as year-month-day"),
        (["--gradient-chunks", "1"], r"gradient_chunks = 1"),
        (["--safety-balance", "colour"], r"colour"),
        (["--utility-balance", "colour"], r"colour"),
        (["--safety-shares", "violence=1,knitting=1"], r"safety.jsonl line 1: column 'kind' is missing"),
        (["--safety-shares", "violence=0"], r"safety: shares\.violence = 0\.0"),
        (["--safety-balance", "category", "--safety-shares", "violence=1,knitting=1"], r"no row has 'knitting'"),
        (["--utility-balance", "subject", "--utility-shares", "knitting=1"], r"no row has 'knitting'"),
        (["--utility-shares", "animals=nan"], r"utility: shares\.animals = nan"),
        (["--utility-shares", "animals"], r"--utility-shares animals: expected a share"),
        (["--utility", "mmlu=x", "--utility", "mmlu=y"], r"there is already a domain 'mmlu'"),
    ],
)
@pytest.mark.parametrize("command", ["diagnose", "plan"])
def test_settings_reach_the_recipe(
    command: str, arguments: list[str], said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = ["--out", "run"] if command == "diagnose" else []
    # There is no model: what is wrong with settings and data is told before one is loaded.
    done = CliRunner().invoke(app, [command, "./absent", *place, *arguments])
    assert isinstance(done.exception, CastuneError)
    with pytest.raises(CastuneError, match=said):
        raise done.exception
