"""Signs of how castune is built, of commits and of the working tree side by side: `make structure REVISIONS=HEAD~9`.

Signs, not aims: a number that gets worse wants a reason, not a trick.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/castune"
LONG_FUNCTION, LONG_FILE = 60, 350


def sources(revision: str | None) -> dict[str, str]:
    """The text of every module by its path below the package; of the working tree where no revision is named."""
    if revision is None:
        return {
            str(path.relative_to(ROOT / PACKAGE)): path.read_text(encoding="utf-8")
            for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        }
    names = _git("ls-tree", "-r", "--name-only", revision, PACKAGE).splitlines()
    return {
        name.removeprefix(f"{PACKAGE}/"): _git("show", f"{revision}:{name}") for name in names if name.endswith(".py")
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def room(path: str) -> str:
    """The first part of a module's name below castune: a package, or a module of its own."""
    return path.split("/", 1)[0].removesuffix(".py")


def code_lines(text: str, tree: ast.Module) -> int:
    """Lines that are neither blank nor part of a docstring."""
    of_docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    return sum(bool(line.strip()) and number not in of_docstrings for number, line in enumerate(text.splitlines(), 1))


def long_functions(tree: ast.Module) -> Iterator[str]:
    """Functions of more lines than fit on a screen, from `def` to the last line."""
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and (node.end_lineno or 0) - node.lineno + 1 > LONG_FUNCTION:
            yield node.name


def imported(path: str, tree: ast.Module) -> set[str]:
    """Rooms of castune that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("castune.")}
    return found - {room(path)}


def arrows(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Which rooms each room imports; names of castune itself, such as its version, are no room."""
    rooms = {room(path) for path in trees} - {"__init__", "__main__"}
    found: dict[str, set[str]] = {name: set() for name in rooms}
    for path, tree in trees.items():
        if room(path) in rooms:
            found[room(path)] |= imported(path, tree) & rooms
    return found


def longest_chain(graph: Mapping[str, set[str]]) -> list[str]:
    """The longest way along the arrows that enters no room twice.

    Raises:
        ValueError: rooms import each other in a circle; the message names them.
    """

    @cache
    def below(name: str) -> list[str]:
        if name in open_rooms:
            raise ValueError(f"rooms import each other: {' -> '.join([*open_rooms, name])}")
        open_rooms.append(name)
        tails = [below(other) for other in sorted(graph[name])]
        open_rooms.pop()
        return [name, *max(tails, key=len, default=[])]

    open_rooms: list[str] = []
    return max((below(name) for name in sorted(graph)), key=len)


def signs(texts: Mapping[str, str]) -> dict[str, str]:
    """The table's column for one state of the source."""
    trees = {path: ast.parse(text) for path, text in texts.items()}
    functions = [name for tree in trees.values() for name in long_functions(tree)]
    graph = arrows(trees)
    try:
        chain = str(len(longest_chain(graph)))
    except ValueError as error:
        chain = f"circle: {str(error).partition(': ')[2]}"
    return {
        "source lines without docstrings": str(sum(code_lines(text, trees[path]) for path, text in texts.items())),
        "modules": str(len(texts)),
        "rooms": str(len(graph)),
        f"functions over {LONG_FUNCTION} lines": str(len(functions)),
        f"files over {LONG_FILE} lines": str(sum(len(text.splitlines()) > LONG_FILE for text in texts.values())),
        "`Any`": str(sum(len(re.findall(r"\bAny\b", text)) for text in texts.values())),
        "`dict[str, Any]`": str(sum(text.count("dict[str, Any]") for text in texts.values())),
        "import arrows between rooms": str(sum(map(len, graph.values()))),
        "longest chain of rooms": chain,
    }


def main(revisions: list[str]) -> None:
    """Print a table, a column a revision and one for the working tree."""
    columns = {name: signs(sources(name)) for name in revisions} | {"now": signs(sources(None))}
    print(f"| | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|")
    for row in columns["now"]:
        print(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")


if __name__ == "__main__":
    main(sys.argv[1:])
