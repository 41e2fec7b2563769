"""Continuous suites and strengths against plain forwards: one row each, no batch, no castune in the scoring."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_scores import logs, mean_log, opened, replied
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_rel

from castune.artifacts.samples import references_of
from castune.config import EvaluateConfig
from castune.core.refusals import STANDARD_REFUSAL
from castune.data.example import Example
from castune.errors import CastuneError, DataError
from castune.evaluation.backend import TransformersHost, require_log_probs
from castune.evaluation.judges import NotJudged
from castune.evaluation.run import evaluate, evaluate_on
from castune.evaluation.suites import Suite, load_suite
from castune.stats.estimates import paired_difference
from castune.steps.changes import differences

CONFIG = EvaluateConfig(reference_tokens=7, margin_tokens=4, batch_tokens=300, max_length=600)
SAID = [
    Example(id="short", prompt="Name a colour.", reply="Blue."),
    Example(id="long", prompt="Tell me about bees, please.", reply="Bees live in hives and make honey from nectar."),
    Example(id="odd", prompt="What is 2 + 2?", reply="It is 4, as everyone knows."),
]
PROMPTS = [Example(id=example.id, prompt=example.prompt) for example in SAID]


@pytest.fixture
def adapter(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A LoRA adapter that changes what a tiny model says."""
    torch.manual_seed(5)
    made = get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


@pytest.fixture
def host(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> TransformersHost:
    return TransformersHost(tiny_model("llama"), tiny_tokenizer)


def measured(
    host: TransformersHost, adapter: Path | None, suites: list[Suite], strength: float = 1.0, **more: Any
) -> Any:
    with host.backend("arm", adapter, strength) as backend:
        options = {"config": CONFIG, "by": NotJudged(), "name": "arm", "model_info": {"fingerprint": "x"}, **more}
        return evaluate_on(backend, suites=suites, **options)


@pytest.fixture
def arm(host: TransformersHost, adapter: Path) -> Iterator[Any]:
    """The adapted model, for plain forwards."""
    with host.backend("arm", adapter) as backend:
        yield backend.model  # type: ignore[attr-defined]


def test_nll_is_that_of_plain_forwards(arm: Any, tiny_tokenizer: Any, questions: list[Example]) -> None:
    found = evaluate(arm, tiny_tokenizer, suites=[Suite("said", "nll", tuple(SAID))], config=CONFIG)
    expected = []
    for example in SAID:
        reply = replied(tiny_tokenizer, example.prompt, str(example.reply))
        expected.append(-mean_log(arm, opened(tiny_tokenizer, example.prompt), reply))
    assert [sample["outcome"] for sample in found.samples] == pytest.approx(expected, abs=1e-5)
    [result] = found.suites
    assert (result.metric, result.judge, result.n) == ("nll", "log-likelihood", 3)
    assert result.value == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert result.interval is not None
    low, high = result.interval
    # Student's with two degrees of freedom.
    assert (high - low) / 2 == pytest.approx(4.302653 * float(result.standard_error or 0), rel=1e-5)


def test_divergence_is_over_the_whole_vocabulary(
    host: TransformersHost, adapter: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    found = measured(host, adapter, [Suite("prompts", "kl", tuple(PROMPTS))])
    base = tiny_model("llama").eval()
    with host.backend("arm", adapter) as backend:
        for sample in found.samples:
            start = opened(tiny_tokenizer, sample["prompt"])
            by_base, by_arm = (logs(model, start, sample["reference"]) for model in (base, backend.model))  # type: ignore[attr-defined]
            divergence = (by_base.exp() * (by_base - by_arm)).sum(-1).mean().item()
            assert divergence > 1e-3
            assert sample["outcome"] == pytest.approx(divergence, abs=1e-5)
            # The replies are the base model's own, greedy.
            assert sample["reference"] == [int(row.argmax()) for row in by_base]


def test_the_base_does_not_diverge_from_itself(host: TransformersHost) -> None:
    found = measured(host, None, [Suite("prompts", "kl", tuple(PROMPTS))])
    assert [sample["outcome"] for sample in found.samples] == pytest.approx([0, 0, 0], abs=1e-7)


def test_margins_are_those_of_plain_forwards(host: TransformersHost, adapter: Path, tiny_tokenizer: Any) -> None:
    found = measured(host, adapter, [Suite("prompts", "safety-margin", tuple(PROMPTS))])
    with host.backend("arm", adapter) as backend:
        for sample in found.samples:
            start = opened(tiny_tokenizer, sample["prompt"])
            refusal = replied(tiny_tokenizer, sample["prompt"], STANDARD_REFUSAL)[:4]
            model: Any = backend.model  # type: ignore[attr-defined]
            margin = mean_log(model, start, refusal) - mean_log(model, start, sample["reference"][:4])
            assert sample["outcome"] == pytest.approx(margin, abs=1e-5)


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.5])
def test_a_strength_is_a_merged_model_with_b_scaled(
    host: TransformersHost, adapter: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any, strength: float
) -> None:
    scaled = adapter.parent / "scaled"
    shutil.copytree(adapter, scaled)
    weights = load_file(scaled / "adapter_model.safetensors")
    save_file(
        {name: strength * value if "lora_B" in name else value for name, value in weights.items()},
        scaled / "adapter_model.safetensors",
    )
    merged = PeftModel.from_pretrained(tiny_model("llama"), scaled).merge_and_unload()
    suites = [Suite("said", "nll", tuple(SAID))]
    by_hand = evaluate(merged, tiny_tokenizer, suites=suites, config=CONFIG)
    found = measured(host, adapter, suites, strength)
    assert [s["outcome"] for s in found.samples] == pytest.approx([s["outcome"] for s in by_hand.samples], abs=1e-5)
    # The next one is at full strength again.
    again, whole = (measured(host, adapter, suites) for _ in range(2))
    assert again.samples == whole.samples
    assert again.samples != found.samples


