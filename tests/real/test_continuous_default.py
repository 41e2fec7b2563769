"""Likelihoods, divergences and margins of the default model in float32 against plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_scores import logs, mean_log, opened, replied

from castune.config import EvaluateConfig
from castune.core.refusals import STANDARD_REFUSAL
from castune.evaluation.backend import TransformersHost
from castune.evaluation.judges import NotJudged
from castune.evaluation.run import evaluate_on
from castune.evaluation.suites import load_suites

pytestmark = pytest.mark.real
SUITES = (
    "starter-helpful-eval#4",
    "nll:starter-solutions-eval#3",
    "kl:starter-overrefusal-eval#3",
    "margin:starter-safety-eval#4",
)


def test_numbers_are_those_of_plain_forwards(default_model: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = default_model
    torch.manual_seed(3)
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = made.unload()
    suites, config = load_suites(SUITES), EvaluateConfig(reference_tokens=12)
    with TransformersHost(model, tokenizer).backend("arm", tmp_path / "adapter") as backend:
        found = evaluate_on(backend, suites=suites, config=config, by=NotJudged(), name="arm", model_info={})
        arm: Any = backend.model  # type: ignore[attr-defined]
        expected = []
        for suite in suites:
            for example, sample in zip(suite.examples, found.samples_of(suite.name), strict=True):
                start = opened(tokenizer, example.user_text)
                if suite.purpose == "nll":
                    expected.append(-mean_log(arm, start, replied(tokenizer, example.user_text, str(example.reply))))
                    continue
                own: list[int] = sample["reference"]  # type: ignore[typeddict-item]
                if suite.purpose == "kl":
                    by_arm = logs(arm, start, own)
                    with arm.disable_adapter():
                        by_base = logs(arm, start, own)
                    expected.append((by_base.exp() * (by_base - by_arm)).sum(-1).mean().item())
                else:
                    refusal = replied(tokenizer, example.user_text, STANDARD_REFUSAL)
                    expected.append(mean_log(arm, start, refusal[:8]) - mean_log(arm, start, own[:8]))
    assert [sample["outcome"] for sample in found.samples] == pytest.approx(expected, abs=1e-5)
