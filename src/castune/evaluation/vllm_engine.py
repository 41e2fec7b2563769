"""vLLM: one engine for the base model and all its adapters, on prompts tokenised as everywhere in castune.

Not run on an accelerator by its authors: tests drive it through an engine of transformers with vLLM's interface.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from castune.artifacts.tune_result import ADAPTER_CONFIG
from castune.config import EvaluateConfig
from castune.core.generation import Reply, ReplyText
from castune.core.journal import nullable
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.errors import CastuneError
from castune.evaluation.backend import Backend, Host, Work, plain_reply, probes
from castune.evaluation.suites import Suite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ranks that vLLM makes room for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Requests that are journalled together. The engine schedules them itself, and is idle only at the end of each batch.
_BATCH = 512
# Prompts whose replies show whether an adapter reaches the weights, and the length of these replies.
_PROBES = 16
_PROBE_TOKENS = 32
# Log-probabilities of equal weights differ by rounding from batch to batch; those of a trained adapter by far more.
_SAME = 1e-3


def require_vllm() -> None:
    """Refuse the backend where the library is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise CastuneError("the backend vllm needs the package vllm: python -m pip install 'castune[vllm]'")


@final
class VllmEngine(Host):
    """A model in vLLM, to which adapters are added one after the other.

    Args:
        model: hub id or directory.
        tokenizer: its tokenizer.
        revision: branch, tag or commit of a hub id.
        dtype: as vLLM takes it: auto, bfloat16, float16, float32.
        adapters: the PEFT directories that will be asked for, for the room their ranks need.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        adapters: Sequence[Path] = (),
    ) -> None:
        require_vllm()
        from transformers import GenerationConfig
        from vllm import LLM

        self.tokenizer = tokenizer
        try:
            # For its end-of-turn tokens; everything else of it is set aside, as with transformers.
            self.generation_config = GenerationConfig.from_pretrained(model, revision=revision)
        except OSError:
            self.generation_config = GenerationConfig()
        self._engine = LLM(
            model=model,
            revision=revision,
            dtype=dtype,
            enable_lora=bool(adapters),
            **({"max_lora_rank": _room(adapters)} if adapters else {}),
            trust_remote_code=False,
            generation_config="vllm",
        )
        self._numbers: dict[Path, int] = {}

    def check(self, adapters: Mapping[str, Path | None], suites: Sequence[Suite], config: EvaluateConfig) -> None:
        """Refuse an adapter that changes nothing: some models and modules are passed over by vLLM without a word.

        Raises:
            CastuneError: replies to probe prompts, and their log-probabilities, are the base model's.
        """
        chat = ChatFormat(self.tokenizer, max_length=config.max_length)
        prompts = [chat.prompt_ids(example)[0] for example in probes(suites, _PROBES)]

        def said(request: object) -> tuple[list[tuple[int, ...]], np.ndarray]:
            return _replies_with_values(self.run(prompts, request, max_tokens=_PROBE_TOKENS, logprobs=0))

        base = None
        for name, adapter in adapters.items():
            if adapter is None:
                continue
            base = base or said(None)
            tokens, values = said(self._request(name, adapter))
            if tokens == base[0] and np.abs(values - base[1]).max() < _SAME:
                raise CastuneError(
                    f"vLLM answers {len(prompts)} probe prompts with adapter {name!r} as it does without "
                    "(log-probabilities too): it does not apply the adapter; evaluate with --backend hf"
                )

    @contextmanager
    def backend(self, name: str, adapter: Path | None, strength: float = 1.0) -> Iterator[Backend]:
        """The model, with an adapter added to the engine or without."""
        yield VllmBackend(self, None if adapter is None else self._request(name, adapter))

    def _request(self, name: str, adapter: Path) -> Any:
        from vllm.lora.request import LoRARequest

        # The engine keeps adapters by their number: another one needs another number.
        number = self._numbers.setdefault(adapter, len(self._numbers) + 1)
        return LoRARequest(name, number, str(adapter))

    def run(self, prompts: Sequence[Sequence[int]], request: object, **sampling: object) -> list[Any]:
        """vLLM's greedy outputs for tokenised prompts, in their order."""
        from vllm import SamplingParams

        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        parameters = SamplingParams(temperature=0.0, detokenize=False, **sampling)
        return list(self._engine.generate(inputs, parameters, lora_request=request, use_tqdm=False))


