"""Every code block of the documentation is run, or, where it needs what is not here, checked.

`bash` and `python` blocks are run, each page from top to bottom in a directory of its own; `toml`, `yaml` and `json` are
read by what reads them. `console`, `shell` and blocks without a language need a GPU, the hub or a cluster: the shell must be able to read
them, and every command and option of castune in them must exist.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
import yaml
from castune_server import served_castune
from processes import run_command

from castune.cli import app
from castune.config import Recipe
from castune.config.gate import GatePolicy

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN, READ, CHECKED = ("bash", "python"), ("toml", "yaml", "json"), ("console", "shell", "")
_FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A code block and the line it begins in."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(found[2], textwrap.dedent(found[3]), text.count("\n", 0, found.start()) + 1)
        for found in _FENCE.finditer(text)
    ]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


RUN_PAGES = [path for path in PAGES if any(block.language in RUN for block in blocks(path))]


def test_every_block_has_a_language_that_is_run_read_or_checked() -> None:
    for path in PAGES:
        for block in blocks(path):
            assert block.language in (*RUN, *READ, *CHECKED, "text"), f"{name(path)}:{block.line}: {block.language}"
    assert sum(len(blocks(path)) for path in PAGES) > 45


def test_no_page_has_code_by_indentation() -> None:
    # It would be neither run nor checked.
    for path in PAGES:
        text = _FENCE.sub("", path.read_text(encoding="utf-8"))
        assert not re.search(r"\n\n    (?:castune|pip|python|import) ", text), name(path)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_blocks_that_are_not_run_are_right(path: Path) -> None:
    for block in blocks(path):
        where = f"{name(path)}:{block.line}"
        if block.language == "toml":
            values = tomllib.loads(block.text)
            if "rule" in values:
                GatePolicy.of(values)
            else:
                Recipe.of(**{"out": "somewhere", **values})
        elif block.language == "yaml":
            assert yaml.safe_load(block.text), where
        elif block.language == "json":
            json.loads(block.text)
        elif block.language in CHECKED:
            text = "\n".join(re.sub(r"^\$ ", "", line) for line in block.text.splitlines())
            if "castune " not in text:
                continue
            for arguments in castune_commands(text):
                assert_parses(arguments, where)


def castune_commands(text: str) -> list[list[str]]:
    """The arguments of every castune command in a shell text, whatever starts it."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        # What a scheduler wraps is a command too.
        line = re.sub(r'--wrap "([^"]*)"', r"; \1", line)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            words = []
        if "castune" not in words or "install" in words:
            continue
        arguments = words[words.index("castune") + 1 :]
        end = next((i for i, word in enumerate(arguments) if word in ("|", "&&", ";", "&") or word.endswith(";")), None)
        found.append([word.rstrip(")") for word in arguments[:end]])
    return found


def assert_parses(arguments: list[str], where: str) -> None:
    group: Any = typer.main.get_command(app)
    command = group.commands.get(arguments[0]) if arguments else None
    assert command is not None, f"{where}: there is no command {arguments}"
    # Raises for an option that does not exist, a value of the wrong kind, or a missing argument.
    command.make_context(arguments[0], arguments[1:])


# What a newcomer reads first; the other pages, the tutorial among them, are run by `make test-all`.
FIRST = ("README.md",)


@pytest.mark.real
@pytest.mark.parametrize(
    "path",
    [page if name(page) in FIRST else pytest.param(page, marks=pytest.mark.slow) for page in RUN_PAGES],
    ids=name,
)
def test_blocks_are_run(path: Path, tmp_path: Path) -> None:
    wanted = [block for block in blocks(path) if block.language in RUN]
    (tmp_path / "blocks.json").write_text(json.dumps([list(block) for block in wanted]), encoding="utf-8")
    place = tmp_path / "page"
    place.mkdir()
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(map(str, (served_castune().parent, Path(sys.executable).parent, os.environ["PATH"]))),
        "RECIPES": str(ROOT / "recipes"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OPENAI_API_KEY": "",
    }
    done = run_command(
        [sys.executable, "-c", _RUNNER, tmp_path / "blocks.json"], cwd=place, env=environment, timeout=1200
    )
    assert done.returncode == 0, f"{name(path)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"


_RUNNER = """
import json, subprocess, sys, traceback
names = {"__name__": "__main__"}
for language, text, line in json.load(open(sys.argv[1])):
    print(f"--- line {line}", flush=True)
    if language == "bash":
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", text])
        if done.returncode:
            sys.exit(f"the block of line {line} ended with {done.returncode}")
        continue
    try:
        exec(compile(text, f"block of line {line}", "exec"), names)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
"""
