from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import (
    MODEL,
    Run,
    attributed,
    make_domains,
    make_evaluation,
    make_map,
    make_masked,
    make_mixed_map,
    make_projected,
    make_run,
    make_suite,
)

from castune.artifacts import ConflictMap
from castune.artifacts.lm_eval_result import LmEvalResult, LmEvalScore
from castune.names import KINDS
from castune.report.diagnosis import conflict_map
from castune.report.markup import Markup, join, script_json, tag
from castune.report.summary import NOT_MEASURED
from castune.selection import select
from castune.stats.estimates import CostRatio, PairedDifference

ATTACKS = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "\"' onmouseover=alert(4) x='",
    "</details></table></main><h1>owned",
    "<!--<script>",
]


class Page(HTMLParser):
    """Elements, visible text, and what lies inside closed `<details>`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.shown = "", ""
        self.feed(html)

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in ("meta", "input"):
            self.open.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop()[0] == name

    def handle_data(self, data: str) -> None:
        names = [name for name, _ in self.open]
        if "script" in names or "style" in names:
            return
        self.text += data + " "
        closed = any(name == "details" and "open" not in attributes for name, attributes in self.open)
        if not closed or "summary" in names:
            self.shown += data + " "

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]


def hostile(run: Run, attack: str) -> Run:
    """The run with `attack` in every text that comes from data or from a model."""
    run.cmap.metadata["model"] = {**MODEL, "name": attack, "type": attack}
    for arm, evaluation in run.evaluations.items():
        samples = [
            {**sample, "prompt": attack, "group": attack}
            | ({"reply": attack} if "reply" in sample else {"choices": [attack] * 4})
            for sample in evaluation.samples
        ]
        run.evaluations[arm] = dataclasses.replace(
            evaluation, samples=tuple(samples), model={"name": attack}, settings={attack: attack}
        )
    run.selections[attack] = run.selections.pop("random")
    run.tunings[attack] = run.tunings.pop("random")
    run.evaluations[attack] = run.evaluations.pop("random")
    for source in run.masked["ties"].sources:
        source["name"] = attack
    run.projected[attack] = make_projected(run.selections["safe"], attack)
    del run.projected["safe-lora"]
    run.masked[attack] = run.masked.pop("ties")
    run.recipe_text, run.notes = attack, [attack]
    return run


@pytest.mark.parametrize("attack", ATTACKS)
def test_texts_of_models_and_users_stay_text(tmp_path: Path, attack: str) -> None:
    plain, attacked = make_run((4, 4)), make_run((4, 4))
    for run in (plain, attacked):
        run.masked = {"ties": make_masked(run.selections["safe"], "mine")}
        run.projected = {"safe-lora": make_projected(run.selections["safe"], "mine")}
    hostile(attacked, attack)
    expected, found = (
        Page(plain.write(tmp_path / "plain.html")),
        Page(attacked.write(tmp_path / "attacked.html")),
    )
    assert found.open == []
    for name in ("script", "img", "h1", "main", "style", "iframe", "link"):
        assert len(found.named(name)) == len(expected.named(name))
    handlers = [key for _, attributes in found.elements for key in attributes if key.startswith("on")]
    assert handlers == []
    # Model, prompts, replies, recipe and notes are all there, as they are.
    assert found.text.count(attack) > 50


@pytest.mark.parametrize("attack", ATTACKS)
def test_names_and_sources_of_domains_stay_text(tmp_path: Path, attack: str) -> None:
    """No diagnosis gives such a name; a file that is not ours could."""
    plain, attacked = make_run((4, 4)), make_run((4, 4))
    plain.cmap = make_domains((4, 4), ["knowledge", "maths"])
    attacked.cmap = make_domains((4, 4), ["knowledge", attack], combined=attack)
    expected, found = (Page(run.write(tmp_path / f"{i}.html")) for i, run in enumerate((plain, attacked)))
    assert found.open == []
    assert [name for name, _ in found.elements] == [name for name, _ in expected.elements]
    assert not [key for _, attributes in found.elements for key in attributes if key.startswith("on")]
    assert found.text.count(attack) >= 3


@pytest.mark.parametrize(("combined", "said"), [("mean", "mean over the utility domains"), ("worst", "is highest")])
def test_every_domain_has_a_line(tmp_path: Path, run: Run, combined: str, said: str) -> None:
    assert "Utility domains" not in Page(run.write(tmp_path / "one.html")).text
    run.cmap = make_domains((4, 4), ["knowledge", "maths"], combined)
    text = Page(run.write(tmp_path / "two.html")).text
    assert "Utility domains" in text
    assert said in text
    for line in (
        "knowledge questions: knowledge.jsonl, n = 30 accuracy 25.0\u202f%\u00a0±\u00a04.0, n = 30, 0 unscored 0.61 0.88",
        "maths questions: maths.jsonl, n = 40 accuracy 35.0\u202f%\u00a0±\u00a04.0, n = 40, 1 unscored undefined 0.78",
    ):
        assert line in text
    assert "Utility accuracy before ablation, mean over domains" in text


def test_what_is_measured_on_prompts_with_replies_is_called_so(tmp_path: Path, run: Run) -> None:
    run.cmap = make_domains((4, 4), ["knowledge", "overrefusal"])
    for one in (run.cmap, run.cmap.domains["overrefusal"]):
        one.metadata["settings"] = {**one.metadata["settings"], "reply_domains": ["overrefusal"]}
    text = Page(run.write(tmp_path / "two.html")).text
    assert "knowledge questions: knowledge.jsonl, n = 30 accuracy 25.0" in text
    assert "overrefusal harmless prompts: overrefusal.jsonl, n = 40 share answered 35.0" in text
    assert "Utility questions and harmless prompts" in text
    assert "Utility accuracy or share answered before ablation, mean over domains" in text
    run.cmap = run.cmap.domains["overrefusal"]
    text = Page(run.write(tmp_path / "one.html")).text
    assert "Utility harmless prompts" in text
    assert "Utility share answered before ablation" in text


def test_json_in_a_script_cannot_end_it() -> None:
    value = {"a": ATTACKS, "b": "\u2028\u2029&"}
    text = script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="JSON"):
        script_json(float("nan"))


def test_markup_is_escaped_once() -> None:
    assert tag("p", "a < b", tag("b", "&"), title='"') == '<p title="&quot;">a &lt; b<b>&amp;</b></p>'
    assert join([Markup("<br>"), "<br>"]) == "<br>&lt;br&gt;"


def test_numbers_on_the_page_are_those_of_the_artifacts(tmp_path: Path, run: Run) -> None:
    text = Page(run.write(tmp_path / "report.html")).text
    for arm, evaluation in run.evaluations.items():
        for suite in evaluation.suites:
            assert suite.value is not None
            assert suite.standard_error is not None
            rate = f"{100 * suite.value:.1f}\u202f%\u00a0±\u00a0{100 * suite.standard_error:.1f}"
            row = rf"{arm} .*{re.escape(rate)} .*n = {suite.n}, {suite.unscored} unscored"
            assert re.search(row, text), (arm, suite.suite)
    for changes in run.differences.values():
        for change in changes.values():
            assert change.value is not None
            signed = f"{100 * change.value:+.1f}".replace("-", "−")
            assert f"{signed}\u00a0±\u00a04.1  {change.n} pairs" in text
    for result in run.tunings.values():
        assert f"{result.certificate.checked_rows:,}, all identical" in text
        assert f"{result.certificate.changed_rows:,} of {result.certificate.selected_rows:,}" in text
        assert all(f"{count:,}" in text for count in result.budget.values())
    assert "63.7\u202f%\u00a0±\u00a05.4, n = 80" in text
    assert "7.8\u202f%\u00a0±\u00a03.4, n = 64, 2 unscored" in text
    assert "max_new_tokens 32" in text
    for hash_ in ("5afe5afe5afe5afe", "a119a119a119a119", "hash-of-safety", "feedc0de", "0123456789abcdef"):
        assert hash_ in text


def test_how_an_arm_was_trained_is_told(tmp_path: Path, run: Run) -> None:
    assert "Gradient surgery" not in Page(run.write(tmp_path / "plain.html")).text
    safe, risky = run.tunings["safe"], run.tunings["risky"]
    run.tunings["safe"] = dataclasses.replace(
        safe,
        settings={**safe.settings, "surgery": "pcgrad", "surgery_granularity": "head", "freeze_a": True},
        surgery={"steps": 200, "conflicting_steps": 57, "mean_cosine": -0.0321},
        utility={"source": "starter-utility", "n": 96, "hash": "0a", "cut": 0, "replayed": 0},
    )
    run.tunings["risky"] = dataclasses.replace(
        risky,
        settings={**risky.settings, "method": "dpo", "quantization": "nf4", "replay": 0.1},
        null_space={"share": 0.95, "tokens": 5120, "directions": {"q.0": (12, 576), "q.1": (34, 576)}},
        utility={"source": "starter-utility", "n": 96, "hash": "0a", "cut": 0, "replayed": 178},
    )
    selections = ({"step": 0, "units": [], "map_hash": "a"}, {"step": 100, "units": [], "map_hash": "b"})
    run.tunings["random"] = dataclasses.replace(run.tunings["random"], selections=selections)
    run.masked = {"ties": make_masked(run.selections["safe"], "mine-")}
    run.projected = {"safe-lora": make_projected(run.selections["safe"], "mine")}
    text = Page(run.write(tmp_path / "report.html")).text
    assert "safe SFT, pcgrad, A frozen" in text
    assert "risky DPO, 10 % replayed (178 examples), null space of 95 % of the utility activations, base in nf4" in text
    assert (
        "risky: A is free of the leading 12 to 34 of 576 directions of its inputs, which hold 95 % of the second moment "
        "of the utility activations (5,120 tokens, 2 projections)." in text
    )
    assert "random SFT, heads chosen 2 times (budget: of the last) " in text
    assert "safe pcgrad, head starter-utility, n = 96 57 of 200 −0.032" in text
    assert "ties mine-1 × 1, mine-2 × 0.5 ties, density 0.4" in text
    assert "30 v_proj" in text
    # Of a norm of 5, a part of 3 became one of 1.
    assert "1 of 3 (cosine below 0.35) 0.200 to 0.600 0.825" in text
    assert "a projected adapter may change every head of its layers" in text


def test_a_margin_map_says_how_many_tokens_it_compared(tmp_path: Path, run: Run) -> None:
    run.cmap.metadata["settings"]["margin_tokens"] = 8
    assert "margin (replies by their first 8 tokens), zero ablation" in Page(run.write(tmp_path / "r.html")).text


def test_the_data_of_the_charts_are_those_of_the_map(tmp_path: Path, run: Run) -> None:
    page = run.write(tmp_path / "report.html")
    data = json.loads(re.findall(r'<script id="charts" type="application/json">(.*?)</script>', page)[0])
    (cells,) = data["specs"]["zones"]["datasets"].values()
    assert [cell["conflict_score"] for cell in cells] == run.cmap.column("conflict_score").tolist()
    assert {attributes["data-chart"] for attributes in Page(page).named("div") if "data-chart" in attributes} == set(
        data["specs"]
    )


def test_what_was_not_measured_says_so(tmp_path: Path, run: Run) -> None:
    suites = [
        make_suite("utility", 0.5, None, n=1),
        make_suite("safety", None, None, n=0, unscored=96),
        make_suite("over-refusal", 0.25, 0.05),
    ]
    run.evaluations = {
        "base": run.evaluations["base"],
        "safe": make_evaluation("safe", suites),
        "risky": make_evaluation("risky", suites[:1]),
    }
    run.differences = {"safe": {"starter-safety-eval": PairedDifference(None, None, 0, 96, 0, 0, None)}}
    run.cost_ratios = {"ucr": {"safe": CostRatio(None)}}
    text = Page(run.write(tmp_path / "report.html")).text
    table = text[text.index("Before and after") : text.index("Rates are value")]
    safe = table[table.index(" safe ") : table.index(" risky ")]
    assert f"50.0\u202f%\u00a0±\u00a0{NOT_MEASURED}" in safe
    assert f"{NOT_MEASURED} change {NOT_MEASURED} n = 0, 96 unscored" in safe
    assert " 0.0\u202f%" not in safe
    risky = table[table.index(" risky ") :]
    assert risky.count(NOT_MEASURED) >= 4
    assert "Not plotted, as a number is missing: safe, risky." in text


def test_undefined_cost_is_no_number(tmp_path: Path, run: Run) -> None:
    text = Page(run.write(tmp_path / "report.html")).text
    table = text[text.index("Before and after") : text.index("Rates are value")]
    assert re.search(r"random .* undefined", table)
    assert re.search(r"risky .* 0\.15", table)


def test_further_cost_ratios_have_columns_where_they_were_measured(tmp_path: Path, run: Run) -> None:
    assert "UCR, nats" not in Page(run.write(tmp_path / "report.html")).text
    run.cost_ratios["ucr_nll"] = {"safe": CostRatio(0.31, 0.2, 0.4, 0.0)}
    text = Page(run.write(tmp_path / "report.html")).text
    table = text[text.index("Before and after") : text.index("Rates are value")]
    assert "UCR UCR, nats" in table
    assert "0.05 (0.01 to 0.12) 0.31 (0.20 to 0.40)" in table


def test_arms_judged_on_other_terms_are_marked(tmp_path: Path, run: Run) -> None:
    assert "not the same examples" not in run.write(tmp_path / "report.html")
    other = make_suite("safety", 0.5, 0.05, judge="other", max_new_tokens=64, data_hash="changed")
    run.evaluations["safe"] = make_evaluation("safe", [other])
    text = Page(run.write(tmp_path / "report.html")).text
    assert "not the same examples as base" in text
    assert "judge other, max_new_tokens 64" in text
    assert "judge prefix, max_new_tokens 32" in text


def test_harmful_text_is_behind_a_click(tmp_path: Path, run: Run) -> None:
    samples = [
        {**sample, "prompt": "HARMFUL PROMPT", "reply": "HARMFUL REPLY"}
        for sample in run.evaluations["base"].samples_of("starter-safety-eval")
    ]
    run.evaluations["base"] = dataclasses.replace(run.evaluations["base"], samples=tuple(samples))
    page = run.write(tmp_path / "report.html")
    found = Page(page)
    assert "HARMFUL PROMPT" in found.text
    assert "HARMFUL REPLY" in found.text
    assert "HARMFUL" not in found.shown
    assert page.count("HARMFUL PROMPT") == found.text.count("HARMFUL PROMPT")  # nor in an attribute


def test_samples_show_outcomes_and_never_a_guess(tmp_path: Path) -> None:
    run = make_run((4, 4))
    run.evaluations = {"base": run.evaluations["base"]}
    text = Page(run.write(tmp_path / "report.html")).text
    over = text[text.index("starter-over-refusal-eval: ") : text.index("Provenance")]
    assert over.count(" answered ") == 19
    assert over.count(" unscored ") == 1
    utility = text[text.index("starter-utility-eval: ") : text.index("starter-safety-eval: ")]
    assert utility.count(" right answer ") == 20
    assert "−0.750" in utility


def test_examples_whose_outcome_differs_come_first(tmp_path: Path, run: Run) -> None:
    text = Page(run.write(tmp_path / "report.html")).text
    utility = text[text.index("starter-utility-eval: ") : text.index("starter-safety-eval: ")]
    shown = [int(number) for number in re.findall(r"dragonfly (\d+)", utility)]
    differing = [i for i in range(20) if (i % 3 != 0) != ((i + 1) % 3 != 0)]
    assert shown == [*differing, *(i for i in range(20) if i not in differing)]


def many_samples(run: Run, count: int, reply: str) -> Run:
    """A suite in which base answers all, and `safe` and `risky` refuse all but one each: the last, the last but one."""
    for arm, evaluation in run.evaluations.items():
        kept = {"safe": count - 1, "risky": count - 2}.get(arm)
        samples = [
            {
                "suite": "many",
                "id": f"m{i}",
                "purpose": "over-refusal",
                "group": None,
                "prompt": f"Question {i}.",
                "reply": reply,
            }
            | {"outcome": (i in (count - 2, count - 1)) if arm == "base" else kept is not None and i != kept}
            for i in range(count)
        ]
        run.evaluations[arm] = dataclasses.replace(evaluation, samples=tuple(samples))
    return run


def test_of_many_samples_rare_changes_are_kept(tmp_path: Path, run: Run) -> None:
    text = Page(many_samples(run, 300, "A reply.").write(tmp_path / "report.html")).text
    assert "many: 24 of 300 examples" in text
    shown = re.findall(r"Question (\d+)\.", text)
    assert len(shown) == 24
    assert {"298", "299"} <= set(shown), "each is the only one that an arm lost"


def test_samples_stay_in_bounds(tmp_path: Path, run: Run) -> None:
    # An escaped "&" has five characters: 24 rows of four replies would be too much.
    page = many_samples(run, 300, "&" * 100_000).write(tmp_path / "report.html")
    assert "many: 24 of 300 examples" not in page
    replies = page[page.index("sample-replies") : page.index('id="provenance"')]
    assert len(replies) < 650_000
    assert page.count("cut here, 100,000 characters") >= 6 * 4


def test_a_run_without_training_and_with_a_bare_map_is_reported(tmp_path: Path) -> None:
    cmap = make_map((2, 3), settings={}, data={}, baseline={}, ties={}, seconds=None, provenance={})
    text = Page(Run(cmap).write(tmp_path / "report.html")).text
    assert "Nothing has been evaluated" in text
    assert "Nothing has been trained" in text
    assert "not recorded" in text
    assert not re.search(r"\b(nan|None|\{\})", text)


def test_a_map_of_a_thousand_heads_stays_small(tmp_path: Path) -> None:
    make_run((32,) * 32).write(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_vega_is_there_once(tmp_path: Path, run: Run) -> None:
    page = run.write(tmp_path / "report.html")
    assert page.count("window.vegaEmbed") == 1


def test_the_page_names_no_file_or_site(tmp_path: Path, run: Run) -> None:
    for name, attributes in Page(run.write(tmp_path / "report.html")).elements:
        found: dict[str, Any] = {key: value for key, value in attributes.items() if key in ("src", "href")}
        assert found == {}, name


def test_problems_show_the_right_answer_and_why_they_were_lost(tmp_path: Path, run: Run) -> None:
    problem = {
        "suite": "gsm8k", "id": "p1", "purpose": "utility", "group": None, "prompt": "One and one?", "reply": "3",
        "finished": True, "tokens": 1, "target": "2", "found": "3", "outcome": False, "failure": "direct answer",
    }  # fmt: skip
    for arm, evaluation in run.evaluations.items():
        run.evaluations[arm] = dataclasses.replace(evaluation, samples=(*evaluation.samples, problem))
    text = Page(run.write(tmp_path / "report.html")).text
    assert "One and one? right answer: 2" in text
    assert "wrong direct answer 3" in text


def test_every_prompt_of_the_four_way_table_is_counted_once(tmp_path: Path, run: Run) -> None:
    counts = {"n_refused": 66, "n_complied": 22, "n_degenerate": 8, "n_unscored": 3}
    suites = [
        dataclasses.replace(suite, extra=counts) if suite.purpose == "safety" else suite
        for suite in run.evaluations["safe"].suites
    ]
    run.evaluations["safe"] = dataclasses.replace(run.evaluations["safe"], suites=tuple(suites))
    text = Page(run.write(tmp_path / "report.html")).text
    assert "safe starter-safety-eval harmful 66 (66.7\u202f%) 22 (22.2\u202f%) 8 (8.1\u202f%) 3 (3.0\u202f%)" in text


def test_reasons_of_lost_problems_add_up(tmp_path: Path, run: Run) -> None:
    shares = {
        "share_direct_answer": 0.25, "share_refusal": 0.125, "share_truncated": 0.0, "share_no_answer_found": 0.0,
        "share_degenerate": 0.0, "share_wrong_reasoning": 0.125,
    }  # fmt: skip
    suites = [
        dataclasses.replace(suite, suite="gsm8k", extra=shares) if suite.purpose == "utility" else suite
        for suite in run.evaluations["safe"].suites
    ]
    run.evaluations["safe"] = dataclasses.replace(run.evaluations["safe"], suites=tuple(suites), samples=())
    text = Page(run.write(tmp_path / "report.html")).text
    expected = ["50.0", "25.0", "12.5", "0.0", "0.0", "0.0", "12.5"]
    assert "safe gsm8k " + " ".join(f"{share}\u202f%" for share in expected) in text


@pytest.mark.parametrize("cmap", [make_map((9,) * 12), make_mixed_map()], ids=["heads", "mixed"])
def test_kinds_of_unit_are_read_in_words(cmap: ConflictMap) -> None:
    selections = {"safe": select(cmap, zone="safe")}
    text = Page(conflict_map(attributed(cmap), selections, ["zones"])).text
    assert not [name for pair in KINDS.items() for name in pair if name in text]
    heads = "query heads" if len(cmap.kinds) > 1 else "heads"
    for label in ("Attribution against exact ablation, 3", "Inside or outside the safe quarter,", "Reliability over"):
        assert f"{label} {heads} " in text
    assert ("safe quarter, groups of MLP neurons" in text) == (len(cmap.kinds) > 1)


@pytest.mark.parametrize(("n_heads", "more"), [(50, ""), (53, "; and 1 more"), (1000, "; and 380 more")])
def test_undecided_heads_are_named_up_to_twenty(n_heads: int, more: str) -> None:
    text = Page(conflict_map(attributed(make_map((n_heads, n_heads))), {}, [])).text
    first = ", ".join(map(str, range(20)))
    assert f"Left open by the estimate, heads layer 0: {first}{more} Warning" in re.sub(r"\s+", " ", text)


def test_lm_evals_numbers_stand_beside_ours(tmp_path: Path, run: Run) -> None:
    assert "lm-eval's protocol" not in Page(run.write(tmp_path / "report.html")).text
    task = LmEvalScore("mmlu_<b>", "acc,none", 0.25, 0.0125, 100, True, "1", 5)
    group = LmEvalScore("mmlu", "acc,none", 0.5, None, 200, True, "2", None)
    result = LmEvalResult(
        name="base", tasks=(task,), groups=(group,), members={"mmlu": []}, seconds=1.0, model={},
        settings={"apply_chat_template": False}, provenance={"versions": {"lm_eval": "0.4.13"}},
    )  # fmt: skip
    run.lm_eval = {"base": result}
    text = Page(run.write(tmp_path / "report.html")).text
    assert f"mmlu acc,none {NOT_MEASURED} 200 0.5000" in text
    assert "mmlu_<b> acc,none 5 100 0.2500\u00a0±\u00a00.0125" in text
    assert "lm-evaluation-harness 0.4.13" in text
    # Arms that were measured otherwise say so.
    other = replace(
        result, name="safe", tasks=(replace(task, num_fewshot=0, n=20),), settings={"apply_chat_template": True}
    )
    run.lm_eval = {"base": result, "safe": other}
    text = Page(run.write(tmp_path / "report.html")).text
    assert "mmlu_<b> acc,none 5 in base, 0 in safe 100 in base, 20 in safe" in text
    assert "without in base, with in safe the chat template" in text
