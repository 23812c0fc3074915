"""A rollout engine's HTTP routes without a model: what a trainer asks of an engine at a URL."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tcopd_fast.rollout.requests import PATH


class FakeEngine(ThreadingHTTPServer):
    """version: of its weights. answers: by path; one that raises RuntimeError is HTTP 500."""

    daemon_threads = True

    def __init__(self, workers: list[dict], model: str = "student", room: int = 64) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.version = "default"
        models = {"data": [{"id": model, "max_model_len": room}]}
        self.answers = {"/v1/models": lambda: models, "/collective_rpc": lambda: {"results": workers}}
        self.answers["/weight_info"] = lambda: {"weight_version": self.version}
        self.answers |= dict.fromkeys(("/pause", "/reset_prefix_cache", "/resume"), lambda: {})
        self.answers[PATH] = self.one_token
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def one_token(self) -> dict[str, Any]:
        """A response of one token."""
        content = [{"token_id": 5, "logprob": -1.0}]
        spans = [{"version": self.version}]
        return {"choices": [{"token_ids": [5], "logprobs": {"content": content}, "finish_reason": "stop",
                             "weight_versions": spans}]}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: FakeEngine

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            status, body = 200, json.dumps(self.server.answers[path]()).encode()
        except RuntimeError as error:
            status, body = 500, str(error).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Quiet."""
