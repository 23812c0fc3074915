"""Generation requests to vLLM servers: many at once, spread over the engines, moved on when one fails."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import torch
from torch import Tensor

from tcopd_fast.rollout.meter import Meter
from tcopd_fast.types import Prompt

CONNECTIONS = 512
"""Requests of one rank under way at once; more wait here."""
IDLE_S = 1.0
"""A connection is not used again after so long: vLLM closes it after 5 s, and a request sent at that moment would look
like one to an engine that died."""
PATH = "/inference/v1/generate"


@dataclass(frozen=True)
class Request:
    """One response to be sampled. order: (batch, place in it). body: what vLLM's token-in-token-out route takes."""

    order: tuple[int, int]
    prompt: Prompt
    sample: int
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """One sampled response. logprobs: float32 [L]. version: the oldest weights that any of its tokens came from."""

    request: Request
    token_ids: tuple[int, ...]
    logprobs: Tensor
    finish_reason: str
    version: int


@dataclass(frozen=True)
class Lost:
    """A request that found no engine up."""

    request: Request


@dataclass
class Ticket:
    """Requests under way, of one batch or several, and what came back of them; for one consumer.

    arrivals: filled by the dispatcher's thread. lost: requests to be sent again. dropped: answers that were too old.
    """

    arrivals: queue.SimpleQueue[Answer | Lost | Exception] = field(default_factory=queue.SimpleQueue)
    lost: list[Request] = field(default_factory=list)
    dropped: int = 0
    _under_way: set[tuple[int, int]] = field(default_factory=set)
    _answers: dict[tuple[int, int], Answer] = field(default_factory=dict)

    def sent(self, requests: Sequence[Request]) -> None:
        """Count these as under way."""
        self._under_way |= {request.order for request in requests}

    def under_way(self, batch: int) -> int:
        """Requests of this and earlier batches that have no answer and are not lost, as far as it was looked."""
        return sum(order[0] <= batch for order in self._under_way)

    def ready(self, batch: int) -> list[Answer]:
        """Answers to requests of this and earlier batches that have come and were not handed out, in order.

        Raises what the dispatcher met.
        """
        while not self.arrivals.empty():
            self.wait()
        return [self._answers.pop(order) for order in sorted(self._answers) if order[0] <= batch]

    def wait(self) -> None:
        """Until something more has come of any batch. Raises what the dispatcher met."""
        arrival = self.arrivals.get()
        if isinstance(arrival, Exception):
            raise arrival
        self._under_way.discard(arrival.request.order)
        if isinstance(arrival, Lost):
            self.lost.append(arrival.request)
        else:
            self._answers[arrival.request.order] = arrival


class Dispatcher:
    """Sends requests from a thread of its own, so that the caller can do other things meanwhile.

    meter: which engine had this rank's requests when.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.meter = Meter()
        self.urls: list[str] = []
        self.down: dict[int, str] = {}
        """Engine number -> what its last request met."""
        self._load: list[int] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout requests", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession | None = None

    def use(self, urls: Sequence[str]) -> None:
        """Send to these engines from here on; all of them count as up."""
        # Requests under way keep their place in the count.
        self.urls, self.down, self._load = list(urls), {}, self._load or [0] * len(urls)
        self.meter.expect(len(urls))

    def submit(self, ticket: Ticket, requests: Sequence[Request]) -> None:
        """Start sending; returns at once."""
        ticket.sent(requests)
        asyncio.run_coroutine_threadsafe(self._serve(ticket, requests), self._loop)

    def close(self) -> None:
        """Drop whatever is under way."""
        if self._session is not None:
            asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, ticket: Ticket, requests: Sequence[Request]) -> None:
        if self._session is None:
            # Not httpx: its Python takes several times the time of aiohttp's C per request, from the learner's thread.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS, keepalive_timeout=IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=self.timeout_s),
            )
        room = asyncio.Semaphore(CONNECTIONS)

        async def one(request: Request) -> None:
            async with room:
                answer = await self._answer(request)
            ticket.arrivals.put(Lost(request) if answer is None else answer)

        try:
            await asyncio.gather(*(one(request) for request in requests))
        except Exception as error:
            ticket.arrivals.put(error)

    async def _answer(self, request: Request) -> Answer | None:
        """From the least loaded engine that is up; None when none is."""
        assert self._session is not None
        while True:
            up = [n for n in range(len(self.urls)) if n not in self.down]
            if not up:
                return None
            engine = min(up, key=lambda n: self._load[n])
            self._load[engine] += 1
            try:
                with self.meter.request(engine):
                    async with self._session.post(self.urls[engine] + PATH, json=request.body) as response:
                        status, content = response.status, await response.read()
                    if status == 200:
                        answer = parse(request, json.loads(content))
                        self.meter.returned(engine, len(answer.token_ids))
                        return answer
                text = content.decode(errors="replace")
                if status < 500:
                    raise RuntimeError(f"rollout engine {engine} refuses a request: {text[:500]}")
                self.down[engine] = f"HTTP {status}: {text[:200]}"
            except (aiohttp.ClientError, asyncio.TimeoutError, ForeignWeights) as error:
                self.down[engine] = repr(error)
            finally:
                self._load[engine] -= 1


class ForeignWeights(RuntimeError):
    """An engine sampled with weights that this trainer has not sent: it has been started again since."""


def parse(request: Request, body: Mapping[str, Any]) -> Answer:
    """vLLM's answer.

    Raises RuntimeError when tokens and logprobs do not belong together, ForeignWeights for weights without a number.
    """
    choice = body["choices"][0]
    token_ids = tuple(choice["token_ids"])
    content = choice["logprobs"]["content"]
    reason = choice["finish_reason"]
    if reason not in ("stop", "length") or tuple(item["token_id"] for item in content) != token_ids:
        raise RuntimeError(
            f"a rollout engine ended a response as {reason!r}, {len(token_ids)} tokens, {len(content)} logprobs"
        )
    versions = [span["version"] for span in choice["weight_versions"]]
    if not versions or not all(version.isdecimal() for version in versions):
        raise ForeignWeights(f"a rollout engine sampled with weights {versions}, which are not the learner's")
    return Answer(
        request, token_ids, torch.tensor([item["logprob"] for item in content], dtype=torch.float32), reason,
        min(map(int, versions)),
    )  # fmt: skip
