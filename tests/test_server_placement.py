"""Placement `server` against a small HTTP server that misbehaves on demand."""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
import torch
from test_models import WORLD, config_for, exact, rollouts
from tiny import CHARACTERS, make_tokenizer
from transformers import AutoModelForCausalLM

from tcopd_fast import serve_teacher
from tcopd_fast.cli import main
from tcopd_fast.config_io import dump_config
from tcopd_fast.config_sections import ServerConfig
from tcopd_fast.errors import UserError
from tcopd_fast.models import ModelSet, check_models
from tcopd_fast.scoring import Scorer, server
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


def hang(handler):
    time.sleep(1.0)
    handler.close_connection = True


def drop(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def truncated(handler):
    handler.reply(200, '{"choices": [{"index": 0, "logpr', length=5000)
    drop(handler)


# The check of an endpoint asks for two completions.
CHECK_PASSES = [None, None]
FAULTS = {
    "500": lambda h: h.reply(500, '{"error": {"message": "EngineCore died"}}'),
    "503": lambda h: h.reply(503, "busy"),
    "429": lambda h: h.reply(429, "too many"),
    "hang": hang,
    "drop": drop,
    "truncated": truncated,
    "no JSON": lambda h: h.reply(200, "<html>starting</html>"),
    "no logprobs": lambda h: h.reply(200, '{"choices": [{"index": 0, "logprobs": null}]}'),
    "one answer for many": lambda h: h.reply(200, '{"choices": []}'),
}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE_S", 0.02)


@pytest.fixture
def fakes():
    """Makes servers and stops them in the end."""
    made: list[FakeTeacher] = []

    def make(*args, **kwargs) -> FakeTeacher:
        made.append(FakeTeacher(*args, **kwargs))
        return made[-1]

    yield make
    for fake in made:
        fake.stop()


def client(*there: FakeTeacher, rows: int = 24, vocab_size: int | None = None, **options) -> TeacherClient:
    settings = {"max_tokens_per_request": 24, "request_timeout_s": 0.5, "deadline_s": 20, **options}
    config = ServerConfig(urls=[fake.url for fake in there], **settings)
    models = ModelSet(make_tokenizer(), vocab_size, 128)
    return TeacherClient("some/teacher", config, models, head_rows=rows, longest=LONGEST, tolerance=0.05)


def assert_right(got, items):
    for tensor, rollout in zip(got, items, strict=True):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected(rollout))


def test_scores_come_back_in_order_from_every_url_in_turn(fakes):
    one, two = fakes(), fakes()
    teacher = client(one, two, max_concurrent_requests=3)
    one.pause = two.pause = 0.02
    for fake in (one, two):
        fake.requests.clear()
    items = rollouts(tuple(range(1, 25)))
    assert_right(teacher.score(items, 1.0), items)
    sent = one.asked() + two.asked()
    assert sum(len(body["prompt"]) for body in sent) == len(items), "nothing is sent twice"
    assert max(len(body["prompt"]) for body in sent) > 1, "sequences share requests"
    assert all(sum(map(len, body["prompt"])) <= 24 or len(body["prompt"]) == 1 for body in sent)
    assert abs(len(one.asked()) - len(two.asked())) <= 3
    assert 2 <= one.most_at_once + two.most_at_once <= 4
    assert one.most_at_once <= 3 and two.most_at_once <= 3


def test_nothing_to_score_asks_for_nothing(fakes):
    fake = fakes()
    teacher = client(fake)
    with pytest.raises(ValueError, match="empty prompt"):
        teacher.score([replace(r, prompt=replace(r.prompt, token_ids=())) for r in rollouts()], 1.0)
    fake.requests.clear()
    assert teacher.score([], 1.0) == [] and not fake.requests


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_met_with_another_try(fakes, name, caplog):
    fake = fakes()
    teacher = client(fake)
    # One fault while scoring, one in the check that follows.
    fake.faults += [*CHECK_PASSES, FAULTS[name], FAULTS[name]]
    items = rollouts((3, 5, 2, 30, 30, 30))
    assert_right(teacher.score(items, 1.0), items)
    assert not fake.faults and fake.url in caplog.text and "answers again" in caplog.text