@pytest.mark.parametrize("purpose", ["nll", "kl", "safety-margin", "over-refusal-margin"])
def test_batches_change_nothing(host: TransformersHost, adapter: Path, purpose: str) -> None:
    suites = [Suite("prompts", purpose, tuple(SAID))]
    one, other = (
        measured(host, adapter, suites, config=CONFIG.model_copy(update={"batch_tokens": tokens}))
        for tokens in (1, 4000)
    )
    assert [s["outcome"] for s in one.samples] == pytest.approx([s["outcome"] for s in other.samples], abs=1e-5)


def test_an_arm_is_measured_on_the_replies_that_the_base_gave(host: TransformersHost, adapter: Path) -> None:
    suites = [Suite("prompts", "kl", tuple(PROMPTS)), Suite("others", "over-refusal-margin", tuple(PROMPTS))]
    base = measured(host, None, suites)
    given = {name: [reply[:3] for reply in replies] for name, replies in references_of(base.samples).items()}
    found = measured(host, adapter, suites, references=given)
    assert references_of(found.samples) == given
    # By itself it generates the same replies: with the adapter off.
    alone = measured(host, adapter, suites)
    assert references_of(alone.samples) == references_of(base.samples)
    assert differences({"base": base, "arm": alone})["arm"].keys() == {"prompts", "others"}
    assert differences({"base": base, "arm": found})["arm"] == {}


def test_a_killed_measurement_goes_on(
    host: TransformersHost, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = [Suite("prompts", "kl", tuple(PROMPTS)), Suite("said", "nll", tuple(SAID))]
    config = CONFIG.model_copy(update={"batch_tokens": 1})
    whole = measured(host, adapter, suites, config=config)
    import castune.evaluation.backend as backend

    calls = []

    def killed(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return divergences(*args, **options)

    divergences = backend.divergences
    monkeypatch.setattr(backend, "divergences", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(host, adapter, suites, config=config, out=tmp_path / "out")
    found = measured(host, adapter, suites, config=config, out=tmp_path / "out")
    assert len(calls) == 4
    assert found.samples == whole.samples


def test_what_is_not_finite_is_unscored(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    found = evaluate(model, tiny_tokenizer, suites=[Suite("said", "nll", tuple(SAID))], config=CONFIG)
    assert [sample["outcome"] for sample in found.samples] == [None] * 3
    assert (found.suites[0].value, found.suites[0].unscored) == (None, 3)


def test_changes_of_numbers_are_tested_by_their_mean() -> None:
    before, after = [1.0, 2.0, 3.5, 4.0], [1.5, 2.1, 4.5, 4.2]
    found = paired_difference(before, after)
    assert found.value == pytest.approx(0.45)
    assert found.p == pytest.approx(ttest_rel(after, before).pvalue, rel=1e-9)
    assert paired_difference([0.5, 0.5], [0.75, 0.75]).p is None


@pytest.mark.parametrize(
    ("source", "name", "purpose"),
    [
        ("nll:starter-utility-eval#5", "starter-utility-eval-nll", "nll"),
        ("kl:starter-overrefusal-eval#5", "starter-overrefusal-eval-kl", "kl"),
        ("margin:starter-safety-eval#5", "starter-safety-eval-margin", "safety-margin"),
        ("margin:starter-overrefusal-eval#5", "starter-overrefusal-eval-margin", "over-refusal-margin"),
    ],
)
def test_named_sources_are_measured_otherwise_too(source: str, name: str, purpose: str) -> None:
    suite = load_suite(source)
    assert (suite.name, suite.purpose, len(suite.examples)) == (name, purpose, 5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nll:starter-overrefusal-eval", "overrefusal-eval-001.*nothing whose likelihood"),
        ("margin:starter-utility-eval", "safety-margin or over-refusal-margin"),
        ("safety-margin:starter-utility-eval", "suites hold prompts"),
    ],
)
def test_what_cannot_be_measured_so_is_refused(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_suite(source)


@pytest.mark.parametrize("backend", ["vllm", "openai"])
def test_weights_that_are_elsewhere_give_no_numbers(backend: str) -> None:
    suite = Suite("said", "nll", tuple(SAID))
    with pytest.raises(CastuneError, match="suite said: nll .*--backend hf"):
        require_log_probs([suite], EvaluateConfig(backend=backend))
    with pytest.raises(CastuneError, match=r"evaluate\.strengths: .*--backend hf"):
        require_log_probs([], EvaluateConfig(backend=backend, strengths=[0.5]))
