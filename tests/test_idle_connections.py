"""A server may close a connection that was idle: that is not an engine that died."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from test_requests import Client, Route, Server, prompts_of

from tcopd_fast.rollout.requests import IDLE_S


class OncePerConnection(Route):
    """Answers a connection's first request and keeps it open, but closes it on the second without an answer."""

    protocol_version = "HTTP/1.1"
    answered = 0

    def do_POST(self) -> None:
        body = self.body()
        if self.answered:
            self.close_connection = True
            return
        self.answered += 1
        self.answer({body["token_ids"][0]: -1.0}, [0])


@pytest.fixture
def client():
    server = Server(("127.0.0.1", 0), OncePerConnection)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = Client(SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}"))
    yield client
    client._dispatcher.close()
    server.shutdown()


def answered(client: Client, step: int) -> None:
    ticket = client.submit(prompts_of(step), samples=1, max_new_tokens=4, temperature=1.0, seed=0)
    assert len(client.collect(ticket)) == 8 and not client._dispatcher.down


def test_idle_connections_are_not_used_again(client):
    answered(client, 0)
    time.sleep(IDLE_S + 0.5)
    answered(client, 1)


def test_an_engine_whose_connection_breaks_is_down_with_the_reason(client, monkeypatch):
    """What the idle connections would look like if they were used."""
    answered(client, 0)
    found: list[str] = []
    monkeypatch.setattr(client, "_recover", lambda: found.extend(client._dispatcher.down.values()) or stop())
    with pytest.raises(RuntimeError, match="replaced"):
        answered(client, 1)
    assert "disconnected" in found[0] or "Error" in found[0]


def stop() -> None:
    raise RuntimeError("replaced")
