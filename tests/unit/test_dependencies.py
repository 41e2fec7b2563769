"""What castune is installed with: pinned, whole, and no newer than what it says it accepts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
}


def required(requirement: Requirement, seen: set[str]) -> Iterator[tuple[Requirement, str]]:
    """The requirement and all that it requires here, each with the version that is installed."""
    for extra in (requirement.extras or {""}) | {""}:
        if (key := f"{canonicalize_name(requirement.name)}[{extra}]") in seen:
            continue
        seen.add(key)
        found = metadata.distribution(requirement.name)
        yield requirement, found.version
        for line in found.requires or ():
            inner = Requirement(line)
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                yield from required(inner, seen)


def test_the_lowest_versions_that_are_tried_are_those_that_are_accepted() -> None:
    tried = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = {line.replace("==", ">=") for line in tried if not line.startswith("#")}
    assert lowest == {line for line in PROJECT["dependencies"] if not line.startswith("torch>=")}


@pytest.mark.parametrize("group", ["core", "dev"])
def test_everything_is_there_accepted_and_pinned(group: str) -> None:
    lines = PROJECT["dependencies"] if group == "core" else PROJECT["optional-dependencies"]["dev"]
    seen: set[str] = set()
    wrong = []
    for line in lines:
        for requirement, version in required(Requirement(line), seen):
            name = canonicalize_name(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement} is required, {version} is installed")
            if name != "castune" and PINNED.get(name) != version.partition("+")[0]:
                wrong.append(f"{name} {version} is installed, constraints.txt has {PINNED.get(name)}")
    assert len(seen) > 40
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.processes
def test_doctor_says_that_torch_is_missing(tmp_path: Path) -> None:
    for one in Path(sysconfig.get_path("purelib")).iterdir():
        if not one.name.startswith("torch"):
            (tmp_path / one.name).symlink_to(one)
    command = [sys.executable, "-S", "-m", "castune.cli", "doctor"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{tmp_path}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"torch +missing; install it with: python -m pip install torch$", done.stdout, re.MULTILINE)
    assert re.search(r"transformers +\d", done.stdout)
