"""Replies of a model behind any server that speaks OpenAI's chat completions: vLLM, llama.cpp, a hosted service.

A server may be slow, overloaded, dead or hostile, and prompts may be harmful. So every request is bounded in time as a
whole and in size, a conversation without a reply is None and no end of the run, and no log holds a prompt, a reply or
the key.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from castune.core.progress import Advance, no_progress
from castune.errors import CastuneError
from castune.evaluation.address import checked_key, require_openai, server_address
from castune.evaluation.reply_cache import ReplyCache
from castune.evaluation.responses import BadBody, Completion, Failed, bounded, completion_of, failure

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What a server without keys is sent: the library insists on one.
_NO_KEY = "none"

# Seconds before the second attempt, doubled before each one more; and the most a server may ask us to wait. Rate limits
# are counted by the minute.
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
# Seconds for a connection: a host that does not exist should not cost what a long reply may take.
_CONNECT = 10.0
# Conversations lost one after the other before a server counts as dead.
_GIVE_UP = 20


class Endpoint:
    """A model behind a server that speaks OpenAI's chat completions.

    Replies are greedy (temperature 0). Models that refuse the parameter are asked without it, with a warning, and
    those that refuse `max_tokens` with `max_completion_tokens`, which older servers ignore.

    The time of a conversation is at most `(attempts + 2) x timeout` and the waits between attempts, each of which is at
    most a minute, whatever the server does or asks for.

    Attributes:
        model: its name at the server.
        base_url: where the server is.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        parallel: int = 8,
        cache: Path | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            model: the name of the model at the server.
            base_url: where the server is, as a rule up to `/v1`; None for OPENAI_BASE_URL, else OpenAI's.
            api_key: the key; None for OPENAI_API_KEY. Servers other than OpenAI's may need none.
            timeout: seconds a request may take, to the last byte of the response.
            attempts: requests for a conversation, at most.
            parallel: requests at a time, at most.
            cache: directory of replies already had, a file each; None keeps none.

        Raises:
            CastuneError: the package openai is missing, or an argument is not what it must be.
        """
        require_openai()
        if timeout <= 0 or attempts < 1 or parallel < 1:
            raise CastuneError(
                f"timeout {timeout}, attempts {attempts}, parallel {parallel}: must be positive, at least 1, at least 1"
            )
        given = base_url or os.environ.get("OPENAI_BASE_URL", "").strip()
        self.model = model
        self.base_url = server_address(given)
        self._key = checked_key(api_key or os.environ.get("OPENAI_API_KEY", ""))
        self._needs_key = not given
        self._timeout, self._attempts, self._parallel = timeout, attempts, parallel
        self._cache = ReplyCache(cache)
        # What this server and model were found to take.
        self._limit, self._greedy = "max_tokens", True
        self._has_replied = False
        self._lost_in_a_row = 0

    def __repr__(self) -> str:
        return f"Endpoint(model={self.model!r}, base_url={self.base_url!r})"

    def check(self) -> None:
        """Find out before any work whether the server answers, accepts the key and serves the model.

        A server that does not list its models is asked for a reply of one token.

        Raises:
            CastuneError: no key, no answer, a key that is refused, or a model that is not served.
        """
        self._run(self._check)

    def complete(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        *,
        max_tokens: int,
        advance: Advance = no_progress,
    ) -> list[Completion | None]:
        """The model's reply to each conversation.

        Where `attempts` requests brought no reply, the service's content filter kept it, or the server does not want
        the conversation, there is None; a warning says how many and why. After 20 conversations lost one after the
        other without a reply in between the server counts as dead, and the others of this call are None at once;
        conversations it does not want do not count. The next call asks until one more is lost.

        Args:
            conversations: messages with `role` and `content`.
            max_tokens: the most that a reply may have; of reasoning models, their reasoning included.
            advance: told of each conversation, in another thread.

        Returns:
            a reply a conversation, in their order.

        Raises:
            CastuneError: the server refuses the key or does not know the model, and has not replied before.
        """
        if not conversations:
            return []
        self._lost_in_a_row = min(self._lost_in_a_row, _GIVE_UP - 1)
        call = _Call(conversations, max_tokens, advance)
        self._run(self._complete, call)
        if call.reasons or call.unasked:
            logger.warning(
                "%s at %s: no reply to %d of %d conversations; the last reason: %s%s",
                self.model,
                self.base_url,
                len(call.reasons) + call.unasked,
                len(conversations),
                call.reasons[-1] if call.reasons else "the server counts as dead",
                f"; {call.unasked} were not sent, after {_GIVE_UP} lost in a row" if call.unasked else "",
            )
        return call.completions

    def _run(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run `work(client, *args)` to its end.

        Coroutines, not threads: only they can be stopped while they wait for a socket, at a time limit and by Ctrl-C.
        In a thread of its own, since the caller may have a running event loop, as notebooks do.
        """
        from anyio.from_thread import start_blocking_portal

        if self._needs_key and not self._key:
            raise CastuneError(
                f"{self.base_url}: needs a key; set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own"
            )

        async def run() -> None:
            async with self._client() as client:
                await work(client, *args)

        with start_blocking_portal() as portal:
            portal.call(run)

    def _client(self) -> openai.AsyncOpenAI:
        import httpx2
        import openai

        return openai.AsyncOpenAI(
            api_key=self._key or _NO_KEY,
            base_url=self.base_url,
            # Its own retries know no limit on the whole time of a request, wait two minutes where a server asks for
            # them and give up where it asks for more, and do not repeat what cannot be read.
            max_retries=0,
            timeout=httpx2.Timeout(self._timeout, connect=min(self._timeout, _CONNECT)),
            # A compressed body can grow a thousandfold.
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [bounded]}),
        )

    async def _check(self, client: openai.AsyncOpenAI) -> None:
        try:
            body = await self._insist(lambda: self._send(client.models.with_raw_response.list()))
        except Failed as failed:
            # No list here, or not for this key, which may be restricted to chat.
            if failed.status not in (403, 404, 405, 501):
                raise self._useless(failed) from None
            await self._check_by_asking(client)
            return
        listed = body.get("data") if isinstance(body, dict) else body
        if not isinstance(listed, list):
            raise CastuneError(f"{self.base_url}: this is no OpenAI-compatible server; does its URL end in /v1?")
        names = {str(entry["id"])[:100] for entry in listed if isinstance(entry, dict) and "id" in entry}
        # Gemini and Ollama list more than the name they are asked by.
        if names.isdisjoint({self.model, f"models/{self.model}", f"{self.model}:latest"}):
            nearest = difflib.get_close_matches(self.model, sorted(names), n=10, cutoff=0)
            served = ", ".join(map(repr, nearest)) or "none"
            if self._key:
                served = served.replace(self._key, "***")
            raise CastuneError(f"{self.base_url}: no model {self.model!r}; of its {len(names)} models: {served}")

    async def _check_by_asking(self, client: openai.AsyncOpenAI) -> None:
        try:
            await self._insist(lambda: self._chat(client, [{"role": "user", "content": "Hello"}], 1))
        except Failed as failed:
            if failed.about != "conversation":
                raise self._useless(failed) from None

    async def _complete(self, client: openai.AsyncOpenAI, call: _Call) -> None:
        pending = iter(enumerate(call.conversations))

        async def work() -> None:
            for index, conversation in pending:
                call.completions[index] = await self._completion(client, conversation, call)
                call.advance(1)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._parallel, len(call.conversations))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _completion(
        self, client: openai.AsyncOpenAI, conversation: Sequence[Mapping[str, str]], call: _Call
    ) -> Completion | None:
        messages = [dict(message) for message in conversation]
        # What is wanted of the model: what of it the server takes may be found out only later.
        key = [self.base_url, self.model, messages, call.max_tokens, {"temperature": 0}]
        completion = self._cache.get(key)
        if completion is not None:
            return completion
        if self._seems_dead():
            call.unasked += 1
            return None
        try:
            completion = await self._insist(lambda: self._chat(client, messages, call.max_tokens))
        except Failed as failed:
            if failed.about == "endpoint" and not self._has_replied:
                raise self._useless(failed) from None
            if failed.about != "conversation":
                self._lost_in_a_row += 1
            call.reasons.append(failed.reason)
            return None
        self._has_replied, self._lost_in_a_row = True, 0
        self._cache.put(key, completion)
        return completion

    async def _insist(self, request: Callable[[], Awaitable[T]]) -> T:
        """The result of a request, made again while that may help."""
        for attempt in range(self._attempts):
            try:
                return await request()
            except Failed as failed:
                if failed.about != "moment" or attempt + 1 == self._attempts or self._seems_dead():
                    raise
                wait = min(max(_FIRST_WAIT * 2**attempt, failed.wait), _LONGEST_WAIT)
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _seems_dead(self) -> bool:
        return self._lost_in_a_row >= _GIVE_UP

    async def _chat(self, client: openai.AsyncOpenAI, messages: list[dict[str, str]], max_tokens: int) -> Completion:
        while True:
            parameters: dict[str, Any] = {self._limit: max_tokens, **({"temperature": 0} if self._greedy else {})}
            create = client.chat.completions.with_raw_response.create
            try:
                body = await self._send(create(model=self.model, messages=cast(Any, messages), **parameters))
            except Failed as failed:
                # Others may have adapted meanwhile; what counts is what this request had. Each turn drops a parameter
                # for good, so there are three at most.
                if failed.unsupported not in parameters:
                    raise
                self._do_without(failed.unsupported)
            else:
                return completion_of(body)

    def _do_without(self, parameter: str) -> None:
        if parameter == "max_tokens":
            self._limit = "max_completion_tokens"
        elif self._greedy:
            self._greedy = False
            logger.warning("%s at %s: refuses temperature 0; its replies are sampled", self.model, self.base_url)

    async def _send(self, request: Awaitable[Any]) -> Any:
        """The JSON of a response, whose last byte is there within the time limit.

        The library's own time limit is one for each read, which a server that drips bytes never exceeds.
        """
        import openai

        try:
            async with asyncio.timeout(self._timeout):
                response = await request
        except openai.APIStatusError as error:
            raise failure(error) from None
        except (TimeoutError, openai.APITimeoutError):
            raise Failed(f"no whole answer within {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise Failed(f"connection lost or refused ({type(error.__cause__).__name__})") from None
        except UnicodeEncodeError:
            raise Failed("a prompt with half a character", about="conversation") from None
        except Exception as error:
            # What the library does not foresee of a server (a charset that is none, say) must not end the run.
            reason = str(error) if isinstance(error, BadBody) else type(error).__name__
            raise Failed(f"unreadable answer ({reason})") from None
        try:
            return json.loads(response.http_response.content)
        except (ValueError, RecursionError):
            raise Failed("unreadable answer (no JSON)") from None

    def _useless(self, failed: Failed) -> CastuneError:
        """The error of an endpoint that will never reply."""
        if failed.status == 401:
            what = "refuses the key in OPENAI_API_KEY" if self._key else "needs a key; set OPENAI_API_KEY"
        elif failed.status == 403:
            what = "does not let this key use the model, or needs one; see OPENAI_API_KEY"
        elif failed.about == "endpoint" and failed.status in (402, 429):
            what = "the account has no credit left"
        elif failed.about == "endpoint":
            what = f"has no model {self.model!r}, or no chat completions at this URL, which often ends in /v1"
        else:
            what = "no answer; is the server running, and is the URL right?"
        return CastuneError(f"{self.base_url}: {what} ({failed.reason})")


@dataclass
class _Call:
    """One call of `complete`: what is asked, what came and why the rest did not."""

    conversations: Sequence[Sequence[Mapping[str, str]]]
    max_tokens: int
    advance: Advance
    reasons: list[str] = field(default_factory=list)
    unasked: int = 0

    def __post_init__(self) -> None:
        self.completions: list[Completion | None] = [None] * len(self.conversations)
