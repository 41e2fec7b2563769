"""Commands in a run directory take what was not typed from the run: else its arms differ in more than their heads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import command

from castune.artifacts import EvalResult, TuneResult
from castune.errors import CastuneError
from castune.steps.directory import RunDirectory

FinishedRun = Callable[..., Path]


@pytest.fixture
def folder(finished_run: FinishedRun, own_data: dict[str, Path]) -> RunDirectory:
    align = {"source": str(own_data["align"]), "limit": 3}
    return RunDirectory(finished_run(evaluate__limit=2, evaluate__strengths=[0.5], align=align))


def test_an_arm_is_trained_as_the_main_one(folder: RunDirectory) -> None:
    said = command("tune", folder.path, "--arm", "random")
    asked = "--rank 4 --learning-rate 0.02 --max-steps 2 --batch-size 2 --accumulation 1 --group-by-length"
    assert f"As in this run: {asked}\n" in said
    assert re.search(r"As in this run: --data \S+align\.jsonl --limit 3\n", said)
    main = TuneResult.load(folder.arm(None).adapter)
    other = TuneResult.load(folder.side_arm("random").adapter)
    assert other.settings == main.settings
    assert other.data == main.data
    typed = command("tune", folder.path, "--arm", "risky-50", "--rank", "2", "--max-steps", "none", "--epochs", "0.5")
    assert "rank" not in typed.partition("As in this run")[2].splitlines()[0]
    changed = TuneResult.load(folder.side_arm("risky-50").adapter).settings
    assert {key for key in changed if changed[key] != main.settings[key]} == {"rank", "max_steps", "epochs"}
    assert changed["max_steps"] is None


def test_arms_leave_out_what_the_main_arm_left_out(finished_run: FinishedRun, own_data: dict[str, Path]) -> None:
    folder = RunDirectory(finished_run())
    held_out = own_data["align"].with_name("one-row.jsonl")
    held_out.write_text(own_data["align"].read_text("utf-8").splitlines()[1] + "\n")
    command("tune", folder.path, "--overwrite", "--held-out", f"safety:{held_out}")
    command("tune", folder.path, "--arm", "all")
    adapters = (folder.arm(None).adapter, folder.side_arm("all").adapter)
    main, other = (TuneResult.load(adapter).data for adapter in adapters)
    assert main["left_out"] == other["left_out"] != []
    assert main["hash"] == other["hash"]
    # Other data are none of its business.
    copy = own_data["align"].with_name("copy.jsonl")
    copy.write_text(own_data["align"].read_text("utf-8"))
    command("tune", folder.path, "--arm", "risky-50", "--data", copy)
    assert "left_out" not in TuneResult.load(folder.side_arm("risky-50").adapter).data


def test_overlap_is_allowed_for_once(folder: RunDirectory, own_data: dict[str, Path]) -> None:
    measure = ["evaluate", folder.path, "--limit", "none", "--suites", f"safety:{own_data['align']}"]
    command(*measure, "--allow-overlap")
    with pytest.raises(CastuneError, match="castune tune --held-out"):
        command(*measure)


def test_switches_can_be_taken_back(folder: RunDirectory) -> None:
    said = command("tune", folder.path, "--arm", "all", "--no-group-by-length", "--null-space", "none")
    assert "group-by-length" not in said
    assert TuneResult.load(folder.side_arm("all").adapter).settings["group_by_length"] is False


def test_data_that_are_named_bring_no_limit_of_other_data(folder: RunDirectory, own_data: dict[str, Path]) -> None:
    command("tune", folder.path, "--arm", "all", "--data", own_data["align"])
    n = len(own_data["align"].read_text("utf-8").splitlines())
    assert TuneResult.load(folder.side_arm("all").adapter).data["n"] == n


def test_a_plain_evaluation_measures_what_the_run_did(folder: RunDirectory) -> None:
    before = EvalResult.load(folder.evaluation("safe"))
    written = folder.evaluation("safe").joinpath("metrics.json").stat().st_mtime_ns
    command("tune", folder.path, "--arm", "all")
    said = command("evaluate", folder.path)
    assert "--limit 2 --strengths 0.5,1.0" in said
    assert folder.evaluation("safe").joinpath("metrics.json").stat().st_mtime_ns == written
    found = EvalResult.load(folder.evaluation("all"))
    assert found.settings == before.settings
    assert [suite.data_hash for suite in found.suites] == [suite.data_hash for suite in before.suites]
    assert folder.is_evaluated("all", 0.5)


def test_a_limit_can_be_taken_back(folder: RunDirectory, own_data: dict[str, Path]) -> None:
    command("evaluate", folder.path, "--limit", "none", "--strengths", "1")
    n = len(own_data["benign"].read_text("utf-8").splitlines())
    assert max(suite.n for suite in EvalResult.load(folder.evaluation("safe")).suites) >= n > 2
    with pytest.raises(CastuneError, match="limit"):
        command("evaluate", folder.path, "--limit", "0")


def test_replies_are_judged_again_as_the_run_judged_them(folder: RunDirectory) -> None:
    command("evaluate", folder.path, "--judge", "prefix")
    command("judge", folder.path)
    assert EvalResult.load(folder.evaluation("safe")).settings["judge"] == "prefix"


def test_the_name_of_an_arm_changes_what_the_run_did(finished_run: FinishedRun, own_data: dict[str, Path]) -> None:
    folder = RunDirectory(finished_run(tune__surgery="pcgrad"))
    utility = ["--utility", own_data["utility"]]
    command("tune", folder.path, "--arm", "safe+pcgrad-symmetric", *utility)
    settings = TuneResult.load(folder.side_arm("safe+pcgrad-symmetric").adapter).settings
    assert settings["surgery"] == "pcgrad-symmetric"
    # What was typed is not the run's, even where it is the same.
    for surgery, arm in (("pcgrad-symmetric", "all+pcgrad"), ("pcgrad", "all+pcgrad-symmetric")):
        with pytest.raises(CastuneError, match="contradict each other"):
            command("tune", folder.path, "--arm", arm, "--surgery", surgery, *utility)
