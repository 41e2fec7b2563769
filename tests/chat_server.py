"""A server that speaks OpenAI's chat completions, each reply by plain greedy decoding with transformers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from castune.data.chat import ChatFormat


class ChatServer:
    """Serves models by their names, each reply by plain greedy decoding; `broken` names fail."""

    def __init__(self, tokenizer: Any, models: dict[str, Any]) -> None:
        self.tokenizer, self.models = tokenizer, models
        self.broken: set[str] = set()
        self.n_asked = 0
        # Prompts that every model answers like the first.
        self.alike: set[str] = set()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, status: int, content: Any) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.answer(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in outer.models]})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.n_asked += 1
                if request["model"] in outer.broken:
                    self.answer(400, {"error": {"message": "no"}})
                    return
                with outer.lock:
                    self.answer(200, outer.reply(request))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @torch.no_grad()
    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        assert request["temperature"] == 0
        text = self.tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
        ids, new, end = self.tokenizer(text, add_special_tokens=False)["input_ids"], [], ChatFormat(self.tokenizer)
        reason, model = "length", self.models[request["model"]]
        if request["messages"][-1]["content"] in self.alike:
            model = next(iter(self.models.values()))
        while len(new) < request["max_tokens"]:
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in end.end_tokens(model):
                reason = "stop"
                break
            new.append(token)
        content = self.tokenizer.decode(new, skip_special_tokens=True)
        message = {"role": "assistant", "content": content}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": len(new), "total_tokens": len(ids) + len(new)},
        }

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
