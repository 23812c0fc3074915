"""Batches ahead and partial batches, against an engine that answers when it is told to."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.dist import World
from tcopd_fast.rollout.ahead import Ahead
from tcopd_fast.rollout.requests import Dispatcher
from tcopd_fast.rollout.vllm_server import ServerEngine
from tcopd_fast.types import Prompt, Rollout


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that closes while its answer is held back is part of the tests."""


class Route(BaseHTTPRequestHandler):
    """vLLM's generation route; `do_POST` says what is answered when."""

    def body(self) -> dict:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, logprobs: dict[int, float], versions: list[int]) -> None:
        """logprobs: of every token, in order. versions: of the weights they came from."""
        choice = {
            "token_ids": list(logprobs), "finish_reason": "stop",
            "logprobs": {"content": [{"token_id": t, "logprob": p} for t, p in logprobs.items()]},
            "weight_versions": [{"version": str(version)} for version in versions],
        }  # fmt: skip
        answer = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


class FakeEngine:
    """Answers vLLM's generation route at once, but holds back prompts whose first token is in `held`."""

    def __init__(self) -> None:
        self.version = 0
        self.held: set[int] = set()
        self.bodies: list[dict] = []
        self.changed = threading.Condition()
        engine = self

        class Handler(Route):
            def do_POST(self) -> None:
                body = self.body()
                with engine.changed:
                    engine.bodies.append(body)
                    began = engine.version
                    engine.changed.notify_all()
                    engine.changed.wait_for(lambda: body["token_ids"][0] not in engine.held, 30)
                self.answer({body["token_ids"][0]: -1.0, 9: -2.0}, [began, engine.version])

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def release(self) -> None:
        with self.changed:
            self.held.clear()
            self.changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.bodies) >= count, 10)


@pytest.fixture
def fake():
    engine = FakeEngine()
    yield engine
    engine.release()
    engine.server.shutdown()


class Client(ServerEngine):
    """A ServerEngine whose engine is already there and takes no weights."""

    def __init__(self, fake: FakeEngine) -> None:
        self._tokenizer = SimpleNamespace(eos_token_id=9, decode=lambda ids, skip_special_tokens: str(ids))
        self._world, self._fleet = World(0, 1, torch.device("cpu")), SimpleNamespace(max_model_len=64)
        self._dispatcher = Dispatcher(timeout_s=30.0)
        self._dispatcher.use([fake.url])


@pytest.fixture
def client(fake):
    client = Client(fake)
    yield client
    client._dispatcher.close()


def prompts_of(step: int) -> list[Prompt]:
    """Eight prompts; the first token of number i of step s is 10·s + i."""
    return [Prompt(f"{step}/{i}", "d", (10 * step + i, 1), "", None, "test") for i in range(8)]


def ahead(client: Client, **settings) -> Ahead:
    config = RolloutConfig(engine="vllm", max_new_tokens=4, **settings)
    return Ahead(client, config, prompts_of, seed_of=lambda step: step, steps=4)


def numbers(rollouts: list[Rollout]) -> list[int]:
    return [r.token_ids[0] for r in rollouts]


def nothing(_: Rollout) -> None:
    pass


def test_a_batch_ahead_is_asked_for_before_this_one_is_waited_for(fake, client):
    batches = ahead(client, staleness=1)
    fake.held = {7}
    threading.Timer(0.3, fake.release).start()
    assert numbers(batches.take(0, nothing)) == list(range(8))
    fake.wait_for(16)
    fake.version = 1
    rollouts = batches.take(1, nothing)
    assert numbers(rollouts) == [10 + i for i in range(8)] and {r.version for r in rollouts} == {0}
    assert batches.metrics(1) == {"rollout/dropped_stale": 0.0, "rollout/carried_on": 0.0}


def test_the_slowest_of_a_partial_batch_join_the_next_with_their_logprobs(fake, client):
    batches = ahead(client, staleness=1, partial_share=0.25)
    fake.held = {2, 5}
    seen: list[Rollout] = []
    assert numbers(batches.take(0, seen.append)) == [0, 1, 3, 4, 6, 7]
    assert len(seen) == 6 and batches.metrics(0)["rollout/carried_on"] == 2
    fake.wait_for(8)
    assert len(fake.bodies) == 8, "with a partial batch one step of the bound is kept for the slowest"
    fake.version = 1
    fake.release()
    end = time.monotonic() + 10
    while batches._ticket.arrivals.qsize() < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    rollouts = batches.take(1, nothing)
    assert set(numbers(rollouts[:2])) == {2, 5}, "older batches come first"
    assert [r.version for r in rollouts[:2]] == [0, 0]
    assert torch.equal(rollouts[0].logprobs, torch.tensor([-1.0, -2.0]))
    assert rollouts[0].prompt.id == "0/2"


def test_what_got_too_old_is_dropped_and_counted(fake, client):
    batches = ahead(client, staleness=1, partial_share=0.25)
    fake.held = {2, 5}
    assert len(batches.take(0, nothing)) == 6
    fake.version = 1
    assert len(batches.take(1, nothing)) == 8
    assert batches.metrics(1) == {"rollout/dropped_stale": 0.0, "rollout/carried_on": 2.0}
    fake.version = 2
    seen: list[Rollout] = []
    # They are not more than the share that need not be waited for, but the last step waits for everything.
    assert len(batches.take(2, seen.append)) == 8
    fake.version = 3
    fake.release()
    rollouts = batches.take(3, seen.append)
    assert numbers(rollouts) == [30 + i for i in range(8)]
    assert batches.metrics(3) == {"rollout/dropped_stale": 2.0, "rollout/carried_on": 0.0}
    assert len(seen) == 16


def test_no_more_than_the_share_is_ever_left(fake, client):
    """Two are left of step 0; step 1 then waits for its own slow ones."""
    batches = ahead(client, staleness=3, partial_share=0.25)
    fake.held = {2, 5, 13, 15}
    assert len(batches.take(0, nothing)) == 6
    threading.Timer(0.3, fake.release).start()
    assert len(batches.take(1, nothing)) >= 8


def test_a_prompts_own_limit_reaches_the_engine(fake, client):
    short = Prompt("s", "d", (1, 1), "", None, "test", max_new_tokens=2)
    long = Prompt("l", "d", (2, 1), "", None, "test")
    client.generate([short, long], samples=1, max_new_tokens=4, temperature=1.0, seed=0)
    limits = {body["token_ids"][0]: body["sampling_params"]["max_tokens"] for body in fake.bodies}
    assert limits == {1: 2, 2: 4}


def test_an_error_in_the_callback_ends_the_wait(fake, client):
    fake.held = {3}
    batches = ahead(client, staleness=1)

    def stop(rollout: Rollout) -> None:
        raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        batches.take(0, stop)
