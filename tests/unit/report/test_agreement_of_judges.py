"""Two judges on one page: how far they agree, and the replies of which they say different things, behind a click."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_run import Run
from test_page import ATTACKS, Page

from castune.report.agreement import JudgePair, two_judges
from castune.report.page import write_report


def pair_of(arm: str, verdicts: list[tuple[bool | None, bool | None]], other: str = "reading") -> JudgePair:
    def sample(n: int) -> Any:
        return {"suite": "harm", "id": str(n), "purpose": "safety", "prompt": f"prompt {n}", "reply": f"{arm} says {n}"}

    return JudgePair(arm, "opening", other, [(sample(n), *both) for n, both in enumerate(verdicts)])


VERDICTS: list[tuple[bool | None, bool | None]] = [
    *[(True, True)] * 20,
    *[(True, False)] * 5,
    *[(False, True)] * 10,
    *[(False, False)] * 15,
    (None, True),
]


def test_the_row_has_counts_and_kappa(run: Run, tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", **vars(run), judge_pairs=[pair_of("base", VERDICTS)])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "Do two judges agree?" in page.shown
    line = " ".join(page.shown.split("opening, reading")[1].split()[:12])
    assert line.startswith("50 20 (40.0")
    assert "0.40 (" in line
    assert "opening and reading disagree on 15 replies." in page.shown


def test_replies_they_disagree_on_are_behind_a_click_and_stay_text(run: Run, tmp_path: Path) -> None:
    apart = pair_of("base", VERDICTS)
    for attack, (sample, *_) in zip(ATTACKS, apart.verdicts[20:], strict=False):
        sample["reply"] = attack
    plain = Page(run.write(tmp_path / "plain.html"))
    write_report(tmp_path / "r.html", **vars(run), judge_pairs=[apart])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.open == []
    for name in ("script", "img", "style", "iframe", "link"):
        assert len(page.named(name)) == len(plain.named(name))
    for attack in ATTACKS:
        assert attack in page.text
        assert attack not in page.shown
    assert "base says 34" in page.text
    assert "base says 34" not in page.shown
    assert "base says 3 " not in page.text, "they agree on it"


def test_of_long_lists_some_are_shown() -> None:
    shown = two_judges([pair_of("base", [(True, False)] * 100), pair_of("safe", [(True, True), (False, False)])])
    assert "disagree on 100 replies, 20 shown" in shown
    assert shown.count("base says") == 20


def test_judges_who_say_one_thing_have_no_kappa() -> None:
    shown = two_judges([pair_of("base", [(False, False)] * 9)])
    assert "not defined" in shown
    assert "say the same of every reply" in shown


def test_without_verdicts_nothing_is_said() -> None:
    assert two_judges([]) == ""
    assert two_judges([pair_of("base", [(None, True)])]) == ""
