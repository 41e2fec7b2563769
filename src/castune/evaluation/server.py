"""A model behind an OpenAI-compatible server: vLLM, llama.cpp, SGLang, TGI, or a service.

The server applies its own chat template. Log-probabilities of given replies are not part of that interface, so
questions are answered by the letter that the model writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

from castune.config import EvaluateConfig
from castune.errors import CastuneError
from castune.evaluation.backend import Backend, Host, PlainReply, Work, probes
from castune.evaluation.endpoint import Endpoint
from castune.evaluation.responses import Completion
from castune.evaluation.suites import Suite

# Requests that are journalled together: what a kill loses. A server that batches wants many at once.
_BATCH = 128
_PARALLEL = 32
# Seconds for a reply of thousands of tokens, from a server that has all of these at once.
_TIMEOUT = 900.0


# Prompts whose replies show whether an adapter is served under its name, and the length limit of these replies.
_PROBES = 16
_PROBE_TOKENS = 48


@final
class ServerHost(Host):
    """A server that knows the model by its name, and every adapter by the name of its arm.

    With vLLM: `vllm serve MODEL --enable-lora --max-lora-rank 32 --lora-modules safe=RUN/adapter`.

    Args:
        model: what the server calls the model itself.
    """

    def __init__(self, model: str) -> None:
        self.model = model

    def check(self, adapters: Mapping[str, Path | None], suites: Sequence[Suite], config: EvaluateConfig) -> None:
        """Refuse suites that need log-probabilities, models that are not served, and adapters that change no reply.

        Raises:
            CastuneError: the message names the suite or the arm and says what to do.
        """
        require_replies_only(suites, config)
        conversations = [example.messages() for example in probes(suites, _PROBES)]
        found: dict[str, list[str | None]] = {}
        for name, adapter in adapters.items():
            endpoint = self._backend(name, adapter).endpoint
            endpoint.check()
            if len(adapters) > 1:
                replies = endpoint.complete(conversations, max_tokens=_PROBE_TOKENS)
                found[name] = [None if reply is None else reply.text for reply in replies]
        base = next((found[name] for name, adapter in adapters.items() if adapter is None and name in found), None)
        for name, adapter in adapters.items():
            if adapter is None or base is None:
                continue
            pairs = [(one, other) for one, other in zip(found[name], base, strict=True) if None not in (one, other)]
            if not pairs:
                raise CastuneError(f"the server gave no reply to any of {len(conversations)} probe prompts")
            if all(one == other for one, other in pairs):
                raise CastuneError(
                    f"the server answers {len(pairs)} probe prompts as {name!r} as it does as {self.model!r}: the "
                    "adapter is not loaded under that name, or has no effect"
                )

    @contextmanager
    def backend(self, name: str, adapter: Path | None, strength: float = 1.0) -> Iterator[Backend]:
        """The served model of that name."""
        yield self._backend(name, adapter)

    def _backend(self, name: str, adapter: Path | None) -> ServerBackend:
        return ServerBackend(self.model if adapter is None else name)


def require_replies_only(suites: Sequence[Suite], config: EvaluateConfig) -> None:
    """Refuse suites whose choices are scored, which takes log-probabilities.

    Raises:
        CastuneError: the message names the suite and says what to do.
    """
    for suite in suites:
        if suite.is_scored(config):
            letters = suite.examples[0].scoring == "letter"
            advice = (
                "let the model write the letter with --letters generated"
                if letters
                else "its choices are scored by likelihood: use another backend or another suite"
            )
            raise CastuneError(f"suite {suite.name}: a server gives no scores of choices; {advice}")


@final
class ServerBackend(Backend):
    """A model that a server knows by name; see `Endpoint` for its address and key.

    Replies are not cached: an adapter that was trained again may be served under the name of the last one.

    Args:
        model: what the server calls it.
    """

    def __init__(self, model: str) -> None:
        self.endpoint = Endpoint(model, parallel=_PARALLEL, timeout=_TIMEOUT)

    def work(self, suite: Suite, config: EvaluateConfig) -> Work:
        """Requests in the order of the suite."""
        limit = suite.reply_tokens(config)

        def answer(indices: Sequence[int]) -> list[PlainReply | None]:
            conversations = [suite.examples[index].messages() for index in indices]
            return [_plain(found) for found in self.endpoint.complete(conversations, max_tokens=limit)]

        n = len(suite.examples)
        return Work([range(start, min(start + _BATCH, n)) for start in range(0, n, _BATCH)], answer)


def _plain(found: Completion | None) -> PlainReply | None:
    if found is None:
        return None
    # A server refuses what is too long for its model.
    return {"text": found.text, "finished": found.finished, "tokens": found.tokens, "cut": False}
