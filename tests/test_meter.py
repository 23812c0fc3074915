"""When engines in processes of their own were busy, as the dispatcher of their requests saw it."""

from __future__ import annotations

import contextlib
import threading
import time

from test_requests import Route, Server

from tcopd_fast.dist import free_port
from tcopd_fast.rollout.meter import Meter
from tcopd_fast.rollout.requests import Dispatcher, Request, Ticket
from tcopd_fast.timeline import Span, epoch_seconds
from tcopd_fast.types import Prompt


def test_meter_unites_requests_and_cuts_where_a_step_ends():
    meter = Meter()
    meter.expect(2)
    with meter.request(0):
        with meter.request(0):
            time.sleep(0.02)
            meter.returned(0, 5)
        time.sleep(0.01)
        middle = epoch_seconds()
        time.sleep(0.01)
        first = meter.drain(middle)
        meter.returned(0, 7)
    second = meter.drain(epoch_seconds())
    (one,), (two,) = first["engine 0"], second["engine 0"]
    assert first["engine 1"] == second["engine 1"] == []
    assert one.end == two.start == middle and (one.tokens, two.tokens) == (5, 7)
    assert one.end - one.start > 0.03 and two.end - two.start >= 0.01
    assert meter.drain(epoch_seconds()) == {"engine 0": [], "engine 1": []}


def test_meter_counts_no_time_while_weights_are_exchanged():
    meter = Meter()
    with meter.request(0):
        time.sleep(0.01)
        with meter.held():
            start = epoch_seconds()
            with meter.request(0):
                time.sleep(0.02)
                meter.returned(0, 3)
            end = epoch_seconds()
        time.sleep(0.01)
    first, second = meter.drain(epoch_seconds())["engine 0"]
    assert first.end <= start and second.start >= end and (first.tokens, second.tokens) == (3, 0)


def test_tokens_that_come_after_their_span_was_handed_out_go_with_the_next():
    meter = Meter()
    with meter.request(0):
        time.sleep(0.005)
        with meter.held():
            (first,) = meter.drain(epoch_seconds())["engine 0"]
            meter.returned(0, 3)
        time.sleep(0.005)
    (second,) = meter.drain(epoch_seconds())["engine 0"]
    assert (first.tokens, second.tokens) == (0, 3)


def test_a_request_that_begins_during_an_exchange_counts_from_its_end():
    meter = Meter()
    with contextlib.ExitStack() as request:
        with meter.held():
            request.enter_context(meter.request(0))
            held = epoch_seconds()
        after = epoch_seconds()
        time.sleep(0.01)
    (only,) = meter.drain(epoch_seconds())["engine 0"]
    assert held <= only.start <= after and only.end - after >= 0.01
    with meter.held(), meter.request(0):
        time.sleep(0.01)
    assert meter.drain(epoch_seconds()) == {"engine 0": []}


def test_meter_under_many_threads_loses_no_token():
    meter = Meter()
    taken: list[Span] = []

    def ask(engine: int) -> None:
        for _ in range(200):
            with meter.request(engine % 3):
                meter.returned(engine % 3, 1)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken += [span for own in meter.drain(epoch_seconds()).values() for span in own]
    taken += [span for own in meter.drain(epoch_seconds()).values() for span in own]
    assert sum(span.tokens for span in taken) == 1200


def test_dispatcher_reports_when_which_engine_had_requests():
    """Two engines of 30 ms a response and one that refuses connections, four requests."""

    class Slow(Route):
        def do_POST(self) -> None:
            self.body()
            time.sleep(0.03)
            self.answer({7: -1.0, 8: -1.0}, [3])

    servers = [Server(("127.0.0.1", 0), Slow) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    dispatcher = Dispatcher(timeout_s=5.0)
    urls = [f"http://127.0.0.1:{server.server_port}" for server in servers]
    dispatcher.use([*urls, f"http://127.0.0.1:{free_port()}"])
    ticket = Ticket()
    prompt = Prompt("p", "math", (1,), "", None, "test")
    start = epoch_seconds()
    dispatcher.submit(ticket, [Request((0, i), prompt, i, {}) for i in range(4)])
    while ticket.under_way(0):
        ticket.wait()
    seen = dispatcher.meter.drain(epoch_seconds())
    dispatcher.close()
    for server in servers:
        server.shutdown()
    assert list(seen) == ["engine 0", "engine 1", "engine 2"]
    assert sum(span.tokens for own in seen.values() for span in own) == 8
    for name in ("engine 0", "engine 1"):
        (own,) = seen[name]
        assert own.tokens in (2, 4, 6) and start <= own.start and own.end - own.start >= 0.03
    assert sum(span.tokens for span in seen["engine 2"]) == 0
