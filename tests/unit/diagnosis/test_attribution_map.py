"""Maps by attribution: every number by plain hooks, and how they are checked against exact ablation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import castune
from castune import ConflictMap, DiagnoseConfig, HeadLayout
from castune.artifacts import Unit
from castune.console import show_diagnosis
from castune.core.journal import Journal
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.fidelity import FAITHFUL, Fidelity, units_to_check
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.reliability import spearman
from castune.diagnosis.sweep import Outcomes, sweep
from castune.names import KINDS

ATTRIBUTION = DiagnoseConfig(measure="attribution", max_new_tokens=4, check_units=5, check_examples=4)
MARGIN = ATTRIBUTION.model_copy(update={"measure": "margin"})
EVERYTHING = ATTRIBUTION.model_copy(update={"check_units": 1000, "check_examples": 1000})


def by_plain_hooks(model: Any, ids: list[int], margin: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Margin of one sequence, and minus activation times gradient at every output projection, head by head."""
    inputs: list[torch.Tensor] = []
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    handles = [p.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for p in projections]
    log_probs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    for handle in handles:
        handle.remove()
    value = margin(log_probs)
    gradients = torch.autograd.grad(value, inputs)
    n_heads = model.config.num_attention_heads
    effects = [
        -(z.detach() * g)[0].sum(0).unflatten(0, (n_heads, -1)).sum(1) for z, g in zip(inputs, gradients, strict=True)
    ]
    return {"margin": value.item(), "effects": torch.cat(effects).numpy()}


