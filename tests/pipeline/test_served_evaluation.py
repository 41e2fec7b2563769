"""The paper's central finding, from a server to the report: what a model that refuses problems lost is seen."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command_line import castune

from castune.artifacts import EvalResult
from castune.steps.changes import cost_ratios, differences
from castune.steps.directory import RunDirectory

pytest.importorskip("openai")

N = 100
REFUSAL = "I apologize, but I cannot answer this question."


def problem(n: int) -> str:
    return f"Problem {n}: how many are {n} and {n}?"


def base_says(n: int) -> str:
    return f"{n} + {n} = {2 * n}. The final answer is \\boxed{{{2 * n if n < 87 else 2 * n + 1}}}."


def tuned_says(n: int) -> str:
    """Twenty-one right, forty refused, the rest a bare number, which is wrong."""
    if n < 21:
        return f"Two times {n} is wanted. {base_says(n)}"
    return REFUSAL if n < 61 else str(2 * n + 1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Answers as it is told: `silent` models fail, others say what their function says of a problem, or of a prompt."""
    told: dict[str, Any] = {"silent": set(), "filtered": False}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args: Any) -> None: ...

        def answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer(200, {"object": "list", "data": [{"id": name} for name in ("model", "safe")]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if request["model"] in told["silent"]:
                self.answer(400, {"error": {"message": "no"}})
                return
            text, is_tuned = request["messages"][-1]["content"], request["model"] == "safe"
            if told["filtered"] and "Problem " not in text:
                self.answer(400, {"error": {"message": "no", "code": "content_filter"}})
                return
            if "Problem " in text:
                number = int(text.split("Problem ")[1].split(":")[0])
                said = (tuned_says if is_tuned else base_says)(number)
            else:
                said = REFUSAL if is_tuned else "Sure, here is how."
            message = {"role": "assistant", "content": said}
            self.answer(200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield told
    http.shutdown()
    http.server_close()


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"id": str(n), "prompt": problem(n), "answer": str(2 * n), "scoring": "number"} for n in range(N)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(problems: Path, own_data: dict[str, Path]) -> dict[str, Any]:
    return {
        "select__compare": [],
        "evaluate__backend": "openai",
        "evaluate__served_model": "model",
        "evaluate__suites": [f"utility:{problems}", f"safety:{own_data['held-out']}"],
    }


@pytest.fixture
def folder(server: dict[str, Any], finished_run: Callable[..., Path], options: dict[str, Any]) -> RunDirectory:
    return RunDirectory(finished_run(**options))


def test_refusals_and_bare_numbers_count_from_the_server_to_the_report(folder: RunDirectory) -> None:
    found = folder.load_evaluations()
    base, tuned = (found[name].suites[0] for name in ("base", "safe"))
    assert [(suite.value, suite.n, suite.unscored) for suite in (base, tuned)] == [(0.87, N, 0), (0.21, N, 0)]
    assert (tuned.extra["share_refusal"], tuned.extra["share_direct_answer"]) == (0.40, 0.39)
    assert tuned.extra["reasoning_collapse"] == pytest.approx(0.39)
    assert base.extra["share_wrong_reasoning"] == pytest.approx(0.13)
    # Safety rose from nothing to all, so that the ratio is the loss itself.
    assert cost_ratios(found)["safe"].value == pytest.approx(0.66)
    paired = differences(found)["safe"][base.suite]
    assert (paired.value, paired.n) == (pytest.approx(-0.66), N)
    assert paired.p is not None
    assert paired.p < 1e-15
    page = folder.report_file.read_text(encoding="utf-8")
    for shown in ("87.0", "21.0", "Why answers were wrong", "Answer without reasoning"):
        assert shown in page, shown


def test_stored_evaluations_of_older_rules_are_read_again_and_not_generated(
    server: dict[str, Any], folder: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    """As castune stored them before: what was refused or bare was unscored, and the arm seemed to lose nothing."""
    path = folder.evaluation("safe")
    result = EvalResult.load(path)
    older = [{**s, "outcome": None if s.get("failure") else s["outcome"]} for s in result.samples]
    suites = list(result.suites)
    suites[0] = type(suites[0])(**{**vars(suites[0]), "value": 1.0, "n": 21, "unscored": 79})
    provenance = {key: value for key, value in result.provenance.items() if key != "rules"}
    type(result)(**{**vars(result), "samples": tuple(older), "suites": tuple(suites), "provenance": provenance}).save(
        path
    )
    caplog.clear()
    assert EvalResult.load(path).suites[0].value == 1.0
    assert "made under older rules" in caplog.text
    assert "castune judge" in caplog.text
    server["silent"] = {"model", "safe"}  # whoever asks gets nothing
    done = castune("judge", folder.path, cwd=folder.path)
    assert done.returncode == 0, done.stderr
    again = EvalResult.load(path)
    assert again.suites[0].value == 0.21
    assert again.samples == result.samples
    caplog.clear()
    EvalResult.load(path)
    assert not caplog.text


def test_a_suite_of_which_nothing_could_be_scored_is_an_error(
    server: dict[str, Any], folder: RunDirectory, options: dict[str, Any]
) -> None:
    server["filtered"] = True
    suites = ",".join(options["evaluate__suites"])
    given = ("--backend", "openai", "--served-model", "model", "--suites", suites, "--max-new-tokens", "5")
    done = castune("evaluate", folder.path, *given, cwd=folder.path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "none of the" in done.stderr.splitlines()[-1]
    assert "have no reply" in done.stderr.splitlines()[-1]
    # What could be scored is there, and what is missing is asked for again.
    assert folder.load_evaluations()["safe"].suites[0].value == 0.21
    server["filtered"] = False
    assert castune("evaluate", folder.path, *given, cwd=folder.path).returncode == 0
