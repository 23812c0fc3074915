"""Placement `server` against a small HTTP server that misbehaves on demand."""

from __future__ import annotations

import math
import socket
import threading
import time
from dataclasses import replace

import fake_teacher
import pytest
from fake_teacher import LONGEST, assert_right, client, served, serving
from test_models import rollouts
from tiny import CHARACTERS

from tcopd_fast.config_io import dump_config
from tcopd_fast.errors import UserError
from tcopd_fast.scoring import server


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


fakes = pytest.fixture(serving)


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
    monkeypatch.setattr(fake_teacher, "logprob", lambda previous, token: -0.1 if token < 24 else -12.0)
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
