"""What a response of a chat-completions server means: a reply, or why there is none.

Servers may answer with what they were sent, so nothing of their words but known codes gets into a reason.
"""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    import httpx2
    import openai

# Bytes of a body; the longest replies and lists of models are a tenth of it.
_LARGEST_BODY = 16 * 2**20

# No request of this endpoint will succeed: key, credit, permission, model or URL.
_OF_ENDPOINT = (401, 402, 403, 404, 405, 501)
# The server understood and does not want this conversation: too long, say, or a role its chat template lacks.
_OF_CONVERSATION = (400, 413, 422)
# Codes that a log may hold.
_CODES = {
    *("content_filter", "content_policy_violation", "invalid_prompt"),
    *("context_length_exceeded", "string_above_max_length", "invalid_value", "unsupported_parameter"),
    *("unsupported_value", "insufficient_quota", "rate_limit_exceeded", "invalid_api_key", "model_not_found"),
}
_FILTERED = ("content_filter", "content_policy_violation", "invalid_prompt")
_REFUSED = r"(?:unsupported|not support|deprecated)"
_NOT_WANTED = rf"(?:{_REFUSED}|not permitted|not allowed|forbidden)"
# "Unsupported value: 'temperature' does not support 0 with this model."
_REFUSED_NAME = re.compile(
    rf"{_NOT_WANTED}[^.]{{,40}}?\b(max_tokens|temperature)\b|\b(max_tokens|temperature)\b[^.]{{,40}}?{_NOT_WANTED}",
    re.IGNORECASE,
)
# "`temperature` must be strictly positive", "temperature should be in range (0, 2]": zero is what is not taken.
_ZERO_REFUSED = re.compile(
    r"\btemperature\b[^.;]{,60}?(?:positive|greater|larger|above|range|between|>)", re.IGNORECASE | re.DOTALL
)
# How servers say that the length limit came first.
_CUT = ("length", "max_tokens", "max_output_tokens", "max_completion_tokens", "model_length", "max_length")


@dataclass(frozen=True)
class Completion:
    """What the model replied.

    Attributes:
        text: the reply; empty where the model said nothing, as a reasoning model does whose thoughts used up
            `max_tokens`. Where the service has a field for refusals, what stands in it is the reply.
        finished: the model ended it; False where it was cut off.
        tokens: how many the server counted, hidden reasoning included; None where it does not tell.
    """

    text: str
    finished: bool
    tokens: int | None


class Failed(Exception):
    """A request brought no reply.

    Attributes:
        reason: why, fit for a log.
        about: what stands in the way: the moment (another attempt may succeed), the conversation (others may) or the
            endpoint (nothing will).
        status: of the response; 0 without one.
        wait: seconds the server asks for.
        unsupported: the parameter that is not taken.
    """

    def __init__(
        self,
        reason: str,
        *,
        about: Literal["moment", "conversation", "endpoint"] = "moment",
        status: int = 0,
        wait: float = 0.0,
        unsupported: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.about, self.status, self.wait, self.unsupported = reason, about, status, wait, unsupported


class BadBody(Exception):
    """A body that is not read to its end."""


def failure(error: openai.APIStatusError) -> Failed:
    """What a response that is an error means."""
    status, code = error.status_code, error.code
    # OpenRouter's moderation is a 403.
    filtered = code in _FILTERED or (status == 403 and re.search("moderation|flagged", error.message))
    about: Literal["moment", "conversation", "endpoint"] = "moment"
    if status in _OF_CONVERSATION or filtered:
        about = "conversation"
    elif status in _OF_ENDPOINT or code == "insufficient_quota":
        about = "endpoint"
    if code == "model_not_found" or (status == 400 and error.param == "model"):
        about = "endpoint"
    return Failed(
        f"HTTP {status}" + (f", {code}" if code in _CODES else ""),
        about=about,
        status=status,
        wait=_asked_wait(error.response.headers),
        unsupported=_unsupported(error) if status in (400, 422) else None,
    )


def _unsupported(error: openai.APIStatusError) -> str | None:
    """The parameter that a server or model does not take; a value of it that is too large is not meant."""
    if error.param:
        refused = re.search(_REFUSED, f"{error.code} {error.message}", re.IGNORECASE)
        if refused and error.param in ("max_tokens", "temperature"):
            return error.param
        if error.param != "temperature":
            return None
    # Compatible servers often tell in words only, and under names of their own.
    words = f"{error.message} {error.body}"
    found = _REFUSED_NAME.search(words)
    if found:
        return (found[1] or found[2]).lower()
    return "temperature" if error.param == "temperature" or _ZERO_REFUSED.search(words) else None


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 without one."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else max(seconds, 0.0)


def completion_of(body: Any) -> Completion:
    """The reply in a response."""
    try:
        if body.get("error"):
            raise Failed("an error in the place of an answer")
        choice = body["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        text = _said(message.get("content")) or message.get("refusal") or ""
        counted = (body.get("usage") or {}).get("completion_tokens")
    except (LookupError, TypeError, AttributeError):
        raise Failed("unreadable answer (no choices)") from None
    if ended == "content_filter":
        raise Failed("the service's content filter", about="conversation")
    if not isinstance(text, str):
        raise Failed("unreadable answer (content is no text)")
    # JSON can hold halves of surrogate pairs, which no file can.
    text = text.encode("utf-8", "replace").decode("utf-8")
    finished = str(ended).lower() not in _CUT
    return Completion(text, finished, counted if type(counted) is int and counted >= 0 else None)


def _said(content: object) -> Any:
    """The text of a content, which may come in parts; parts of reasoning are not said."""
    if not isinstance(content, list):
        return content
    parts = [
        part if isinstance(part, str) else part.get("text") if part.get("type") == "text" else "" for part in content
    ]
    return "".join(parts)


async def bounded(response: httpx2.Response) -> None:
    """Let no more of a body be read than memory is there for."""
    import httpx2

    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise BadBody("compressed without being asked")
    stream = cast(httpx2.AsyncByteStream, response.stream)

    class Bounded(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            read = 0
            async for chunk in stream:
                read += len(chunk)
                if read > _LARGEST_BODY:
                    raise BadBody(f"more than {_LARGEST_BODY} bytes")
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = Bounded()