def test_a_dead_url_is_left_alone_ever_longer_while_the_other_works(fakes, monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE_S", 0.1)
    alive, dead = fakes(), fakes()
    teacher = client(alive, dead)
    dead.stop()
    alive.pause = 0.01
    items = rollouts((30,) * 60)
    start = time.monotonic()
    for _ in range(3):
        assert_right(teacher.score(items, 1.0), items)
    assert teacher.endpoints[0].failures == 0
    # Pauses of 0.1, 0.2, 0.4 s …
    assert 1 <= teacher.endpoints[1].failures <= math.log2((time.monotonic() - start) / 0.1 + 1) + 1


def test_requests_that_fail_together_are_one_failure(fakes, monkeypatch):
    monkeypatch.setattr(server, "FIRST_PAUSE_S", 0.3)
    fake = fakes()
    teacher = client(fake, max_concurrent_requests=8)
    fake.pause = 0.1
    fake.faults += [*CHECK_PASSES, *[FAULTS["500"]] * 8]
    seen = []
    monkeypatch.setattr(teacher, "_set_aside", lambda e, real=teacher._set_aside: (seen.append(e), real(e)))
    items = rollouts((30,) * 8)
    assert_right(teacher.score(items, 1.0), items)
    assert len(seen) == 1


def test_a_server_that_dies_and_returns_on_its_port_is_used_again(fakes, caplog):
    first = fakes()
    teacher = client(first)
    first.pause = 0.02
    items = rollouts((30,) * 60)
    out = []
    call = threading.Thread(target=lambda: out.append(teacher.score(items, 1.0)))
    first.requests.clear()
    call.start()
    while len(first.completions()) < 20:
        time.sleep(0.005)
    first.stop()
    time.sleep(0.3)
    second = fakes(port=first.port)
    call.join(20)
    assert_right(out[0], items)
    assert len(second.completions()) > 20 and "answers again" in caplog.text


def test_a_server_that_returns_as_another_model_ends_the_run(fakes):
    """Even when it was away between two calls and no request ever failed."""
    first = fakes()
    teacher = client(first)
    assert_right(teacher.score(rollouts(), 1.0), rollouts())
    first.stop()
    fakes(port=first.port).shift = 0.1
    with pytest.raises(UserError, match=r"0\.1 nats per token away .* must serve the same weights"):
        teacher.score(rollouts(), 1.0)


def test_the_deadline_is_one_message_with_url_error_and_remedy(fakes):
    fake = fakes()
    teacher = client(fake, deadline_s=0.6)
    fake.stop()
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        teacher.score(rollouts((30,) * 20), 1.0)
    assert time.monotonic() - start < 3
    text = str(caught.value)
    assert "some/teacher: 0 of 20 sequences" in text and "server.deadline_s=0.6" in text
    assert fake.url in text and "ConnectError" in text and "start the server again" in text
    assert 2 <= teacher.endpoints[0].failures <= 6


def test_a_server_that_is_only_slow_is_told_from_one_that_fails(fakes):
    fake = fakes()
    teacher = client(fake, deadline_s=0.3, max_concurrent_requests=1, request_timeout_s=5)
    fake.pause = 0.1
    with pytest.raises(UserError, match="no error, only slow"):
        teacher.score(rollouts((30,) * 20), 1.0)


def spoiled(change):
    def spoil(choices):
        change(choices[0]["logprobs"])
        return choices

    return spoil


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it["tokens"].__setitem__(2, "token_id:0"), r"other tokens than it was sent .*at 2: \[0\] there"),
        (lambda it: it["token_logprobs"].__setitem__(2, math.nan), "logprob nan"),
        (lambda it: it["token_logprobs"].__setitem__(2, -math.inf), "logprob -inf"),
        (lambda it: it["token_logprobs"].__setitem__(2, -9999.0), "logprob -9999"),
        (lambda it: it["token_logprobs"].__setitem__(2, None), "logprob None"),
        (lambda it: it["token_logprobs"].__setitem__(2, 7.5), r"logprob 7\.5"),
    ],
)
def test_answers_that_no_retry_can_mend_end_the_call_at_once(fakes, change, message):
    fake = fakes()
    teacher = client(fake, max_concurrent_requests=2)
    fake.spoil = spoiled(change)
    fake.requests.clear()
    with pytest.raises(UserError, match=message):
        teacher.score(rollouts((30,) * 50), 1.0)
    assert len(fake.asked()) <= 4


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_a_refusal_ends_the_call_at_once(fakes, status):
    fake, elsewhere = fakes(), fakes()
    teacher = client(fake)
    fake.requests.clear()
    reason = '{"error": {"message": "because of that"}}'
    refuse = lambda h: h.reply(status, reason, Location=f"{elsewhere.url}/completions")  # noqa: E731
    fake.faults += [*CHECK_PASSES, *[refuse] * 50]
    with pytest.raises(UserError, match=rf"{fake.url}/completions: HTTP {status}: because of that"):
        teacher.score(rollouts((30,) * 50), 1.0)
    assert 1 <= len(fake.asked()) <= 16 and not elsewhere.requests, "redirects are not followed"


def test_servers_that_insist_on_a_token_get_one(fakes):
    fake = fakes()
    fake.needs_a_token = True
    items = rollouts()
    assert_right(client(fake).score(items, 1.0), items)
    assert fake.completions()[-1]["max_tokens"] == 1


