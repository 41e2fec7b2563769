"""A model behind a server that speaks chat completions: the same replies as from transformers, here and there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import ChatServer
from peft import LoraConfig, get_peft_model

import castune as ct
from castune.config import EvaluateConfig
from castune.data.example import Example
from castune.evaluation.backend import TransformersBackend
from castune.evaluation.judges import judge
from castune.evaluation.run import evaluate_on
from castune.evaluation.server import ServerHost
from castune.evaluation.suites import Suite

pytest.importorskip("openai")

CONFIG = EvaluateConfig(max_new_tokens=12, letters="generated")


@pytest.fixture
def server(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ChatServer]:
    tuned = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    found = ChatServer(tiny_tokenizer, {"own/model": tiny_model("llama"), "safe": tuned.eval()})
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{found.http.server_port}/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield found
    found.close()


def suites(questions: list[Example], harmful: list[Example]) -> list[Suite]:
    letters = tuple(q for q in questions if q.scoring == "letter")
    return [Suite("letters", "utility", letters), Suite("prompts", "safety", tuple(harmful))]


def measured(found: list[Suite], name: str, adapter: Path | None, **options: Any) -> ct.EvalResult:
    host = ServerHost("own/model")
    host.check({"base": None, name: adapter}, found, CONFIG)
    with host.backend(name, adapter) as backend:
        return evaluate_on(
            backend, suites=found, config=CONFIG, by=judge("opening"), name=name, model_info={}, **options
        )


@pytest.mark.parametrize("name", ["base", "safe"])
def test_samples_are_those_of_transformers(
    server: ChatServer, tiny_tokenizer: Any, questions: list[Example], harmful: list[Example], name: str, tmp_path: Path
) -> None:
    found = suites(questions, harmful)
    mine = measured(found, name, None if name == "base" else tmp_path)
    model = server.models["own/model" if name == "base" else name]
    theirs = evaluate_on(
        TransformersBackend(model, tiny_tokenizer),
        suites=found,
        config=CONFIG,
        by=judge("opening"),
        name=name,
        model_info={},
    )
    assert mine.samples == theirs.samples
    assert {s.suite: (s.value, s.n, s.unscored, s.extra) for s in mine.suites} == {
        s.suite: (s.value, s.n, s.unscored, s.extra) for s in theirs.suites
    }


def test_what_a_server_cannot_score_is_refused_before_it_is_asked(server: ChatServer, questions: list[Example]) -> None:
    texts = Suite("texts", "utility", tuple(q for q in questions if q.scoring == "likelihood"))
    letters = Suite("letters", "utility", tuple(q for q in questions if q.scoring == "letter"))
    for config, suite, advice in (
        (CONFIG, texts, "another backend"),
        (CONFIG.model_copy(update={"letters": "argmax"}), letters, "--letters generated"),
    ):
        with pytest.raises(ct.CastuneError, match=advice):
            ServerHost("own/model").check({"base": None}, [suite], config)


def test_an_adapter_that_is_not_served_under_its_name_is_refused(
    server: ChatServer, questions: list[Example], harmful: list[Example], tmp_path: Path
) -> None:
    found = suites(questions, harmful)
    with pytest.raises(ct.CastuneError, match="no model 'risky'"):
        measured(found, "risky", tmp_path)
    server.models["risky"] = server.models["own/model"]
    with pytest.raises(ct.CastuneError, match="as it does as 'own/model'"):
        measured(found, "risky", tmp_path)
    server.broken.add("risky")
    with pytest.raises(ct.CastuneError, match="no reply to any of 9 probe prompts"):
        measured(found, "risky", tmp_path)


@pytest.mark.slow
def test_questions_that_are_answered_alike_do_not_hide_an_adapter(
    server: ChatServer, questions: list[Example], harmful: list[Example], tmp_path: Path
) -> None:
    """Sixteen questions come first, and the adapter changes none of their letters."""
    letters = [q for q in questions if q.scoring == "letter"]
    many = [dataclasses.replace(letters[0], id=str(i)) for i in range(16)]
    server.alike = {many[0].user_text}
    found = [Suite("letters", "utility", tuple(many)), Suite("prompts", "safety", tuple(harmful))]
    host = ServerHost("own/model")
    host.check({"base": None, "safe": tmp_path}, found, CONFIG)
    with pytest.raises(ct.CastuneError, match="as it does as"):
        host.check({"base": None, "safe": tmp_path}, found[:1], CONFIG)


def test_replies_that_do_not_come_are_unscored_and_the_run_ends(
    server: ChatServer, questions: list[Example], harmful: list[Example], tmp_path: Path
) -> None:
    server.broken.add("own/model")
    found = measured(suites(questions, harmful), "base", None, out=tmp_path)
    assert all(
        (s.value, s.n, s.unscored) == (None, 0, len(s_.examples))
        for s, s_ in zip(found.suites, suites(questions, harmful), strict=True)
    )
    assert ct.EvalResult.load(tmp_path) == found
    server.broken.clear()
    again = measured(suites(questions, harmful), "base", None, out=tmp_path)
    assert not any(sample.get("missing") for sample in again.samples)