def mean(log_probs: torch.Tensor, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Mean log-probability per token of a reply, from those of the whole sequence."""
    places = range(len(prompt) - 1, len(prompt) - 1 + len(reply))
    return torch.stack([log_probs[i, token] for i, token in zip(places, reply, strict=True)]).mean()


def outcomes_of(
    model: Any, tokenizer: Any, utility: list[Example], safety: list[Example]
) -> tuple[Outcomes, Outcomes, list[Any]]:
    units = UnitLayout(HeadLayout.of(model))
    objectives = Objectives(Ablator(model, units, units.units, True), tokenizer, ChatFormat(tokenizer), ATTRIBUTION)
    measure = objectives.attributed_measure(objectives.utility_outcome(utility))
    of_utility = sweep("utility", objectives.ablator, measure, journal=Journal(None, "test"), shard=Shard())
    replies = objectives.replies(safety)
    of_safety = objectives.safety(safety, replies, Journal(None, "test"), Shard())
    assert of_utility is not None
    assert of_safety is not None
    return of_utility, of_safety.outcomes, replies


def test_effects_on_margins_by_plain_hooks(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    model, chat = tiny_model("llama"), ChatFormat(tiny_tokenizer)
    of_utility, of_safety, replies = outcomes_of(model, tiny_tokenizer, questions, harmful)
    model.requires_grad_(True)
    for number, example in enumerate(questions):
        prompt, choices = chat.choices(example)
        found = [
            by_plain_hooks(model, [*prompt, *choice], lambda found, p=prompt, c=choice: mean(found, p, c))
            for choice in choices
        ]
        scores = [one["margin"] for one in found]
        wrong = max((i for i in range(len(scores)) if i != example.answer), key=lambda i: scores[i])
        margin = scores[example.answer or 0] - scores[wrong]
        effect_H = found[example.answer or 0]["effects"] - found[wrong]["effects"]
        np.testing.assert_allclose(of_utility.baseline_N[number], margin, atol=2e-5)
        np.testing.assert_allclose(of_utility.ablated_HN[:, number] - margin, effect_H, atol=5e-5)
        assert np.abs(effect_H).max() > 1e-2
    for number, (example, reply) in enumerate(zip(harmful, replies, strict=True)):
        prompt, [refusal] = chat.continuations(example, [example.reply or ""])
        own = [*reply.tokens, *([chat.end_token] if reply.finished else [])][:4]
        pair = [
            by_plain_hooks(model, [*prompt, *said], lambda found, p=prompt, s=said: mean(found, p, s))
            for said in (refusal[:4], own)
        ]
        np.testing.assert_allclose(of_safety.baseline_N[number], pair[0]["margin"] - pair[1]["margin"], atol=2e-5)
        effect_H = pair[0]["effects"] - pair[1]["effects"]
        np.testing.assert_allclose(of_safety.ablated_HN[:, number] - of_safety.baseline_N[number], effect_H, atol=5e-5)


def test_effects_on_margins_of_helpful_replies_by_plain_hooks(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, harmful: list[Example]
) -> None:
    """Over-refusal: the reply that is given against a standard refusal, over the first tokens of both."""
    model, chat = tiny_model("llama"), ChatFormat(tiny_tokenizer)
    harmless = [
        Example(id=f"b{i}", prompt=f"How do I kill {what}?", reply=reply)
        for i, (what, reply) in enumerate([("a process", "A"), ("time", "Read."), ("the lights", "By the switch.")])
    ]
    of_utility, _, _ = outcomes_of(model, tiny_tokenizer, harmless, harmful)
    model.requires_grad_(True)
    for number, example in enumerate(harmless):
        prompt, pair = chat.continuations(example, [example.reply or "", "I'm sorry, but I can't help with that."])
        helps, refuses = [
            by_plain_hooks(model, [*prompt, *said], lambda found, p=prompt, s=said: mean(found, p, s))
            for said in (tokens[:4] for tokens in pair)
        ]
        np.testing.assert_allclose(of_utility.baseline_N[number], helps["margin"] - refuses["margin"], atol=2e-5)
        effect_H = helps["effects"] - refuses["effects"]
        np.testing.assert_allclose(
            of_utility.ablated_HN[:, number] - of_utility.baseline_N[number], effect_H, atol=5e-5
        )
        assert np.abs(effect_H).max() > 1e-2


@pytest.mark.parametrize("batch_tokens", [60, 4000])
def test_batches_change_nothing(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    batch_tokens: int,
) -> None:
    arguments: dict[str, Any] = {"safety": harmful, "utility": questions}
    usual = castune.diagnose(tiny_model("llama"), tiny_tokenizer, config=ATTRIBUTION, **arguments)
    config = ATTRIBUTION.model_copy(update={"batch_tokens": batch_tokens})
    found = castune.diagnose(tiny_model("llama"), tiny_tokenizer, config=config, **arguments)
    for name in ("utility_shift", "safety_shift"):
        np.testing.assert_allclose(found.column(name), usual.column(name), rtol=2e-4, atol=1e-6)


def test_what_is_checked_is_the_map_by_margins(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    """With all units and all examples checked, fidelity is the agreement of two whole maps."""
    arguments: dict[str, Any] = {"safety": harmful, "utility": questions}
    model = tiny_model("llama")
    found = castune.diagnose(model, tiny_tokenizer, config=EVERYTHING, **arguments)
    exact = castune.diagnose(model, tiny_tokenizer, config=MARGIN, **arguments)
    fidelity = found.fidelity["q_head"]
    assert fidelity["examples"] == {"utility": len(questions), "safety": len(harmful)}
    assert [tuple(one) for one in fidelity["units"]] == [("q_head", *head) for head in found.heads]
    for name, of_column in fidelity["columns"].items():
        expected = spearman(found.column(name), exact.column(name))
        assert of_column["spearman"] == pytest.approx(expected, abs=0.03)  # batches round, and near ties turn
    assert found.column("optimization_conflict").tolist() == exact.column("optimization_conflict").tolist()
    assert found.metadata["baseline"] == exact.metadata["baseline"]


def test_every_kind_of_unit_and_mean_ablation(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    config = ATTRIBUTION.model_copy(update={"units": tuple(KINDS), "mlp_groups": 3, "ablation": "mean"})
    found = castune.diagnose(tiny_model("llama"), tiny_tokenizer, safety=harmful, utility=questions, config=config)
    assert set(found.fidelity) == set(KINDS.values())
    assert all(len(one["units"]) >= 3 for one in found.fidelity.values())
    heads, columns = found.only("q_head"), found.only("o_head")
    assert heads.column("safety_shift").tolist() == columns.column("safety_shift").tolist()
    assert found.fidelity["q_head"]["columns"]["safety_shift"] == {
        **found.fidelity["o_head"]["columns"]["safety_shift"],
        "worst": found.fidelity["q_head"]["columns"]["safety_shift"]["worst"],
    }


def test_domains_of_questions_and_problems(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example]
) -> None:
    problems = [
        Example(
            id=f"p{i}", prompt=f"{i} + 1?", reply=f"{i} + 1 is \\boxed{{{i + 1}}}.", target=str(i + 1), scoring="boxed"
        )
        for i in range(4)
    ]
    utility = {"questions": questions, "problems": problems}
    found = castune.diagnose(tiny_model("llama"), tiny_tokenizer, safety=harmful, utility=utility, config=ATTRIBUTION)
    assert found.metadata["measures"] == {
        "safety": "attribution", "utility:problems": "attribution", "utility:questions": "attribution",
    }  # fmt: skip
    assert set(found.fidelity["q_head"]["examples"]) == {"safety", "utility:problems", "utility:questions"}


def test_a_map_tells_its_fidelity_where_it_is_stored(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example], tmp_path: Any
) -> None:
    made = castune.diagnose(
        tiny_model("llama"), tiny_tokenizer, safety=harmful, utility=questions, config=ATTRIBUTION, out=tmp_path
    )
    loaded = ConflictMap.load(tmp_path)
    assert loaded.fidelity == made.fidelity
    score = loaded.fidelity["q_head"]["columns"]["conflict_score"]["spearman"]
    assert bool(loaded.fidelity["q_head"]["warnings"]) == (score is None or score < FAITHFUL)


def test_a_verified_zone_is_that_of_the_exact_map(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example], tmp_path: Any
) -> None:
    """With every unit that is left open measured exactly, what is still attributed is far from the border."""
    arguments: dict[str, Any] = {"safety": harmful, "utility": questions}
    model = tiny_model("llama", num_hidden_layers=4)
    config = ATTRIBUTION.model_copy(update={"verify": "zone", "check_units": 16, "check_examples": 1000})
    found = castune.diagnose(model, tiny_tokenizer, config=config, out=tmp_path, **arguments)
    plain = castune.diagnose(model, tiny_tokenizer, config=config.model_copy(update={"verify": "none"}), **arguments)
    exact = castune.diagnose(model, tiny_tokenizer, config=MARGIN, **arguments)
    assert plain.standing["q_head"]["undecided"], "nothing would be shown"
    standing = found.standing["q_head"]
    assert standing["exact"]
    assert not standing["undecided"]
    measured = {(layer, head) for _, layer, head in standing["exact"]}
    for head, shift, before, margin in zip(
        found.heads, *(cmap.column("safety_shift") for cmap in (found, plain, exact)), strict=True
    ):
        assert shift == pytest.approx(margin if head in measured else before, rel=1e-3, abs=1e-5)
    assert found.fidelity["q_head"]["columns"] == plain.fidelity["q_head"]["columns"]
    # What was done already is no remedy.
    assert plain.fidelity["q_head"]["columns"]["conflict_score"]["spearman"] < FAITHFUL
    remedies = ['those near the border of the safe zone (diagnose.verify = "zone"), or ', ""]
    for cmap, near in zip((plain, found), remedies, strict=True):
        (warning,) = cmap.fidelity["q_head"]["warnings"]
        assert warning.endswith(f': measure exactly {near}all units (diagnose.measure = "margin").')
    zones = [
        {head for head, bucket in zip(cmap.heads, cmap.column("bucket"), strict=True) if bucket == 4}
        for cmap in (found, exact, plain)
    ]
    assert len(zones[0] & zones[1]) >= len(zones[2] & zones[1])
    # Within a budget, the nearest to the border first.
    few = castune.diagnose(model, tiny_tokenizer, config=config.model_copy(update={"verify_units": 1}), **arguments)
    assert len(few.standing["q_head"]["exact"]) == 1


def test_the_command_line_names_the_undecided_where_they_are_few(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = castune.diagnose(tiny_model("llama"), tiny_tokenizer, safety=harmful, utility=questions, config=ATTRIBUTION)
    heads = [list(one) for one in found.units]
    for n in (0, 1, 10, 11):
        placed = {**found.standing["q_head"], "undecided": heads[:n], "probable": [], "exact": []}
        show_diagnosis(replace(found, metadata={**found.metadata, "standing": placed}))
        said = capsys.readouterr().out
        assert (
            f"heads in or out of the safe quarter: {len(heads) - n} certain, 0 may change with other examples, {n} left open"
            in said
        )
        named = {0: [], 1: ["layer 0: 0"], 10: ["layer 0: 0, 1, 2, 3; layer 1: 0, 1, 2, 3; layer 2: 0, 1"], 11: []}
        assert re.findall(r"^    undecided heads: (.*)$", said, re.MULTILINE) == named[n]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 60), st.randoms())
def test_checked_units_are_spread_over_depth(n_layers: int, n_heads: int, n: int, random: Any) -> None:
    units = [Unit.head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    scores = np.array([random.random() for _ in units])
    found = units_to_check(units, scores, n)
    assert len(found) == len(set(found)) == min(n, len(units))
    assert found == sorted(found)
    if n >= 4 and len(units) >= 2 * n:
        # Of every quarter of the units by depth about as many.
        quarters = [len({*part} & {*found}) for part in np.array_split(np.arange(len(units)), 4)]
        assert max(quarters) - min(quarters) <= 1


def test_fidelity_of_what_is_known() -> None:
    units = [Unit.head(0, head) for head in range(20)]
    exact = np.linspace(0.1, 2, 20)
    same = Fidelity.of(exact / 2, exact, units)
    assert (same.spearman, same.slope) == (pytest.approx(1), pytest.approx(2))
    assert [miss.unit for miss in same.worst] == [["q_head", 0, 19], ["q_head", 0, 18], ["q_head", 0, 17]]
    assert Fidelity.of(exact[::-1].copy(), exact, units).spearman == pytest.approx(-1)
    assert Fidelity.of(np.ones(20), exact, units).spearman is None
