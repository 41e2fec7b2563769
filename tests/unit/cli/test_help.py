"""The help of every command at 80 columns: whole sentences, nothing cut off, examples that the parser accepts."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from castune.cli import app, options
from castune.cli.help import summary
from castune.config import DiagnoseConfig, EvaluateConfig, Recipe, SelectConfig, TuneConfig

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
RECIPES = Path(__file__).parents[3] / "recipes"
EXAMPLES = [line for one in (GROUP, *COMMANDS.values()) for line in one.epilog.splitlines()]
# The terminal of the test, whatever the one is that it is started from.
NARROW = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}


def shown(*arguments: str, columns: str = "80") -> str:
    """What the help says."""
    done = CliRunner().invoke(app, [*arguments, "--help"], env={**NARROW, "COLUMNS": columns})
    assert done.exit_code == 0, done.output
    return done.output


def sections(text: str) -> dict[str, list[str]]:
    """Lines below every heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in text.splitlines():
        if re.fullmatch(r"\S.*:", line):
            heading = line.removesuffix(":")
        elif line.strip():
            found.setdefault(heading, []).append(line)
    return found


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_no_line_is_longer_than_80_columns_and_none_is_cut_off(name: str) -> None:
    text = shown(*name.split())
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "…" not in text
    assert not re.search(r"\w\.\.\.$", text, re.MULTILINE)
    assert "<" not in text  # a type that no word stands for


def test_commands_are_in_groups_with_a_sentence_each_that_is_shown_whole() -> None:
    found = sections(shown())
    groups = ["Core commands", "Studies", "Adapters", "Tools"]
    assert [name for name in found if name] == [*groups, "Options", "Examples"]
    lines = [line.split(maxsplit=1) for group in groups for line in found[group]]
    assert lines == [[name, summary(command)] for name, command in COMMANDS.items()]
    assert found["Core commands"][0].split()[0] == "run"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_a_sentence_and_ends_with_examples(name: str) -> None:
    command, text = COMMANDS[name], shown(name)
    # Castune's own dots are within file names.
    assert re.fullmatch(r"[A-Z](?:[^.]|\.(?=\w))+\.", summary(command))
    assert text.split("\n\n")[1].strip() == summary(command)
    examples = command.epilog.splitlines()
    assert 1 <= len(examples) <= 3
    assert text.split("Examples:\n")[1].splitlines() == [f"  {line}" for line in examples]
    assert all(shlex.split(line)[:2] == ["castune", name] for line in examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_and_option_is_described(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert (parameter.help or "").strip().endswith((".", "...")), parameter.name


def test_many_options_are_in_groups_and_few_are_not() -> None:
    found = sections(shown("diagnose"))
    wanted = ["Arguments", "Input", "Measurement", "Attribution", "Units", "Execution", "Output", "Other options"]
    assert [name for name in found if name] == ["", *wanted, "Examples"][1:]
    assert any("--safety-limit" in line for line in found["Input"])
    assert any("--out" in line for line in found["Output"])
    assert [line.split()[0] for line in found["Other options"]] == ["--help"]
    assert [name for name in sections(shown("select")) if name] == ["Arguments", "Options", "Examples"]


def test_usage_names_what_has_to_be_given() -> None:
    assert shown("diagnose").splitlines()[0].endswith("diagnose MODEL --out DIR [OPTIONS]")
    assert shown("run").splitlines()[0].endswith("run [RECIPE] [OPTIONS]")
    assert shown("mask").splitlines()[0].endswith("mask ADAPTER... [OPTIONS]")


def test_help_names_options_as_they_are_typed_where_the_command_has_them() -> None:
    assert "(see --buckets)" in shown("select")
    assert "follows --safety-shares" in shown("diagnose").replace("\n" + " " * 28, " ")
    # A plan is of all measures.
    assert "--measure" not in shown("plan")


def test_names_and_defaults_are_not_torn_apart() -> None:
    text = shown("evaluate", columns="60")
    assert "starter-overrefusal-eval" in text
    assert re.search(r"\[default: hf\]", text)


def example_contexts(line: str) -> Iterator[Any]:
    """An example read as the shell and the parser read it, and not executed: of castune itself, then of the command.

    Raises for an option that does not exist, a value of the wrong kind, or a missing argument.
    """
    name, *arguments = shlex.split(line)
    assert name == "castune"
    root = GROUP.make_context(name, arguments)
    yield root
    command, *rest = arguments
    yield COMMANDS[command].make_context(command, rest, parent=root)


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_are_accepted_by_the_parser(line: str) -> None:
    _, context = example_contexts(line)
    assert context.command.name == shlex.split(line)[1]


@pytest.mark.parametrize("line", ["castune tune runs/x --rnak 4", "castune diagnose default", "castune select"])
def test_what_is_no_command_is_not_accepted(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|missing"):
        list(example_contexts(line))


@pytest.mark.parametrize("line", EXAMPLES)
def test_values_in_examples_are_accepted_by_the_settings(line: str) -> None:
    _, context = example_contexts(line)
    configs: dict[str, tuple[Any, Any]] = {
        "plan": (DiagnoseConfig, options.PLANNED_DIAGNOSIS),
        "diagnose": (DiagnoseConfig, options.DIAGNOSIS),
        "select": (SelectConfig, options.SELECTION),
        "tune": (TuneConfig, options.TUNING),
        "evaluate": (EvaluateConfig, options.EVALUATION),
        "judge": (EvaluateConfig, options.JUDGE),
    }
    if context.command.name in configs:
        config, settings = configs[context.command.name]
        config(**{one.key: one.value(context.params[one.name]) for one in settings})
    if changes := context.params.get("overrides"):
        Recipe.load(RECIPES / "quickstart.toml", changes)
    for word in shlex.split(line):
        assert not word.startswith("recipes/") or (RECIPES.parent / word).is_file()


def castune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    code = "from castune.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **NARROW, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("castune diag", ["diagnose"]),
        ("castune di", ["diagnose", "dial"]),
        ("castune re", ["report", "repair", "reproduce"]),
        ("castune diagnose default --meas", ["--measure"]),
        ("castune diagnose default --measure ma", ["margin"]),
        ("castune select runs/x --zone r", ["risky", "random"]),
        ("castune --show-completion z", ["zsh"]),
    ],
)
def test_bash_completes_commands_options_and_their_values(words: str, completed: list[str]) -> None:
    last = len(words.split()) - 1
    done = castune(_CASTUNE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(last))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == completed


@pytest.mark.processes
def test_the_script_for_bash_completes_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "castune"
    program.write_text(f"#!{sys.executable}\nfrom castune.cli import main\nmain()\n", encoding="utf-8")
    program.chmod(0o755)
    script = """eval "$(castune --show-completion bash)" && complete -p castune >&2
        COMP_WORDS=(castune diag) COMP_CWORD=1
        _castune_completion castune && echo "${COMPREPLY[@]}" """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "diagnose\n", done.stderr
    assert "-F _castune_completion castune" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_there_is_a_script_for_every_shell(shell: str) -> None:
    done = CliRunner().invoke(app, ["--show-completion", shell])
    assert done.exit_code == 0
    assert "_CASTUNE_COMPLETE" in done.output


def test_another_shell_is_refused() -> None:
    done = CliRunner().invoke(app, ["--show-completion", "cmd"])
    assert done.exit_code == 2
    assert "'bash'" in done.output
