"""A teacher's completions route without a model, and what it answers."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import torch
from test_models import config_for
from tiny import CHARACTERS, make_tokenizer

from tcopd_fast.config_sections import ServerConfig
from tcopd_fast.models import ModelSet
from tcopd_fast.scoring import server
from tcopd_fast.scoring.server import TeacherClient

LONGEST = 44


def logprob(previous: int, token: int) -> float:
    return -0.05 * (previous + 1) - 0.01 * token


def expected(rollout) -> torch.Tensor:
    ids = [*rollout.prompt.token_ids, *rollout.token_ids]
    values = [logprob(a, b) for a, b in pairwise(ids)]
    return torch.tensor(values[len(rollout.prompt.token_ids) - 1 :])


class Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client may hang up
            super().handle_error(request, client_address)


class FakeTeacher:
    """Answers like vLLM, with the logprobs of `logprob`.

    faults: one is taken for each completions request and, unless None, handles it in place of an answer. spoil: changes
    the choices of an answer with scores.
    """

    def __init__(self, port: int = 0, characters: tuple[str, ...] = CHARACTERS) -> None:
        self.tokenizer = make_tokenizer(characters=characters)
        self.probe = self.tokenizer(server.probe_text(make_tokenizer(), LONGEST))["input_ids"]
        self.models: list[dict] = [{"id": "teacher", "max_model_len": 128}]
        self.faults: list = []
        self.spoil = lambda choices: choices
        self.shift, self.needs_a_token, self.pause = 0.0, False, 0.0
        self.requests: list[tuple[str, dict, dict]] = []
        self.at_once = self.most_at_once = 0
        self.lock, self.released, self.sockets = threading.Lock(), threading.Event(), set()
        self.http = Http(("127.0.0.1", port), self.handler())
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Die: the port is closed and every connection breaks."""
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.sockets):
            with suppress(OSError):  # the other side may have been faster
                connection.shutdown(socket.SHUT_RDWR)

    def completions(self) -> list[dict]:
        return [body for path, body, _ in self.requests if path == "/v1/completions"]

    def asked(self) -> list[dict]:
        """Requests for scores, without those that find out what is served."""
        return [body for body in self.completions() if self.scores(body)]

    def scores(self, body: dict) -> bool:
        return not isinstance(body["prompt"], str) and body["prompt"] != [self.probe]

    def answer(self, body: dict) -> dict:
        prompts = [self.tokenizer(body["prompt"])["input_ids"]] if isinstance(body["prompt"], str) else body["prompt"]
        assert body["echo"] and body["return_tokens_as_token_ids"] and body["logprobs"] == 0
        choices = []
        for i, ids in enumerate(prompts):
            values = [None, *(logprob(a, b) - self.shift for a, b in pairwise(ids))]
            tokens = [f"token_id:{t}" for t in ids]
            if body["max_tokens"]:
                tokens, values = [*tokens, "token_id:3"], [*values, -1.0]
            choices.append({"index": i, "logprobs": {"tokens": tokens, "token_logprobs": values}})
        return {"choices": self.spoil(choices[::-1]) if self.scores(body) else choices}

    def handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                fake.sockets.add(self.connection)

            def log_message(self, *args):
                pass

            def reply(self, status: int, content: str, length: int | None = None, **headers):
                data = content.encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data) if length is None else length))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                fake.requests.append((self.path, {}, dict(self.headers)))
                self.reply(200, json.dumps({"data": fake.models}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.requests.append((self.path, body, dict(self.headers)))
                    fault = fake.faults.pop(0) if fake.faults else None
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                fake.released.wait(fake.pause)
                with fake.lock:
                    fake.at_once -= 1
                if fault is not None:
                    return fault(self)
                if fake.needs_a_token and body["max_tokens"] == 0:
                    return self.reply(400, '{"error": {"message": "max_tokens must be at least 1, got 0."}}')
                return self.reply(200, json.dumps(fake.answer(body)))

        return Handler


def client(*there: FakeTeacher, rows: int = 24, vocab_size: int | None = None, **options) -> TeacherClient:
    settings = {"max_tokens_per_request": 24, "request_timeout_s": 0.5, "deadline_s": 20, **options}
    config = ServerConfig(urls=[fake.url for fake in there], **settings)
    models = ModelSet(make_tokenizer(), vocab_size, 128)
    return TeacherClient("some/teacher", config, models, head_rows=rows, longest=LONGEST, tolerance=0.05)


def assert_right(got, items):
    for tensor, rollout in zip(got, items, strict=True):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected(rollout))


def serving() -> Iterator[Callable[..., FakeTeacher]]:
    """A fixture's generator: makes servers, and stops them in the end."""
    made: list[FakeTeacher] = []

    def make(*args, **kwargs) -> FakeTeacher:
        made.append(FakeTeacher(*args, **kwargs))
        return made[-1]

    yield make
    for fake in made:
        fake.stop()


def served(tiny, tmp_path, fake, **sections):
    """A configuration whose teacher `anti` is behind `fake`."""
    anti = {"path": str(tiny.anti), "placement": "server", "server": sections.pop("server", {"urls": [fake.url]})}
    teachers = {"expert": {"path": str(tiny.expert)}, "anti": {**anti, **sections.pop("anti", {})}}
    return config_for(tiny, tmp_path, teachers=teachers, **sections)
