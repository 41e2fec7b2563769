"""The vLLM backend against transformers.

vLLM needs an accelerator. Here its place is taken by an engine with its interface, as its source has it, whose
numbers come from the model's plain forward and the model with PEFT's adapter: what is tested is what castune asks of
such an engine and makes of its answers, not vLLM.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import castune as ct
from castune.config import EvaluateConfig
from castune.data.example import Example
from castune.evaluation.backend import Host, TransformersHost
from castune.evaluation.judges import judge
from castune.evaluation.run import evaluate_on
from castune.evaluation.suites import Suite
from castune.evaluation.vllm_engine import VllmEngine

CONFIG = EvaluateConfig(max_new_tokens=12, max_length=200)


class SamplingParams(SimpleNamespace):
    """vLLM's: everything by keyword."""

    def __init__(
        self,
        *,
        temperature: float,
        detokenize: bool,
        max_tokens: int,
        stop_token_ids: list[int] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> None:
        assert temperature == 0.0, "greedy"
        super().__init__(**{key: value for key, value in locals().items() if key not in ("self", "__class__")})


class LoRARequest(SimpleNamespace):
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        assert lora_int_id >= 1
        super().__init__(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)


class LLM:
    """vLLM's offline engine. Adapters are cached by their number, and some models pass over them without a word."""

    takes_adapters = True
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, model: str, *, trust_remote_code: bool, generation_config: str, **options: Any) -> None:
        assert not trust_remote_code
        assert generation_config == "vllm", "the model's own sampling settings must not be mixed in"
        self.path, self.options = model, options
        self.models = {0: AutoModelForCausalLM.from_pretrained(model).eval()}
        LLM.made.append(options)

    def generate(
        self, prompts: list[Any], sampling_params: SamplingParams, *, lora_request: Any, use_tqdm: bool
    ) -> list[Any]:
        model = self.models[0]
        if lora_request is not None and self.takes_adapters:
            assert self.options["enable_lora"]
            number = lora_request.lora_int_id
            if number not in self.models:
                base = AutoModelForCausalLM.from_pretrained(self.path)
                self.models[number] = PeftModel.from_pretrained(base, lora_request.lora_path).eval()
                config = self.models[number].peft_config["default"]
                assert config.r <= self.options["max_lora_rank"], "vLLM refuses higher ranks"
            model = self.models[number]
        return [self.one(model, prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    @staticmethod
    @torch.no_grad()
    def one(model: Any, prompt: list[int], params: SamplingParams) -> Any:
        ids, given, values = list(prompt), [None], []
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        given += [{t: SimpleNamespace(logprob=log_probs[n, t].item())} for n, t in enumerate(ids[1:])]
        reason = "length"
        for _ in range(params.max_tokens):
            last = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            token = int(last.argmax())
            ids.append(token)
            values.append({token: SimpleNamespace(logprob=last[token].item())})
            if token in (params.stop_token_ids or []):
                reason = "stop"
                break
        output = SimpleNamespace(
            token_ids=ids[len(prompt) :],
            finish_reason=reason,
            text="",
            logprobs=None if params.logprobs is None else values,
        )
        return SimpleNamespace(outputs=[output], prompt_logprobs=None if params.prompt_logprobs is None else given)


@pytest.fixture
def saved(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A model and an adapter on disk, and an engine under vLLM's name."""
    package, lora, request = (types.ModuleType(f"vllm{name}") for name in ("", ".lora", ".lora.request"))
    package.LLM, package.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    for module in (package, lora, request):
        module.__spec__ = types.SimpleNamespace(name=module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(LLM, "made", [])
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    peft_model = get_peft_model(model, LoraConfig(r=20, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter"


def suites(questions: list[Example], harmful: list[Example]) -> list[Suite]:
    letters = [q for q in questions if q.scoring == "letter"]
    texts = [q for q in questions if q.scoring == "likelihood"]
    problem = Example(id="p", prompt="What is 2 + 2?", target="4", scoring="number")
    found = [("letters", "utility", letters), ("texts", "utility", texts), ("problems", "utility", [problem])]
    return [Suite(name, purpose, tuple(rows)) for name, purpose, rows in [*found, ("prompts", "safety", harmful)]]


def measured(host: Host, found: list[Suite], adapter: Path | None) -> ct.EvalResult:
    host.check({"base": None, "tuned": adapter}, found, CONFIG)
    with host.backend("tuned", adapter) as backend:
        return evaluate_on(backend, suites=found, config=CONFIG, by=judge("opening"), name="x", model_info={})


@pytest.mark.parametrize("adapted", [False, True])
def test_samples_are_those_of_transformers(
    saved: tuple[Path, Path], tiny_tokenizer: Any, questions: list[Example], harmful: list[Example], adapted: bool
) -> None:
    path, adapter = saved
    found = suites(questions, harmful)
    assert all(suite.examples for suite in found)
    engine = VllmEngine(str(path), tiny_tokenizer, adapters=[adapter])
    model = AutoModelForCausalLM.from_pretrained(path)
    one, two = (
        measured(host, found, adapter if adapted else None)
        for host in (engine, TransformersHost(model, tiny_tokenizer))
    )
    for mine, theirs in zip(one.samples, two.samples, strict=True):
        for key in ("choice_scores", "margin"):
            assert mine.pop(key, None) == pytest.approx(theirs.pop(key, None), abs=1e-4)
        assert mine == theirs
    assert LLM.made[0]["max_lora_rank"] == 32, "the least room that rank 20 fits into"


def test_an_adapter_that_the_engine_passes_over_is_refused(
    saved: tuple[Path, Path],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, adapter = saved
    engine = VllmEngine(str(path), tiny_tokenizer, adapters=[adapter])
    monkeypatch.setattr(LLM, "takes_adapters", False)
    with pytest.raises(ct.CastuneError, match="does not apply the adapter"):
        measured(engine, suites(questions, harmful), adapter)
    assert measured(engine, suites(questions, harmful), None).samples


def test_without_adapters_the_engine_makes_no_room_for_them(saved: tuple[Path, Path], tiny_tokenizer: Any) -> None:
    VllmEngine(str(saved[0]), tiny_tokenizer)
    assert LLM.made[0]["enable_lora"] is False
    assert "max_lora_rank" not in LLM.made[0]


def test_without_vllm_the_backend_says_what_to_install(tiny_tokenizer: Any) -> None:
    with pytest.raises(ct.CastuneError, match=r"castune\[vllm\]"):
        VllmEngine("anything", tiny_tokenizer)
