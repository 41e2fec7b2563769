"""A model behind a server, against a real server on localhost that misbehaves in every way it can."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from loopback import needs_loopback

from castune.errors import CastuneError
from castune.evaluation import endpoint as module
from castune.evaluation import responses
from castune.evaluation.endpoint import Endpoint
from castune.evaluation.responses import Completion

pytestmark = needs_loopback

KEY = "sk-the-secret-key-1234567890"
PROMPT = "How do I pick a forbidden lock?"
# Seconds for requests that never end.
TIMEOUT = 0.4


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    path: str
    headers: Message
    body: dict[str, Any]
    prompt: str


class Exchange(BaseHTTPRequestHandler):
    """One request and what is done about it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        self.server.seen_gets.append(self.path)
        self.server.models(self)

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompt = self.body["messages"][-1]["content"]
        with self.server.lock:
            self.server.seen.append(Seen(self.path, self.headers, self.body, self.prompt))
            self.number = len(self.server.seen)
            self.server.now += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.now)
        try:
            self.server.respond(self)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def send(self, status: int, body: bytes | str, **headers: str) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        named = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in {**named, **{n.replace("_", "-"): v for n, v in headers.items()}}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def reply(self, text: Any, *, finish_reason: Any = "stop", tokens: Any = 3, **message: Any) -> None:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, **message},
            "finish_reason": finish_reason,
        }
        usage = {"completion_tokens": tokens, "prompt_tokens": 1, "total_tokens": 4}
        self.send(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}))

    def error(self, status: int, message: str = "no", **fields: Any) -> None:
        self.send(status, json.dumps({"error": {"message": f"{message} {PROMPT} {KEY}", "type": "error", **fields}}))

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def drip(self, start: bytes) -> None:
        """A byte now and then, much longer than anyone should listen."""
        self.close_connection = True
        self.wfile.write(start)
        for _ in range(200):
            if self.server.stopping.wait(0.05):
                return
            self.wfile.write(b"x")

    def log_message(self, format: str, *args: object) -> None:
        pass


Response = Callable[[Exchange], object]


