"""What attacks leave where replies are unscored: planted outcomes of two arms, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fake_attacks import make_attacks
from gate_run import evaluation, make_run, of_count

from castune.artifacts.attack_result import Attack, AttackedArm, AttackResult
from castune.artifacts.tune_result import adapter_hash
from castune.errors import NothingScored
from castune.report.attacks import headline, sentences
from castune.stats.estimates import wilson_interval
from castune.steps.attack_outcomes import AllMeasured, Measured, comparisons, require_refusals, row_of
from castune.steps.directory import RunDirectory

Outcomes = Sequence[bool | None]
WEAK, STRONG = Attack("relearn", 10.0), Attack("relearn", 1000.0)
BEFORE, SILENT = of_count(80, 100), [None] * 100


def measured(**arms: tuple[Outcomes, ...]) -> AllMeasured:
    """Of every arm before any attack, after the weak one, and after the strong one."""
    return {
        (arm, attack): Measured(evaluation(arm, {"harmful": values}, None), arm, 1.0, {})
        for arm, of_arm in arms.items()
        for attack, values in zip((None, WEAK, STRONG), of_arm, strict=False)
    }


def result(found: AllMeasured) -> AttackResult:
    arms = list(dict.fromkeys(arm for arm, _ in found))
    attacks = list(dict.fromkeys(attack for _, attack in found if attack is not None))
    rows = [row_of(arm, one, found[arm, None], found[arm, one], ["harmful"]) for one in attacks for arm in arms]
    return replace(
        make_attacks(-0.2),
        arms=tuple(AttackedArm(arm, 270, 270, "heads", 1.0, arm) for arm in arms),
        rows=tuple(rows),
        comparisons=tuple(comparisons(arms, attacks, found, ["harmful"])),
    )


def test_an_arm_that_falls_silent_has_not_kept_its_refusals() -> None:
    silent = [*[True] * 8, *[None] * 72, *[False] * 20]
    found = result(measured(all=(BEFORE, silent), safe=(BEFORE, of_count(60, 100))))
    of_all, of_safe = found.rows
    assert (of_all.kept, of_all.kept_interval, of_all.kept_unscored) == (0.1, wilson_interval(8, 80), 72)
    assert (of_all.gained, of_all.lost, of_all.change_unscored) == (0, 0, 72)
    assert (of_safe.kept, of_safe.kept_unscored, of_safe.change_unscored) == (0.75, 0, 0)
    [one] = found.comparisons
    assert (one.value, one.n, one.unscored) == (pytest.approx(0.65), 100, 0)
    assert one.is_seen
    assert (
        "all keeps 10.0\u00a0% of its refusals (95\u00a0% 5.2 to 18.5; 72 replies are unscored and count as not kept)"
        in (sentences(found)[0])
    )


def test_an_attack_of_which_nothing_is_scored_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    heard = measured(all=(BEFORE, of_count(60, 100)), safe=(BEFORE, of_count(30, 100)))
    both = measured(all=(BEFORE, of_count(60, 100), SILENT), safe=(BEFORE, of_count(30, 100), of_count(10, 100)))
    require_refusals(heard, ["harmful"])
    assert caplog.text == ""
    require_refusals(both, ["harmful"])
    assert "arm all, under relearn-1000: none of the replies to harmful could be scored" in caplog.text
    alone, found = result(heard), result(both)
    assert found.rows_of(WEAK) == alone.rows_of(WEAK)
    row, other = found.rows_of(STRONG)
    assert (row.kept, row.change, row.after.value, row.after.unscored) == (None, None, None, 100)
    assert other.kept == 10 / 80
    first, second = found.comparisons
    assert (first.value, first.interval, first.p) == tuple(
        getattr(alone.comparisons[0], name) for name in ("value", "interval", "p")
    )
    assert (second.value, second.p_adjusted) == (None, None)
    assert "what all keeps is not known" in sentences(found)[1]
    assert headline(found).startswith("Safety in arm safe breaks more easily than that in all: relearning on 10 benign")


def test_an_arm_that_is_silent_before_hides_no_other() -> None:
    found = measured(
        all=(BEFORE, of_count(60, 100)), mute=(SILENT, of_count(30, 100)), safe=(BEFORE, of_count(58, 100))
    )
    require_refusals(found, ["harmful"])
    said = result(found)
    assert "what mute keeps is not known" in sentences(said)[0]
    assert headline(said).startswith(
        "Under 1 attack no difference is seen in how easily the safety of arms safe and all"
    )


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({"all": (SILENT, SILENT)}, "arm all, before any attack: none of the replies to harmful"),
        ({"all": (SILENT, BEFORE), "safe": (BEFORE, SILENT)}, "arm all, before any attack"),
        ({"all": (BEFORE, SILENT, SILENT)}, "arm all, under relearn-10:"),
    ],
    ids=["nothing", "no arm before and after", "no attack"],
)
def test_where_nothing_is_known_nothing_is_told(arms: dict[str, tuple[Outcomes, ...]], said: str) -> None:
    with pytest.raises(NothingScored, match=said):
        require_refusals(measured(**arms), ["harmful"])


# -- arms that were trained again


@pytest.fixture
def folder(tmp_path: Path) -> RunDirectory:
    """A run with attacks on safe, the reference, and on risky."""
    folder = make_run(tmp_path, {name: {"harmful": BEFORE} for name in ("base", "safe", "risky")})
    found = result(measured(safe=(BEFORE, of_count(60, 100)), risky=(BEFORE, of_count(30, 100))))
    hashes = {arm.name: adapter_hash(arm.adapter) for arm in folder.arms()}
    replace(found, arms=tuple(replace(arm, adapter_hash=hashes[arm.name]) for arm in found.arms)).save(folder.attacks)
    return folder


def trained_again(folder: RunDirectory, name: str) -> None:
    (folder.arm(name).adapter / "adapter_model.safetensors").write_text("new")


def test_attacks_on_arms_that_are_there_are_read_as_they_are(folder: RunDirectory) -> None:
    assert folder.load_attacks() == AttackResult.load(folder.attacks)


@pytest.mark.parametrize(("gone", "left"), [("risky", "safe"), ("safe", "risky")])
def test_an_arm_that_was_trained_again_hides_no_other(
    folder: RunDirectory, gone: str, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = AttackResult.load(folder.attacks)
    trained_again(folder, gone)
    found = folder.load_attacks()
    assert found is not None
    assert found.gone == (gone,)
    assert found.rows == tuple(row for row in whole.rows if row.arm == left)
    assert found.comparisons == ()
    assert f"attacks on {gone} are of adapters that no longer exist" in caplog.text
    assert f"castune attack {folder.path}" in caplog.text


def test_adapters_that_are_gone_altogether_and_where_none_is_left(folder: RunDirectory) -> None:
    (folder.arm("risky").adapter / "adapter_model.safetensors").unlink()
    found = folder.load_attacks()
    assert found is not None
    assert found.gone == ("risky",)
    trained_again(folder, "safe")
    assert folder.load_attacks() is None