def _room(adapters: Sequence[Path]) -> int:
    """The least rank vLLM makes room for that suffices for all adapters; by itself it stops at 16."""
    rank = max(json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"] for path in adapters)
    return next((room for room in _RANKS if room >= rank), int(rank))


@final
class VllmBackend(Backend):
    """The model of an engine, with or without an adapter."""

    def __init__(self, engine: VllmEngine, request: object) -> None:
        self.engine, self.request = engine, request

    def work(self, suite: Suite, config: EvaluateConfig) -> Work:
        """Large batches in the order of the suite."""
        chat = ChatFormat(self.engine.tokenizer, max_length=config.max_length)
        examples = suite.examples

        def choices(indices: Sequence[int]) -> list[Any]:
            return self._scores(chat, [examples[index] for index in indices])

        def replies(indices: Sequence[int]) -> list[Any]:
            return self._replies(chat, [examples[index] for index in indices], suite.reply_tokens(config))

        batches = [range(start, min(start + _BATCH, len(examples))) for start in range(0, len(examples), _BATCH)]
        return Work(batches, choices if suite.is_scored(config) else replies)

    def _replies(self, chat: ChatFormat, examples: Sequence[Example], max_new_tokens: int) -> list[Any]:
        end, text_of = chat.end_tokens(self.engine), ReplyText(self.engine.tokenizer)
        prompts = [chat.prompt_ids(example) for example in examples]
        outputs = self.engine.run(
            [ids for ids, _ in prompts], self.request, max_tokens=max_new_tokens, stop_token_ids=end
        )
        found = []
        for output, (_, cut) in zip(outputs, prompts, strict=True):
            tokens = list(output.outputs[0].token_ids)
            # The token that stopped it may be among them, and is not part of the reply.
            stop = next((n for n, token in enumerate(tokens) if token in end), None)
            kept = tuple(tokens[:stop])
            found.append(plain_reply(Reply(text_of(kept), kept, output.outputs[0].finish_reason == "stop"), cut, chat))
        return found

    def _scores(self, chat: ChatFormat, examples: Sequence[Example]) -> list[Any]:
        """Mean log-probability per token of every choice as the reply; of a letter, its one token's."""
        rows, replies = [], []
        for example in examples:
            prompt, choices = chat.choices(example)
            for choice in choices:
                # The last token of a row is never an input: here it must be, for vLLM to score it.
                rows.append([*chat.row(example, prompt, [choice]).ids, choice[-1]])
                replies.append(choice)
        outputs = self.engine.run(rows, self.request, max_tokens=1, prompt_logprobs=0)
        means = iter(
            float(np.mean([given[token].logprob for token, given in zip(reply, _last(output, reply), strict=True)]))
            for reply, output in zip(replies, outputs, strict=True)
        )
        return [nullable([next(means) for _ in example.choices]) for example in examples]


def _last(output: Any, reply: Sequence[int]) -> Sequence[Any]:
    return list(output.prompt_logprobs[-len(reply) :])


def _replies_with_values(outputs: Sequence[Any]) -> tuple[list[tuple[int, ...]], np.ndarray]:
    replies = [tuple(output.outputs[0].token_ids) for output in outputs]
    values = [
        given[token].logprob
        for output, tokens in zip(outputs, replies, strict=True)
        for token, given in zip(tokens, output.outputs[0].logprobs, strict=True)
    ]
    return replies, np.array(values)
