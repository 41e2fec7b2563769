"""What a repair says of candidates of which too few examples are scored."""

from __future__ import annotations

from castune.artifacts.repair_result import RepairResult, Tried
from castune.report.repair_summary import summary, verdict

FEW = "of 100 examples of starter-safety-eval that mine has a score for it has 8"


def tried(name: str, kind: str, cost: float, *, kept: float | None = 0.97, too_few: str = "") -> Tried:
    return Tried(
        name, kind, 3, 1.0, {}, None if kept is None else 0.5, kept, None, {"nll": (cost, 0.01)}, None,
        {"safety": 8 if too_few else 100, "nll": 50}, too_few,
    )  # fmt: skip


def test_a_silent_candidate_is_named_with_the_reason() -> None:
    rows = (
        tried("mine", "source", 0.3, kept=1.0),
        tried("drop-2", "effects", 0.2),
        tried("drop-4", "effects", 0.1, kept=1.0, too_few=FEW),
        tried("drop-8", "effects", 0.1, kept=None, too_few=FEW.replace("8", "0")),
    )
    found = RepairResult(
        adapter={"name": "mine", "hash": "x"}, model={}, settings={}, cost="nll", base_safety=0.0, suites=("s",),
        tried=rows, chosen="drop-2", reason="why", dropped=(), arm=None, confirmed_on=(), confirmed=(), provenance={},
    )  # fmt: skip
    lines = summary(found)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "drop-4 50.0 % too few scored +0.100 ± 0.010" in text.replace("\u202f", " ")
    assert "drop-8 – too few scored" in text
    assert f"drop-4 cannot be chosen or compared: {FEW}" in text
    assert "drop-2 cannot" not in text


def test_a_silent_alternative_is_no_better_and_of_a_silent_choice_nothing_is_said() -> None:
    rows = [
        tried("mine", "source", 0.3, kept=1.0),
        tried("drop-2", "effects", 0.2),
        tried("random-2-1", "random", 0.1, kept=1.0, too_few=FEW),
        tried("weaker-0.9", "weaker", 0.25),
    ]
    assert verdict(rows, "drop-2", "nll").startswith("none of 1 alternatives keeps as much safety")
    rows[1] = tried("drop-2", "effects", 0.2, too_few=FEW)
    assert verdict(rows, "drop-2", "nll") == "nothing can be said of drop-2, of which too few examples are scored"
