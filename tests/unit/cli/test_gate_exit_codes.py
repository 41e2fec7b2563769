"""`castune gate`: exit codes, and the files it writes."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from gate_run import SECRET, make_run, of_count, write_policy

from castune import cli
from castune.artifacts.gate_result import GateResult

ARMS = {"base": {"harmful": of_count(20, 100)}, "safe": {"harmful": of_count(96, 100)}}
RULE = 'metric = "safety"\nat_least = {}'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_run(tmp_path / "run", ARMS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def castune(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["castune", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("threshold", "verdict", "code"), [(0.5, "pass", 0), (0.999, "fail", 1), (0.95, "inconclusive", 3)]
)
def test_the_exit_code_is_the_verdict_and_the_files_say_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threshold: float, verdict: str, code: int
) -> None:  # fmt: skip
    write_policy(place / "gate.toml", RULE.format(threshold), "certificate = true")
    files = ["--json", "out/gate.json", "--junit", "out/gate.xml"]
    assert castune(monkeypatch, "gate", "run", "--policy", "gate.toml", *files) == code
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith(f"{verdict}: 2 rules")
    result = GateResult.load("out/gate.json")
    assert (result.verdict, result.run, result.policy) == (verdict, "run", "gate.toml")
    assert json.loads(Path("out/gate.json").read_text(encoding="utf-8"))["verdict"] == verdict
    suite = ET.parse("out/gate.xml").getroot()[0]
    assert suite.get("failures") == str(int(verdict == "fail"))
    assert suite.get("skipped") == str(int(verdict == "inconclusive"))
    # Nothing half written is left, and nothing of what the model said is anywhere.
    assert sorted(path.name for path in Path("out").iterdir()) == ["gate.json", "gate.xml"]
    assert not any(
        SECRET in text for text in (said, *(path.read_text(encoding="utf-8") for path in Path("out").iterdir()))
    )


def test_the_same_run_and_policy_give_the_same_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_policy(place / "gate.toml", RULE.format(0.95))
    contents = []
    for _ in range(2):
        castune(monkeypatch, "gate", "run", "--policy", "gate.toml", "--json", "gate.json", "--junit", "gate.xml")
        contents.append([Path(name).read_bytes() for name in ("gate.json", "gate.xml")])
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing option '--policy'"),
        (["run", "--policy", "absent.toml"], "error: absent.toml: no such policy"),
        (["absent", "--policy", "gate.toml"], "error: absent: not a run directory"),
        (["run", "--policy", "gate.toml", "--baseline", "absent"], "error: absent: not a run directory"),
        (["run", "--policy", "gate.toml", "--json", "run"], "error: --json run: is a directory; give a file to write"),
        (
            ["run", "--policy", "gate.toml", "--junit", "./gate.toml"],
            "error: --junit gate.toml: the same file as --policy",
        ),
        (["run", "--policy", "gate.toml", "--json", "g", "--junit", "g"], "error: --junit g: the same file as --json"),
        (["run", "--policy", "gate.toml", "--json", "gate.toml/g.json"], "gate.toml is a file, not a directory"),
        # The first of the two could be written.
        (["run", "--policy", "gate.toml", "--json", "g", "--junit", "dangling/g.xml"], "error: "),
    ],
)
def test_bad_input_ends_with_code_2_and_writes_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    write_policy(place / "gate.toml", RULE.format(0.95))
    (place / "dangling").symlink_to("nowhere")
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    assert castune(monkeypatch, "gate", *arguments) == 2
    out, error = capsys.readouterr()
    assert "rule" not in out, "no verdict where there is none"
    assert said in error
    assert "Traceback" not in error
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before
