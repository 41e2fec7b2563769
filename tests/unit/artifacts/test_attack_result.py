"""The record of attacks: equal when it is read again, refused when it was changed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fake_attacks import DIRECTION, RELEARN, make_attacks

from castune.artifacts.attack_result import ATTACKS_FILE, Attack, AttackResult
from castune.errors import ArtifactError


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = make_attacks(-0.2)
    file = result.save(tmp_path)
    assert file == tmp_path / ATTACKS_FILE
    assert AttackResult.load(tmp_path) == result
    assert AttackResult.load(tmp_path).attacks == [RELEARN, DIRECTION]


def test_what_a_result_holds_by_attack() -> None:
    result = make_attacks(-0.2)
    assert [row.arm for row in result.rows_of(RELEARN)] == ["all", "safe"]
    assert [one.attack for one in result.comparisons_of(DIRECTION)] == [DIRECTION]
    assert result.rows_of(Attack("quantise")) == []
    assert result.arms[1].share == pytest.approx(0.25, abs=0.01)


def test_what_is_left_without_an_arm_needs_nothing_of_it() -> None:
    result = make_attacks(-0.2)
    left = result.without(["safe"])
    assert ([arm.name for arm in left.arms], left.gone) == (["all"], ("safe",))
    assert left.rows == tuple(row for row in result.rows if row.arm == "all")
    assert left.comparisons == ()
    assert result.without([]) == result
    with pytest.raises(ValueError, match="no arms"):
        result.without(["safe", "all"])


@pytest.mark.parametrize(
    ("kind", "amount"), [("relearn", None), ("dial", None), ("direction", 1.0), ("quantise", 4.0), ("bribe", None)]
)
def test_what_is_no_attack(kind: str, amount: float | None) -> None:
    with pytest.raises(ValueError, match="no attack"):
        Attack(kind, amount)


def test_names_are_those_of_directories() -> None:
    found = [Attack("relearn", 100.0), Attack("dial", 0.25), Attack("direction"), Attack("quantise")]
    assert [attack.name for attack in found] == ["relearn-100", "dial-0.25", "direction", "quantise"]


@pytest.mark.parametrize(
    ("value", "low", "high", "p", "is_seen"),
    [
        (-0.2, -0.3, -0.1, 0.01, True),
        (0.2, 0.1, 0.3, 0.049, True),
        (-0.2, -0.3, -0.1, 0.06, False),
        (-0.2, -0.5, 0.1, 0.01, False),
        (-0.2, -0.3, -0.1, None, False),
    ],
)
def test_a_difference_is_claimed_by_interval_and_adjusted_p(
    value: float, low: float, high: float, p: float | None, is_seen: bool
) -> None:
    one = make_attacks(-0.2).comparisons[0]
    assert replace(one, value=value, interval=(low, high), p_adjusted=p).is_seen is is_seen
    assert not replace(one, value=None, interval=None).is_seen


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target", "much", "target"),
        ("rows", [], "no arms, or no attacks"),
        ("arms", [], "no arms, or no attacks"),
        ("left_out", {"quantise": 4}, "left_out"),
        ("kind", "shopping list", "expected a attack result, found shopping list"),
        ("schema_version", 9, "schema version 9"),
    ],
)
def test_damage_is_named(tmp_path: Path, key: str, value: Any, said: str) -> None:
    file = make_attacks(-0.2).save(tmp_path)
    record = json.loads(file.read_text())
    record.pop("digest")
    file.write_text(json.dumps({**record, key: value}))
    with pytest.raises(ArtifactError, match=said):
        AttackResult.load(tmp_path)


def test_a_changed_digit_and_an_arm_that_is_not_there(tmp_path: Path) -> None:
    result = make_attacks(-0.2)
    file = result.save(tmp_path)
    file.write_text(file.read_text().replace('"unscored": 0', '"unscored": 1', 1))
    with pytest.raises(ArtifactError, match="castune attack RUN"):
        AttackResult.load(tmp_path)
    with pytest.raises(ValueError, match="arms that are not there: safe"):
        AttackResult(**{**{name: getattr(result, name) for name in asdict(result)}, "arms": result.arms[:1]})
    with pytest.raises(ArtifactError, match="castune attack RUN"):
        AttackResult.load(tmp_path / "nowhere")