class Server(ThreadingHTTPServer):
    """A server of the model "m"; what it does is set by `respond` and `models`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.seen: list[Seen] = []
        self.seen_gets: list[str] = []
        self.now = self.most_at_once = 0
        self.respond: Response = lambda e: e.reply(f"re: {e.prompt}")
        self.models: Response = lambda e: e.send(200, json.dumps({"data": [{"id": "m"}, {"id": "other"}]}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients hang up, that is the point


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        yield server
        server.stopping.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "OPENAI_LOG",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(module, "_LONGEST_WAIT", 0.2)


def ask(endpoint: Endpoint, *prompts: str, max_tokens: int = 5) -> list[Completion | None]:
    return endpoint.complete([[{"role": "user", "content": prompt}] for prompt in prompts], max_tokens=max_tokens)


def texts(completions: list[Completion | None]) -> list[str | None]:
    return [None if completion is None else completion.text for completion in completions]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---------------------------------------------------------------------------------------------------- what is asked


def test_replies_come_in_the_order_of_their_conversations(server: Server) -> None:
    def later_ones_first(e: Exchange) -> None:
        time.sleep(0.05 - 0.004 * int(e.prompt))
        e.reply(f"re: {e.prompt}")

    server.respond = later_ones_first
    completions = ask(Endpoint("m", base_url=server.url), *map(str, range(12)))
    assert completions == [Completion(f"re: {i}", True, 3) for i in range(12)]
    assert len(server.seen) == 12


def test_progress_is_told_once_a_conversation(server: Server) -> None:
    server.respond = lambda e: e.reply("yes") if e.prompt == "good" else e.error(400)
    told: list[float] = []
    conversations = [[{"role": "user", "content": p}] for p in ("good", "bad", "good")]
    Endpoint("m", base_url=server.url).complete(conversations, max_tokens=5, advance=told.append)
    assert told == [1, 1, 1]


def test_the_request_is_greedy_and_whole(server: Server) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    Endpoint("m", base_url=server.url + "/", api_key=KEY).complete([conversation], max_tokens=7)
    (request,) = server.seen
    assert request.path == "/v1/chat/completions"
    assert request.body == {"model": "m", "messages": conversation, "max_tokens": 7, "temperature": 0}
    assert request.headers["Authorization"] == f"Bearer {KEY}"


def test_where_and_with_which_key_may_stand_in_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    endpoint = Endpoint("m")
    endpoint.check()
    assert texts(ask(endpoint, "a")) == ["re: a"]
    assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_server_of_ones_own_needs_no_key(server: Server) -> None:
    endpoint = Endpoint("m", base_url=server.url)
    endpoint.check()
    assert texts(ask(endpoint, "a")) == ["re: a"]


def test_nothing_is_asked_about_nothing(server: Server) -> None:
    assert ask(Endpoint("m", base_url=server.url)) == []
    assert server.seen == []


def test_a_running_event_loop_is_no_obstacle(server: Server) -> None:
    async def notebook() -> list[Completion | None]:
        return ask(Endpoint("m", base_url=server.url), "a")

    assert texts(asyncio.run(notebook())) == ["re: a"]


# --------------------------------------------------------------------------------------------------- what is replied


@pytest.mark.parametrize(
    ("response", "completion"),
    [
        (lambda e: e.reply("to be cont", finish_reason="length"), Completion("to be cont", False, 3)),
        (lambda e: e.reply(None, finish_reason="length", tokens=5), Completion("", False, 5)),
        (lambda e: e.reply(""), Completion("", True, 3)),
        (lambda e: e.reply(None, refusal="I'm sorry."), Completion("I'm sorry.", True, 3)),
        # That it was cut off has to be said.
        (lambda e: e.reply("a", finish_reason=None), Completion("a", True, 3)),
        (lambda e: e.reply("a", finish_reason="eos_token"), Completion("a", True, 3)),
        (lambda e: e.reply("a", finish_reason="MAX_TOKENS"), Completion("a", False, 3)),
        (
            lambda e: e.reply(
                [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "I cannot help."}]},
                    {"type": "text", "text": "a"},
                    {"type": "text", "text": "b"},
                ]
            ),
            Completion("ab", True, 3),
        ),
        (lambda e: e.reply("a", tokens=None), Completion("a", True, None)),
        (lambda e: e.reply("a", tokens="many"), Completion("a", True, None)),
        (lambda e: e.reply("a", finish_reason="content_filter"), None),
        # Half of a surrogate pair is valid JSON and can be written to no file.
        (lambda e: e.reply("a\ud83d"), Completion("a?", True, 3)),
        # Valid JSON under another content type is a reply.
        (lambda e: e.send(200, '{"choices": [{"message": {"content": "a"}}]}', Content_Type="text/plain"),
         Completion("a", True, None)),
    ],
)  # fmt: skip
def test_every_kind_of_reply(server: Server, response: Response, completion: Completion | None) -> None:
    server.respond = response
    assert ask(Endpoint("m", base_url=server.url), "a") == [completion]
    assert len(server.seen) == 1


# --------------------------------------------------------------------------------------------- what the moment spoils

HEADER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
HANGING: dict[str, Response] = {
    "drips in the body": lambda e: e.drip(
        HEADER + b'Content-Length: 1000000\r\n\r\n{"choices": [{"message": {"content": "'
    ),
    "drips in the headers": lambda e: e.drip(HEADER + b"X-Slow: "),
    "drips in an error": lambda e: e.drip(b"HTTP/1.1 500 Oh\r\nContent-Length: 1000000\r\n\r\n"),
    "says nothing": lambda e: e.server.stopping.wait(10),
}
SPOILED: dict[str, Response] = {
    "429": lambda e: e.error(429),
    "429 with Retry-After": lambda e: e.send(429, "{}", Retry_After="0.02"),
    "429 for long": lambda e: e.send(429, "{}", Retry_After="99999"),
    "429 and told not to retry": lambda e: e.send(429, "{}", x_should_retry="false"),
    "500": lambda e: e.error(500),
    "500 that tells the key": lambda e: e.error(500, code=KEY, param=KEY),
    "500 that tells the prompt": lambda e: e.error(500, code=PROMPT, param=PROMPT),
    "503": lambda e: e.send(503, "<html>overloaded</html>", Content_Type="text/html"),
    "hangs up before": lambda e: e.hang_up(),
    "hangs up in the middle": lambda e: (e.send(200, '{"choi', Content_Length="900"), e.hang_up()),
    "garbage": lambda e: e.send(200, '{"choices": [{'),
    "garbage bytes": lambda e: e.send(200, b"\xff\xfe\x00\x9c" * 9),
    "nested too deep": lambda e: e.send(200, "[" * 200_000),
    "no HTTP": lambda e: (e.wfile.write(b"HELLO\r\n\r\n"), e.hang_up()),
    "no JSON at all": lambda e: e.send(200, "<html>welcome</html>", Content_Type="text/html"),
    "empty": lambda e: e.send(200, ""),
    "no charset": lambda e: e.send(200, "x", Content_Type="application/json; charset=zlib_codec"),
    "an error of no charset": lambda e: e.send(500, "x", Content_Type="text/plain; charset=zlib_codec"),
    "no choices": lambda e: e.send(200, '{"object": "error", "message": "oops"}'),
    "empty choices": lambda e: e.send(200, '{"choices": []}'),
    "a list": lambda e: e.send(200, "[1, 2]"),
    "null": lambda e: e.send(200, "null"),
    "content that is no text": lambda e: e.reply(7),
    "no message": lambda e: e.send(200, '{"choices": [{"message": null}]}'),
    "compressed without being asked": lambda e: e.send(200, b"\x1f\x8b", Content_Encoding="gzip"),
    **HANGING,
}  # fmt: skip


@pytest.mark.parametrize("spoiled", [*(name for name in SPOILED if name not in HANGING), "says nothing"])
def test_what_fails_twice_may_succeed_the_third_time(
    server: Server, spoiled: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.respond = lambda e: SPOILED[spoiled](e) if e.number <= 2 else e.reply("at last")
    endpoint = Endpoint("m", base_url=server.url, timeout=TIMEOUT if spoiled in HANGING else 20)
    assert texts(ask(endpoint, "a")) == ["at last"]
    assert len(server.seen) == 3
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_always_fails_is_none_after_all_attempts(
    server: Server, spoiled: str, caplog: pytest.LogCaptureFixture
) -> None:
    def only_this(e: Exchange) -> None:
        if e.prompt == PROMPT:
            SPOILED[spoiled](e)
        else:
            e.reply("fine")

    server.respond = only_this
    caplog.set_level(logging.DEBUG)
    timeout = TIMEOUT if spoiled in HANGING else 20
    endpoint = Endpoint("m", base_url=server.url, api_key=KEY, timeout=timeout, attempts=3)
    started = time.monotonic()
    completions = ask(endpoint, "a", PROMPT, "b")
    took = time.monotonic() - started
    assert texts(completions) == ["fine", None, "fine"]
    assert sum(e.prompt == PROMPT for e in server.seen) == 3
    # Three requests and two waits of the longest kind; the rest is for a slow machine.
    assert took < 3 * TIMEOUT + 2 * 0.2 + 1.0
    (warning,) = warnings_of(caplog)
    assert "no reply to 1 of 3 conversations; the last reason: " in warning
    assert KEY not in caplog.text
    assert PROMPT not in caplog.text


def test_a_server_that_is_not_there(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert ask(Endpoint("m", base_url=f"http://127.0.0.1:{port}/v1", attempts=2), "a") == [None]
    assert "connection" in warnings_of(caplog)[0]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_without_end_is_not_read_to_the_end(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chunked: bool
) -> None:
    monkeypatch.setattr(responses, "_LARGEST_BODY", 100_000)
    length = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: 999999999999\r\n\r\n"
    piece = b"2710\r\n" + b"x" * 10_000 + b"\r\n" if chunked else b"x" * 10_000
    sent = [0]

    def pour(e: Exchange) -> None:
        e.close_connection = True
        e.wfile.write(HEADER + length)
        while not e.server.stopping.is_set():
            e.wfile.write(piece)
            sent[0] += len(piece)

    server.respond = pour
    assert ask(Endpoint("m", base_url=server.url, attempts=1, timeout=20), "a") == [None]
    assert "more than 100000 bytes" in warnings_of(caplog)[0]
    # What the kernel holds between the two comes on top.
    assert sent[0] < 50_000_000


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("0.15", 0.15, 0.2),
        ("99999", 0.2, 0.2),
        ("inf", 0.2, 0.2),
        ("1e999", 0.2, 0.2),
        ("tomorrow", 0.2, 0.2),
        ("yesterday", 0, 0.01),
        ("-5", 0, 0.01),
        ("nan", 0, 0.01),
        ("soon", 0, 0.01),
        ("", 0, 0.01),
    ],
)
def test_retry_after_is_kept_up_to_a_limit(server: Server, asked: str, least: float, most: float) -> None:
    days = {"tomorrow": 1, "yesterday": -1}
    if asked in days:
        asked = email.utils.formatdate(time.time() + 86400 * days[asked], usegmt=True)
    times: list[float] = []

    def limited(e: Exchange) -> None:
        times.append(time.monotonic())
        if e.number == 1:
            e.send(429, "{}", Retry_After=asked)
        else:
            e.reply("ok")

    server.respond = limited
    assert texts(ask(Endpoint("m", base_url=server.url), "a")) == ["ok"]
    assert least <= times[1] - times[0] < most + 0.5


def test_waits_double(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.04)
    times: list[float] = []

    def limited(e: Exchange) -> None:
        times.append(time.monotonic())
        e.error(500)

    server.respond = limited
    ask(Endpoint("m", base_url=server.url, attempts=4), "a")
    waits = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert [wait >= least for wait, least in zip(waits, [0.04, 0.08, 0.16], strict=True)] == [True] * 3


# --------------------------------------------------------------------------------------- what the conversation spoils


@pytest.mark.parametrize(
    "response",
    [
        lambda e: e.error(400, code="context_length_exceeded"),
        lambda e: e.error(422),
        lambda e: e.error(413),
        lambda e: e.error(400, code="content_filter"),
        lambda e: e.error(403, "requires moderation on, and your input was flagged:"),
        lambda e: e.reply(None, finish_reason="content_filter"),
    ],
)
def test_a_conversation_the_server_does_not_want_is_asked_once_and_says_nothing_of_the_others(
    server: Server, response: Response, caplog: pytest.LogCaptureFixture
) -> None:
    server.respond = lambda e: e.reply("ok") if e.prompt == "last" else response(e)
    completions = ask(Endpoint("m", base_url=server.url, parallel=2), *["unwanted"] * 30, "last")
    assert texts(completions) == [None] * 30 + ["ok"]
    assert len(server.seen) == 31
    assert "no reply to 30 of 31" in warnings_of(caplog)[0]


def test_a_prompt_that_no_request_can_hold(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    assert texts(ask(Endpoint("m", base_url=server.url), "a\ud83d", "b")) == [None, "re: b"]
    assert "half a character" in warnings_of(caplog)[0]


# ------------------------------------------------------------------------------------------- what the endpoint spoils

USELESS = [
    (401, {"code": "invalid_api_key"}, "refuses the key"),
    (402, {}, "credit"),
    (403, {}, "this key"),
    (404, {"code": "model_not_found"}, "no model 'm'"),
    (405, {}, "/v1"),
    (400, {"param": "model"}, "no model 'm'"),
    (429, {"code": "insufficient_quota"}, "credit"),
]


@pytest.mark.parametrize(("status", "fields", "what"), USELESS)
def test_what_will_never_succeed_ends_at_once(
    server: Server, status: int, fields: dict[str, str], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.respond = lambda e: e.error(status, **fields)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(CastuneError, match=what) as error:
        ask(Endpoint("m", base_url=server.url, api_key=KEY, parallel=4), *[PROMPT] * 50)
    assert len(server.seen) <= 8
    for text in (str(error.value), repr(error.value), caplog.text):
        assert KEY not in text
        assert PROMPT not in text


def test_a_server_that_wants_a_key_is_said_to(server: Server) -> None:
    server.respond = lambda e: e.error(401)
    with pytest.raises(CastuneError, match="set OPENAI_API_KEY"):
        ask(Endpoint("m", base_url=server.url), "a")


@pytest.mark.parametrize(("status", "fields", "what"), USELESS)
def test_after_a_reply_it_is_none(server: Server, status: int, fields: dict[str, str], what: str) -> None:
    server.respond = lambda e: e.reply("ok") if e.number == 1 else e.error(status, **fields)
    assert texts(ask(Endpoint("m", base_url=server.url, parallel=1), "a", "b", "c")) == ["ok", None, None]
    assert len(server.seen) == 3


# --------------------------------------------------------------------------------------------- what a model may refuse

NO_MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
NO_TEMPERATURE = (
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (422, {"error": "Input validation error: `temperature` must be strictly positive", "error_type": "validation"}),
        (400, {"error": {"message": "temperature should be in range (0, 2]", "param": None, "code": "1210"}}),
        (422, {"status": 422, "message": "Invalid params: temperature must be in range (0, +inf)"}),
        (400, {"error": {"message": "Invalid value", "param": "temperature", "code": "invalid_value"}}),
        (422, {"detail": [{"loc": ["body", "temperature"], "msg": "Input should be greater than 0"}]}),
        (400, {"error": {"message": "temperature is not allowed for this model"}}),
    ],
)
def test_a_server_without_temperature_0_is_asked_without_it(
    server: Server, status: int, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def strict(e: Exchange) -> None:
        if "temperature" in e.body:
            e.send(status, json.dumps(body))
        else:
            e.reply("said")

    server.respond = strict
    assert texts(ask(Endpoint("m", base_url=server.url), "a", "b")) == ["said", "said"]
    assert "its replies are sampled" in caplog.text


@pytest.mark.parametrize(
    "body",
    [{"error": {"message": "Provider returned error", "code": 429}}, {"choices": None}, {"choices": []}, {}, [], None],
)
def test_an_answer_without_a_reply_is_no_reply(server: Server, body: Any) -> None:
    server.respond = lambda e: e.send(200, json.dumps(body))
    assert ask(Endpoint("m", base_url=server.url, attempts=1), "a") == [None]


@pytest.mark.parametrize("structured", [True, False])
def test_refused_parameters_are_replaced_once_for_all(
    server: Server, structured: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def reasoning_model(e: Exchange) -> None:
        if "max_tokens" in e.body:
            e.error(
                400, NO_MAX_TOKENS, **({"param": "max_tokens", "code": "unsupported_parameter"} if structured else {})
            )
        elif "temperature" in e.body:
            e.error(
                400, NO_TEMPERATURE, **({"param": "temperature", "code": "unsupported_value"} if structured else {})
            )
        else:
            e.reply(str(e.body["max_completion_tokens"]))

    server.respond = reasoning_model
    endpoint = Endpoint("m", base_url=server.url, parallel=3, attempts=1)
    assert texts(ask(endpoint, *map(str, range(9)))) == ["5"] * 9
    # Those under way when it was found out meet the refusals too.
    assert 9 + 2 <= len(server.seen) <= 9 + 2 * 3
    (warning,) = warnings_of(caplog)
    assert "temperature" in warning
    before = len(server.seen)
    assert texts(ask(endpoint, "a", "b")) == ["5"] * 2
    assert len(server.seen) == before + 2


def test_a_server_that_refuses_whatever_it_gets_is_not_asked_for_ever(server: Server) -> None:
    def never(e: Exchange) -> None:
        name = next((n for n in ("max_tokens", "max_completion_tokens", "temperature") if n in e.body), "messages")
        e.error(400, f"Unsupported parameter: {name}", param=name, code="unsupported_parameter")

    server.respond = never
    assert ask(Endpoint("m", base_url=server.url), "a") == [None]
    assert len(server.seen) <= 3


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("max_tokens is too large: the model supports at most 4096", {"param": "max_tokens"}),
        ("max_tokens must be at least 1, got -186", {}),
        ("the role system is not supported", {"param": "messages"}),
        # Servers tell what they were sent: here a prompt with both words, far from each other.
        (
            "invalid input: 'What was the temperature in Oslo yesterday, and why are some units of it not supported?'",
            {},
        ),
    ],
)
def test_other_refusals_change_no_parameter(server: Server, message: str, fields: dict[str, str]) -> None:
    server.respond = lambda e: e.error(400, message, **fields)
    endpoint = Endpoint("m", base_url=server.url)
    assert ask(endpoint, "a", "b") == [None, None]
    assert [sorted(e.body) for e in server.seen] == [["max_tokens", "messages", "model", "temperature"]] * 2


# ----------------------------------------------------------------------------------------------------- many at a time


def test_requests_run_in_parallel_and_no_more_than_allowed(server: Server) -> None:
    # Nobody is answered before all eight are there.
    all_there = threading.Barrier(8, timeout=10)

    def together(e: Exchange) -> None:
        all_there.wait()
        e.reply("ok")

    server.respond = together
    assert texts(ask(Endpoint("m", base_url=server.url, parallel=8), *map(str, range(16)))) == ["ok"] * 16
    assert len(server.seen) == 16

    def slow(e: Exchange) -> None:
        time.sleep(0.03)
        e.reply("ok")

    server.respond, server.most_at_once = slow, 0
    ask(Endpoint("m", base_url=server.url, parallel=3), *map(str, range(12)))
    assert server.most_at_once == 3


def test_one_endpoint_serves_several_threads(server: Server, tmp_path: Path) -> None:
    server.respond = lambda e: e.error(503) if e.number % 3 == 0 else e.reply(f"re: {e.prompt}")
    endpoint = Endpoint("m", base_url=server.url, parallel=2, attempts=9, cache=tmp_path)
    # All threads ask the same, so that they write the same files.
    prompts = [str(i) for i in range(10)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: texts(ask(endpoint, *prompts)), range(4)))
    assert results == [[f"re: {p}" for p in prompts]] * 4
    assert len(list(tmp_path.iterdir())) == 10


# ---------------------------------------------------------------------------------------------------- servers that die


def test_a_server_that_is_dead_is_not_asked_to_the_end(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.respond = lambda e: e.error(500)
    told: list[float] = []
    endpoint = Endpoint("m", base_url=server.url, parallel=4, attempts=2)
    conversations = [[{"role": "user", "content": str(i)}] for i in range(200)]
    completions = endpoint.complete(conversations, max_tokens=5, advance=told.append)
    assert completions == [None] * 200
    assert 20 * 2 <= len(server.seen) <= (20 + 4) * 2
    assert told == [1] * 200
    (warning,) = warnings_of(caplog)
    assert "no reply to 200 of 200" in warning
    assert "after 20 lost in a row" in warning
    # The next call asks until one more is lost, and goes on where the server is back.
    before = len(server.seen)
    assert ask(endpoint, *map(str, range(50))) == [None] * 50
    assert len(server.seen) - before <= 4 * 2
    server.respond = lambda e: e.reply("back")
    assert texts(ask(endpoint, *map(str, range(50)))) == ["back"] * 50


def test_a_server_that_fails_often_is_not_dead(server: Server) -> None:
    server.respond = lambda e: e.reply("ok") if int(e.prompt) % 10 == 0 else e.error(500)
    completions = ask(Endpoint("m", base_url=server.url, parallel=2, attempts=1), *map(str, range(60)))
    assert [c is not None for c in completions] == [i % 10 == 0 for i in range(60)]


# --------------------------------------------------------------------------------------------------------------- cache


def test_what_is_known_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    def first() -> Endpoint:
        return Endpoint("m", base_url=server.url, api_key=KEY, cache=tmp_path)

    server.respond = lambda e: e.reply(f"réponse {e.number}", finish_reason="length")
    known = ask(first(), PROMPT, "b")
    assert ask(first(), PROMPT, "b") == known
    assert ask(first(), "b") == known[1:]
    assert len(server.seen) == 2
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    for file in files:
        assert len(file.stem) == 64
        assert file.suffix == ".json"
        assert KEY not in file.read_text()
        assert PROMPT not in file.read_text()


def test_what_differs_is_asked(server: Server, tmp_path: Path) -> None:
    ask(Endpoint("m", base_url=server.url, cache=tmp_path), "a")
    ask(Endpoint("m", base_url=server.url, cache=tmp_path), "a", max_tokens=6)
    ask(Endpoint("other", base_url=server.url, cache=tmp_path), "a")
    ask(Endpoint("m", base_url=server.url.replace("/v1", "/v2"), cache=tmp_path), "a")
    Endpoint("m", base_url=server.url, cache=tmp_path).complete([[{"role": "system", "content": "a"}]], max_tokens=5)
    assert len(server.seen) == len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b'{"text": "a", "fini',
        b"[]",
        b"null",
        b'{"text": 1, "finished": true, "tokens": 3}',
        b'{"text": "a", "finished": "yes", "tokens": 3}',
        b'{"text": "a", "finished": true, "tokens": true}',
        b'{"text": "a", "finished": true}',
        b"[" * 200_000,
    ],
)
def test_a_damaged_file_is_measured_again_and_mended(
    server: Server, tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = Endpoint("m", base_url=server.url, cache=tmp_path)
    known = ask(endpoint, PROMPT)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert ask(endpoint, PROMPT) == known
    assert len(server.seen) == 2
    assert file.read_bytes() == whole
    (warning,) = warnings_of(caplog)
    assert str(file) in warning
    assert PROMPT not in warning


def test_only_replies_are_kept(server: Server, tmp_path: Path) -> None:
    server.respond = lambda e: e.error(400) if e.prompt == "a" else e.reply("x", finish_reason="content_filter")
    endpoint = Endpoint("m", base_url=server.url, cache=tmp_path / "new")
    assert ask(endpoint, "a", "b") == [None, None]
    assert not (tmp_path / "new").exists()
    server.respond = lambda e: e.reply("ok")
    assert texts(ask(endpoint, "a", "b")) == ["ok", "ok"]


def test_a_place_that_cannot_be_written_to_is_an_error_of_the_user(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CastuneError, match="cannot keep replies"):
        ask(Endpoint("m", base_url=server.url, cache=tmp_path / "file"), "a")


# --------------------------------------------------------------------------------------------------------------- check


def test_check_passes_where_all_is_well(server: Server) -> None:
    Endpoint("m", base_url=server.url, api_key=KEY).check()
    assert server.seen_gets == ["/v1/models"]
    assert server.seen == []


@pytest.mark.parametrize(
    "listed",
    [
        '{"data": [{"id": "models/m"}]}',
        '{"data": [{"id": "m:latest"}]}',
        '[{"id": "m"}]',
        '{"data": [{}, 3, {"id": "m"}]}',
    ],
)
def test_check_reads_the_lists_of_other_servers(server: Server, listed: str) -> None:
    server.models = lambda e: e.send(200, listed)
    Endpoint("m", base_url=server.url).check()


@pytest.mark.parametrize("status", [404, 405, 501])
def test_check_passes_where_no_models_are_listed(server: Server, status: int) -> None:
    server.models = lambda e: e.error(status)
    Endpoint("m", base_url=server.url).check()
    assert [e.body["max_tokens"] for e in server.seen] == [1]
    server.respond = lambda e: e.error(status)
    with pytest.raises(
        CastuneError, match=r"no model 'm', or no chat completions at this URL, which often ends in /v1"
    ):
        Endpoint("m", base_url=server.url).check()


def test_check_names_models_that_are_served(server: Server) -> None:
    names = [f"family-{i}" for i in range(500)] + [KEY]
    server.models = lambda e: e.send(200, json.dumps({"data": [{"id": n} for n in names]}))
    with pytest.raises(CastuneError, match=r"no model 'family-77x'; of its 501 models: 'family-77'") as error:
        Endpoint("family-77x", base_url=server.url, api_key=KEY).check()
    assert len(str(error.value)) < 400
    server.models = lambda e: e.send(200, json.dumps({"data": [{"id": KEY}]}))
    with pytest.raises(CastuneError, match=r"of its 1 models: '\*\*\*'"):
        Endpoint("m", base_url=server.url, api_key=KEY).check()


@pytest.mark.parametrize(
    ("response", "what"),
    [
        (lambda e: e.error(401), "refuses the key"),
        (lambda e: e.error(402), "credit"),
        (lambda e: e.error(500), "no answer"),
        (lambda e: e.hang_up(), "no answer"),
        (lambda e: e.send(200, "<html>"), "unreadable"),
        (lambda e: e.send(200, '{"hello": "world"}'), "no OpenAI-compatible server"),
        (lambda e: e.send(200, '{"data": []}'), "none"),
        (lambda e: e.drip(HEADER + b"Content-Length: 1000000\r\n\r\n"), "within 0.4 s"),
    ],
)
def test_check_tells_what_is_wrong(server: Server, response: Response, what: str) -> None:
    server.models = response
    with pytest.raises(CastuneError, match=what) as error:
        Endpoint("m", base_url=server.url, api_key=KEY, timeout=TIMEOUT, attempts=2).check()
    assert KEY not in str(error.value)
    assert len(server.seen_gets) <= 2


def test_check_waits_for_a_server_that_is_starting(server: Server) -> None:
    def starting(e: Exchange) -> None:
        if len(server.seen_gets) == 1:
            e.error(503)
        else:
            e.send(200, '{"data": [{"id": "m"}]}')

    server.models = starting
    Endpoint("m", base_url=server.url).check()


def test_check_asks_where_a_key_may_chat_and_not_list(server: Server) -> None:
    server.models = lambda e: e.error(403)
    Endpoint("m", base_url=server.url, api_key=KEY).check()
    assert [e.body["max_tokens"] for e in server.seen] == [1]
    server.respond = lambda e: e.error(403)
    with pytest.raises(CastuneError, match="this key"):
        Endpoint("m", base_url=server.url, api_key=KEY).check()


def test_check_without_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(CastuneError, match="is the server running"):
        Endpoint("m", base_url=f"http://127.0.0.1:{port}/v1", attempts=2).check()


# ----------------------------------------------------------------------------------------------------------- arguments


def test_the_hosted_service_needs_a_key() -> None:
    with pytest.raises(CastuneError, match="OPENAI_API_KEY"):
        Endpoint("m").check()
    with pytest.raises(CastuneError, match="OPENAI_API_KEY"):
        ask(Endpoint("m"), "a")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://x:port/v1", "http://[x/v1", "/v1"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(CastuneError, match="http://localhost:8000/v1"):
        Endpoint("m", base_url=url)


@pytest.mark.parametrize(
    "url", [f"http://u:{KEY}@x/v1", f"http://{KEY}@x/v1", f"http://x/v1?key={KEY}", f"http://x/#{KEY}"]
)
def test_secrets_in_a_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(CastuneError) as error:
        Endpoint("m", base_url=url)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("key", [f"{KEY} {KEY}", f"{KEY}\r\nX: y", f"{KEY}ä"])
def test_a_key_that_is_none_is_not_shown(key: str) -> None:
    with pytest.raises(CastuneError, match="OPENAI_API_KEY") as error:
        Endpoint("m", base_url="http://x/v1", api_key=key)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("argument", [{"timeout": 0}, {"attempts": 0}, {"parallel": 0}])
def test_numbers_that_make_no_sense(argument: dict[str, int]) -> None:
    with pytest.raises(CastuneError, match="positive"):
        Endpoint("m", base_url="http://x/v1", **argument)  # type: ignore[arg-type]


def test_the_key_is_not_shown() -> None:
    endpoint = Endpoint("m", base_url="http://x/v1", api_key=KEY)
    assert KEY not in repr(endpoint) + str(endpoint)
    assert "http://x/v1" in repr(endpoint)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(CastuneError, match=r"pip install 'castune\[openai\]'"):
        Endpoint("m", base_url="http://x/v1")