def test_what_cannot_serve_is_refused_at_the_start(fakes):
    swapped = list(CHARACTERS)
    swapped[4], swapped[5] = swapped[5], swapped[4]
    with pytest.raises(UserError, match="splits a text into other tokens than the student's tokenizer"):
        client(fakes(characters=tuple(swapped)))

    short = fakes()
    short.models[0]["max_model_len"] = LONGEST
    with pytest.raises(UserError, match=rf"holds {LONGEST} tokens .* --max-model-len {LONGEST + 1} or more"):
        client(short)
    short.models[0]["max_model_len"] = LONGEST + 1
    client(short)

    several = fakes()
    several.models.append({"id": "other"})
    with pytest.raises(UserError, match=r"serves teacher, other; set server\.model"):
        client(several)
    assert client(several, model="other").endpoints[0].model == "other"
    assert several.completions()[-1]["model"] == "other"
    with pytest.raises(UserError, match=r"serves teacher, other; set server\.model"):
        client(several, model="third")

    good, off = fakes(), fakes()
    off.shift = 0.2
    with pytest.raises(UserError, match=rf"{off.url}: scores a text 0\.2 nats .* what {good.url} said"):
        client(good, off)

    gone = fakes()
    gone.stop()
    with pytest.raises(UserError, match=rf"{gone.url} of some/teacher: ConnectError .*tcopd serve-teacher"):
        client(good, gone)


def test_head_rows_beyond_the_shared_vocabulary_may_hold_no_probability(fakes, monkeypatch):
    fake = fakes()
    with pytest.raises(UserError, match=r"the 16 rows of its head beyond the 24 .* hold a probability of"):
        client(fake, rows=40, vocab_size=24)
    asked = {ids[-1] for body in fake.completions() if isinstance(body["prompt"], list) for ids in body["prompt"]}
    assert asked >= set(range(24, 40))
    monkeypatch.setitem(globals(), "logprob", lambda previous, token: -0.1 if token < 24 else -12.0)
    assert (
        "16 padding rows of its head hold a probability of 9.8e-05" in client(fake, rows=40, vocab_size=24).description
    )


def test_the_key_travels_in_the_header_and_nowhere_else(fakes, monkeypatch, tiny, tmp_path):
    fake = fakes()
    with pytest.raises(UserError, match=r"server\.api_key_env=TEACHER_KEY: .* not set"):
        client(fake, api_key_env="TEACHER_KEY")
    assert not fake.requests
    monkeypatch.setenv("TEACHER_KEY", "s3cret")
    client(fake, api_key_env="TEACHER_KEY")
    assert {headers.get("Authorization") for _, _, headers in fake.requests} == {"Bearer s3cret"}
    section = {"urls": [fake.url], "api_key_env": "TEACHER_KEY"}
    assert "s3cret" not in dump_config(served(tiny, tmp_path, fake, server=section))
    fake.requests.clear()
    client(fake)
    assert not any("Authorization" in headers for _, _, headers in fake.requests)


def test_requests_take_no_proxy_from_the_environment(fakes, monkeypatch):
    proxy, fake = fakes(), fakes()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    items = rollouts()
    assert_right(client(fake).score(items, 1.0), items)
    assert not proxy.requests


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://gate/models/a/v1", "https://gate/models/a/v1"),
    ],
)
def test_urls_are_base_urls(url, base):
    assert server.base_url(url) == base


# ---- in the configuration, and beside other placements


def served(tiny, tmp_path, fake, **sections):
    anti = {"path": str(tiny.anti), "placement": "server", "server": sections.pop("server", {"urls": [fake.url]})}
    teachers = {"expert": {"path": str(tiny.expert)}, "anti": {**anti, **sections.pop("anti", {})}}
    return config_for(tiny, tmp_path, teachers=teachers, **sections)


