"""A model behind an OpenAI-compatible server: vLLM, llama.cpp, SGLang, TGI, or a service.

The server applies its own chat template. Log-probabilities of given replies are not part of that interface, so
questions are answered by the letter that the model writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from castune.config import EvaluateConfig
from castune.errors import CastuneError
from castune.evaluate.backend import Backend, Host, Work
from castune.evaluate.endpoint import Endpoint
from castune.evaluate.responses import Completion
from castune.evaluate.suites import Suite

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

    @contextmanager
    def backend(self, name: str, adapter: Path | None) -> Iterator[Backend]:
        """The served model of that name."""
        yield ServerBackend(self.model) if adapter is None else ServerBackend(name, base=ServerBackend(self.model))


@final
class ServerBackend(Backend):
    """A model that a server knows by name; see `Endpoint` for its address and key.

    Replies are not cached: an adapter that was trained again may be served under the name of the last one.

    Args:
        model: what the server calls it.
        base: of an adapter, the model without it.
    """

    def __init__(self, model: str, *, base: ServerBackend | None = None) -> None:
        self.endpoint = Endpoint(model, parallel=_PARALLEL, timeout=_TIMEOUT)
        self.base = base

    def check(self, suites: Sequence[Suite], config: EvaluateConfig) -> None:
        """Refuse suites that need log-probabilities, servers that are not there, and adapters that change no reply.

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
        self.endpoint.check()
        if self.base is None:
            return
        conversations = [example.messages() for suite in suites for example in suite.examples[:_PROBES]][:_PROBES]
        mine, others = (
            [found and found.text for found in backend.endpoint.complete(conversations, max_tokens=_PROBE_TOKENS)]
            for backend in (self, self.base)
        )
        if mine == others:
            raise CastuneError(
                f"the server answers {len(conversations)} probe prompts as {self.endpoint.model!r} as it does as "
                f"{self.base.endpoint.model!r}: the adapter is not loaded under that name, or has no effect"
            )

    def work(self, suite: Suite, config: EvaluateConfig) -> Work:
        """Requests in the order of the suite."""
        limit = suite.reply_tokens(config)

        def answer(indices: Sequence[int]) -> list[Any]:
            conversations = [suite.examples[index].messages() for index in indices]
            return [_plain(found) for found in self.endpoint.complete(conversations, max_tokens=limit)]

        n = len(suite.examples)
        return Work([range(start, min(start + _BATCH, n)) for start in range(0, n, _BATCH)], answer)


def _plain(found: Completion | None) -> dict[str, Any] | None:
    if found is None:
        return None
    # A server refuses what is too long for its model.
    return {"text": found.text, "finished": found.finished, "tokens": found.tokens, "cut": False}