def test_a_served_teacher_stands_beside_resident_models(tiny, tmp_path, fakes):
    fake = fakes()
    # The path only names the tokenizer: whatever is served there scores, even if the path is the student's.
    config = served(tiny, tmp_path, fake, anti={"path": str(tiny.student), "base": str(tiny.expert)})
    scorer = Scorer(config, check_models(config), WORLD)
    assert {role: scorer.models[key].choice.placement for role, key in scorer.roles.items()} == {
        "reference": "resident", "expert": "resident", "anti": "server", "anti.base": "resident",
    }  # fmt: skip
    assert f"anti: server (teacher at {fake.url})" in scorer.placements()
    fake.requests.clear()
    items = rollouts()
    scored = scorer.score(items, [{"expert": 1.5, "anti": -0.5}, {"expert": 1.5, "anti": 0.0}, {"anti": 1.0}])
    assert_right([scored[0].teacher_logprobs["anti"], scored[2].teacher_logprobs["anti"]], [items[0], items[2]])
    assert "anti" not in scored[1].teacher_logprobs
    sent = [ids for body in fake.asked() for ids in body["prompt"]]
    assert sorted(sent) == sorted([*r.prompt.token_ids, *r.token_ids] for r in (items[0], items[2]))
    expert = AutoModelForCausalLM.from_pretrained(tiny.expert).eval()
    torch.testing.assert_close(
        scored[2].teacher_ref_logprobs["anti"].double(), exact(expert, items[2]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"temperature": 0.7}}, r"rollout\.temperature=0\.7: a server's prompt logprobs .* teachers\.anti"),
        ({"eval": {"data": [{"path": "x.jsonl"}], "temperature": 0.6}}, r"eval\.temperature=0\.6"),
        ({"anti": {"placement": "resident"}}, r"teachers\.anti: placement: server and a section `server`"),
        ({"anti": {"server": None}}, r"teachers\.anti: placement: server and a section `server`"),
        ({"anti": {"dtype": "bfloat16"}}, r"teachers\.anti\.dtype=bfloat16: the server decides"),
        ({"server": {"urls": []}}, r"teachers\.anti\.server\.urls"),
        ({"server": {"urls": ["127.0.0.1:8000"]}}, r"'127.0.0.1:8000'; give base URLs"),
        ({"server": {"urls": ["http://me:pw@host/v1"]}}, r"holds a password; use teachers\.anti\.server\.api_key_env"),
        ({"server": {"urls": ["http://h/v1"], "dedline_s": 3}}, r"server\.dedline_s: unknown key.*deadline_s"),
        ({"server": {"urls": ["http://h/v1"], "deadline_s": 3600}}, r"server\.deadline_s: .* equal to 1500"),
        ({"scoring": {"placement": "server"}}, r"scoring\.placement"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_configuration(tiny, tmp_path, fakes, sections, message):
    fake = fakes()
    with pytest.raises(UserError, match=message) as caught:
        served(tiny, tmp_path, fake, **sections)
    assert "me:pw" not in str(caught.value)
    assert not fake.requests


def test_another_temperature_never_reaches_the_server(fakes):
    with pytest.raises(UserError, match=r"temperature 0\.7: .* at temperature 1 only"):
        client(fakes()).score(rollouts(), 0.7)


# ---- tcopd serve-teacher


def test_serve_teacher_becomes_vllm_with_these_flags(tiny, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(serve_teacher.os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(serve_teacher.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(serve_teacher.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    words = ["serve-teacher", str(tiny.expert), "--port", "8123", "--max-model-len", "129"]
    assert not main([*words, "--vllm=--max-num-seqs 4 --max-logprobs 2"])
    ((program, command, environment),) = calls
    assert command[:3] == [program, "-m", "vllm.entrypoints.openai.api_server"]
    options = command[3:]
    pairs = dict(pairwise(options))
    assert pairs["--model"] == str(tiny.expert) and pairs["--host"] == "127.0.0.1" and pairs["--port"] == "8123"
    assert pairs["--generation-config"] == "vllm" and pairs["--max-num-batched-tokens"] == "2048"
    assert pairs["--dtype"] == "float32" and pairs["--max-model-len"] == "129"
    assert options[-4:] == ["--max-num-seqs", "4", "--max-logprobs", "2"]
    assert environment["TORCHDYNAMO_DISABLE"] == "1" and environment["VLLM_LOGGING_LEVEL"] == "INFO"
    out = capsys.readouterr().out
    assert 'server: {urls: ["http://127.0.0.1:8123/v1"]}' in out and "only processes of this machine" in out

    monkeypatch.setenv("VLLM_API_KEY", "k3y")
    main([*words, "--host", "0.0.0.0"])
    out = capsys.readouterr().out
    assert "whoever reaches port 8123" in out and "api_key_env: VLLM_API_KEY" in out and "k3y" not in out
    assert "k3y" not in " ".join(calls[1][1])


def test_the_printed_line_is_valid_configuration(tiny, tmp_path):
    import yaml

    service = serve_teacher.Service(str(tiny.anti), "::1", 8000, "teacher", None, None, 2048, False, "")
    (teacher,) = yaml.safe_load(serve_teacher.config_line(service, keyed=True)).values()
    config = config_for(tiny, tmp_path, teachers={"expert": {"path": str(tiny.expert)}, "anti": teacher})
    assert config.teachers["anti"].server.urls == ["http://[::1]:8000/v1"]


def test_serve_teacher_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve_teacher.importlib.util, "find_spec", lambda name: object())
    assert main(["serve-teacher", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
